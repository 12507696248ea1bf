"""APIRemoteWorkspace against Runtime APIs of others: what they are asked, and all that they may answer."""

import asyncio
import json
from collections import defaultdict

import pytest
from aiohttp import web

from agent_sdk.protocol.errors import InvalidParams, RemoteApiError
from workspaces import APIRemoteWorkspace

KEY = "runtime-api-key-0123"
ERROR = {"status": "error"}


class FakeApi:
    """A Runtime API that answers what it is told; the last answer to an address is given again."""

    def __init__(self) -> None:
        self.answers = defaultdict(list)
        self.asked = []
        self.keys = set()
        self.url = ""

    def on(self, call, *answers):
        """An answer is a status and a body, as JSON or as text, and headers."""
        self.answers[call] = list(answers)

    async def handle(self, request):
        self.keys.add(request.headers.get("X-API-Key"))
        body = await request.text()
        name = "session" if request.path.startswith("/sessions/") else request.path[1:]
        self.asked.append((name, json.loads(body) if body else None))
        answers = self.answers[name]
        status, content, *headers = answers.pop(0) if len(answers) > 1 else answers[0]
        if content is None:
            await asyncio.Event().wait()
        text = content if isinstance(content, str) else json.dumps(content)
        return web.Response(status=status, text=text, headers=headers[0] if headers else {})

    def calls(self):
        return [name for name, _ in self.asked]


@pytest.fixture
async def fake_apis(aiohttp_server):
    async def fresh():
        api, app = FakeApi(), web.Application()
        app.router.add_route("*", "/{anything:.*}", api.handle)
        server = await aiohttp_server(app)
        api.url = str(server.make_url("")).rstrip("/")
        return api

    return fresh


@pytest.fixture
async def api(fake_apis, running_server):
    """One that gives the shared server as its runtime, which is ready at once."""
    api = await fake_apis()
    api.runtime = {"runtime_id": "r1", "url": running_server.url, "session_api_key": running_server.api_key}
    api.ready = {**api.runtime, "status": "running", "pod_status": "ready"}
    api.on("session", (404, {"detail": "no"}), (200, api.ready))
    api.on("start", (200, api.runtime))
    for verb in ("stop", "pause", "resume"):
        api.on(verb, (200, {}))
    return api


def there(api, **more):
    return APIRemoteWorkspace(api.url, KEY, "image:1", **{"startup_timeout": 30, **more})


async def refusal(workspace) -> RemoteApiError:
    with pytest.raises(RemoteApiError) as refused:
        async with workspace:
            pytest.fail("it could be entered")
    assert KEY not in str(refused.value)
    return refused.value


# --- what it is asked ---


async def test_a_start_asks_what_every_runtime_api_understands(api):
    async with there(api, env={"A": "b"}, resource_factor=2, runtime_class="gvisor") as workspace:
        assert (await workspace.execute("echo hi")).stdout == "hi\n"
    assert api.calls() == ["session", "start", "session", "stop"]
    assert api.keys == {KEY}
    body = dict(api.asked[1][1])
    assert body.pop("command").startswith("/")
    assert body == {
        "image": "image:1",
        "working_dir": "/",
        "environment": {
            "A": "b",
            "AGENT_SERVER_COMMAND_ENV": '{"A":"b"}',
            "AGENT_SERVER_ALLOW_HOSTS": "*",
        },
        "session_id": workspace.session_id,
        "run_as_user": 10001,
        "fs_group": 10001,
        "image_pull_policy": "IfNotPresent",
        "runtime_class": "gvisor",
        "resource_factor": 2,
    }
    assert api.asked[3] == ("stop", {"runtime_id": "r1"})


async def test_the_usual_factor_and_class_are_not_sent(api):
    async with there(api):
        assert not {"resource_factor", "runtime_class"} & set(api.asked[1][1])


async def test_a_running_session_is_attached_to_and_not_started(api):
    api.on("session", (200, api.ready))
    async with there(api, session_id="mine", keep_alive=True):
        pass
    assert api.calls() == ["session", "session"]


async def test_a_paused_session_is_resumed_and_paused_again_at_the_end(api):
    api.on("session", (200, {**api.ready, "status": "paused"}), (200, api.ready))
    async with there(api, session_id="mine", pause_on_close=True):
        pass
    assert api.calls() == ["session", "resume", "session", "pause"]


async def test_a_runtime_may_be_called_id(api):
    api.on("start", (200, {**api.runtime, "runtime_id": None, "id": "r2"}))
    api.on("session", (404, {}), (200, {**api.ready, "runtime_id": None, "id": "r2"}))
    async with there(api) as workspace:
        assert workspace.runtime_id == "r2"


async def test_states_that_may_pass_are_waited_for(api):
    states = ("not found", "Pending", "running", "whatever", "")
    waiting = [(200, {**api.ready, "pod_status": state}) for state in states]
    api.on("session", (404, {}), *waiting, (200, {**api.ready, "pod_status": "READY"}))
    async with there(api):
        pass
    assert api.calls().count("session") == len(states) + 2


# --- what may pass ---


@pytest.mark.parametrize("call", ["session", "start"])
@pytest.mark.parametrize(
    "answer",
    [
        (429, {}, {"Retry-After": "0"}),
        (425, {}, {"Retry-After": "9" * 5000}),
        (500, "oops"),
        (502, "<html>"),
        (503, {}),
        (408, ""),
    ],
    ids=lambda answer: str(answer[0]),
)
async def test_what_may_pass_is_tried_again(api, call, answer):
    api.on(call, answer, *api.answers[call])
    async with there(api) as workspace:
        assert (await workspace.execute("echo hi")).stdout == "hi\n"


async def test_a_failure_while_it_waits_for_the_runtime_is_tried_again(api):
    api.on("session", (404, {}), (503, "busy"), (200, api.ready))
    async with there(api):
        pass
    assert api.calls().count("start") == 1


async def test_what_does_not_pass_in_time_is_told_with_the_last_answer(api):
    api.on("session", (503, {"detail": "all engines are busy"}))
    error = await refusal(there(api, startup_timeout=0.5))
    assert "was not ready after 0.5 s" in str(error)
    assert "answered 503 to attach: all engines are busy" in str(error)
    assert error.details["status"] == 503


# --- what does not ---


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            401,
            {"detail": "who are you"},
            "answered 401 to attach: who are you; pass the right runtime_api_key",
        ),
        (403, {"error": {"message": "over quota"}}, "answered 403 to attach: over quota"),
        (400, {"error": "bad id"}, "answered 400 to attach: bad id"),
        (418, "", "answered 418 to attach: it says no more"),
        (200, "<html>hello</html>", "is no Runtime API: it answers '<html>hello</html>'"),
        (200, "[]", "is no Runtime API"),
        (200, "[" * 100_000, "is no Runtime API"),
        (400, "[" * 100_000, "answered 400 to attach: [[["),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_refusal_is_one_sentence_at_once(api, status, body, sentence):
    api.on("session", (status, body))
    error = await refusal(there(api))
    assert sentence in str(error)
    assert (error.details["status"], error.details["phase"]) == (status, "attach")
    assert "\n" not in str(error)
    assert api.calls() == ["session"]


@pytest.mark.parametrize("missing", ["url", "runtime_id"])
async def test_a_start_that_does_not_say_where_is_an_error(api, missing):
    api.on("start", (200, {**api.runtime, missing: ""}))
    assert f"says no {missing}" in str(await refusal(there(api)))


async def test_a_url_that_is_none_is_an_error(api):
    odd = {**api.ready, "url": "file:///etc/passwd"}
    api.on("start", (200, odd))
    api.on("session", (404, {}), (200, odd))
    assert "says no url of the runtime" in str(await refusal(there(api)))


@pytest.mark.parametrize(
    ("state", "sentence"),
    [("failed", "did not start"), ("unknown", "did not start"), ("CrashLoopBackOff", "want of memory")],
)
async def test_a_runtime_that_fails_is_told_with_its_logs_and_ended(api, state, sentence):
    failed = {
        **api.ready,
        "pod_status": state,
        "pod_logs": "line one\nexec format error\n",
        "events": ["pulled"],
    }
    api.on("session", (404, {}), (200, failed))
    error = await refusal(there(api))
    assert sentence in str(error)
    assert "pulled | line one | exec format error" in str(error)
    assert api.calls() == ["session", "start", "session", "stop"]


async def test_a_runtime_that_is_never_ready_is_ended(api):
    api.on("session", (404, {}), (200, {**api.ready, "pod_status": "pending"}))
    error = await refusal(there(api, startup_timeout=0.5))
    assert "was not ready after 0.5 s (it is pending)" in str(error)
    assert api.calls()[-1] == "stop"


async def test_a_session_that_vanishes_while_it_is_waited_for_is_an_error(api):
    api.on("session", (404, {}), (200, {**api.ready, "pod_status": "pending"}), (404, {}))
    assert "is gone" in str(await refusal(there(api)))


@pytest.mark.parametrize("status", [400, 404, 409])
async def test_a_resume_that_fails_never_starts_another_runtime(api, status):
    api.on("session", (200, {**api.ready, "status": "paused"}))
    api.on("resume", (status, {"detail": "its disk is gone"}))
    error = await refusal(there(api, session_id="mine"))
    assert f"answered {status} to resume: its disk is gone" in str(error)
    assert not {"start", "stop"} & set(api.calls())


async def test_a_session_that_is_gone_after_a_failed_resume_is_not_started_anew(api):
    api.on("session", (200, {**api.ready, "status": "paused"}), (404, {}))
    api.on("resume", (503, "try later"))
    assert "another runtime would not have its files" in str(await refusal(there(api, session_id="mine")))
    assert "start" not in api.calls()


async def test_a_failed_entry_leaves_a_session_of_others_as_it_was(api):
    api.on("session", (200, {**api.ready, "pod_status": "failed"}))
    await refusal(there(api, session_id="mine"))
    assert not {"stop", "pause"} & set(api.calls())


async def test_a_redirect_is_told_and_the_key_goes_nowhere_else(api, fake_apis):
    other = await fake_apis()
    other.on("session", (200, {}))
    api.on("session", (307, "", {"Location": f"{other.url}/sessions/x"}))
    assert f"redirects to {other.url}" in str(await refusal(there(api)))
    assert other.asked == []


async def test_nobody_at_the_address_is_one_sentence_soon(unused_tcp_port):
    workspace = APIRemoteWorkspace(f"http://127.0.0.1:{unused_tcp_port}", KEY, "image", connect_timeout=0.3)
    assert "cannot reach the Runtime API" in str(await refusal(workspace))


async def test_an_api_that_does_not_answer_is_given_up(api):
    api.on("session", (200, None))
    error = await refusal(there(api, api_timeout=0.2, connect_timeout=0.1))
    assert "did not answer within 0.2 s" in str(error)


async def test_an_answer_without_end_is_not_read_to_its_end(api):
    api.on("session", (200, "x" * (5 << 20)))
    assert "longer than" in str(await refusal(there(api, connect_timeout=0.0)))


@pytest.mark.parametrize("url", ["", "localhost:3000", "ftp://host", "http://"])
async def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(InvalidParams, match="runtime_api_url must start with http"):
        APIRemoteWorkspace(url, KEY, "image")


# --- its end ---


async def test_a_stop_that_fails_is_logged_and_not_raised(api, caplog):
    api.on("stop", (500, "oops"))
    async with there(api):
        pass
    assert api.calls().count("stop") == 3
    assert "may still be there: " in caplog.text


async def test_a_stop_that_fails_for_a_moment_is_tried_again(api, caplog):
    api.on("stop", (503, "busy"), (200, {}))
    async with there(api):
        pass
    assert api.calls().count("stop") == 2
    assert "may still be there" not in caplog.text


async def test_a_runtime_that_is_gone_at_the_end_is_fine(api, caplog):
    api.on("stop", (404, {"detail": "no such runtime"}))
    async with there(api):
        pass
    assert "may still be there" not in caplog.text
