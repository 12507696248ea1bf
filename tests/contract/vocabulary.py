"""The words in which promises of conversations are written."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from agent_sdk.conversation.contract import Conversation, Outcome, Wait
from agent_sdk.definition import Agent
from agent_sdk.protocol.events import (
    Event,
    ToolReturned,
    TurnEnded,
)
from agent_sdk.protocol.specs import ConfirmationPolicy, ScriptedLLM, Step
from agent_sdk.tools import FunctionTool, tool
from agent_sdk.workspace.contract import Workspace

Open = Callable[..., Awaitable[Conversation]]
Places = dict[Conversation, Workspace]

PATIENCE = 30
"""Seconds until a test that hangs fails."""


def acting(*steps: Step, tools: list[str | FunctionTool] | None = None, repeat: bool = False) -> Agent:
    """An agent whose model says just this."""
    llm = ScriptedLLM(steps=steps, repeat=repeat)
    return Agent(llm=llm) if tools is None else Agent(llm=llm, tools=tools)


class Gate:
    """A client tool that lets a test stand in the middle of a turn."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

        @tool
        async def gate() -> str:
            """Wait."""
            self.entered.set()
            await self.release.wait()
            return "through"

        self.tool = gate

    async def reached(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.entered.wait()


ASKS = ConfirmationPolicy(mode="always")


async def approved(conversation: Conversation) -> Outcome:
    """Run a turn that ASKS before its calls: it cannot end before `run` has arrived, which would begin it anew."""

    async def approve(wait: Wait) -> None:
        if wait.what == "approval":  # and not a box that takes long to start
            await conversation.respond(wait.request_id, "approve")

    return await conversation.run(timeout=PATIENCE, on_waiting=approve)


async def until(conversation: Conversation, kind: type, count: int = 1) -> Any:
    """The count-th event of this kind, now or when it comes."""
    async with asyncio.timeout(PATIENCE):
        async for event in conversation.events(follow=True):
            count -= isinstance(event, kind)
            if count == 0:
                return event
    raise AssertionError(f"the conversation was closed before a {kind.__name__}")


async def past(conversation: Conversation) -> list[Event]:
    return [event async for event in conversation.events()]


async def these(conversation: Conversation, kind: type) -> list[Any]:
    return [event for event in await past(conversation) if isinstance(event, kind)]


async def ended(conversation: Conversation) -> TurnEnded:
    return (await these(conversation, TurnEnded))[-1]


async def last_result(conversation: Conversation) -> ToolReturned:
    return (await these(conversation, ToolReturned))[-1]


async def no_longer_runs(workspace: Workspace, pid_file: str = "pid") -> None:
    """Returns when the process has ended whose number is in this file."""
    await workspace.execute(
        f"while grep -q '^State:.[^ZX]' /proc/$(cat {pid_file})/status; do sleep 0.01; done"
    )
