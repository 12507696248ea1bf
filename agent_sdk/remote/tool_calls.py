"""Tools that run here and are called from there: each call runs once, over however many connections it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from agent_sdk.protocol.errors import Cancelled
from agent_sdk.protocol.methods.conversation import ToolCall, ToolOutput
from agent_sdk.rpc.peer import Inbound
from agent_sdk.tools import FunctionTool


class ToolCalls:
    """The calls of one conversation that its server knows no answer of yet."""

    def __init__(self, functions: Mapping[str, FunctionTool[..., Any]]) -> None:
        self._functions = functions
        self._runs: dict[str, asyncio.Task[ToolOutput]] = {}
        self._closed = False

    @property
    def names(self) -> list[str]:
        """The tools there are here."""
        return list(self._functions)

    async def answer(self, params: ToolCall, call: Inbound) -> ToolOutput:
        """Run a tool, or attach to its run: one whose connection was lost goes on, and its call comes again.

        Raises:
            Cancelled: the conversation was closed here: somebody else who has the tool is to run it.
        """
        if self._closed:
            raise Cancelled("the conversation was closed here")
        run = self._runs.get(params.request_id)
        if run is None:
            run = self._runs[params.request_id] = asyncio.create_task(self._run(params))
        try:
            await asyncio.wait({run})
        except asyncio.CancelledError:
            if not call.abandoned:
                await self._cancel(params.request_id)
            raise
        return run.result()

    def settled(self, request_id: str) -> None:
        """The server has an answer, or needs none any more."""
        run = self._runs.pop(request_id, None)
        if run is not None:
            run.cancel()

    async def close(self) -> None:
        """Cancel what runs, and run nothing more."""
        self._closed = True
        for request_id in list(self._runs):
            await self._cancel(request_id)

    async def _cancel(self, request_id: str) -> None:
        run = self._runs.pop(request_id, None)
        if run is not None and run is not asyncio.current_task():
            run.cancel()
            await asyncio.wait({run})

    async def _run(self, params: ToolCall) -> ToolOutput:
        function = self._functions.get(params.tool)
        if function is None:
            return ToolOutput(text=f"this client has no tool {params.tool!r}", is_error=True)
        result = await function.run(params.arguments)
        return ToolOutput(text=result.text, is_error=result.is_error, data=result.data)
