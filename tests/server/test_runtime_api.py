"""The Runtime API over HTTP, with processes behind it."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession

from agent_sdk import RemoteWorkspace
from agent_server.config.options import RuntimeConfig, TenantConfig

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789ab"
TENANTS = {"alice": TenantConfig(key=ALICE), "bob": TenantConfig(key=BOB)}
IMAGE = "agent-server:latest"


def options(**config):
    return {"runtime_api": "process", "runtimes": RuntimeConfig(**{"tenants": TENANTS, **config})}


class Api:
    """What a client of the Runtime API does."""

    def __init__(self, http: ClientSession) -> None:
        self.http = http

    async def ask(self, method, path, status=200, **options):
        async with self.http.request(method, path, **options) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json()

    async def start(self, session="one", *, status=200, wait=30, **more):
        body = {"image": IMAGE, "session_id": session, **more}
        return await self.ask("POST", f"/start?wait={wait}", status, json=body)

    async def verb(self, name, runtime, status=200):
        return await self.ask("POST", f"/{name}", status, json={"runtime_id": runtime["runtime_id"]})

    async def session(self, id="one", status=200, wait=0):
        return await self.ask("GET", f"/sessions/{id}?wait={wait}", status)


@asynccontextmanager
async def client(server, key=ALICE):
    async with ClientSession(server.url, headers={"X-API-Key": key} if key else {}) as http:
        yield Api(http)


@pytest.fixture
async def server(start):
    async with start(**options()) as server:
        yield server


@pytest.fixture
async def api(server):
    async with client(server) as api:
        yield api


def workspace(runtime):
    return RemoteWorkspace(runtime["url"], runtime["session_api_key"])


def processes(data: Path) -> set[int]:
    """The processes that were started for something below this folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(data).encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


# --- one runtime ---


async def test_a_started_runtime_is_an_agent_server_behind_the_same_port(server, api):
    runtime = await api.start()
    assert runtime["url"].startswith(f"{server.url}/runtimes/")
    assert (runtime["status"], runtime["pod_status"]) == ("running", "ready")
    async with workspace(runtime) as there:
        assert (await there.execute("echo $((6 * 7))")).stdout == "42\n"


@pytest.mark.parametrize(
    "command",
    [
        None,
        "/opt/agent-server/bin/start serve",
        ["/usr/bin/other", "--port", "60000"],
        ["/usr/bin/other", "--port", "9" * 5000],
    ],
    ids=["none", "ours", "other", "no port"],
)
async def test_the_environment_of_a_runtime_reaches_its_commands_whatever_is_to_be_run(api, command):
    runtime = await api.start(command=command, environment={"COLOUR": "blue", "PYTHONPATH": "/nowhere"})
    assert runtime["pod_status"] == "ready", runtime
    async with workspace(runtime) as there:
        assert (await there.execute("echo $COLOUR $PYTHONPATH")).stdout == "blue /nowhere\n"
        key = await there.execute('test -z "$SESSION_API_KEY$AGENT_SERVER_API_KEY"')
        assert key.exit_code == 0


async def test_a_session_tells_all_that_clients_of_other_runtime_apis_look_at(api):
    started = await api.start()
    shown = await api.session()
    assert shown == started
    assert {"runtime_id", "url", "session_id", "session_api_key", "status", "pod_status"} < set(shown)
    assert (shown["restart_count"], shown["restart_reasons"], shown["pod_logs"]) == (0, [], "")
    assert [status["ready"] for status in shown["container_statuses"]] == [True]
    assert shown["events"] == []


async def test_without_wait_the_answer_comes_while_the_runtime_is_pending(api):
    runtime = await api.start(wait=0)
    assert (runtime["status"], runtime["pod_status"]) == ("running", "pending")
    assert (await api.session(wait=30))["pod_status"] == "ready"


async def test_two_starts_of_a_session_at_once_make_one_runtime(server, api):
    first, second = await asyncio.gather(api.start(), api.start())
    assert first["runtime_id"] == second["runtime_id"]
    assert len((await api.ask("GET", "/list"))["runtimes"]) == 1


async def test_a_stopped_runtime_is_gone_with_its_data_and_its_processes(server, api, tmp_path):
    runtime = await api.start()
    async with workspace(runtime) as there:
        await there.execute("echo kept > file")
    assert processes(tmp_path)
    assert (await api.verb("stop", runtime))["status"] == "stopped"
    assert not processes(tmp_path)
    assert list((tmp_path / "data" / "runtimes").iterdir()) == []
    await api.session(status=404)
    await api.verb("stop", runtime, status=404)


async def test_a_paused_runtime_takes_no_process_and_keeps_its_files(api, tmp_path):
    runtime = await api.start()
    async with workspace(runtime) as there:
        await there.execute("echo kept > file")
        assert (await api.verb("pause", runtime))["status"] == "paused"
        assert not processes(tmp_path)
        assert (await api.session())["status"] == "paused"
        resumed = await api.verb("resume", runtime)
        assert (resumed["status"], resumed["runtime_id"]) == ("running", runtime["runtime_id"])
        assert (await there.execute("cat file")).stdout == "kept\n"


async def test_starting_the_session_of_a_paused_runtime_resumes_it(api):
    runtime = await api.start()
    await api.verb("pause", runtime)
    again = await api.start()
    assert (again["runtime_id"], again["pod_status"]) == (runtime["runtime_id"], "ready")


async def test_a_request_to_a_runtime_that_is_being_started_waits_for_it(server, api):
    runtime = await api.start(wait=0)
    assert runtime["pod_status"] == "pending"
    async with server.http(None) as http, http.get(f"{runtime['url']}/health") as answer:
        assert await answer.json() == {"status": "ok"}
