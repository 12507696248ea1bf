"""What the model is shown of a conversation: turns, grown event by event, never made anew.

A history that is rebuilt from the log is the one that grew: an AgentMessage says how far the model
had read, so a message that came while it wrote stands after its answer, here and after a restart.

What follows from an answer is one table of its finish reason and content:

| the answer | is | the turn |
| --- | --- | --- |
| calls tools | `calls` | runs them; those that a limit cut are not run, and the model is told |
| refused, or filtered by the provider | `withheld` | fails with `model_refused` |
| has no text (it may have thought) | `empty` | asks once more, then fails with `model_answer_broken` |
| was cut because the context window is full | `full` | ends as `limit`: a longer request is refused |
| has text that the output limit cut | `cut` | has it continued three times, then ends as `limit` |
| was broken off, with the turn | `interrupted` | has ended; when it goes on, the model is told |
| has text, whatever else its end is called | `done` | ends as `finished` |

An answer whose finish reason is an error has failed before it gets here (see ResponseParser.completion).
"""

from __future__ import annotations

from typing import Literal

from agent_sdk.agent.mask import is_cut, shortened
from agent_sdk.models import AssistantTurn, ToolTurn, ToolUse, Turn, UserTurn
from agent_sdk.protocol.errors import ModelAnswerBroken, ModelError, ModelRefused
from agent_sdk.protocol.events import AgentMessage, Event, ToolCalled, ToolReturned, UserMessage

MODEL_CHARS = 30_000
"""Characters of a tool result that the model sees."""
_ID_CHARACTERS = 128

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


class History:
    """Feed it every event in the order of the log."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.head_seq = 0
        self.unread: list[UserMessage] = []
        """The user's messages that the model has not been shown."""
        self.was_cut = False
        """Whether what the model said last came to no end of its own: its next words may go on there, whoever asks."""
        self._answer: AgentMessage | None = None
        self._last: AgentMessage | None = None
        """The last answer, if it called no tool and nobody has said anything since."""
        self._said: list[str] = []
        """Its text, and before it that of the answers which it continues."""
        self._uses: list[ToolUse] = []
        self._call_ids: set[str] = set()

    def __repr__(self) -> str:
        return f"<History {len(self.turns)} turns, {len(self.unread)} unread>"

    @property
    def answered(self) -> str | None:
        """The model's last answer when it came to its end, called no tool and nobody has said anything since."""
        done = self._last is not None and not self.unread and ending_of(self._last) == "done"
        return self.said if done else None

    @property
    def continues(self) -> bool:
        """Whether the next answer goes on where a limit has cut the last one."""
        return self._last is not None and ending_of(self._last) in ("cut", "full")

    @property
    def said(self) -> str:
        """What the model said last, as one text where the output limit had cut it and it was continued."""
        return "".join(self._said)

    def add(self, event: Event) -> None:
        """Take in the next event of the log."""
        self.head_seq = event.seq
        match event:
            case UserMessage():
                self.unread.append(event)
            case AgentMessage():
                self._close_answer()
                self.read(event.seen_seq)
                self._take(event)
            case ToolCalled():
                self._call_ids.add(event.call_id)
                self._uses.append(ToolUse(call_id=event.call_id, tool=event.tool, arguments=event.arguments))
                if self._answer is not None and len(self._uses) == self._answer.tool_calls:
                    self._close_answer()
            case ToolReturned():
                text = cut_middle(event.text, MODEL_CHARS, event.bytes_cut)
                self.turns.append(ToolTurn(call_id=event.call_id, text=text, is_error=event.is_error))

    def _take(self, answer: AgentMessage) -> None:
        ending = ending_of(answer)
        if answer.text:
            self.was_cut = is_cut(answer)
        if ending == "calls":
            self._answer, self._last, self._said = answer, None, []
            return
        if not self.continues:
            self._said = []
        self._said.append(answer.text)
        self._last = answer
        # A model that sees its refusal refuses again; and none takes an answer without a word.
        if ending != "withheld" and (ending != "interrupted" or answer.text.strip()):
            self._answer = answer
            self._close_answer()

    def coming(self) -> list[Turn]:
        """Return what the model would be shown if it were asked now, all messages up to `head_seq` among it."""
        return [*self.turns, *self._news(self.unread)]

    def read(self, seq: int | None = None) -> int:
        """Show the model the messages up to `seq` (None: all), from the next request on; return the head's seq.

        Without any, a model that has answered is told why it is asked again.
        """
        if not self.unread and self._last is None:
            return self.head_seq
        messages = [message for message in self.unread if seq is None or message.seq <= seq]
        self.turns += self._news(messages)
        if messages:
            del self.unread[: len(messages)]
            self._last = None
        return self.head_seq

    def _news(self, messages: list[UserMessage]) -> list[Turn]:
        if messages:
            return [UserTurn(message.text) for message in messages]
        words = _NUDGES.get(ending_of(self._last)) if self._last is not None else None
        return [UserTurn(words)] if words and not isinstance(self.turns[-1], UserTurn) else []

    def fresh_call_id(self, wanted: str) -> str:
        """Return `wanted`, or something like it when it is empty, long or was used: ids tell results apart."""
        wanted = wanted.strip() or "call"
        if len(wanted) > _ID_CHARACTERS:
            wanted = "call"
        found = wanted
        while found in self._call_ids:
            found = f"{wanted}_{len(self._call_ids)}"
            wanted += "_"
        self._call_ids.add(found)
        return found

    def _close_answer(self) -> None:
        if self._answer is None:
            return
        self.turns.append(
            AssistantTurn(
                text=self._answer.text, tool_calls=tuple(self._uses), provider=self._answer.provider
            )
        )
        self._answer, self._uses = None, []


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


def cut_middle(text: str, limit: int, cut: int = 0) -> str:
    """Return the text, or `limit` characters of it and a line that says how many bytes are left out.

    Args:
        text: what is perhaps too long.
        limit: in characters.
        cut: bytes that are left out of `text` already, in its middle.
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = cut + len(text[half : len(text) - half].encode(errors="replace"))
    return f"{text[:half]}\n[... {left_out} bytes left out ...]\n{text[len(text) - half :]}"
