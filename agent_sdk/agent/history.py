"""What the model is shown of a conversation: turns, grown event by event, never made anew.

A history that is rebuilt from the log is the one that grew: an AgentMessage says how far the model
had read, so a message that came while it wrote stands after its answer, here and after a restart.
"""

from __future__ import annotations

from agent_sdk.agent.clip import MODEL_CHARS, clip_chars
from agent_sdk.agent.ending import ending_of, nudge
from agent_sdk.models import AssistantTurn, ToolTurn, ToolUse, Turn, UserTurn
from agent_sdk.protocol.events import AgentMessage, Event, ToolCalled, ToolReturned, UserMessage

_ID_CHARACTERS = 128


class History:
    """Feed it every event in the order of the log."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.head_seq = 0
        self.unread: list[UserMessage] = []
        """The user's messages that the model has not been shown."""
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
                text = clip_chars(event.text, MODEL_CHARS, event.bytes_cut)
                self.turns.append(ToolTurn(call_id=event.call_id, text=text, is_error=event.is_error))

    def _take(self, answer: AgentMessage) -> None:
        ending = ending_of(answer)
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
        messages = [message for message in self.unread if seq is None or message.seq <= seq]
        self.turns += self._news(messages)
        if messages:
            del self.unread[: len(messages)]
            self._last = None
        return self.head_seq

    def _news(self, messages: list[UserMessage]) -> list[Turn]:
        if messages:
            return [UserTurn(message.text) for message in messages]
        words = nudge(self._last) if self._last is not None else None
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
