"""Engines that are absent, broken, hanging or something else: each is told in one sentence, and nothing hangs."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys

import pytest
from aiohttp import web

from agent_sdk.protocol.errors import (
    EngineUnavailable,
    ImageUnavailable,
    NotFound,
    WorkspaceUnavailable,
)
from tests.conftest import let_others_through
from tests.docker.fake_engine import INFO, VERSION, FakeEngine, never, slam, stream
from workspaces.backend.docker.engine import Engine, engine_version
from workspaces.backend.docker.engine_streams import LONGEST_LINE

DEEP = '{"x": ' + "[" * 100_000
"""Deeper than anybody reads."""
HASTE = 0.1
"""Of the limits of time: what hangs is given up after 1 s instead of 10."""


@pytest.fixture
async def fake(tmp_path):
    async with FakeEngine(tmp_path).listening() as fake:
        yield fake


@pytest.fixture
async def engine(fake):
    async with Engine(fake.url, patience=HASTE) as engine:
        yield engine


def repr_of(said):
    return repr(said)[:20]


async def refusal(url, kind=EngineUnavailable):
    with pytest.raises(kind) as refused:
        async with Engine(url, patience=HASTE):
            pass
    assert "\n" not in str(refused.value)
    assert refused.value.details["phase"] == "engine"
    return str(refused.value)


# --- whether there is one ---


async def test_a_missing_socket_says_how_to_start_the_engine(tmp_path):
    said = await refusal(f"unix://{tmp_path}/none.sock")
    assert said == f"there is no engine at unix://{tmp_path}/none.sock: start Docker, or set DOCKER_HOST"


async def test_a_socket_that_nobody_serves_says_so(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/dead.sock")
    assert "nothing listens at" in await refusal(f"unix://{tmp_path}/dead.sock")


async def test_a_port_that_nobody_serves_says_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "nothing listens at tcp://127.0.0.1" in await refusal(f"tcp://127.0.0.1:{port}")


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to be refused as")
def test_a_user_who_may_not_is_told_which_group_to_join(tmp_path):
    """In a process of its own: root may use every socket."""
    program = f"""
import asyncio, os
from workspaces.backend.docker.engine import engine_version
os.setgid(65534); os.setuid(65534)
try:
    asyncio.run(engine_version("unix:///{tmp_path}/engine.sock"))
except Exception as exc:
    print(type(exc).__name__, exc)
"""
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(f"{tmp_path}/engine.sock")
        os.chmod(f"{tmp_path}/engine.sock", 0o600)
        closed.listen()
        let_others_through(tmp_path)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("EngineUnavailable this user may not use the engine"), done
    assert "group" in done.stdout


async def test_docker_host_counts_before_the_context_and_an_address_before_both(monkeypatch, tmp_path, fake):
    config = tmp_path / ".docker" / "config.json"
    config.parent.mkdir()
    config.write_text('{"currentContext": "nonesuch"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    await refusal(None)
    monkeypatch.setenv("DOCKER_HOST", fake.url)
    async with Engine() as engine:
        assert engine.where == fake.url
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    async with Engine(fake.url) as engine:
        assert engine.where == fake.url


@pytest.mark.parametrize("url", ["docker.sock", "ftp://host", "unix:", "tcp://", "tcp://host:port"])
async def test_an_address_that_makes_no_sense_is_refused(url):
    await refusal(url)


async def test_certificates_that_are_not_there_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    assert "DOCKER_CERT_PATH" in await refusal("tcp://127.0.0.1:2376")


async def test_an_engine_that_speaks_no_tls_is_told_apart(monkeypatch, fake):
    def answer(said):
        return asyncio.start_server(lambda _, writer: (writer.write(said), writer.close()), "127.0.0.1", 0)

    async with await answer(
        b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent HTTP to an HTTPS server."
    ) as server:
        port = server.sockets[0].getsockname()[1]
        assert "HTTPS" in await refusal(f"tcp://127.0.0.1:{port}", WorkspaceUnavailable)


async def test_an_engine_that_is_too_old_is_refused(fake):
    fake.answer("GET /version", {**VERSION, "ApiVersion": "1.24"})
    assert "too old (API 1.24): use Docker 19.03" in await refusal(fake.url)


async def test_an_engine_of_the_future_is_used(fake):
    fake.answer("GET /version", {**VERSION, "ApiVersion": "1.99"})
    fake.answer("GET /v1.99/info", INFO)
    async with Engine(fake.url) as engine:
        assert engine.info.api == "1.99"


@pytest.mark.parametrize(
    "said",
    [
        "",
        "null",
        "[]",
        '"1.41"',
        "<html>",
        "{",
        "{}",
        '{"ApiVersion": null}',
        '{"ApiVersion": "x.y"}',
        "\udcff",
        DEEP,
    ],
    ids=repr_of,
)
@pytest.mark.parametrize("call", ["GET /version", "GET /info"])
async def test_what_is_no_engine_is_told_apart(fake, call, said):
    async def handler(request):
        return web.Response(body=said.encode("utf-8", "surrogateescape"), content_type="application/json")

    fake.on(call, handler)
    assert "DOCKER_HOST" in await refusal(fake.url)


@pytest.mark.parametrize("call", ["GET /version", "GET /info"])
async def test_an_engine_that_hangs_is_given_up(fake, call):
    fake.on(call, never)
    assert "within 1 s" in await refusal(fake.url)


async def test_an_engine_that_stops_in_the_middle_of_an_answer_is_given_up(fake):
    fake.on("GET /info", stream(b'{"Name": ', announced=1000))
    assert "does not answer" in await refusal(fake.url)


async def test_a_connection_that_is_slammed_is_told(fake):
    fake.on("GET /info", slam)
    assert "does not answer" in await refusal(fake.url)


async def test_the_version_is_all_that_is_asked_for_it(fake):
    assert await engine_version(fake.url) == "28.2.2"
    assert fake.calls == ["GET /version"]


# --- calls that fail ---


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        ({"message": "the disk\nis on fire"}, "application/json"),
        ('{"message": "the disk is on fire"}', "text/plain"),
        ("the disk is on fire\n", "text/plain"),
    ],
)
async def test_a_failure_is_passed_on_in_one_line(fake, engine, body, content_type):
    fake.answer("POST /containers/x/start", body, 500, content_type)
    with pytest.raises(EngineUnavailable) as failed:
        await engine.start("x")
    assert (
        str(failed.value)
        == "the engine could not start the container x: the disk is on fire; look at its log"
    )
    assert failed.value.details == {"phase": "start", "status": 500}


@pytest.mark.parametrize("body", [{"error": 1}, [], "{", "", DEEP], ids=repr_of)
async def test_a_failure_that_makes_no_sense_is_one_all_the_same(fake, engine, body):
    fake.answer("POST /containers/x/start", body, 500)
    with pytest.raises(EngineUnavailable):
        await engine.start("x")


async def test_a_novel_is_cut_short(fake, engine):
    fake.answer("POST /containers/x/start", {"message": "x" * 1_000_000}, 500)
    with pytest.raises(EngineUnavailable) as failed:
        await engine.start("x")
    assert len(str(failed.value)) < 3000


async def test_what_does_no_harm_is_asked_again_when_the_connection_was_lost(fake, engine):
    answers = iter([slam, slam])

    async def handler(request):
        return await next(answers, stream(b'{"Id": "x"}'))(request)

    fake.on("GET /containers/x/json", handler)
    async with Engine(fake.url) as patient:
        assert await patient.inspect("x") == {"Id": "x"}
    assert fake.calls.count("GET /containers/x/json") == 3


async def test_a_start_is_never_asked_twice(fake, engine):
    fake.on("POST /containers/x/start", slam)
    with pytest.raises(EngineUnavailable):
        await engine.start("x")
    assert fake.calls.count("POST /containers/x/start") == 1


async def test_a_container_that_hangs_at_its_start_is_removed(fake, engine):
    fake.on("POST /containers/x/start", never)
    fake.answer("DELETE /containers/x")
    with pytest.raises(EngineUnavailable, match="within 2 s"):
        await engine.start("x")
    assert fake.calls[-1] == "DELETE /containers/x?force=1&v=1"


async def test_a_container_whose_creation_hangs_is_looked_for_and_removed(fake, engine):
    fake.on("POST /containers/create", never)
    fake.answer("GET /containers/json", [{"Id": "late"}])
    fake.answer("DELETE /containers/late", status=204)
    with pytest.raises(EngineUnavailable, match="within 3 s"):
        await engine.create("c", {})
    assert fake.calls[-1].startswith("DELETE /containers/late")


async def test_a_container_made_after_its_creation_was_cancelled_is_removed(fake):
    finish, marks = asyncio.Event(), []

    async def create(request):
        marks.append((await request.json())["Labels"]["io.agentserver.create"])
        await finish.wait()
        return web.json_response({"Id": "late"}, status=201)

    async def search(request):
        assert json.loads(request.query["filters"]) == {"label": [f"io.agentserver.create={marks[0]}"]}
        return web.json_response([{"Id": "late"}])

    fake.on("POST /containers/create", create)
    fake.on("GET /containers/json", search)
    fake.answer("DELETE /containers/late", status=204)
    async with Engine(fake.url) as engine:
        task = asyncio.ensure_future(engine.create("c", {"Labels": None}))
        await fake.called("POST /containers/create")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [call for call in fake.calls if call.startswith("DELETE")]
        finish.set()
    assert fake.calls[-1].startswith("DELETE /containers/late")


async def test_a_container_that_is_gone_after_its_creation_is_not_found(fake, engine):
    fake.answer("POST /containers/create", {"Id": "x"}, 201)
    fake.answer("POST /containers/x/start", {"message": "No such container: x"}, 404)
    with pytest.raises(NotFound, match="No such container"):
        await engine.start(await engine.create("c", {}))


@pytest.mark.parametrize("heavy", ["create", "start", "remove"])
async def test_only_so_many_heavy_calls_run_at_a_time(fake, heavy):
    running = most = 0
    gate = asyncio.Event()

    async def handler(request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1
        return web.json_response({"Id": "x"})

    for call in ("POST", "DELETE"):
        fake.on(f"{call} /containers/", handler)
    fake.answer("GET /containers/x/json", {"Id": "x"})
    async with Engine(fake.url, at_once=3) as engine:
        call = {
            "create": lambda name: engine.create(name, {}),
            "start": engine.start,
            "remove": engine.remove,
        }
        calls = [asyncio.ensure_future(call[heavy](f"c{n}")) for n in range(20)]
        await fake.called("POST" if heavy != "remove" else "DELETE")
        assert await engine.inspect("x")  # light calls pass, and by now all that may have been asked
        gate.set()
        await asyncio.gather(*calls)
    assert most == 3


@pytest.mark.parametrize("name", ["../images", "..", "a/b", "a?b", "", "a%2fb", "a\n"])
async def test_a_name_leads_nowhere_else(fake, engine, name):
    before = list(fake.calls)
    for call in (engine.inspect, engine.start, engine.stats):
        with pytest.raises(NotFound):
            await call(name)
    for call in (engine.remove, engine.kill, engine.remove_volume):
        await call(name)
    assert fake.calls == before


# --- events ---


def event(action, id="x", **attributes):
    actor = {"ID": id, "Attributes": attributes}
    return json.dumps({"Action": action, "Actor": actor, "timeNano": 1767225600_500000007}).encode() + b"\n"


@pytest.mark.parametrize("said", [b"y" * (2 << 20), DEEP.encode()], ids=["long", "deep"])
async def test_events_that_make_no_sense_lose_no_death(fake, said):
    """Each time something comes that is no event the containers are looked at."""
    state = {"Running": True}

    async def inspect(request):
        return web.json_response({"State": state})

    async def events(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await fake.called("GET /containers/x/json")
        state.update(Running=False, Status="exited", ExitCode=9)
        await response.write(said + b"\n")
        await asyncio.Event().wait()

    fake.on("GET /containers/x/json", inspect)
    fake.on("GET /events", events)
    async with Engine(fake.url) as engine:
        assert (await engine.watch("x").died).exit_code == 9


async def test_a_stream_of_events_that_ends_is_taken_up_where_it_ended(fake):
    fake.answer("GET /containers/x/json", {"State": {"Running": True}})
    answers = iter([stream(event("oom")), slam, stream(event("die", exitCode="137"), end=False)])

    async def events(request):
        return await next(answers)(request)

    fake.on("GET /events", events)
    async with Engine(fake.url) as engine:
        death = await engine.watch("x").died
    assert (death.exit_code, death.cause) == (137, "oom")
    since = [call.partition("since=")[2].partition("&")[0] for call in fake.calls if "events" in call]
    assert since == ["1767225600.500000000", "1767225600.500000008", "1767225600.500000008"]


async def test_a_late_event_of_an_earlier_end_is_not_taken_for_one_of_a_container_that_was_started_again(
    fake,
):
    state = {
        "Running": True,
        "StartedAt": "2026-01-01T00:00:01.123456789Z",
    }  # the event is half a second older
    looked = asyncio.Queue()

    async def inspect(request):
        looked.put_nowait(dict(state))
        return web.json_response({"State": state})

    async def events(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await looked.get()
        await response.write(event("die", exitCode="9"))
        await looked.get()
        state.update(Running=False, Status="exited", ExitCode=0)
        await response.write(b"no event\n")
        await asyncio.Event().wait()

    fake.on("GET /containers/x/json", inspect)
    fake.on("GET /events", events)
    async with Engine(fake.url) as engine:
        assert (await engine.watch("x").died).exit_code == 0


async def test_an_engine_that_dies_with_its_container_does_not_keep_the_death_secret(fake):
    """The event comes, and then nothing can be asked any more."""
    fake.answer("GET /containers/x/json", {"State": {"Running": True}})

    async def events(request):
        fake.on("GET /containers/x/json", slam)
        return await stream(event("die", exitCode="5"), end=False)(request)

    fake.on("GET /events", events)
    async with Engine(fake.url, patience=0.1) as engine:
        assert (await engine.watch("x").died).exit_code == 5


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss (iproute2)")
async def test_an_engine_on_another_machine_that_is_gone_is_noticed_by_the_kernel(tmp_path):
    """Nothing comes over a stream of events for hours when all is well."""
    async with FakeEngine(tmp_path).listening(tcp=True) as fake:
        fake.answer("GET /containers/x/json", {"State": {"Running": True}})
        fake.on("GET /events", stream(b"\n", end=False))
        async with Engine(fake.url) as engine:
            engine.watch("x")
            await fake.called("GET /containers/x/json")
            await fake.called("GET /events")
            port = fake.url.rpartition(":")[2]
            ss = await asyncio.create_subprocess_exec(
                "ss", "-tnoH", "dst", f"127.0.0.1:{port}", stdout=subprocess.PIPE
            )
            shown, _ = await ss.communicate()
    assert b"timer:(keepalive," in shown


# --- output ---


def written(text):
    """As engines send what was written to standard output."""
    return struct.pack(">BxxxL", 1, len(text)) + text


async def test_a_line_without_end_comes_in_pieces(fake, engine):
    fake.on("GET /containers/x/logs", stream(*[written(b"y" * 16384)] * 20, written(b"\nend\n")))
    lines = [line async for line in engine.follow_logs("x")]
    assert "".join(lines) == "y" * 20 * 16384 + "end"
    assert max(map(len, lines)) < 2 * LONGEST_LINE


async def test_output_that_is_cut_off_is_shown_so_far(fake, engine):
    fake.on("GET /containers/x/logs", stream(written(b"whole\n"), written(b"half")[:-2]))
    assert [line async for line in engine.follow_logs("x")] == ["whole", "ha"]
    assert await engine.logs("x") == "whole\nha"


async def test_last_words_of_a_container_that_cannot_be_asked_for_are_empty(fake, engine):
    for answer in (slam, never):
        fake.on("GET /containers/x/logs", answer)
        assert await engine.logs("x") == ""


# --- images ---


IMAGE = {"Id": "sha256:1", "Os": "linux", "Architecture": "amd64", "Size": 5, "Config": None}


def pulled(*said):
    return stream(*(json.dumps(line).encode() + b"\r\n" for line in said))


def layer(id, status, **detail):
    return {"id": id, "status": status, "progressDetail": detail}


@pytest.fixture
def pulls(fake):
    """Have an image there as soon as it was pulled with this answer."""

    def pulls(handler):
        async def create(request):
            response = await handler(request)
            fake.answer("GET /images/", IMAGE)
            return response

        fake.on("POST /images/create", create)

    return pulls


async def test_a_missing_image_is_pulled_and_its_progress_adds_up(fake, engine, pulls):
    mib = 1 << 20
    pulls(
        pulled(
            {"status": "Pulling from x"},
            layer("a", "Pulling fs layer"),
            layer("a", "Downloading", current=mib, total=4 * mib),
            layer("b", "Downloading", current=mib, total=2 * mib),
            layer("a", "Downloading", current=4 * mib, total=4 * mib),
            layer("a", "Download complete"),
            layer("b", "Download complete"),
            layer("a", "Extracting", current=1, total=9),
            layer("a", "Pull complete"),
        )
    )
    told = []
    image = await engine.image("host.test/x", on_progress=lambda *said: told.append(said))
    assert (image.id, image.name, image.arch, image.size) == ("sha256:1", "host.test/x", "amd64", 5)
    assert "POST /images/create?fromImage=host.test/x&tag=latest" in fake.calls
    assert told == [
        ("pull", mib, 4 * mib),
        ("pull", 2 * mib, 6 * mib),
        ("pull", 5 * mib, 6 * mib),
        ("pull", 6 * mib, 6 * mib),
    ]


async def test_an_image_that_is_there_is_not_pulled_unless_it_must(fake, engine, pulls):
    fake.answer("GET /images/", IMAGE)
    await engine.image("x:1")
    assert not [call for call in fake.calls if "create" in call]
    pulls(pulled({"status": "up to date"}))
    await engine.image("x:1", pull="always")
    assert "POST /images/create?fromImage=x:1" in fake.calls


async def test_a_missing_image_that_may_not_be_pulled_is_refused(fake, engine):
    fake.answer("GET /images/", {"message": "No such image: x:1"}, 404)
    with pytest.raises(ImageUnavailable, match="not on the engine: docker pull x:1"):
        await engine.image("x:1", pull="never")
    assert not [call for call in fake.calls if "create" in call]


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("pull access denied for x, repository does not exist or may require 'docker login'", "docker login"),
        ("manifest for x:1 not found: manifest unknown: manifest unknown", "correct its name"),
        ("no matching manifest for linux/amd64 in the manifest list entries", "another platform"),
        ("Get https://host.test/v2/: dial tcp: lookup host.test: no such host", "docker load"),
        ("write /var/lib/docker/tmp/x: no space left on device", "make room"),
        ("something new", "something new"),
    ],
)
@pytest.mark.parametrize("early", [True, False])
async def test_a_pull_that_fails_says_why_and_what_to_do(fake, engine, said, mend, early):
    if early:
        fake.answer("POST /images/create", {"message": said}, 500 if "space" in said else 404)
    else:
        fake.on("POST /images/create", pulled({"status": "Pulling"}, {"error": said, "errorDetail": {}}))
    with pytest.raises(WorkspaceUnavailable) as failed:
        await engine.image("x:1")
    assert mend in str(failed.value)
    assert failed.value.details["phase"] == "pull"
    assert isinstance(failed.value, EngineUnavailable if "space" in said else ImageUnavailable)


@pytest.mark.parametrize(
    ("stall", "kind", "says"),
    [
        (never, EngineUnavailable, "within 1.2 s"),
        (stream(b'{"status": "Pulling"}\n', end=False), ImageUnavailable, "stood still for 1.2 s"),
    ],
)
async def test_a_pull_that_stands_still_is_given_up(fake, stall, kind, says):
    fake.on("POST /images/create", stall)
    async with Engine(fake.url, patience=0.02) as engine:
        with pytest.raises(kind, match=says):
            await engine.image("x:1")


async def test_a_pull_that_breaks_off_is_told(fake, engine):
    fake.on("POST /images/create", stream(b'{"status": "Pulling"}\n', announced=1000))
    with pytest.raises(ImageUnavailable, match="broke off"):
        await engine.image("x:1")


async def test_an_image_for_another_platform_is_refused(fake, engine, pulls):
    fake.answer("GET /images/", {**IMAGE, "Architecture": "arm64"})
    with pytest.raises(ImageUnavailable, match="x:1 is for linux/arm64, not for linux/amd64"):
        await engine.image("x:1")
    assert (await engine.image("x:1", platform="linux/arm64")).arch == "arm64"
    pulls(pulled({"status": "Pulling"}))
    assert (await engine.image("x:1", platform="linux/amd64")).arch == "amd64"


@pytest.mark.parametrize(
    "name", ["", "../info", "a/../../info", "a b", "a//b", "-x", "a?b", "é", "a" * 600, "a\n"]
)
async def test_a_name_that_no_image_can_have_is_refused_unasked(fake, engine, name):
    before = list(fake.calls)
    with pytest.raises(ImageUnavailable, match="no image can have the name"):
        await engine.image(name)
    assert fake.calls == before


async def test_what_docker_login_left_is_shown_to_the_registry_it_is_for(
    fake, engine, pulls, monkeypatch, tmp_path
):
    config = tmp_path / ".docker" / "config.json"
    config.parent.mkdir()
    key = base64.b64encode(b"me:secret").decode()
    known = {"host.test:5000": {"auth": key}, "other.test": {"auth": "%%"}}
    config.write_text(json.dumps({"auths": {**known, INFO["IndexServerAddress"]: {"identitytoken": "t"}}}))
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = []

    async def create(request):
        shown.append(request.headers.get("X-Registry-Auth"))
        return await pulled({"status": "up to date"})(request)

    pulls(create)
    for name in ("host.test:5000/x:1", "other.test/x:1", "x:1"):
        await engine.image(name, pull="always")
    assert shown[1] is None
    assert [json.loads(base64.urlsafe_b64decode(header)) for header in (shown[0], shown[2])] == [
        {"username": "me", "password": "secret", "serveraddress": "host.test:5000"},
        {"identitytoken": "t", "serveraddress": INFO["IndexServerAddress"]},
    ]


@pytest.fixture
def shown(fake, engine, pulls, monkeypatch, tmp_path):
    """Pull an image with this configuration of `docker`; what the engine was shown for its registry."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "elsewhere").mkdir()

    async def shown(image, config):
        headers = []

        async def create(request):
            headers.append(request.headers.get("X-Registry-Auth"))
            return await pulled({"status": "up to date"})(request)

        pulls(create)
        (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
        await engine.image(image, pull="always")
        return None if headers[0] is None else json.loads(base64.urlsafe_b64decode(headers[0]))

    return shown


@pytest.mark.parametrize("image", ["docker.io/org/x", "index.docker.io/org/x:1", "docker.io/x"])
async def test_a_login_to_the_hub_counts_for_every_name_of_it_wherever_docker_keeps_it(shown, image):
    config = {"auths": {"https://index.docker.io/v1/": {"auth": base64.b64encode(b"me:secret").decode()}}}
    key = await shown(image, config)
    assert (key["username"], key["password"]) == ("me", "secret")


@pytest.mark.parametrize("address", ["https://host.test:5000/v1/", "http://host.test:5000", "host.test:5000"])
async def test_a_login_counts_however_its_registry_was_written(shown, address):
    key = await shown("host.test:5000/a/x", {"auths": {address: {"username": "me", "password": "secret"}}})
    assert key == {"username": "me", "password": "secret", "serveraddress": "host.test:5000"}


@pytest.mark.parametrize(
    "config", [{"credsStore": "ours"}, {"credHelpers": {"host.test": "ours"}, "credsStore": "none"}]
)
async def test_a_credential_helper_is_asked_and_one_that_fails_is_as_if_it_were_not_there(
    shown, config, tmp_path
):
    helper = tmp_path / "docker-credential-ours"
    helper.write_text(
        '#!/bin/sh\nread registry\necho "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"$registry\\"}"\n'
    )
    helper.chmod(0o755)
    assert await shown("host.test/x", config) == {"identitytoken": "host.test", "serveraddress": "host.test"}
    helper.write_text("#!/bin/sh\necho credentials not found in native keychain; exit 1\n")
    assert await shown("host.test/x", config) is None


async def test_the_current_context_is_looked_for_where_docker_keeps_it(monkeypatch, tmp_path, fake):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    (tmp_path / "config.json").write_text('{"currentContext": "ours"}')
    meta = tmp_path / "contexts/meta" / hashlib.sha256(b"ours").hexdigest()
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(json.dumps({"Endpoints": {"docker": {"Host": fake.url}}}))
    async with Engine() as engine:
        assert engine.where == fake.url
