"""Which agent a conversation has, and how it changes. Keeps the secrets, which no log may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from agent_sdk.agent.mask import Mask, check_secrets
from agent_sdk.agent.middleware.chain import made_of
from agent_sdk.agent.runtime import AgentRuntime, Place, RunClientTool
from agent_sdk.conversation.log import ConversationLog
from agent_sdk.conversation.state import ConversationState
from agent_sdk.conversation.store import AgentStore
from agent_sdk.definition import Agent
from agent_sdk.middleware import Middleware
from agent_sdk.protocol.errors import AgentServerError, InternalError, InvalidParams, StateConflict
from agent_sdk.protocol.events import (
    AgentConfigured,
    ConversationCreated,
    Event,
    SecretsChanged,
)
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, Model
from agent_sdk.tools import FunctionTool
from agent_sdk.workspace.contract import Workspace


class AgentConfig:
    """The agent's description before the conversation is open, and its AgentRuntime afterwards."""

    def __init__(
        self,
        agent: Agent | AgentSpec | None,
        *,
        conversation: str,
        max_iterations: int,
        confirmation: ConfirmationPolicy,
        secrets: Mapping[str, str],
        run_client_tool: RunClientTool | None,
        title: str | None,
        tags: Mapping[str, str],
    ) -> None:
        self.runtime: AgentRuntime | None = None
        self.mask = Mask(secrets.values())
        """Hides what nobody may read in a log: keys, headers and secrets, former ones too."""
        self.missing = ""
        """What of the stored agent this process does not know, a sentence."""
        self.obstacle: AgentServerError | None = None
        """Why the stored agent cannot work any more."""
        self._agent = agent
        self.conversation = conversation
        """Its id."""
        self._max_iterations = max_iterations
        self._confirmation = confirmation
        self._secrets = dict(secrets)
        self._title = title
        self._tags = dict(tags)
        self._run_client_tool = run_client_tool
        self._workspace: Workspace | None = None
        self.place = Place()
        self._functions: Mapping[str, FunctionTool[..., Any]] = {}
        self._former: list[AgentRuntime] = []
        self._recalled: AgentRuntime | None = None

    @property
    def run_client_tool(self) -> RunClientTool | None:
        """How tools of a client are run."""
        return self._run_client_tool

    @run_client_tool.setter
    def run_client_tool(self, runner: RunClientTool | None) -> None:
        self._run_client_tool = runner
        if self.runtime is not None:
            self.runtime.run_client_tool = runner

    def open(self, workspace: Workspace) -> None:
        """Make the AgentRuntime, when an agent is known.

        Raises:
            InvalidParams: a tool, the model, a limit or a secret's name is not acceptable.
        """
        self._workspace = workspace
        if self._agent is not None:
            self.runtime = self._made(self._agent, self._max_iterations, self._confirmation)

    def restore(self, store: AgentStore, stored: tuple[bytes, bytes | None]) -> None:
        """Make the AgentRuntime of the stored agent; if that is not possible, `missing` or `obstacle` says why."""
        try:
            restored = store.unpack(self.conversation, *stored)
            self.missing = restored.missing
            if not self.missing:
                self._secrets.update(restored.secrets)
                self.runtime = self._made(restored.agent, restored.max_iterations, restored.confirmation)
        except msgspec.ValidationError as exc:
            self.obstacle = InternalError(f"the agent that was stored cannot be read by this version: {exc}")
        except InvalidParams as exc:
            self.obstacle = exc

    def packed(self, store: AgentStore) -> tuple[bytes, bytes | None] | None:
        """Return what is to be stored of the agent as it is now; None: there is none."""
        runtime = self.runtime
        if runtime is None:
            return None
        return store.pack(
            self.conversation,
            replace(runtime.spec, llm=runtime.llm),
            max_iterations=runtime.max_iterations,
            confirmation=runtime.confirmation,
            secrets=self._secrets,
        )

    def replace(
        self, agent: Agent | AgentSpec, *, max_iterations: int, confirmation: ConfirmationPolicy
    ) -> None:
        """Use this agent from now on; one that differs in nothing but its model keeps its tools."""
        spec, functions, _ = _parts(agent)
        runtime = self.runtime
        same = (
            runtime is not None
            and replace(runtime.spec, llm=spec.llm) == spec
            and functions == self._functions
        )
        if runtime is None or not same:
            made = self._made(agent, max_iterations, confirmation)
            if runtime is not None:
                self._former.append(runtime)
            self.runtime = made
            return
        if runtime.llm != spec.llm:
            runtime.switch(spec.llm)
        runtime.max_iterations, runtime.confirmation = max_iterations, confirmation

    async def recall(self, journal: ConversationLog) -> None:
        """Let the agent's tools and middleware go on where the log left them."""
        runtime = self.runtime
        if runtime is None:
            return
        runtime.toolbox.recall(journal.state.results)
        if runtime.chain.reduces and runtime is not self._recalled:
            await journal.reduce(runtime.chain.add)
        self._recalled = runtime
        journal.delivery.observers = runtime.chain.observers

    def introduction(self, state: ConversationState) -> list[Event]:
        """Return the events that say who and what this conversation is, as far as the log does not say it yet."""
        events: list[Event] = [] if state.created else [ConversationCreated(conversation=self.conversation)]
        events += self.news(state)
        return [*events, *state.retitled(self._title, self._tags)]

    def news(self, state: ConversationState) -> list[Event]:
        """Return the events that say of the agent what the log does not say yet."""
        events: list[Event] = []
        if self.runtime is not None:
            configured = self.runtime.configured()
            if state.configured is None or replace(state.configured, seq=0, at=0.0) != configured:
                events.append(configured)
        if not state.secret_names.issuperset(self._secrets):
            events.append(SecretsChanged(names=tuple(sorted(self._secrets))))
        return events

    def check_secrets(self, secrets: Mapping[str, str]) -> None:
        """Check that these can be added to the secrets there are.

        Raises:
            InvalidParams: a name cannot be an environment variable, or they are too many or too long.
        """
        check_secrets({**self._secrets, **secrets})

    def add_secrets(self, secrets: Mapping[str, str]) -> SecretsChanged:
        """Set secrets and return the event that names them.

        Raises:
            InvalidParams: a name cannot be an environment variable, or they are too many or too long.
        """
        self.check_secrets(secrets)
        if self.runtime is not None:
            self.runtime.add_secrets(secrets)
        self._secrets.update(secrets)
        self.mask.hide(self._secrets.values())
        return SecretsChanged(names=tuple(sorted(secrets)))

    def set_confirmation(self, policy: ConfirmationPolicy) -> AgentConfigured:
        """Change the policy and return the event that says so."""
        runtime = self._present()
        runtime.confirmation = policy
        return runtime.configured()

    def switch_llm(self, llm: Model) -> AgentConfigured:
        """Change the model and return the event that says so."""
        runtime = self._present()
        runtime.switch(llm)
        return runtime.configured()

    async def close(self) -> None:
        """Let go of the connections to models."""
        for runtime in (*self._former, *([self.runtime] if self.runtime else [])):
            await runtime.close()

    def _present(self) -> AgentRuntime:
        if self.runtime is None:
            raise StateConflict("no agent is configured yet", state="idle")
        return self.runtime

    def _made(
        self, agent: Agent | AgentSpec, max_iterations: int, confirmation: ConfirmationPolicy
    ) -> AgentRuntime:
        if self._workspace is None:
            raise StateConflict("the conversation is not open", state="closed")
        spec, self._functions, middleware = _parts(agent)
        runtime = AgentRuntime(
            spec,
            self._workspace,
            conversation=self.conversation,
            functions=self._functions,
            middleware=middleware,
            max_iterations=max_iterations,
            confirmation=confirmation,
            mask=self.mask,
        )
        runtime.add_secrets(self._secrets)
        runtime.run_client_tool = self._run_client_tool
        runtime.place = self.place
        return runtime


def _parts(
    agent: Agent | AgentSpec,
) -> tuple[AgentSpec, Mapping[str, FunctionTool[..., Any]], Sequence[Middleware]]:
    if isinstance(agent, AgentSpec):
        return agent, {}, [made_of(spec) for spec in agent.middleware]
    return agent.spec(), agent.functions(), agent.middleware
