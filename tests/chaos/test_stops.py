"""The server is stopped as those stop it who run it, at every kind of moment: no stop loses more than a kill."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from tests.chaos import seed
from tests.chaos.checker import Violation, broken_rules
from tests.chaos.client import Caller, Output, Session, Subscriber
from tests.chaos.conftest import Case
from tests.chaos.proxy import Proxy
from tests.chaos.server import KEY, Server
from tests.chaos.storm import settled, traffic
from tests.chaos.test_commands import SAY, agent, conversation, has_lines, pending, terminal
from tests.docker.fake_engine import FakeEngine, never

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

KEPT = {"boxes_on_stop": "keep", "drain_seconds": 4}
Check = Callable[[], Awaitable[None]]
"""What has to come true with the next server."""
ANSWERS = {"step": "hang", "seconds": 1}


class Scene:
    """What goes on in one conversation when the stop comes: who takes part, and what the commands leave behind."""

    def __init__(self, case: Case, server: Server, stack: AsyncExitStack) -> None:
        self.case = case
        self.server = server
        self.stack = stack

    async def begin(self, *steps: dict[str, Any], **options: Any) -> None:
        """A conversation, with an agent if there are steps, and its clients."""
        given = {"agent": agent(*steps), **options} if steps else options
        self.id = await conversation(self.server, **given)
        clients = (
            Caller("client", self.server, self.id, self.case.history),
            Subscriber("subscriber", self.server, self.id, self.case.history),
        )
        self.client, self.subscriber = [await self.stack.enter_async_context(client) for client in clients]

    def effect(self, between: str = "") -> str:
        """A command that shows how often it ran."""
        return self.case.effect(new_id(), between)

    async def say(self, text: str = "go") -> None:
        await self.client.effect("send_message", text=text)

    async def saw(self, kind: str) -> None:
        """Wait until the log has such an event."""
        while all(event["type"] != kind for event in await self.events()):
            await self.subscriber.news(1)

    async def events(self) -> list[dict[str, Any]]:
        return (await self.subscriber.ask("conversation.events"))["events"]

    async def ends(self, status: str = "finished") -> None:
        """The turn comes to this end, and each call has its result."""
        await settled(self.subscriber)
        events = await self.events()
        assert [event["status"] for event in events if event["type"] == "turn_ended"] == [status], events
        called, returned = [
            [event["call_id"] for event in events if event["type"] == kind]
            for kind in ("tool_called", "tool_returned")
        ]
        assert called == returned, events


async def idle(scene: Scene) -> Check:
    """Nothing goes on, and a box waits."""
    await scene.begin(terminal(scene.effect()), SAY)
    await scene.client.ask("files.list", path=".")

    async def check() -> None:
        await scene.say()
        await scene.ends()

    return check


def answering(*before: str) -> Callable[[Scene], Awaitable[Check]]:
    """The model answers, and calls a tool; there is no box yet, or one that did nothing, or one that did something."""

    async def begin(scene: Scene) -> Check:
        await scene.begin(ANSWERS, terminal(scene.effect()), SAY)
        for method in before:
            given = {"shell": "true"} if method == "execute" else {"path": "."}
            await scene.client.ask(method, **({"op_id": new_id()} if method == "execute" else {}), **given)
        await scene.say()
        await scene.saw("turn_started")
        return scene.ends

    return begin


async def running(scene: Scene) -> Check:
    """A command of the agent runs, and one of a client."""
    marks = scene.case.folder / new_id()
    slow = f"echo x >> {marks}; sleep 2"
    await scene.begin(terminal(scene.effect(slow)), SAY)
    await scene.say()
    output, op_id = Output(), new_id()
    command = asyncio.create_task(
        scene.client.effect(
            "execute", op_id=op_id, output=output, shell=scene.case.effect(op_id, f"echo a; {slow}; echo b")
        )
    )
    await has_lines(marks, 2)

    async def check() -> None:
        assert (await command)["exit_code"] == 0
        assert (bytes(output.data), output.jumps) == (b"a\nb\n", [])
        await scene.ends()

    return check


async def approving(scene: Scene) -> Check:
    """The agent waits for an approval."""
    await scene.begin(terminal(scene.effect()), SAY, confirmation={"mode": "always"})
    await scene.say()
    (asked,) = await pending(scene.subscriber)

    async def check() -> None:
        assert await pending(scene.subscriber) == [asked]
        await scene.client.effect("respond", request_id=asked["request_id"], answer="approve")
        await scene.ends()

    return check


def told(verb: str, status: str, between: str) -> Callable[[Scene], Awaitable[Check]]:
    """The user has just said stop: it comes to that, with whichever server; `between`: what the first call does."""

    async def begin(scene: Scene) -> Check:
        await scene.begin(ANSWERS, terminal(scene.effect(between)), terminal("true"), SAY)
        await scene.say()
        await scene.saw("turn_started")
        # As it comes: before the stop, or in the middle of it.
        saying = asyncio.create_task(scene.client.effect(verb))

        async def check() -> None:
            assert await saying is not None
            await scene.ends(status)

        return check

    return begin


async def unread(scene: Scene) -> Check:
    """A process has ended, and nobody has asked for what it said."""
    await scene.begin()
    started = await scene.client.effect("process.start", shell="echo said; exit 3")
    process = {"process_id": started["process_id"]}
    assert (await scene.client.ask("process.wait", **process))["exit_code"] == 3

    async def check() -> None:
        assert (await scene.client.ask("process.wait", **process))["exit_code"] == 3
        session = await scene.client.connected()
        output = Output()
        await session.call("process.output", **process, channel=session.channel(output), since=0)
        await output.has(1)
        assert output.data == b"said\n"

    return check


async def uploading(scene: Scene) -> Check:
    """Half of a file has come."""
    file = scene.case.folder / "large"
    content = scene.case.chance.randbytes(4 << 20)
    await asyncio.to_thread(file.write_bytes, content)
    await scene.begin()
    proxy = await scene.stack.enter_async_context(Proxy(scene.server))
    proxy.delay = 0.01
    workspace = RemoteWorkspace(f"http://127.0.0.1:{proxy.port}", KEY, conversation=scene.id)
    await scene.stack.enter_async_context(workspace)
    transfer = asyncio.create_task(workspace.upload(file, "there"))
    while proxy.passed["up"] < 1 << 20:  # noqa: ASYNC110  a proxy tells nobody
        await asyncio.sleep(0.01)

    async def check() -> None:
        proxy.delay = 0
        assert (await transfer).size == len(content)
        assert await workspace.files.read("there") == content

    return check


async def pulling(scene: Scene) -> Check:
    """The image of a sandbox is being pulled, for a client who waits."""
    engine = FakeEngine(scene.case.folder)
    await scene.stack.enter_async_context(engine.listening())
    for call, answer in (("GET /containers/json", []), ("GET /volumes", {}), ("GET /networks", [])):
        engine.answer(call, answer)
    for call in ("GET /events", "POST /images/create"):
        engine.on(call, never)
    async with Session.open(scene.server.port, workspace={"sandbox": {"image": "some/image:1"}}) as session:
        scene.id = session.introduction["conversation"]
    caller = Caller("sandbox", scene.server, scene.id, scene.case.history)
    scene.client = await scene.stack.enter_async_context(caller)
    command = asyncio.create_task(scene.client.effect("files.mkdir", path="x"))
    await engine.called("POST /images/create")

    async def check() -> None:
        engine.answer("POST /images/create", {"message": "no such image"}, status=404)
        assert await command is None  # refused, with words; not hanging

    return check


SCENES: dict[str, Callable[[Scene], Awaitable[Check]]] = {
    "idle": idle,
    "answering without a box": answering(),
    "answering with a fresh box": answering("files.list"),
    "answering with a used box": answering("execute"),
    "running": running,
    "approving": approving,
    "interrupted": told("interrupt", "interrupted", "sleep 600"),
    "paused": told("pause", "paused", "sleep 2"),
    "unread": unread,
    "uploading": uploading,
    "pulling": pulling,
}


@asynccontextmanager
async def scenes(case: Case, server: Server, *names: str) -> AsyncIterator[list[Check]]:
    """All these at the same time."""
    async with AsyncExitStack() as stack:
        begun = [SCENES[name](Scene(case, server, stack)) for name in names]
        yield await asyncio.gather(*begun)


async def stops(case: Case, *names: str, mutant: str = "", **options: Any) -> list[Violation]:
    """Stop the server in the middle of this, and see it come to its end with the next one; what the checker says."""
    engine = f"unix://{case.folder}/fake.sock"
    async with case.server(mutant=mutant, engine=engine, **{**KEPT, **options}) as server:
        assert await server.start()
        async with scenes(case, server, *names) as checks:
            assert await server.stop() == 0
            assert await server.start()
            results = await asyncio.gather(*(check() for check in checks), return_exceptions=True)
        await swept(server)
        case.note_effects()
        violations = await case.violations(server)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures and not mutant:
        raise ExceptionGroup("scenes", failures)
    return violations


async def swept(server: Server) -> None:
    """End it, with all boxes that are kept."""
    assert await server.stop() == 0
    assert await server.start(AGENT_SERVER_BOXES_ON_STOP="end")
    assert await server.stop() == 0


async def test_a_stop_at_whatever_moment_loses_and_doubles_nothing(case):
    assert not await stops(case, *SCENES)


@pytest.mark.parametrize(
    "name", ["answering without a box", "answering with a fresh box", "answering with a used box"]
)
async def test_a_call_that_was_written_down_is_run_by_the_next_server_where_boxes_are_ended(case, name):
    assert not await stops(case, name, boxes_on_stop="end")


async def test_stops_find_a_build_that_ends_boxes_although_calls_are_written_down_for_them(case):
    # Whether a box has begun with the call when it is ended is a matter of milliseconds: it is tried a few times.
    names = [name for name in SCENES if name.startswith("answering")]
    found: set[int] = set()
    for _ in range(8):
        found |= broken_rules(await stops(case, *names, mutant="boxes_ended"))
        if 9 in found:
            return
    raise AssertionError(f"broken rules found: {found}")


async def test_a_second_signal_ends_it_at_once(case):
    async with case.server(
        **{**KEPT, "drain_seconds": 600}, engine=f"unix://{case.folder}/fake.sock"
    ) as server:
        assert await server.start()
        async with scenes(case, server, "running", "answering without a box", "pulling") as checks:
            server.signal(signal.SIGTERM)
            await server.said("server_draining")
            assert await server.stop() == 0
            assert await server.start()
            for check in checks:
                await check()
        await swept(server)
        case.note_effects()
        await case.judge(server)


async def test_nothing_is_lost_or_doubled_when_the_server_is_stopped_at_random_moments(case):
    async with case.server(**{**KEPT, "drain_seconds": 1}) as server:
        assert await server.start()
        async with traffic(server, case.history) as clients:
            for _ in range(seed.times(4, 100, 1000)):
                async with scenes(case, server, "answering without a box", "running", "paused") as checks:
                    await asyncio.sleep(case.chance.uniform(0, 1.5))  # the moment is the fault
                    server.signal(signal.SIGTERM)
                    if case.chance.random() < 0.3:
                        await asyncio.sleep(case.chance.uniform(0, 0.3))
                        server.signal(signal.SIGTERM)
                    assert await server.ended() == 0
                    assert await server.start()
                    for check in checks:
                        await check()
            await clients.finish()
        await swept(server)
        case.note_effects()
        await case.judge(server)
