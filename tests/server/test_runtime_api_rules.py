"""Who may use the Runtime API, how much of it, and what it refuses."""

import asyncio
import io

import pytest

from agent_server.config.options import GIB, RuntimeConfig, TenantConfig
from agent_server.config.sources import StartRefused
from agent_server.runtime_api.service import Tenants
from tests.server.test_runtime_api import ALICE, BOB, IMAGE, client, options

NOBODY = {"runtime_id": "01900000-0000-7000-8000-000000000000"}


def small(**quota):
    """A tenant with quotas, and one without."""
    return options(tenants={"alice": TenantConfig(key=ALICE, **quota), "bob": TenantConfig(key=BOB)})


def said(answer):
    return answer["error"]["message"]


# --- keys ---


async def test_without_tenants_the_key_is_the_servers_own(start):
    async with start(runtime_api="process") as server:
        async with client(server, server.key) as api:
            assert await api.ask("GET", "/list") == {"runtimes": []}
        async with client(server) as api:
            assert said(await api.ask("GET", "/list", 401)) == "wrong API key"


@pytest.mark.parametrize("path", ["/list", "/sessions/one", "/start", "/stop", "/pause", "/resume"])
async def test_nothing_is_told_without_a_key(start, path):
    async with start(**options()) as server, client(server, key=None) as api:
        method = "GET" if path in ("/list", "/sessions/one") else "POST"
        assert "X-API-Key" in said(await api.ask(method, path, 401))


async def test_a_wrong_address_is_told_with_those_that_there_are(start):
    async with start(**options()) as server, client(server) as api:
        for method, path in (("POST", "/starts"), ("GET", "/session/one"), ("GET", "/start")):
            assert f"the Runtime API has no {method} {path}" in said(await api.ask(method, path, 404))
        assert "Authorization: Bearer KEY" in said(await api.ask("GET", "/v1/conversations", 401))
    async with start() as server, client(server) as api:
        assert "runs no Runtime API" in said(await api.ask("POST", "/start", 404))


async def test_the_key_of_a_tenant_opens_nothing_else(start):
    async with start(**options()) as server, client(server) as api:
        await api.ask("GET", "/v1/conversations", 401)
        await api.ask("GET", "/v1/conversations", 401, headers={"Authorization": f"Bearer {ALICE}"})


async def test_many_wrong_keys_of_one_address_have_to_wait(start):
    async with start(**options()) as server:
        async with client(server, "wrong") as api:
            for _ in range(5):
                await api.ask("GET", "/list", 401)
            await api.ask("GET", "/list", 429)
        async with client(server) as api:
            await api.ask("GET", "/list")


async def test_when_it_is_off_its_addresses_are_none(start):
    async with start() as server, server.http() as http:
        for path in ("/list", "/sessions/one", "/runtimes/one/health"):
            async with http.get(path) as answer:
                assert answer.status == 404


async def test_tenants_see_their_own_sessions_only(start):
    async with start(**options()) as server, client(server) as alice, client(server, BOB) as bob:
        mine = await alice.start(wait=0)
        assert (await bob.ask("GET", "/list"))["runtimes"] == []
        await bob.session(status=404)
        unknown = await bob.verb("stop", NOBODY, 404)
        for verb in ("stop", "pause", "resume"):
            refused = await bob.verb(verb, mine, 404)
            assert said(refused).replace(mine["runtime_id"], NOBODY["runtime_id"]) == said(unknown)
        theirs = await bob.start(wait=0)
        assert theirs["runtime_id"] != mine["runtime_id"]
        assert theirs["session_api_key"] != mine["session_api_key"]


async def test_the_key_of_one_runtime_does_not_open_another(start):
    async with start(**options()) as server, client(server) as alice, client(server, BOB) as bob:
        mine, theirs = await asyncio.gather(alice.start(), bob.start())
        headers = {"Authorization": f"Bearer {mine['session_api_key']}"}
        async with server.http(None) as http:
            async with http.get(f"{mine['url']}/v1/conversations", headers=headers) as answer:
                assert answer.status == 200
            async with http.get(f"{theirs['url']}/v1/conversations", headers=headers) as answer:
                assert answer.status == 401


# --- quotas ---


async def test_a_runtime_too_many_is_refused_until_one_is_stopped(start):
    async with start(**small(sandboxes=1)) as server, client(server) as api, client(server, BOB) as bob:
        first = await api.start("one", wait=0)
        body = {"image": IMAGE, "session_id": "two"}
        async with api.http.post("/start", json=body) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "5")
            assert said(await answer.json()) == "limit 1 runtimes of alice; stop one"
        await api.start("one", wait=0)  # the same one
        await bob.start("two", wait=0)
        await api.verb("stop", first)
        await api.start("two", wait=0)


@pytest.mark.parametrize("quota", [{"cpus": 3.0}, {"memory": 6 * GIB}], ids=["cpus", "memory"])
async def test_what_runs_together_stays_within_the_quota(start, quota):
    async with start(**small(**quota)) as server, client(server) as api:
        first = await api.start("one", wait=0, resource_factor=2)
        assert "are in use" in said(await api.start("two", status=429, resource_factor=2))
        assert "alice may have" in said(await api.start("two", status=403, resource_factor=4))
        await api.verb("pause", first)  # what is paused does not count
        await api.start("two", wait=0, resource_factor=2)
        assert "are in use" in said(await api.verb("resume", first, 429))


# --- bad input ---


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"resource_factor": 3}, "resource_factor must be 1, 2, 4 or 8 (got 3)"),
        ({"resource_factor": "2"}, "$.resource_factor"),
        ({"session_id": "../../etc"}, "$.session_id"),
        ({"session_id": ""}, "$.session_id"),
        ({"session_id": "x" * 129}, "$.session_id"),
        ({"image": ""}, "$.image"),
        ({"image": None}, "$.image"),
        ({"environment": {"1A": "b"}}, "$.environment"),
        ({"environment": {"AGENT_SERVER_API_KEY": "mine"}}, "$.environment"),
        ({"environment": {"A": "b\0c"}}, "$.environment"),
        ({"environment": {"A": "x" * 140_000}}, "environment: at most 131071 bytes as JSON, got 140033"),
        ({"environment": {f"A{i}": "x" * 1000 for i in range(160)}}, "environment: at most 131071 bytes"),
        ({"image_pull_policy": "Sometimes"}, "$.image_pull_policy"),
        ({"command": "sh -c 'x"}, "command: No closing quotation; write a program and its arguments"),
        ({"command": " "}, "command: it has no word"),
        ({"command": []}, "command: it has no word"),
        ({"command": ["x", 1]}, "$.command"),
        ({"command": "a\0b"}, "$.command"),
        ({"working_dir": "etc"}, "$.working_dir"),
        ({"run_as_user": -1}, "$.run_as_user"),
        ({"run_as_user": "root"}, "$.run_as_user"),
        ({"fs_group": 1 << 31}, "$.fs_group"),
    ],
)
async def test_a_body_that_does_not_fit_is_refused_and_starts_nothing(start, body, sentence):
    async with start(**options()) as server, client(server) as api:
        answer = await api.ask("POST", "/start", 400, json={"image": IMAGE, "session_id": "one", **body})
        assert sentence in said(answer)
        assert await api.ask("GET", "/list") == {"runtimes": []}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"x": ' + b"[" * 100_000],
    ids=["empty", "half", "list", "null", "bytes", "deep"],
)
async def test_a_body_that_is_no_object_is_refused(start, body):
    async with start(**options()) as server, client(server) as api:
        for path in ("/start", "/stop"):
            assert "the body does not fit" in said(await api.ask("POST", path, 400, data=body))


async def test_a_body_that_is_too_long_is_refused(start):
    async with start(**options()) as server, client(server) as api:
        await api.ask("POST", "/start", 413, data=io.BytesIO(bytes(2 << 20)))


@pytest.mark.parametrize("wait", ["-1", "61", "soon", "nan"])
async def test_a_wait_that_is_none_is_refused(start, wait):
    async with start(**options()) as server, client(server) as api:
        await api.start(wait=0)
        assert "?wait must be 0..60" in said(await api.session(status=400, wait=wait))


async def test_a_body_that_says_nothing_of_its_length_has_the_same_limit(start):
    async def pieces():
        for _ in range(17):
            yield b" " * (64 << 10)

    async with start(**options()) as server, client(server) as api:
        refused = await api.ask("POST", "/start", 413, data=pieces())
        assert said(refused) == "a body of more than 1048576 bytes"


async def test_what_others_ask_for_besides_is_not_looked_at(start):
    async with start(**options()) as server, client(server) as api:
        assert (await api.start(wait=0, new=[]))["status"] == "running"


async def test_only_the_classes_that_the_operator_names_may_be_asked_for(start):
    classes = {"safe": "runsc", "usual": ""}
    async with start(**options(runtime_classes=classes)) as server, client(server) as api:
        refused = await api.start(status=403, runtime_class="runc")
        assert said(refused) == "runtime_class: there is no 'runc' here; allowed are safe, usual"
        await api.start("two", wait=0, runtime_class="usual")


async def test_a_class_that_isolates_is_refused_where_runtimes_are_processes(start):
    async with start(**options()) as server, client(server) as api:
        refused = await api.start(status=403, runtime_class="gvisor")
        assert said(refused).startswith("runtime_class: runtimes are processes here")
        assert (await api.ask("GET", "/list"))["runtimes"] == []


async def test_images_of_others_are_not_started_unless_the_operator_names_them(start):
    async with start(**options()) as server, client(server) as api:
        assert "may not be started here" in said(await api.start(status=403, image="registry.example/x:1"))


async def test_only_the_images_that_are_allowed_are_started(start):
    async with start(**options(images=("mine/*", "agent-server:?"))) as server, client(server) as api:
        refused = await api.start(status=403)
        assert said(refused) == (
            f"the image {IMAGE} may not be started here; allowed are mine/*, agent-server:?"
        )
        await api.start(wait=0, image="mine/server:2")


async def test_each_runtime_may_have_a_name_of_its_own(start):
    async with start(**options(url="https://{id}.agents.example")) as server, client(server) as api:
        runtime = await api.start(wait=0)
        assert runtime["url"] == f"https://{runtime['runtime_id']}.agents.example"
        headers = {"Host": f"{runtime['runtime_id']}.agents.example"}
        await api.start()
        async with api.http.get("/list", headers=headers) as answer:
            assert answer.status in (401, 404)  # of the runtime, which has no such address


async def test_urls_are_those_that_the_operator_gave(start):
    async with start(**options(url="https://agents.example/")) as server, client(server) as api:
        runtime = await api.start(wait=0)
        assert runtime["url"] == f"https://agents.example/runtimes/{runtime['runtime_id']}"


# --- configuration ---


def test_two_tenants_with_the_same_key_are_refused():
    config = RuntimeConfig(tenants={"a": TenantConfig(key=ALICE), "b": TenantConfig(key=ALICE)})
    with pytest.raises(StartRefused, match=r"tenants\.b: another tenant has the same key"):
        Tenants(config, "own")


def test_a_key_may_be_in_a_file(tmp_path):
    (tmp_path / "key").write_text(f"{ALICE}\n")
    config = RuntimeConfig(cpus=4.0, tenants={"a": TenantConfig(key_file=str(tmp_path / "key"), sandboxes=2)})
    tenant = Tenants(config, "own").check([ALICE], "127.0.0.1")
    assert (tenant.name, tenant.sandboxes, tenant.cpus, tenant.memory) == ("a", 2, 4.0, None)


def test_a_key_file_that_is_missing_is_told(tmp_path):
    config = RuntimeConfig(tenants={"a": TenantConfig(key_file=str(tmp_path / "none"))})
    with pytest.raises(StartRefused, match="the API key cannot be read"):
        Tenants(config, "own")
