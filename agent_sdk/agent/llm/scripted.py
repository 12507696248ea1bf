"""A model without a model: it plays the steps of a ScriptedLLM. Knows no network and hardly any clock.

The number of assistant turns in the request says which answer is due, so a script goes on where it
was after a restart, wherever the conversation is opened again. Say, Call and Calls are answers; a
Fail or Hang stands before the answer that follows it and is met once by each client, so that a
failure can be followed by a success. At the end of the script the last Fail or Hang is met for ever.
"""

from __future__ import annotations

import asyncio
import re

import msgspec

from agent_sdk.models import (
    AssistantTurn,
    Completion,
    ModelRequest,
    OnDelta,
    ToolUse,
    Usage,
)
from agent_sdk.protocol.errors import InvalidParams, ModelError, table
from agent_sdk.protocol.specs import Call, Calls, Fail, Hang, Say, ScriptedLLM

THE_END = Say("The script is over.")

_FAILURES = {cls.kind: cls for cls in table() if issubclass(cls, ModelError)}
_PIECES = re.compile(r"\s*\S+\s*|\s+")
_CHARACTERS_PER_TOKEN = 4


class ScriptedClient:
    """Plays one script.

    Raises:
        InvalidParams: a Fail names no kind of ModelError.
    """

    def __init__(self, script: ScriptedLLM) -> None:
        self._repeat = script.repeat
        self._answers: list[Say | Call | Calls] = []
        self._before: list[list[Fail | Hang]] = [[]]
        for step in script.steps:
            if not isinstance(step, Fail | Hang):
                self._answers.append(step)
                self._before.append([])
                continue
            if isinstance(step, Fail) and step.error not in _FAILURES:
                known = ", ".join(sorted(_FAILURES))
                raise InvalidParams(f"a scripted failure is one of {known}; not {step.error[:64]!r}")
            self._before[-1].append(step)
        self._due = 0
        self._met = 0

    def __repr__(self) -> str:
        return f"<ScriptedClient [{self._due} of {len(self._answers)} answers given]>"

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        """Answer with the next step. A Hang waits; cancelling ends it, and it counts as met.

        Raises:
            ModelError: the kind that the Fail names.
        """
        due, characters = _history(request)
        if due != self._due:
            self._due, self._met = due, 0
        step = await self._step(due, on_delta)
        await asyncio.sleep(0)  # an answer of a real model can be cancelled, too
        answer = _answer(step, due, characters)
        if on_delta is not None:
            for piece in _PIECES.findall(answer.text):
                on_delta(piece, "")
        return answer

    async def close(self) -> None:
        """Nothing is held."""

    async def _step(self, due: int, on_delta: OnDelta | None) -> Say | Call | Calls:
        over = due >= len(self._answers)
        before = self._before[min(due, len(self._answers))]
        while self._met < len(before) or (over and before):
            obstacle = before[min(self._met, len(before) - 1)]
            self._met += 1
            if isinstance(obstacle, Fail):
                raise _FAILURES[obstacle.error](obstacle.message, provider="scripted")
            if on_delta is not None and obstacle.text:
                on_delta(obstacle.text, "")
            await asyncio.sleep(obstacle.seconds)
            if over:
                return THE_END
        if not over:
            return self._answers[due]
        return self._answers[-1] if self._repeat and self._answers else THE_END


def _history(request: ModelRequest) -> tuple[int, int]:
    """How many answers there were, and how much text."""
    answers, characters = 0, len(request.system)
    for turn in request.turns:
        characters += len(turn.text)
        if isinstance(turn, AssistantTurn):
            answers += 1
            for use in turn.tool_calls:
                characters += len(use.arguments)
    return answers, characters


def _answer(step: Say | Call | Calls, due: int, characters: int) -> Completion:
    calls = () if isinstance(step, Say) else step.calls if isinstance(step, Calls) else (step,)
    uses = tuple(
        ToolUse(
            call_id=f"call_{due}_{at}", tool=call.tool, arguments=msgspec.json.encode(call.arguments).decode()
        )
        for at, call in enumerate(calls)
    )
    said = len(step.text) + sum(len(use.arguments) for use in uses)
    return Completion(
        text=step.text,
        tool_calls=uses,
        usage=Usage(
            input_tokens=-(-characters // _CHARACTERS_PER_TOKEN),
            output_tokens=-(-said // _CHARACTERS_PER_TOKEN),
        ),
        finish_reason="tool_calls" if uses else "stop",
    )
