"""The end that is missing in a log when the process that ran a turn ended in the middle of it."""

from __future__ import annotations

from agent_sdk.agent.history import History
from agent_sdk.agent.toolbox import UNKNOWN
from agent_sdk.conversation.fold import Fold
from agent_sdk.protocol.events import Event, RequestResolved, ToolReturned, TurnEnded

REASON = "the process that ran it ended"


def missing_end(fold: Fold, history: History) -> list[Event]:
    """Return what closes an abandoned turn: void requests, results of open calls, TurnEnded."""
    if not fold.turn_open:
        return []
    return [
        *(RequestResolved(request_id=id, answer="void", reason=REASON) for id in fold.pending),
        *(
            ToolReturned(
                call_id=call.call_id, tool=call.tool, text=UNKNOWN.text, is_error=True, data=UNKNOWN.data
            )
            for call in history.open_calls.values()
        ),
        TurnEnded(run_id=fold.run_id or "", status="interrupted", reason=REASON),
    ]
