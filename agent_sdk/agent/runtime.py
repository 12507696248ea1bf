"""An agent at work: its model, its tools, its secrets, and the place where its tools act."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

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


class Secrets:
    """The secrets of a conversation: environment variables for its agent's commands, and what hides them."""

    def __init__(self, expected: Mapping[str, str] | None = None) -> None:
        """Have none yet; those that are `expected` are hidden already."""
        self.values: Mapping[str, str] = {}
        self.mask = Mask((expected or {}).values())
        """Hides the secrets, former ones too, and what else nobody may read in a log: keys and headers of models."""
        self._of_model: list[str] = []

    def add(self, secrets: Mapping[str, str]) -> None:
        """Set secrets from the next tool call on.

        Raises:
            InvalidParams: a name cannot be an environment variable, a value has a NUL in it, or they are too many or
                too long.
        """
        self.values = self.checked(secrets)
        self._hide()

    def checked(self, secrets: Mapping[str, str]) -> Mapping[str, str]:
        """Return the secrets there are with these, which are acceptable.

        Raises:
            InvalidParams: as `add` does.
        """
        together = {**self.values, **secrets}
        check_secrets(together)
        return together

    def use(self, llm: Model) -> None:
        """Hide the key and the headers of this model, too."""
        self._of_model = hidden_in(llm)
        self._hide()

    def _hide(self) -> None:
        self.mask.hide(
            [*self._of_model, *self.values.values()]
        )  # all: the mask forgets what it was told long ago


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
        secrets: Secrets | None = None,
        place: Place | None = None,
        run_client_tool: RunClientTool | None = None,
    ) -> None:
        if max_iterations < 1:
            raise InvalidParams("max_iterations: it must be at least 1")
        self.spec = spec
        self.workspace = workspace
        self.max_iterations = max_iterations
        self.confirmation = confirmation
        self.functions = functions
        """The client tools that run in this process."""
        self.secrets = secrets or Secrets()
        self.place = place or Place()
        self.run_client_tool = run_client_tool
        """How the other client tools are run."""
        self.chain = chain_of(middleware, instructions=spec.instructions)
        built_in = [*(make_tool(name, conversation) for name in spec.tools), *self.chain.tools()]
        # A client tool that is a function of this process runs here.
        elsewhere = [tool for tool in spec.client_tools if tool.name not in functions]
        self.toolbox = Toolbox([*built_in, *functions.values()], elsewhere)
        self.client: ModelClient = open_model(spec.llm)
        self._former: list[ModelClient] = []
        self._info: WorkspaceInfo | None = None
        self.secrets.use(spec.llm)

    def __repr__(self) -> str:
        return f"<AgentRuntime {self.spec.llm.model} with {len(self.toolbox.specs)} tools>"

    async def describe(self) -> WorkspaceInfo:
        """Return what an agent is told of where it is; the workspace is asked once."""
        if self._info is None:
            self._info = await self.place.describe(self.workspace)
        return self._info

    def switch(self, llm: Model) -> None:
        """Use another model from the next call on; the former client serves the call under way."""
        client = open_model(llm)
        self._former.append(self.client)
        self.spec, self.client = replace(self.spec, llm=llm), client
        self.secrets.use(llm)

    def context(self, call_key: str, begun_in: str | None = None) -> ToolContext:
        """Return what tools may use in a call.

        Args:
            call_key: what tells it from all others.
            begun_in: the place in which another process may have begun it.
        """
        place = self.workspace if begun_in is None else self.place.again(begun_in)
        return ToolContext(
            workspace=place or self.workspace,
            secrets=self.secrets.values,
            call_key=call_key,
            same_place=place is not None,
            part=self.secrets.mask.part,
            leaving=is_left,
        )

    def configured(self) -> AgentConfigured:
        """Return the event that describes this agent."""
        return AgentConfigured(
            model=self.spec.llm.model,
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
