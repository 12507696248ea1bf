"""What the loop itself costs: an instant model calls a tool that does nothing."""

from __future__ import annotations

import tempfile
import time

from agent_sdk import Agent, Conversation
from agent_sdk.testing import ScriptedLLM, call
from bench.measure import Row


async def measure() -> list[Row]:
    """Per step over 1, 100 and 2 000 steps: the log in memory, and on disk with fsync."""
    with tempfile.TemporaryDirectory() as folder:
        await _run(10, folder, folder)  # imports and first connections
    rows = []
    for on_disk in (False, True):
        for steps in (1, 100, 2000):
            with tempfile.TemporaryDirectory() as folder:
                each = await _run(steps, folder, folder if on_disk else None)
            where = "on disk" if on_disk else "in memory"
            rows.append(
                Row(
                    name=f"agent step, {steps} steps, log {where}",
                    value=each,
                    unit="ms",
                    target="<= 3",
                    met=each <= 3,
                )
            )
    return rows


async def _run(steps: int, folder: str, log: str | None) -> float:
    agent = Agent(llm=ScriptedLLM([call("think", thought="nothing")], repeat=True), tools=["think"])
    conversation = Conversation(agent, folder, persistence_dir=log, max_iterations=steps)
    async with conversation:
        await conversation.state()  # opened: what is measured is steps, not the making of a database
        began = time.perf_counter()
        await conversation.send_message("go")
        outcome = await conversation.run()
        took = time.perf_counter() - began
    assert outcome.status == "limit", outcome
    return took / steps * 1000
