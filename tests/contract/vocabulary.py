"""The words in which promises of conversations are written."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from agent_sdk.conversation import Conversation
from agent_sdk.definition import Agent
from agent_sdk.protocol.events import (
    Event,
    ToolReturned,
    TurnEnded,
)
from agent_sdk.protocol.specs import ScriptedLLM, Step
from agent_sdk.tools import FunctionTool, tool

Open = Callable[..., Awaitable[Conversation]]

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


async def no_longer_runs(pid: int) -> None:
    """Returns when the process has ended."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        loop.add_reader(handle, over.set)
        async with asyncio.timeout(PATIENCE):
            await over.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
