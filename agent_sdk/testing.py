"""A model without a model: scripts, so that agents can be tested without a provider.

    llm = ScriptedLLM([call("terminal", command="pytest -q"), say("Fixed.")])

A script is data: it works in remote conversations, too. Step n is the n-th answer in a conversation;
a failure or hang stands before the answer that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent_sdk.protocol import specs
from agent_sdk.protocol.checks import checked
from agent_sdk.protocol.specs import Call, Calls, Fail, Hang, Say, Step

__all__ = [
    "Call",
    "Calls",
    "Fail",
    "Hang",
    "Say",
    "ScriptedLLM",
    "Step",
    "call",
    "calls",
    "fail",
    "hang",
    "say",
]


@checked
def ScriptedLLM(
    steps: Sequence[Step] = (), *, repeat: bool = False, model: str = "scripted"
) -> specs.ScriptedLLM:
    """Return a model that gives these steps one after the other; with `repeat` the last one for ever."""
    return specs.ScriptedLLM(steps=tuple(steps), repeat=repeat, model=model)


def say(text: str) -> Say:
    """Return an answer without a tool call; it ends the turn."""
    return Say(text)


def call(tool: str, /, *, saying: str = "", **arguments: Any) -> Call:
    """Return an answer that calls a tool with these arguments; `saying` is the text beside it."""
    return Call(tool, arguments, saying)


def calls(*several: Call, saying: str = "") -> Calls:
    """Return one answer with several tool calls."""
    return Calls(several, saying)


def fail(error: str = "model_unavailable", message: str = "scripted failure") -> Fail:
    """Return a failure of the model; `error` is the kind of a ModelError."""
    return Fail(error, message)


def hang(seconds: float = 3600.0, *, saying: str = "") -> Hang:
    """Return a pause before the next answer; `saying` is streamed first, as the beginning of an answer."""
    return Hang(seconds, saying)
