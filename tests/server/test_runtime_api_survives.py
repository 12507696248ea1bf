"""What becomes of runtimes when they, or the server that started them, are killed."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientError

from agent_sdk.protocol.errors import RemoteApiError
from tests.chaos.server import KEY, Server, cmdline, killed, processes
from tests.server.test_runtime_api import IMAGE, client, options, workspace
from workspaces import APIRemoteWorkspace


@asynccontextmanager
async def running(tmp_path, **more):
    async with Server(tmp_path, runtime_api="process", **more) as server:
        assert await server.start()
        server.url = f"http://127.0.0.1:{server.port}"
        yield server


def runtimes(folder):
    """Pids of the servers that were started for tenants of the one with this data folder."""
    mark = str(folder / "data" / "runtimes")
    found = ((process.pid, cmdline(process)) for process in processes())
    return [pid for pid, words in found if "agent_server" in words and any(mark in word for word in words)]


async def asked(server, method, path, **options):
    async with client(server, KEY) as api:
        return await api.ask(method, path, **options)


async def started(server, session="one", wait=30):
    return await asked(server, "POST", f"/start?wait={wait}", json={"image": IMAGE, "session_id": session})


# --- the server that started them ---


async def test_a_runtime_goes_on_when_the_runtime_api_is_killed_and_is_found_again(tmp_path):
    async with running(tmp_path) as server:
        runtime = await started(server)
        (pid,) = runtimes(tmp_path)
        async with workspace(runtime) as there:
            going_on = await there.start("echo begun; read line; echo $line")
            await server.restart()
            assert runtimes(tmp_path) == [pid]
            assert await asked(server, "GET", "/sessions/one?wait=30") == runtime
            await going_on.write(b"still here\n")
            assert b"".join([piece async for piece in going_on.output()]) == b"begun\nstill here\n"


async def test_a_client_that_waits_for_a_start_gets_its_runtime_from_the_next_server(tmp_path):
    async with running(tmp_path) as server:
        waiting = asyncio.Event()

        def on_progress(phase, done, total):
            if phase == "ready":
                waiting.set()

        there = APIRemoteWorkspace(server.url, KEY, IMAGE, on_progress=on_progress)
        entering = asyncio.create_task(there.__aenter__())
        await waiting.wait()
        await server.restart()
        await entering
        assert (await there.execute("echo hi")).stdout == "hi\n"
        assert len(runtimes(tmp_path)) == 1
        await there.__aexit__(None, None, None)
        assert runtimes(tmp_path) == []


@pytest.mark.parametrize("turns", [0, 1, 5, 50, 500])
async def test_a_start_that_was_killed_at_any_moment_leaves_one_server(tmp_path, turns):
    async with running(tmp_path) as server:
        first = await started(server, wait=0)
        for _ in range(turns):  # it goes on for the time of so many system calls
            await asyncio.to_thread(lambda: None)
        await server.restart()
        found = await asked(server, "GET", "/sessions/one?wait=30")
        assert (found["runtime_id"], found["pod_status"]) == (first["runtime_id"], "ready")
        assert len(runtimes(tmp_path)) == 1


async def test_a_stop_that_was_killed_is_finished_by_the_next_server(tmp_path):
    async with running(tmp_path) as server:
        runtime = await started(server)
        async with workspace(runtime) as there:
            await there.execute("true")

        async def stop():
            with pytest.raises(ClientError):
                await asked(server, "POST", "/stop", json={"runtime_id": runtime["runtime_id"]})

        stopping = asyncio.create_task(stop())
        while "wanted" not in (text := record(tmp_path, runtime)) or '"gone"' not in text:
            await asyncio.to_thread(lambda: None)
        await server.kill()
        await stopping
        assert await server.start()
        await server.said("runtime_removed", runtime=runtime["runtime_id"])
        assert runtimes(tmp_path) == []
        assert server.boxes() == []
        assert await asked(server, "GET", "/list") == {"runtimes": []}


def record(folder, runtime):
    return (folder / "data" / "runtimes" / runtime["runtime_id"] / "session.json").read_text()


async def test_a_paused_runtime_is_still_paused_after_a_restart(tmp_path):
    async with running(tmp_path) as server:
        runtime = await started(server)
        await asked(server, "POST", "/pause", json={"runtime_id": runtime["runtime_id"]})
        await server.restart()
        assert (await asked(server, "GET", "/sessions/one"))["status"] == "paused"
        assert runtimes(tmp_path) == []
        resumed = await asked(server, "POST", "/resume?wait=30", json={"runtime_id": runtime["runtime_id"]})
        assert resumed["pod_status"] == "ready"


@pytest.mark.parametrize(("boxes_on_stop", "left"), [("keep", 1), ("end", 0)])
async def test_a_server_that_is_stopped_leaves_runtimes_as_it_leaves_boxes(tmp_path, boxes_on_stop, left):
    async with running(tmp_path, boxes_on_stop=boxes_on_stop) as server:
        runtime = await started(server)
        assert await server.stop() == 0
        assert len(runtimes(tmp_path)) == left
        assert await server.start()
        assert (await asked(server, "GET", "/sessions/one?wait=30"))["runtime_id"] == runtime["runtime_id"]


async def test_a_record_that_makes_no_sense_costs_that_runtime_alone(tmp_path):
    async with running(tmp_path) as server:
        one, two = await started(server), await started(server, "two")
        await server.stop()
        (tmp_path / "data" / "runtimes" / one["runtime_id"] / "session.json").write_text("{")
        assert await server.start()
        await server.said("runtime_unreadable")
        shown = (await asked(server, "GET", "/list"))["runtimes"]
        assert [runtime["runtime_id"] for runtime in shown] == [two["runtime_id"]]


# --- the runtime ---


@pytest.fixture
async def server(start):
    async with start(**options()) as server:
        yield server


async def test_a_runtime_that_dies_is_started_again_with_its_files(server, tmp_path):
    async with client(server) as api:
        runtime = await api.start()
        async with workspace(runtime) as there:
            await there.execute("echo kept > file")
            await killed(*runtimes(tmp_path))
            assert (await there.execute("cat file")).stdout == "kept\n"
        shown = await api.session(wait=30)
        assert (shown["pod_status"], shown["restart_count"]) == ("ready", 1)
        assert shown["restart_reasons"] == ["the server was ended by signal 9"]
        assert {**shown, "restart_count": 0, "restart_reasons": [], "container_statuses": []} == {
            **runtime,
            "container_statuses": [],
        }


async def test_a_runtime_that_dies_again_and_again_is_given_up_and_its_clients_are_told(server, tmp_path):
    async with client(server) as api:
        shown = await api.start()
        async with APIRemoteWorkspace(
            server.url, api.http.headers["X-API-Key"], IMAGE, session_id="one"
        ) as there:
            waiting = await there.start("sleep 1000")
            for count in range(4):
                while shown["restart_count"] < count or shown["pod_status"] == "pending":
                    shown = await api.session(wait=30)
                await killed(*runtimes(tmp_path))
            with pytest.raises(RemoteApiError, match="crashed again and again") as told:
                await waiting.wait()
            assert "server_started" in str(told.value)
        assert runtimes(tmp_path) == []


async def test_a_runtime_that_cannot_start_has_failed_with_its_log_and_may_be_started_again(
    server, api_folder
):
    async with client(server) as api:
        runtime = await api.start()
        await api.verb("pause", runtime)
        data = api_folder / runtime["runtime_id"] / "data"
        data.rename(data.with_name("kept"))
        data.write_text("in the way")
        failed = await api.ask("POST", "/resume?wait=30", json={"runtime_id": runtime["runtime_id"]})
        assert (failed["status"], failed["pod_status"]) == ("error", "failed")
        assert "the data folder" in failed["pod_logs"]
        data.unlink()
        data.with_name("kept").rename(data)
        assert (await api.start())["pod_status"] == "ready"


@pytest.fixture
def api_folder(tmp_path):
    return tmp_path / "data" / "runtimes"
