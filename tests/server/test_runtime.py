"""One runtime: what it does, in which order, and what is written down before."""

import asyncio
import io

import msgspec
import pytest
from msgspec.structs import replace

from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable, NotFound, WorkspaceUnavailable
from agent_server.logs import opened
from agent_server.runtime_api.record import RECORD, Record
from agent_server.runtime_api.runtime import Runtime
from workspaces.backend.contract import Ending


class Steps:
    """Steps that last until they are let go on."""

    def __init__(self) -> None:
        self.gates = {}
        self.held = []

    def hold(self, step):
        self.gates[step] = gate = (asyncio.Event(), asyncio.Event())
        self.held.append(gate[1])
        return gate

    def release(self):
        """Let all go on that is held: a test that fails must not wait for it at its end."""
        for go_on in self.held:
            go_on.set()

    async def reach(self, name):
        """Wait if this step is held; return whether it was."""
        reached, go_on = self.gates.pop(name, (None, None))
        if reached is not None:
            reached.set()
            await go_on.wait()
        return reached is not None


class SteppedServer(Steps):
    """A server whose steps last until they are let go on, and fail when they are told to."""

    url = "http://127.0.0.1:1"

    def __init__(self, record) -> None:
        super().__init__()
        self.did = []
        self.record = record
        self.errors = {}
        self.death = None

    async def step(self, name):
        self.did.append((name, msgspec.json.decode(self.record.read_bytes())["wanted"]))
        try:
            if await self.reach(name):
                self.did.append((f"{name} done", None))
        except asyncio.CancelledError:
            self.did.append((f"{name} broken off", None))
            raise
        if self.errors.get(name):
            raise self.errors[name].pop(0)

    async def start(self, seconds):
        await self.step("start")
        self.death = asyncio.get_running_loop().create_future()

    async def ended(self):
        return Ending("exit", 1, await asyncio.shield(self.death))

    async def pause(self):
        await self.step("pause")

    async def stop(self):
        await self.step("stop")

    async def let_go(self):
        self.did.append(("let go", None))

    async def last_words(self):
        return "its last words"


@pytest.fixture
async def made(tmp_path):
    record = Record(
        session_id="s",
        runtime_id="r",
        tenant="t",
        api_key="k",
        image="i",
        environment={},
        resource_factor=1,
        cpus=1,
        memory=1,
        runtime_class=None,
        image_pull_policy="Never",
        created=0,
    )
    with opened(style="json", stream=io.StringIO()) as logs:
        server = SteppedServer(tmp_path / RECORD)
        runtime = Runtime(record, server, tmp_path, logs, start_seconds=5)
        yield runtime, server
        server.release()
        await runtime.close(end=False)


async def ready(runtime):
    await runtime.start()
    await runtime.settled(10)
    assert runtime.pod_status == "ready"


async def test_what_is_wanted_is_on_the_disk_before_anything_is_done(made):
    runtime, server = made
    await ready(runtime)
    await runtime.pause()
    await ready(runtime)
    await runtime.stop()
    assert server.did == [("start", "running"), ("pause", "paused"), ("start", "running"), ("stop", "gone")]


async def test_a_start_waits_for_a_pause_that_is_under_way(made):
    runtime, server = made
    await ready(runtime)
    reached, go_on = server.hold("pause")
    pausing = asyncio.create_task(runtime.pause())
    await reached.wait()
    await runtime.start()
    go_on.set()
    await pausing
    await runtime.settled(10)
    assert [name for name, _ in server.did] == ["start", "pause", "pause done", "start"]
    assert (runtime.status, runtime.pod_status) == ("running", "ready")


@pytest.mark.parametrize("verb", ["pause", "stop"])
async def test_a_start_that_is_under_way_is_broken_off(made, verb):
    runtime, server = made
    reached, _ = server.hold("start")
    await runtime.start()
    await reached.wait()
    await (runtime.pause() if verb == "pause" else runtime.stop())
    assert [name for name, _ in server.did] == ["start", "start broken off", verb]


async def test_a_caller_that_goes_away_does_not_break_off_what_it_asked_for(made):
    runtime, server = made
    await ready(runtime)
    reached, go_on = server.hold("stop")
    stopping = asyncio.create_task(runtime.stop())
    await reached.wait()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    go_on.set()
    await runtime.stop()
    assert [name for name, _ in server.did] == ["start", "stop", "stop done", "stop"]


async def test_a_pause_that_fails_leaves_it_running(made):
    runtime, server = made
    await ready(runtime)
    server.errors["pause"] = [WorkspaceUnavailable("no")]
    with pytest.raises(WorkspaceUnavailable):
        await runtime.pause()
    await runtime.settled(10)
    assert (runtime.status, runtime.pod_status, runtime.record.wanted) == ("running", "ready", "running")


async def test_a_pause_that_fails_does_not_take_back_the_end_that_was_asked_for_meanwhile(made):
    runtime, server = made
    await ready(runtime)
    server.errors["pause"] = [WorkspaceUnavailable("it cannot be paused", phase="pause")]
    reached, go_on = server.hold("pause")
    pausing = asyncio.create_task(runtime.pause())
    await reached.wait()
    stopping = asyncio.create_task(runtime.stop())
    go_on.set()
    with pytest.raises(WorkspaceUnavailable):
        await pausing
    await stopping
    await runtime.close(end=False)
    assert [name for name, _ in server.did] == ["start", "pause", "pause done", "stop", "let go"]
    assert runtime.status == "stopped"


async def test_what_was_asked_for_before_an_end_but_comes_after_it_begins_nothing(made):
    runtime, server = made
    await ready(runtime)
    verbs = (runtime.pause(), runtime.stop(), runtime.start(), runtime.pause())
    *done, started, paused = await asyncio.gather(*verbs, return_exceptions=True)
    assert (done, type(started), type(paused)) == ([None, None], NotFound, NotFound)
    assert [name for name, _ in server.did] == ["start", "pause", "stop"]
    assert runtime.status == "stopped"


async def test_a_first_start_that_fails_is_told_at_once_and_may_be_repeated(made):
    runtime, server = made
    server.errors["start"] = [WorkspaceUnavailable("the image is broken")]
    await runtime.start()
    await runtime.settled(10)
    shown = runtime.shown("http://here")
    assert (shown.status, shown.pod_status) == ("error", "failed")
    assert (shown.events, shown.pod_logs) == (["the image is broken"], "its last words")
    await ready(runtime)
    assert runtime.shown("http://here").events == []


async def test_an_engine_that_is_away_for_a_moment_is_waited_for(made):
    runtime, server = made
    server.errors["start"] = [EngineUnavailable("away", phase="engine")] * 2
    await ready(runtime)
    assert len(server.did) == 3


async def test_a_restart_that_fails_is_tried_again_before_it_is_given_up(made):
    runtime, server = made
    await ready(runtime)
    server.errors["start"] = [WorkspaceUnavailable("not yet")]
    server.death.set_result("killed")
    while runtime.record.restarts < 2 or runtime.pod_status != "ready":
        await runtime._changed.wait()
    assert runtime.record.reasons == ("killed", "not yet")


async def test_a_bug_in_a_server_is_a_failure_and_no_silence(made):
    runtime, server = made
    server.errors["start"] = [ZeroDivisionError()]
    await runtime.start()
    await runtime.settled(10)
    assert runtime.pod_status == "failed"
    assert runtime.shown("").events[0].startswith("internal error, logged as ")


@pytest.mark.parametrize(("wanted", "step"), [("running", "start"), ("paused", "pause")])
async def test_the_next_server_brings_about_what_was_wanted(made, wanted, step):
    runtime, server = made
    runtime.record = replace(runtime.record, wanted=wanted)
    server.record.write_bytes(msgspec.json.encode(runtime.record))
    reached, go_on = server.hold(step)
    runtime.recover()
    await reached.wait()
    go_on.set()
    await runtime.settled(10)
    assert server.did[0] == (step, wanted)


async def test_a_runtime_that_died_runs_again_although_that_cannot_be_written_down(made, tmp_path):
    runtime, server = made
    await ready(runtime)
    server.record = (tmp_path / RECORD).rename(tmp_path / "kept")
    (tmp_path / RECORD).mkdir()
    reached, go_on = server.hold("start")
    server.death.set_result("it died")
    await reached.wait()
    go_on.set()
    await runtime.settled(10)
    assert (runtime.pod_status, runtime.record.restarts) == ("ready", 1)


async def test_a_start_that_cannot_be_written_down_leaves_it_as_it_was_and_may_come_again(made, tmp_path):
    runtime, _ = made
    await ready(runtime)
    await runtime.pause()
    kept = (tmp_path / RECORD).rename(tmp_path / "kept")
    (tmp_path / RECORD).mkdir()
    with pytest.raises(AgentServerError):
        await runtime.start()
    assert (runtime.status, runtime.pod_status) == ("paused", "not found")
    (tmp_path / RECORD).rmdir()
    kept.rename(tmp_path / RECORD)
    await ready(runtime)
