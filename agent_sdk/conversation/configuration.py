"""Which agent a conversation has, and how it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from agent_sdk.agent.middleware.chain import made_of
from agent_sdk.agent.runtime import AgentRuntime, Place, RunClientTool, Secrets
from agent_sdk.conversation.log import ConversationLog, ConversationState
from agent_sdk.conversation.store import AgentStore
from agent_sdk.definition import Agent, ConversationOptions
from agent_sdk.log.event_log import EventLog
from agent_sdk.middleware import Middleware
from agent_sdk.protocol.errors import AgentServerError, InternalError, InvalidParams, StateConflict
from agent_sdk.protocol.events import Event, SecretsChanged
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy
from agent_sdk.tools import FunctionTool
from agent_sdk.workspace.contract import Workspace


@dataclass(frozen=True, eq=False, repr=False)
class LocalOptions(ConversationOptions):
    """What is said of a conversation whose agent is in this process."""

    agent: Agent | AgentSpec | None  # type: ignore[assignment]
    _: KW_ONLY
    log: EventLog | None = None
    run_client_tool: RunClientTool | None = None
    place: Place | None = None
    store: AgentStore | None = None


class AgentConfig:
    """The agent of an open conversation, once there is one, and what every agent of it works with. Close it."""

    def __init__(
        self, conversation: str, workspace: Workspace, options: LocalOptions, secrets: Secrets
    ) -> None:
        self.secrets = secrets
        self.place = options.place or Place()
        self.runtime: AgentRuntime | None = None
        """The agent at work, from the next turn on."""
        self.arrived = asyncio.Event()
        """Set when there is one."""
        self.missing = ""
        """What this process does not know of the stored agent, a sentence; a turn then waits for `arrived`."""
        self.obstacle: AgentServerError | None = None
        """Why the stored agent cannot work any more; a turn then fails with it."""
        self._conversation = conversation
        self._workspace = workspace
        self._options = options
        self._former: list[AgentRuntime] = []

    @property
    def ready(self) -> bool:
        """Whether a turn may start, even if it has to wait for its agent."""
        return self.runtime is not None or bool(self.missing) or self.obstacle is not None

    def made(
        self, agent: Agent | AgentSpec, *, max_iterations: int, confirmation: ConfirmationPolicy
    ) -> AgentRuntime:
        """Return this agent, about to work here; `begin` with it.

        Raises:
            InvalidParams: a tool, the model or a limit is not acceptable.
        """
        spec, functions, middleware = _parts(agent)
        return AgentRuntime(
            spec,
            self._workspace,
            conversation=self._conversation,
            functions=functions,
            middleware=middleware,
            max_iterations=max_iterations,
            confirmation=confirmation,
            secrets=self.secrets,
            place=self.place,
            run_client_tool=self._options.run_client_tool,
        )

    def first(self) -> AgentRuntime | None:
        """Return the agent of the options, about to work here, if they have one.

        Raises:
            InvalidParams: a secret, a tool, the model or a limit is not acceptable.
        """
        options = self._options
        self.secrets.add(options.secrets or {})
        if options.agent is None:
            return None
        policy = options.confirmation or ConfirmationPolicy()
        return self.made(options.agent, max_iterations=options.max_iterations, confirmation=policy)

    def restored(self, store: AgentStore, stored: tuple[bytes, bytes | None]) -> AgentRuntime | None:
        """Return the stored agent, about to work here; None: it cannot, and `missing` or `obstacle` says why."""
        try:
            restored = store.unpack(self._conversation, *stored)
            self.missing = restored.missing
            if self.missing:
                return None
            self.secrets.add(restored.secrets)
            return self.made(
                restored.agent, max_iterations=restored.max_iterations, confirmation=restored.confirmation
            )
        except msgspec.ValidationError as exc:
            self.obstacle = InternalError(f"the agent that was stored cannot be read by this version: {exc}")
        except InvalidParams as exc:
            self.obstacle = exc
        return None

    async def begin(self, runtime: AgentRuntime, log: ConversationLog) -> None:
        """Have this agent answer from the next turn on; its tools and middleware go on where the log left them."""
        runtime.toolbox.recall(log.state.results)
        if runtime.chain.reduces:
            await log.reduce(runtime.chain.add)
        log.delivery.observers = runtime.chain.observers
        if self.runtime is not None:
            self._former.append(self.runtime)
        self.runtime, self.missing, self.obstacle = runtime, "", None
        self.arrived.set()

    async def use(
        self,
        agent: Agent | AgentSpec,
        log: ConversationLog,
        *,
        max_iterations: int,
        confirmation: ConfirmationPolicy,
    ) -> None:
        """Have this agent answer from the next turn on; one that differs in nothing but its model keeps its tools.

        Raises:
            InvalidParams: a tool, the model or a limit is not acceptable.
        """
        spec, functions, _ = _parts(agent)
        runtime = self.runtime
        if runtime is None or (replace(runtime.spec, llm=spec.llm), runtime.functions) != (spec, functions):
            made = self.made(agent, max_iterations=max_iterations, confirmation=confirmation)
            await self.begin(made, log)
            return
        if runtime.spec.llm != spec.llm:
            runtime.switch(spec.llm)
        runtime.max_iterations, runtime.confirmation = max_iterations, confirmation

    def packed(self, store: AgentStore) -> tuple[bytes, bytes | None] | None:
        """Return what is to be stored of the agent as it is now; None: there is none."""
        runtime = self.runtime
        if runtime is None:
            return None
        return store.pack(
            self._conversation,
            runtime.spec,
            max_iterations=runtime.max_iterations,
            confirmation=runtime.confirmation,
            secrets=self.secrets.values,
        )

    def news(self, state: ConversationState) -> list[Event]:
        """Return the events that say of the agent what the log does not say yet."""
        events: list[Event] = []
        if self.runtime is not None:
            configured = self.runtime.configured()
            if state.configured is None or replace(state.configured, seq=0, at=0.0) != configured:
                events.append(configured)
        if not state.secret_names.issuperset(self.secrets.values):
            events.append(SecretsChanged(names=tuple(sorted(self.secrets.values))))
        return events

    def present(self) -> AgentRuntime:
        """Return the agent at work.

        Raises:
            StateConflict: there is none.
        """
        if self.runtime is None:
            raise StateConflict("no agent is configured yet", state="idle")
        return self.runtime

    async def close(self) -> None:
        """Let go of the connections to models."""
        for runtime in (*self._former, *([self.runtime] if self.runtime else [])):
            await runtime.close()


def _parts(
    agent: Agent | AgentSpec,
) -> tuple[AgentSpec, Mapping[str, FunctionTool[..., Any]], Sequence[Middleware]]:
    if isinstance(agent, AgentSpec):
        return agent, {}, [made_of(spec) for spec in agent.middleware]
    return agent.spec(), agent.functions(), agent.middleware
