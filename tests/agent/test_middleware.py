"""What a middleware may do at the points of a turn, in which order, and what happens when it misbehaves."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_sdk import (
    Agent,
    Completion,
    ConfirmationPolicy,
    Conversation,
    Middleware,
    Section,
    Stop,
    ToolResult,
    tool,
)
from agent_sdk.agent.middleware.chain import chain_of
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.conversation.store import AgentStore
from agent_sdk.protocol.errors import InvalidParams, PolicyDenied
from agent_sdk.protocol.events import (
    AgentMessage,
    ErrorRaised,
    RequestOpened,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    UserMessage,
)
from agent_sdk.protocol.methods.method import without_defaults
from agent_sdk.protocol.specs import AgentSpec, MiddlewareSpec, ScriptedLLM
from agent_sdk.testing import call, say
from agent_sdk.tools import FunctionTool

POINTS = ("on_turn_start", "prompt", "before_model", "after_model", "around_tool", "on_turn_end")


@tool
async def echo(text: str) -> str:
    """Say it again."""
    return f"echo {text}"


SCRIPT = (call("echo", text="a"), say("done"))


async def play(*middleware, steps=SCRIPT, tools=(echo,), folder=".", then=None, **options):
    """Run one turn; return its outcome and the events."""
    agent = Agent(
        llm=ScriptedLLM(steps=steps), tools=list(tools), middleware=middleware, instructions="Be brief."
    )
    async with LocalConversation(agent, folder, **options) as conversation:
        await conversation.send_message("go")
        work = asyncio.create_task(conversation.run())
        if then is not None:
            await then(conversation)
        outcome = await work
        return outcome, [event async for event in conversation.events()]


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def noting(course, name):
    """A middleware that notes where it was called."""

    class Noting(Middleware, frozen=True):
        async def on_turn_start(self, turn):
            course.append(f"{name} on_turn_start")

        async def prompt(self, turn, sections):
            course.append(f"{name} prompt")
            return sections

        async def before_model(self, turn, request):
            course.append(f"{name} before_model")
            return request

        async def after_model(self, turn, answer):
            course.append(f"{name} after_model")
            return answer

        async def around_tool(self, turn, call, run):
            course.append(f"{name} around_tool")
            result = await run(call)
            course.append(f"{name} has its result")
            return result

        async def on_turn_end(self, turn, status):
            course.append(f"{name} on_turn_end {status}")

    return Noting()


def acting(point, act):
    """A middleware that does this at one point."""

    class Acting(Middleware, frozen=True):
        locals()[point] = lambda self, turn, *given: act(turn, *given)

    return Acting()


# --- the points and their order ---


async def test_the_points_of_a_turn_come_in_their_order():
    course = []
    await play(noting(course, "a"))
    assert course == [
        *("a on_turn_start", "a prompt"),
        *("a before_model", "a after_model", "a around_tool", "a has its result"),
        *("a before_model", "a after_model", "a on_turn_end finished"),
    ]


async def test_the_first_comes_first_on_the_way_in_last_on_the_way_back_and_outermost_around_a_tool():
    course = []
    await play(noting(course, "a"), noting(course, "b"))
    assert course[:10] == [
        *("a on_turn_start", "b on_turn_start", "a prompt", "b prompt", "a before_model", "b before_model"),
        *("b after_model", "a after_model", "a around_tool", "b around_tool"),
    ]
    assert course[-2:] == ["b on_turn_end finished", "a on_turn_end finished"]


async def test_what_is_said_in_the_prompt_stands_before_what_the_user_added():
    systems = []

    class Rule(Middleware, frozen=True):
        text: str

        async def prompt(self, turn, sections):
            return (*sections, Section("rule", self.text))

        async def before_model(self, turn, request):
            systems.append(request.system)
            return request

    await play(Rule(text="Never shout."))
    assert systems[0].endswith("\n\nNever shout.\n\nInstructions of your user\nBe brief.")
    assert systems[0] == systems[1]


async def test_a_middleware_brings_its_tools():
    class Dice(Middleware, frozen=True):
        sides: int = 6

        def tools(self):
            async def roll() -> str:
                """Roll the dice."""
                return f"{self.sides} of {self.sides}"

            return [FunctionTool(roll)]

    _, events = await play(Dice(sides=20), steps=(call("roll"), say("done")))
    assert [event.text for event in of(ToolReturned, events)] == ["20 of 20"]


def test_the_page_has_the_order_of_the_chain():
    page = (Path(__file__).parents[2] / "docs/middleware.md").read_text()
    rows = re.findall(r"^\| (\w+) \| .*\|$", page.partition("## Order")[2].partition("## ")[0], re.MULTILINE)
    assert re.findall(r"\w+", repr(chain_of([CallLimit()], instructions="")))[2:] == [
        re.sub("(?!^)(?=[A-Z])", "_", {"yours": "CallLimit"}.get(row, row)).lower() for row in rows[1:]
    ]


# --- replace ---


async def test_another_model_can_be_asked():
    class Parrot:
        async def complete(self, request, *, on_delta=None):
            return Completion(text=request.turns[-1].text)

        async def close(self):
            pass

    async def routed(turn, request):
        return replace(request, client=Parrot())

    outcome, _ = await play(acting("before_model", routed))
    assert outcome.final_text == "go"


async def test_an_answer_can_be_replaced_before_it_is_written():
    async def shouted(turn, answer):
        return replace(answer, text=answer.text.upper())

    outcome, events = await play(acting("after_model", shouted), steps=(say("done"),))
    assert [event.text for event in of(AgentMessage, events)] == [outcome.final_text] == ["DONE"]


async def test_a_call_can_be_given_a_result_without_being_run():
    async def refused(turn, call, run):
        return ToolResult(text=f"{call.tool} is not for you", is_error=True)

    outcome, events = await play(acting("around_tool", refused))
    [result] = of(ToolReturned, events)
    assert (result.text, result.is_error, outcome.status) == ("echo is not for you", True, "finished")


async def test_a_call_is_run_with_what_a_middleware_makes_of_its_arguments():
    async def changed(turn, call, run):
        return await run(replace(call, arguments='{"text":"b"}'))

    _, events = await play(acting("around_tool", changed))
    assert [event.text for event in of(ToolReturned, events)] == ["echo b"]
    assert [event.arguments for event in of(ToolCalled, events)] == ['{"text":"a"}']


async def test_a_call_that_is_changed_to_a_tool_that_is_not_there_is_refused():
    async def changed(turn, call, run):
        return await run(replace(call, tool="shred"))

    _, events = await play(acting("around_tool", changed))
    assert "There is no tool 'shred'" in of(ToolReturned, events)[0].text


async def test_a_turn_that_is_given_a_message_at_its_end_goes_on():
    class Once(Middleware, frozen=True):
        def reduce(self, state, event):
            return state or isinstance(event, UserMessage) and event.text == "Are you sure?"

        async def on_turn_end(self, turn, status):
            if not turn.state:
                await turn.append(UserMessage(text="Are you sure?"))

    outcome, events = await play(Once(), steps=(say("done"), say("quite")))
    assert outcome.final_text == "quite"
    assert len(of(TurnEnded, events)) == 1


# --- ask ---


def guarded():
    async def asking(turn, answer):
        return replace(answer, tool_calls=tuple(replace(use, ask=True) for use in answer.tool_calls))

    return acting("after_model", asking)


@pytest.mark.parametrize(
    ("answer", "result"),
    [("approve", "echo a"), ("reject", "The user rejected this call: no. It was not run.")],
)
async def test_a_call_that_a_middleware_asks_about_waits_for_an_answer(answer, result):
    async def respond(conversation):
        async for event in conversation.events(follow=True):
            if isinstance(event, RequestOpened):
                await conversation.respond(event.request_id, answer, reason="no")
                return

    outcome, events = await play(guarded(), then=respond)
    assert [event.text for event in of(ToolReturned, events)] == [result]
    assert outcome.status == "finished"


async def test_calls_that_cannot_be_run_are_not_asked_about():
    _, events = await play(guarded(), steps=(call("nobody"), say("done")))
    assert not of(RequestOpened, events)


# --- stop ---


@pytest.mark.parametrize("point", POINTS[:-1])
async def test_a_stop_ends_the_turn_at_any_point_and_every_call_has_its_result(point):
    async def stop(*_):
        raise Stop("that is enough")

    outcome, events = await play(acting(point, stop))
    assert (outcome.status, outcome.reason) == ("limit", "that is enough")
    assert len(of(ToolReturned, events)) == len(of(ToolCalled, events)) == (point in POINTS[3:])
    assert all(event.text == "[no result: that is enough]" for event in of(ToolReturned, events))


async def test_a_stop_says_how_the_turn_ends_and_what_it_said():
    async def stop(turn, request):
        raise Stop("", status="finished", final_text="as before")

    outcome, _ = await play(acting("before_model", stop))
    assert (outcome.status, outcome.final_text) == ("finished", "as before")


@pytest.mark.parametrize("point", ["before_model", "after_model", "around_tool"])
async def test_a_stop_as_finished_leaves_no_message_unread(point):
    stops = [Stop("enough", status="finished", final_text="as before")]

    async def stop(*given):
        if stops:
            accepted.append(await conversation.send_message("and this?"))
            raise stops.pop()
        return given[-1] if point != "around_tool" else await given[-1](given[-2])

    accepted = []
    agent = Agent(llm=ScriptedLLM(steps=SCRIPT), tools=[echo], middleware=[acting(point, stop)])
    async with LocalConversation(agent) as conversation:
        await conversation.send_message("go")
        outcome = await conversation.run()
        assert (outcome.status, outcome.final_text) == ("finished", "done")
        assert [each.run_id for each in accepted] == [outcome.run_id]
        events = [event async for event in conversation.events()]
        assert len(of(ToolReturned, events)) == len(of(ToolCalled, events))
        assert of(AgentMessage, events)[-1].seen_seq >= accepted[0].seq


async def test_a_stop_as_finished_that_lets_the_model_read_nothing_is_obeyed_in_the_end():
    async def stop(*_):
        if len(of(UserMessage, [event async for event in conversation.events()])) < 2:
            await conversation.send_message("and this?")
        raise Stop("enough", status="finished")

    agent = Agent(llm=ScriptedLLM(steps=SCRIPT), tools=[echo], middleware=[acting("before_model", stop)])
    async with LocalConversation(agent) as conversation:
        await conversation.send_message("go")
        assert (await conversation.run()).reason == "enough"


async def test_a_stop_at_the_end_of_a_turn_changes_nothing():
    async def stop(*_):
        raise Stop("too late")

    outcome, _ = await play(acting("on_turn_end", stop))
    assert (outcome.status, outcome.reason) == ("finished", "")


async def test_calls_that_a_stop_kept_from_being_asked_about_have_their_results_with_the_answer():
    """They needed an approval; a process that goes on with the turn would else run them without one."""
    open_calls = []

    async def stop(*_):
        raise Stop("forbidden")

    async def look(turn, status):
        events = [event async for event in conversation.events()]
        open_calls.append(len(of(ToolCalled, events)) - len(of(ToolReturned, events)))

    middleware = [acting("after_model", stop), acting("on_turn_end", look)]
    agent = Agent(llm=ScriptedLLM(steps=SCRIPT), tools=[echo], middleware=middleware)
    policy = ConfirmationPolicy(mode="always")
    async with LocalConversation(agent, confirmation=policy) as conversation:
        await conversation.send_message("go")
        assert (await conversation.run()).reason == "forbidden"
    assert open_calls == [0]


async def test_a_turn_that_was_stopped_goes_on_at_the_next_run():
    stops = [Stop("a break", status="paused")]

    async def stop_once(turn, request):
        if stops:
            raise stops.pop()
        return request

    agent = Agent(llm=ScriptedLLM(steps=SCRIPT), tools=[echo], middleware=[acting("before_model", stop_once)])
    async with LocalConversation(agent) as conversation:
        await conversation.send_message("go")
        assert (await conversation.run()).status == "paused"
        assert (await conversation.run()).final_text == "done"


# --- what goes wrong ---


@pytest.mark.parametrize(
    "wrong", [ValueError, SystemExit, asyncio.CancelledError], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("point", POINTS)
async def test_what_a_middleware_raises_fails_the_turn_and_names_it(point, wrong):
    async def broken(*_):
        raise wrong("oops")

    outcome, events = await play(acting(point, broken))
    assert (outcome.status, outcome.error) == ("failed", "middleware_failed")
    assert outcome.reason == f"middleware acting: {wrong.__name__}: oops"
    assert [event.error for event in of(ErrorRaised, events)] == ["middleware_failed"]
    assert len(of(ToolReturned, events)) == len(of(ToolCalled, events))


async def test_an_error_of_ours_stays_what_it_is():
    async def denied(turn, call, run):
        raise PolicyDenied("not on a Sunday")

    outcome, _ = await play(acting("around_tool", denied))
    assert (outcome.error, outcome.reason) == ("policy_denied", "not on a Sunday")


@pytest.mark.parametrize("point", POINTS[1:-1])
async def test_a_point_that_forgets_to_return_is_told_so(point):
    async def forgetful(*_):
        return None

    outcome, _ = await play(acting(point, forgetful))
    assert outcome.error == "middleware_failed"
    assert "NoneType" in outcome.reason


async def test_an_answer_that_was_paid_for_is_written_although_a_middleware_fails():
    async def broken(turn, answer):
        raise ValueError

    _, events = await play(acting("after_model", broken), steps=(say("expensive"),))
    assert [event.text for event in of(AgentMessage, events)] == ["expensive"]


async def test_a_state_that_cannot_be_reduced_fails_the_turn_and_not_the_log():
    class Confused(Middleware, frozen=True):
        def reduce(self, state, event):
            return 1 / 0

        async def before_model(self, turn, request):
            return request

    outcome, events = await play(Confused())
    assert outcome.reason == "middleware confused: ZeroDivisionError: division by zero"
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


@pytest.mark.parametrize("point", POINTS)
async def test_an_interrupt_ends_a_middleware_that_waits_for_ever(point):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang(*_):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def interrupt(conversation):
        await begun.wait()
        await conversation.interrupt("enough")

    outcome, _ = await play(acting(point, hang), then=interrupt)
    assert (outcome.status, outcome.reason) == ("interrupted", "enough")
    assert ended.is_set()


@pytest.mark.parametrize("then", ["goes_on", "stops"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_middleware_that_swallows_its_cancellation_does_not_keep_the_turn_going(point, then):
    begun, ran, ended = asyncio.Event(), [], asyncio.Event()

    @tool
    async def note() -> None:
        """Note that it ran."""
        ran.append("note")

    async def swallow(turn, *given):
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        ended.set()
        if then == "stops":
            raise Stop("in the end")
        return await given[1](given[0]) if point == "around_tool" else given[-1] if given else None

    async def interrupt(conversation):
        await begun.wait()
        await conversation.interrupt("enough")

    steps = (call("note"), say("done"))
    if point == "on_turn_end":
        steps = steps[1:]
    outcome, events = await play(acting(point, swallow), steps=steps, tools=[note], then=interrupt)
    assert (outcome.status, outcome.reason) == ("interrupted", "enough")
    assert ended.is_set()
    assert ran == []
    answers = {"on_turn_start": 0, "prompt": 0, "before_model": 0}
    assert len(of(AgentMessage, events)) == answers.get(point, 1)
    assert len(of(ToolReturned, events)) == len(of(ToolCalled, events))


# --- observing, and what survives ---


async def test_an_observer_hears_of_every_new_event_in_order_and_disturbs_nobody():
    heard = []

    class Loud(Middleware, frozen=True):
        async def on_event(self, event):
            heard.append(event)
            raise ValueError("I do not like it")

    outcome, events = await play(Loud())
    assert outcome.status == "finished"
    assert heard == events[-len(heard) :]
    assert isinstance(heard[-1], TurnEnded)


COUNTED = '''
import asyncio, os, signal, sys
from agent_sdk import Agent, Conversation, Middleware, tool
from agent_sdk.protocol.events import ToolReturned
from agent_sdk.testing import ScriptedLLM, call, say

class Counted(Middleware, frozen=True):
    def reduce(self, state, event):
        return (state or 0) + isinstance(event, ToolReturned)

    async def before_model(self, turn, request):
        if turn.state == 2:
            print("two calls", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return request

@tool
async def echo(text: str) -> str:
    """Say it again."""
    return text

async def main():
    agent = Agent(llm=ScriptedLLM([call("echo", text="a")], repeat=True), tools=[echo], middleware=[Counted()])
    conversation = Conversation(agent, sys.argv[1], id="c", persistence_dir=sys.argv[1])
    await conversation.send_message("go")
    await conversation.run()

asyncio.run(main())
'''


async def test_a_state_that_follows_from_the_log_survives_a_kill(tmp_path):
    command, environ = [sys.executable, "-c", COUNTED, tmp_path], {**os.environ, "TMPDIR": str(tmp_path)}
    died = await asyncio.to_thread(subprocess.run, command, env=environ, capture_output=True, check=False)
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, b"two calls\n")
    states = []

    class Counted(Middleware, frozen=True):
        def reduce(self, state, event):
            return (state or 0) + isinstance(event, ToolReturned)

        async def before_model(self, turn, request):
            states.append(turn.state)
            return request

    llm = ScriptedLLM(steps=(call("echo", text="a"),) * 3 + (say("done"),))
    agent = Agent(llm=llm, tools=[echo], middleware=[Counted()])
    async with Conversation(agent, tmp_path, id="c", persistence_dir=tmp_path) as conversation:
        assert (await conversation.run()).status == "finished"
    assert states == [2, 3]


# --- there ---


class CallLimit(Middleware, frozen=True):
    calls: int = 10
    tools_too: tuple[str, ...] = ()


def test_a_middleware_crosses_the_wire_as_its_kind_and_what_was_set():
    def spec(*middleware):
        return Agent(llm=ScriptedLLM(steps=()), middleware=middleware).spec()

    assert spec(CallLimit(calls=3)).middleware == (MiddlewareSpec(kind="call_limit", options={"calls": 3}),)
    assert "middleware" not in without_defaults(spec())


@pytest.mark.parametrize("wrong", [(CallLimit,), ("call_limit",), CallLimit()])
def test_an_agent_takes_nothing_else_for_a_middleware(wrong):
    with pytest.raises(InvalidParams, match="middleware: expected"):
        Agent(llm=ScriptedLLM(steps=()), middleware=wrong)


def test_options_are_checked_where_they_are_written():
    with pytest.raises(InvalidParams, match="calls: expected int, got 'three'"):
        CallLimit(calls="three")


async def test_a_kind_that_nobody_has_installed_is_refused_in_one_sentence(tmp_path):
    agent = AgentSpec(llm=ScriptedLLM(steps=()), middleware=(MiddlewareSpec(kind="call_limit"),))
    with pytest.raises(
        InvalidParams, match="there is no 'call_limit' where the agent runs; install a package"
    ):
        await LocalConversation(agent, tmp_path).state()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that names a middleware."""
    information = tmp_path / "rules-1.dist-info"
    information.mkdir()
    (information / "entry_points.txt").write_text("[agent_server.middleware]\nhouse_rule = rules:HouseRule\n")
    (tmp_path / "rules.py").write_text(
        "from agent_sdk import Middleware, Stop\n"
        "class HouseRule(Middleware, frozen=True):\n"
        "    why: str\n"
        "    async def on_turn_start(self, turn):\n"
        "        raise Stop(self.why)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
async def test_a_kind_that_is_installed_is_made_of_its_options(tmp_path):
    rule = MiddlewareSpec(kind="house_rule", options={"why": "not here"})
    agent = AgentSpec(llm=ScriptedLLM(steps=SCRIPT), middleware=(rule,))
    async with LocalConversation(agent, tmp_path) as conversation:
        await conversation.send_message("go")
        assert (await conversation.run()).reason == "not here"


@pytest.mark.usefixtures("installed")
async def test_a_middleware_is_kept_with_the_agent(tmp_path):
    rule = MiddlewareSpec(kind="house_rule", options={"why": "not here"})
    agent = AgentSpec(llm=ScriptedLLM(steps=SCRIPT), middleware=(rule,))
    options = {"id": "c", "persistence_dir": tmp_path, "store": AgentStore(None)}
    async with LocalConversation(None, tmp_path, **options) as conversation:
        await conversation.configure(agent)
    async with LocalConversation(None, tmp_path, **options) as conversation:
        await conversation.send_message("go")
        assert (await conversation.run()).reason == "not here"


async def test_an_agent_that_is_configured_later_begins_with_the_state_of_the_whole_log(tmp_path):
    states = []

    class Talk(Middleware, frozen=True):
        def reduce(self, state, event):
            return (state or 0) + isinstance(event, UserMessage)

        async def before_model(self, turn, request):
            states.append(turn.state)
            return request

    llm = ScriptedLLM(steps=(say("one"), say("two"), say("three")))
    async with LocalConversation(Agent(llm=llm), tmp_path) as conversation:
        for agent in (
            Agent(llm=llm),
            Agent(llm=llm, middleware=[Talk()]),
            Agent(llm=llm, middleware=[Talk()]),
        ):
            await conversation.configure(agent)
            await conversation.send_message("go")
            await conversation.run()
    assert states == [2, 3]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("options", [{}, {"why": 1}, {"why": "x", "how": "y"}])
async def test_options_that_an_installed_kind_does_not_take_are_refused(options, tmp_path):
    rule = MiddlewareSpec(kind="house_rule", options=options)
    with pytest.raises(InvalidParams, match="middleware: house_rule: "):
        await LocalConversation(AgentSpec(llm=ScriptedLLM(steps=()), middleware=(rule,)), tmp_path).state()
