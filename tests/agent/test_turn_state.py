"""What the log says of turns, and what who runs one may do next: both by a table, of which all is tried."""

import pytest

from agent_sdk.agent.turn_state import Course, Phase, Stage, TurnState
from agent_sdk.protocol.errors import InternalError, RequestNotFound
from agent_sdk.protocol.events import (
    AgentMessage,
    Interrupted,
    PauseRequested,
    RequestOpened,
    RequestResolved,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    UserMessage,
)

ENDED = "idle paused limited failed interrupted stopped"
MAY_BECOME = {
    Phase.IDLE: f"running stopping {ENDED}",
    Phase.PAUSED: f"running stopping {ENDED}",
    Phase.LIMITED: f"running stopping {ENDED}",
    Phase.FAILED: f"running stopping {ENDED}",
    Phase.INTERRUPTED: f"running stopping {ENDED}",
    Phase.STOPPED: f"running stopping {ENDED}",
    Phase.RUNNING: "pausing stopping idle paused limited failed interrupted",
    Phase.PAUSING: "pausing stopping idle paused limited failed interrupted",
    Phase.STOPPING: "stopping idle paused limited failed stopped",
    Stage.WORKING: "leaving stopping ending",
    Stage.LEAVING: "stopping ending",
    Stage.STOPPING: "ending",
    Stage.ENDING: "",
}

STARTED, PAUSE, STOP = TurnStarted(run_id="r"), PauseRequested(), Interrupted(reason="enough")


def ended(status: str) -> TurnEnded:
    return TurnEnded(run_id="r", status=status)


def known(*events) -> TurnState:
    state = TurnState()
    for event in events:
        state.add(event)
    return state


@pytest.mark.parametrize("before", [*Phase, *Stage], ids=lambda state: state.value)
def test_a_state_follows_another_as_the_table_says_and_no_other_way(before):
    reached = set()
    for after in type(before):
        try:
            assert before.then(after) is after
            reached.add(after.value)
        except InternalError as exc:
            assert f"{before.value} cannot become {after.value}" in str(exc)
    assert reached == set(MAY_BECOME[before].split())


@pytest.mark.parametrize(
    ("events", "phase", "is_open", "resumable"),
    [
        ([], Phase.IDLE, False, False),
        ([STARTED], Phase.RUNNING, True, False),
        ([PAUSE], Phase.IDLE, False, False),
        ([STARTED, PAUSE], Phase.PAUSING, True, False),
        ([STARTED, PAUSE, PAUSE], Phase.PAUSING, True, False),
        ([STARTED, PAUSE, TurnResumed(run_id="r", generation=2)], Phase.PAUSING, True, False),
        ([STARTED, STOP], Phase.STOPPING, True, False),
        ([STARTED, ended("finished")], Phase.IDLE, False, False),
        ([STARTED, PAUSE, ended("finished")], Phase.IDLE, False, False),
        ([STARTED, PAUSE, ended("paused")], Phase.PAUSED, False, True),
        ([STARTED, ended("limit")], Phase.LIMITED, False, True),
        ([STARTED, ended("failed")], Phase.FAILED, False, True),
        ([ended("failed")], Phase.FAILED, False, True),
        ([STARTED, ended("interrupted")], Phase.INTERRUPTED, False, True),
        ([STARTED, STOP, ended("interrupted")], Phase.STOPPED, False, False),
        ([STARTED, STOP, ended("interrupted"), UserMessage(text="x")], Phase.IDLE, False, False),
        ([STARTED, ended("failed"), UserMessage(text="x")], Phase.FAILED, False, True),
        ([STARTED, STOP, ended("interrupted"), STARTED], Phase.RUNNING, True, False),
    ],
)
def test_the_log_says_whether_a_turn_is_open_and_whether_it_may_go_on(events, phase, is_open, resumable):
    state = known(*events)
    assert (state.phase, state.is_open, state.resumable) == (phase, is_open, resumable)


def test_no_turn_begins_while_another_one_is_open():
    with pytest.raises(InternalError, match="running cannot become running"):
        known(STARTED, TurnStarted(run_id="s"))


def calls(call_id: str) -> ToolCalled:
    return ToolCalled(run_id="r", call_id=call_id, tool="t", arguments="{}")


def asks(request_id: str, call_id: str) -> RequestOpened:
    return RequestOpened(request_id=request_id, call_id=call_id, request="approval", tool="t", arguments="{}")


def test_calls_are_open_until_their_result_is_there_and_requests_until_their_answer():
    state = known(
        STARTED, AgentMessage(run_id="r", text="", seen_seq=1, tool_calls=2), calls("1"), calls("2")
    )
    state.add(asks("q", "1"))
    assert (list(state.open_calls), [request.request_id for request in state.pending]) == (["1", "2"], ["q"])
    state.add(RequestResolved(request_id="q", answer="approved"))
    state.add(ToolReturned(call_id="1", tool="t", text="ok"))
    assert (list(state.open_calls), state.pending, state.iterations) == (["2"], [], 1)
    assert state.answered("q", "approve")
    with pytest.raises(RequestNotFound, match="approved already"):
        state.answered("q", "reject")


def test_what_closes_a_turn_that_nobody_runs_leaves_nothing_open():
    state = known(
        STARTED, AgentMessage(run_id="r", text="", seen_seq=1, tool_calls=1), calls("1"), asks("q", "1")
    )
    for event in state.missing_end():
        state.add(event)
    assert (state.phase, state.open_calls, state.pending) == (Phase.INTERRUPTED, {}, [])
    assert (state.answers["q"].answer, state.missing_end()) == ("void", [])


def test_an_end_is_decided_once():
    course = Course()
    assert (course.end(), course.end(), course.ending) == (True, False, True)
    with pytest.raises(InternalError):
        course.stage = Stage.STOPPING
