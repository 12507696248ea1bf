"""How an answer of the model ended, and what follows from it: one table of finish reason and content.

| the answer | is | the turn |
| --- | --- | --- |
| calls tools | `calls` | runs them; those that a limit cut are not run, and the model is told |
| refused, or filtered by the provider | `withheld` | fails with `model_refused` |
| has no text (it may have thought) | `empty` | asks once more, then fails with `model_answer_broken` |
| was cut because the context window is full | `full` | ends as `limit`: a longer request is refused |
| has text that the output limit cut | `cut` | has it continued three times, then ends as `limit` |
| was broken off, with the turn | `interrupted` | has ended; when it goes on, the model is told |
| has text, whatever else its end is called | `done` | ends as `finished` |

An answer whose finish reason is an error has failed before it gets here (see Answer.completion).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agent_sdk.agent.clip import shortened
from agent_sdk.protocol.errors import ModelAnswerBroken, ModelError, ModelRefused
from agent_sdk.protocol.events import AgentMessage

Ending = Literal["calls", "done", "cut", "full", "empty", "withheld", "interrupted"]

INTERRUPTED = "interrupted"
"""The finish reason of an answer that was broken off: what had come of it."""

CONTINUED = 3
"""How many answers in a row may be cut and continued."""

ASKED_AGAIN = 1
"""How many answers in a row may be empty and asked for again."""

CUT_CALL = (
    "Not run: the output limit cut your answer in the middle of this call's arguments. "
    "Make the call again with shorter arguments, in several steps if need be."
)

FULL = (
    "the conversation has filled the model's context window, which cut the answer; start a new conversation, "
    "or run again with a model that has a larger context window (max_output_tokens does not help)"
)

_NUDGES: dict[Ending, str] = {
    "cut": "[The output limit cut your answer. Go on exactly where it stopped, without repeating anything.]",
    "full": "[The context window was full, which cut your answer. Go on exactly where it stopped.]",
    "interrupted": "[Your answer was interrupted before it was complete. Go on with the task.]",
    "empty": "[Your answer had no text and called no tool. Go on with the task, or say that it is done and how.]",
}

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def ending_of(message: AgentMessage) -> Ending:
    """Return what the answer is, by the table of this module."""
    if message.finish_reason == INTERRUPTED:
        return "interrupted"
    if message.finish_reason in ("refused", "filtered"):
        return "withheld"
    if message.tool_calls:
        return "calls"
    if message.finish_reason == "context_window":
        return "full"
    if not message.text.strip():
        return "empty"
    return "cut" if message.finish_reason == "length" else "done"


def nudge(message: AgentMessage) -> str | None:
    """Return what the model is told when it is asked again after this answer, and nobody has said anything."""
    return _NUDGES.get(ending_of(message))


def is_whole(arguments: str) -> bool:
    """Whether the arguments of a call are an object of JSON that came to its end."""
    try:
        _object.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return True


def failure(message: AgentMessage) -> ModelError:
    """Return why a turn fails whose answer was withheld, or empty again."""
    reason = message.finish_reason
    if ending_of(message) == "withheld":
        who = (
            "the model refused to answer"
            if reason == "refused"
            else "the provider's filter withheld the answer"
        )
        said = shortened(" ".join(message.text.split()), 500)
        return ModelRefused(f"{who}{f': {said}' if said else ''}", finish_reason=reason)
    why = (
        "; its output limit may be too low for its reasoning: raise max_output_tokens"
        if reason == "length"
        else ""
    )
    return ModelAnswerBroken(
        f"the model answered {1 + ASKED_AGAIN} times without text and without a tool call "
        f"(finish reason {reason!r}){why}",
        finish_reason=reason,
    )
