"""An agent at work: everything of one conversation's agent that is open, changes or must be kept secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from agent_sdk.agent.llm.client import open_model
from agent_sdk.agent.mask import Mask, check_secrets, hidden_in
from agent_sdk.agent.middleware.chain import chain_of
from agent_sdk.agent.toolbox import Toolbox, make_tool
from agent_sdk.agent.turn_state import is_left
from agent_sdk.middleware import Middleware
from agent_sdk.models import ModelClient
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.events import AgentConfigured, RequestOpened
from agent_sdk.protocol.results import Wait, WorkspaceInfo
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, Model
from agent_sdk.tools import FunctionTool, ToolContext, ToolResult
from agent_sdk.workspace.contract import Workspace

RunClientTool = Callable[[RequestOpened], Awaitable[ToolResult]]


class AgentRuntime:
    """Made from an AgentSpec for one conversation; close it.

    Raises:
        InvalidParams: a tool or the model does not exist, or max_iterations is not positive.
    """

    def __init__(
        self,
        spec: AgentSpec,
        workspace: Workspace,
        *,
        conversation: str,
        functions: Mapping[str, FunctionTool[..., Any]],
        middleware: Sequence[Middleware] = (),
        max_iterations: int,
        confirmation: ConfirmationPolicy,
        mask: Mask | None = None,
    ) -> None:
        if max_iterations < 1:
            raise InvalidParams("max_iterations: it must be at least 1")
        self.spec = spec
        self.workspace = workspace
        self.max_iterations = max_iterations
        self.confirmation = confirmation
        self.run_client_tool: RunClientTool | None = None
        self.place = Place()
        self.chain = chain_of(middleware, instructions=spec.instructions)
        built_in = [*(make_tool(name, conversation) for name in spec.tools), *self.chain.tools()]
        # A client tool that is a function of this process runs here.
        elsewhere = [tool for tool in spec.client_tools if tool.name not in functions]
        self.toolbox = Toolbox([*built_in, *functions.values()], elsewhere)
        self.llm: Model = spec.llm
        self.client: ModelClient = open_model(spec.llm)
        self._former: list[ModelClient] = []
        self._secrets: dict[str, str] = {}
        self.mask = mask or Mask()
        """What hides them."""
        self._info: WorkspaceInfo | None = None
        self._remember()

    def __repr__(self) -> str:
        return f"<AgentRuntime {self.llm.model} with {len(self.toolbox.specs)} tools>"

    async def describe(self) -> WorkspaceInfo:
        """Return what an agent is told of where it is; the workspace is asked once."""
        if self._info is None:
            self._info = await self.place.describe(self.workspace)
        return self._info

    def switch(self, llm: Model) -> None:
        """Use another model from the next call on; the former client serves the call under way."""
        client = open_model(llm)
        self._former.append(self.client)
        self.llm, self.client = llm, client
        self._remember()

    def add_secrets(self, secrets: Mapping[str, str]) -> None:
        """Set secrets from the next tool call on.

        Raises:
            InvalidParams: a name or a value cannot be one of an environment variable, or they are too many or too long.
        """
        check_secrets({**self._secrets, **secrets})
        self._secrets = {**self._secrets, **secrets}
        self._remember()

    def context(self, call_key: str, begun_in: str | None = None) -> ToolContext:
        """Return what tools may use in a call.

        Args:
            call_key: what tells it from all others.
            begun_in: the place in which another process may have begun it.
        """
        place = self.workspace if begun_in is None else self.place.again(begun_in)
        return ToolContext(
            workspace=place or self.workspace,
            secrets=self._secrets,
            call_key=call_key,
            same_place=place is not None,
            ends=self.mask.ends,
            leaving=is_left,
        )

    def configured(self) -> AgentConfigured:
        """Return the event that describes this agent."""
        return AgentConfigured(
            model=self.llm.model,
            tools=self.spec.tools,
            client_tools=self.spec.client_tools,
            instructions=self.spec.instructions,
            max_iterations=self.max_iterations,
            confirmation=self.confirmation,
        )

    async def close(self) -> None:
        """Let go of the connections to models; the next turn makes new ones."""
        for client in (*self._former, self.client):
            await client.close()
        self._former.clear()

    def _remember(self) -> None:
        self.mask.hide([*hidden_in(self.llm), *self._secrets.values()])


class Place:
    """Where an agent's tools act: a workspace that is lost one day and replaced by another.

    This one ends with the process that uses it, or does not know what others have begun in it.
    """

    @property
    def instance(self) -> str:
        """The name of the box in which calls begin from now on, until it is lost; written down with every call."""
        return ""

    @property
    def waits(self) -> tuple[Wait, ...]:
        """What tools that act there wait for now."""
        return ()

    async def describe(self, workspace: Workspace) -> WorkspaceInfo:
        """Return what an agent is told of where it is; nothing is started for that."""
        return await workspace.describe()

    def untouched(self, instance: str) -> bool:
        """Whether it is certain that nothing has begun that was written down with this name."""
        return False

    def again(self, instance: str) -> Workspace | None:
        """Return the workspace as it was then, which knows what has begun in it; None: that one is gone.

        Lost later, its calls raise OutcomeUnknown instead of beginning in the next one.
        """
        return None

    async def ready(self) -> None:
        """Return when something new may begin there; what has begun goes on meanwhile."""
