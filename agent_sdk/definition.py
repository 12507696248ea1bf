"""Agent and LLM as users write them, and the options of a Conversation: frozen data.

`Agent.spec` turns an agent into the specs of the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from typing import Any, Literal, Self

import msgspec
from msgspec import Struct

from agent_sdk.conversation.contract import Callback, Cursor, OnDelta, OnReset, OnWaiting
from agent_sdk.middleware import Middleware
from agent_sdk.protocol import specs
from agent_sdk.protocol.checks import Iterations, Name, Options, OsText, Secrets, Seq, Tags, Title, flaw
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.methods.method import without_defaults
from agent_sdk.protocol.specs import (
    DEFAULT_TOOLS,
    AgentSpec,
    ConfirmationPolicy,
    MiddlewareSpec,
    Model,
)
from agent_sdk.tools import FunctionTool
from agent_sdk.workspace.contract import Workspace


class LLM(specs.LLM, frozen=True, kw_only=True, tag="llm"):
    """A model and how to reach it; the fields are those of the protocol's LLM."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read LLM_MODEL, LLM_API_KEY and LLM_BASE_URL.

        Raises:
            InvalidParams: LLM_MODEL is not set.
        """
        values = os.environ if environ is None else environ
        if not values.get("LLM_MODEL"):
            raise InvalidParams("LLM_MODEL is not set; it names the model, e.g. LLM_MODEL=openai/gpt-5.5")
        return cls(
            model=values["LLM_MODEL"],
            api_key=values.get("LLM_API_KEY") or None,
            base_url=values.get("LLM_BASE_URL") or None,
        )


class Agent(Struct, frozen=True, kw_only=True):
    """Which model, which tools, which instructions. No behaviour, no state."""

    llm: Model
    tools: tuple[str | FunctionTool[..., Any], ...] | list[str | FunctionTool[..., Any]] = DEFAULT_TOOLS
    """Names of built-in tools, and functions made with `@tool`, which run in this process wherever the agent runs."""
    instructions: str = ""
    """Added to the system prompt."""
    middleware: tuple[Middleware, ...] | list[Middleware] = ()
    """Features beside those of every agent. Where the agent runs on a server, that has to know their classes."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InvalidParams: one cannot be used; the sentence names it and the value.
        """
        for name, kind, wanted in (
            ("llm", specs.LLM | specs.ScriptedLLM, "LLM(…) or ScriptedLLM(…)"),
            ("tools", list | tuple, "a list of names and of functions made with @tool"),
            ("instructions", str, "text"),
            ("middleware", list | tuple, "a list of middleware"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise InvalidParams(f"{name}: expected {wanted}, got {value!r:.64}", field=name)
        if wrong := flaw(self.instructions):
            raise InvalidParams(f"instructions: {wrong}, got {self.instructions!r:.64}", field="instructions")
        seen: set[str] = set()
        entries: Sequence[object] = self.tools
        for entry in entries:
            if not isinstance(entry, str | FunctionTool):
                wanted = "expected names of tools and functions made with @tool"
                raise InvalidParams(f"tools: {wanted}, got {entry!r:.64}", field="tools")
            if isinstance(entry, str) and entry not in DEFAULT_TOOLS:
                known = (
                    f"the built-in ones are {', '.join(DEFAULT_TOOLS)}, others are functions made with @tool"
                )
                raise InvalidParams(f"tools: there is no tool {entry[:64]!r}; {known}", field="tools")
            name = entry if isinstance(entry, str) else entry.spec.name
            if name in seen:
                raise InvalidParams(f"tools: there are two tools called {name!r}; rename one", field="tools")
            seen.add(name)
        features: Sequence[object] = self.middleware
        for feature in features:
            if not isinstance(feature, Middleware):
                raise InvalidParams(
                    f"middleware: expected objects of classes of Middleware, got {feature!r:.64}",
                    field="middleware",
                )

    def spec(self) -> AgentSpec:
        """Return the agent as it crosses the wire."""
        return AgentSpec(
            llm=self.llm,
            tools=tuple(entry for entry in self.tools if isinstance(entry, str)),
            client_tools=tuple(entry.spec for entry in self.tools if isinstance(entry, FunctionTool)),
            instructions=self.instructions,
            middleware=tuple(map(_described, self.middleware)),
        )

    def functions(self) -> dict[str, FunctionTool[..., Any]]:
        """Return the tools that run in this process, by name."""
        return {entry.spec.name: entry for entry in self.tools if isinstance(entry, FunctionTool)}


def _described(feature: Middleware) -> MiddlewareSpec:
    options = msgspec.to_builtins(without_defaults(feature, everywhere=True))
    return MiddlewareSpec(kind=options.pop("kind"), options=options)


@dataclass(frozen=True, eq=False, repr=False)
class ConversationOptions(Options):
    """What is said of a conversation, wherever it runs."""

    agent: Agent | None
    workspace: Workspace | OsText | PathLike[str] = "."
    _: KW_ONLY
    id: Name | None = None
    since: Cursor | Seq | None = None
    callbacks: Sequence[Callback] = ()
    on_delta: OnDelta | None = None
    on_reset: OnReset | None = None
    on_waiting: OnWaiting | None = None
    persistence_dir: OsText | PathLike[str] | None = None
    max_iterations: Iterations = 500
    confirmation: ConfirmationPolicy | None = None
    secrets: Secrets | None = None
    title: Title | None = None
    tags: Tags | None = None
    agent_runs: Literal["here"] | None = None
