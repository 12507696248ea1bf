"""What counts against the quota of a tenant, at every moment of a runtime's life."""

import asyncio
import io
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent_sdk.protocol.errors import Overloaded
from agent_server.config.options import GIB, RuntimeConfig
from agent_server.logs import opened
from agent_server.runtime_api.record import Tenant, Wanted
from agent_server.runtime_api.runtimes import Runtimes
from tests.server.test_runtime import Steps
from tests.server.wire import GUARD
from workspaces.backend.contract import Facts

IMAGE = "agent-server:1"


class SteppedBackend(Steps):
    """A backend of one server for all machines, whose pauses and stops last until they are let go on."""

    def __init__(self, url, can):
        super().__init__()
        self.can = frozenset(can)
        self._url = url
        self.made = []

    async def create(self, machine, on_progress=None):
        self.made.append(machine)
        return machine.name

    async def start(self, id):
        pass

    async def wait(self, id):
        await asyncio.Event().wait()

    async def endpoint(self, id, port):
        return self._url

    async def pause(self, id):
        await self.reach("pause")

    async def stop(self, id, *, grace=0, keep_data=False):
        await self.reach("stop")

    async def inspect(self, id):
        return Facts(id=id, name=id, state="created", labels={}, image=IMAGE, env={}, network=None)

    async def list(self, labels):
        return []


async def healthy(request):
    return web.Response()


@asynccontextmanager
async def runtimes(tmp_path, *can):
    app = web.Application()
    app.router.add_get("/health", healthy)
    with opened(style="json", stream=io.StringIO()) as logs:
        async with TestServer(app) as server:
            backend = SteppedBackend(f"http://{server.host}:{server.port}", can)
            async with Runtimes(
                RuntimeConfig(), tmp_path / "runtimes", backend, logs, labels={}, end=False
            ) as made:
                try:
                    async with asyncio.timeout(GUARD):
                        yield made, backend
                finally:
                    backend.release()


def tenant(**quota):
    return Tenant(name="alice", **{"sandboxes": None, "cpus": None, "memory": None, **quota})


async def started(runtimes, tenant, session):
    runtime = await runtimes.start(tenant, Wanted(image=IMAGE, session_id=session))
    await runtime.settled(10)
    assert runtime.pod_status == "ready"
    return runtime


@pytest.mark.parametrize("quota", [{"cpus": 1.0}, {"memory": 2 * GIB}])
async def test_what_is_being_paused_counts_until_it_is(tmp_path, quota):
    alice = tenant(**quota)
    async with runtimes(tmp_path) as (made, backend):
        first = await started(made, alice, "one")
        reached, go_on = backend.hold("pause")
        pausing = asyncio.create_task(first.pause())
        await reached.wait()
        with pytest.raises(Overloaded):
            await started(made, alice, "two")
        go_on.set()
        await pausing
        await started(made, alice, "two")


@pytest.mark.parametrize("quota", [{"cpus": 1.0}, {"memory": 2 * GIB}, {"sandboxes": 1}])
async def test_what_is_being_stopped_counts_until_it_is_gone(tmp_path, quota):
    alice = tenant(**quota)
    async with runtimes(tmp_path) as (made, backend):
        first = await started(made, alice, "one")
        reached, go_on = backend.hold("stop")
        stopping = asyncio.create_task(made.stop(first))
        await reached.wait()
        for session in ("one", "two"):
            with pytest.raises(Overloaded):
                await started(made, alice, session)
        go_on.set()
        await stopping
        await started(made, alice, "two")


async def test_of_many_that_are_resumed_at_once_no_more_run_than_may(tmp_path):
    alice, bob = tenant(cpus=1.0), tenant()
    async with runtimes(tmp_path) as (made, backend):
        paused = [await started(made, bob, f"{number}") for number in range(4)]
        for runtime in paused:
            await runtime.pause()
        answers = await asyncio.gather(
            *(made.resume(alice, runtime) for runtime in paused), return_exceptions=True
        )
        assert [type(answer) for answer in answers if answer] == [Overloaded] * 3
        assert sum(runtime.runs for runtime in paused) == 1


async def test_a_pause_that_is_taken_back_frees_nothing(tmp_path):
    alice = tenant(cpus=1.0)
    async with runtimes(tmp_path) as (made, backend):
        first = await started(made, alice, "one")
        reached, go_on = backend.hold("pause")
        pausing = asyncio.create_task(first.pause())
        await reached.wait()
        await made.resume(alice, first)
        with pytest.raises(Overloaded):
            await started(made, alice, "two")
        go_on.set()
        await pausing
        with pytest.raises(Overloaded):
            await started(made, alice, "two")


@pytest.mark.parametrize("keeps", [True, False])
async def test_the_memory_of_a_paused_one_counts_where_it_keeps_it(tmp_path, keeps):
    alice = tenant(memory=2 * GIB)
    async with runtimes(tmp_path, *(["freeze"] if keeps else [])) as (made, backend):
        first = await started(made, alice, "one")
        await first.pause()
        if keeps:
            with pytest.raises(Overloaded):
                await started(made, alice, "two")
        else:
            await started(made, alice, "two")


async def test_a_class_is_what_the_operator_calls_so_where_the_backend_can_isolate(tmp_path):
    async with runtimes(tmp_path, "isolate") as (made, backend):
        wanted = Wanted(image=IMAGE, session_id="one", runtime_class="gvisor")
        await (await made.start(tenant(), wanted)).settled(10)
        assert [machine.runtime for machine in backend.made] == ["runsc"]


async def test_a_runtime_whose_folder_cannot_be_removed_keeps_no_other_from_its_end(tmp_path):
    async with runtimes(tmp_path) as (made, _):
        stuck, other = [await started(made, tenant(), name) for name in ("one", "two")]
        for runtime in (stuck, other):
            (tmp_path / "runtimes" / f".removed-{runtime.record.runtime_id}" / "left").mkdir(parents=True)
            with pytest.raises(OSError, match="not empty"):
                await made.stop(runtime)
        (tmp_path / "runtimes" / f".removed-{other.record.runtime_id}" / "left").rmdir()
        await made._sweep()
        assert made._all.keys() == {stuck.record.runtime_id}
