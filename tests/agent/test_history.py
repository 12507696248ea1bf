"""What the model is shown: the same turns whether they grew or were read back from a log."""

from msgspec.structs import replace

from agent_sdk.agent.history import History
from agent_sdk.models import AssistantTurn, ToolTurn, ToolUse, UserTurn
from agent_sdk.protocol.events import AgentMessage, Event, ToolCalled, ToolReturned, UserMessage


def grown(*events: Event) -> History:
    history = History()
    for seq, event in enumerate(events, 1):
        history.add(replace(event, seq=seq))
    return history


def asks(text: str = "go") -> UserMessage:
    return UserMessage(text=text)


def answers(text: str, *, seen: int, calls: int = 0) -> AgentMessage:
    return AgentMessage(run_id="r", text=text, seen_seq=seen, tool_calls=calls)


def calls(call_id: str) -> ToolCalled:
    return ToolCalled(run_id="r", call_id=call_id, tool="t", arguments="{}")


def returns(call_id: str, text: str = "ok", **more) -> ToolReturned:
    return ToolReturned(call_id=call_id, tool="t", text=text, **more)


def use(call_id: str) -> ToolUse:
    return ToolUse(call_id=call_id, tool="t", arguments="{}")


def test_a_message_is_shown_when_the_model_is_asked_next():
    history = grown(asks("a"), asks("b"))
    assert (history.turns, bool(history.unread)) == ([], True)
    assert history.read() == 2
    assert (history.turns, history.unread) == ([UserTurn("a"), UserTurn("b")], [])


def test_an_answer_has_all_its_calls_and_the_results_follow():
    history = grown(asks(), answers("x", seen=1, calls=2), calls("1"), calls("2"), returns("1"), returns("2"))
    assert history.turns == [
        UserTurn("go"),
        AssistantTurn(text="x", tool_calls=(use("1"), use("2"))),
        ToolTurn(call_id="1", text="ok"),
        ToolTurn(call_id="2", text="ok"),
    ]


def test_a_message_that_came_while_the_model_wrote_stands_after_its_answer():
    events = [asks("a"), asks("b"), answers("to a", seen=1), asks("c")]
    live = History()
    live.add(replace(events[0], seq=1))
    live.read()
    for seq, event in enumerate(events[1:], 2):
        live.add(replace(event, seq=seq))
    again = grown(*events)
    assert live.turns == again.turns == [UserTurn("a"), AssistantTurn(text="to a")]
    live.read()
    again.read()
    assert live.turns == again.turns
    assert live.turns[2:] == [UserTurn("b"), UserTurn("c")]


def test_the_last_answer_is_known_until_somebody_speaks():
    assert grown(asks(), answers("done", seen=1)).answered == "done"
    assert grown(asks(), answers("done", seen=1), asks()).answered is None
    assert grown(asks(), answers("x", seen=1, calls=1), calls("1")).answered is None
    assert grown().answered is None


def test_of_a_long_result_the_model_sees_head_and_tail():
    history = grown(returns("1", "a" * 20_000 + "b" * 20_000, bytes_cut=7))
    [turn] = history.turns
    assert len(turn.text) < 31_000
    assert "[... 10007 bytes left out ...]" in turn.text


def test_ids_of_calls_never_repeat():
    history = grown(answers("", seen=0, calls=1), calls("call"))
    ids = [history.fresh_call_id("call"), history.fresh_call_id("call"), history.fresh_call_id(" "), "call"]
    assert len(set(ids)) == 4
    assert history.fresh_call_id("mine") == "mine"


def broken_off(text: str, *, seen: int) -> AgentMessage:
    return AgentMessage(run_id="r", text=text, thinking="hm", seen_seq=seen, finish_reason="interrupted")


def test_the_model_sees_what_it_had_said_before_it_was_interrupted():
    history = grown(asks("a"), broken_off("Once", seen=1), asks("b"))
    history.read()
    assert history.turns == [UserTurn("a"), AssistantTurn(text="Once"), UserTurn("b")]


def test_a_model_that_goes_on_after_an_interruption_is_told_of_it():
    history = grown(asks("a"), broken_off("Once", seen=1))
    assert history.answered is None
    history.read()
    assert history.turns[:2] == [UserTurn("a"), AssistantTurn(text="Once")]
    assert "interrupted" in history.turns[2].text


def test_of_an_answer_that_was_interrupted_before_its_first_word_the_model_sees_nothing():
    history = grown(asks("a"), broken_off("", seen=1))
    history.read()
    assert history.turns == [UserTurn("a")]


def test_the_id_of_a_call_occurs_once_in_a_conversation_and_is_never_empty_or_long():
    history = grown(asks(), answers("", seen=1, calls=1), calls("call_1"))
    ids = [history.fresh_call_id(wanted) for wanted in ("call_1", "new", "new", "", " ", "x" * 1000)]
    assert ids[1] == "new"
    assert len({*ids, "call_1"}) == 7
    assert all(0 < len(call_id) <= 40 for call_id in ids)
