"""agent-server health and config: what operators and their supervisors ask."""

import asyncio
import json
import re

import pytest
from aiohttp import web

from agent_server.data_folder import ADDRESS_FILE
from tests.conftest import serving

KEY = "k" * 40


def test_a_server_is_found_by_its_data_folder_on_whatever_port(perform, running_server):
    done = perform("health", "--data", str(running_server.data))
    assert (done.returncode, done.stdout.decode()) == (0, f"ok ({running_server.url})\n")
    assert perform("health", AGENT_SERVER_DATA=str(running_server.data)).returncode == 0


def test_a_server_is_found_by_its_address(perform, running_server):
    assert perform("health", "--url", running_server.url).returncode == 0


def test_a_folder_without_a_server_is_one_sentence(perform, tmp_path):
    done = perform("health", "--data", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        f"agent-server: no server runs with the data folder {tmp_path}; "
        "name it with --data, or its address with --url or AGENT_SERVER_URL\n"
    )


def test_the_address_goes_with_the_server(tmp_path):
    with serving(tmp_path / "data") as server:
        assert (server.data / ADDRESS_FILE).read_text() == f"{server.url}\n"
    assert not (server.data / ADDRESS_FILE).exists()


def test_a_server_that_was_killed_is_not_healthy(perform, tmp_path):
    (tmp_path / ADDRESS_FILE).write_text("http://127.0.0.1:9\n")
    done = perform("health", "--data", str(tmp_path))
    assert (done.returncode, done.stdout) == (69, b"")
    assert done.stderr.startswith(b"agent-server: cannot reach http://127.0.0.1:9: ")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (web.Response(text="ok"), "is no agent server: it answered 200 OK; is it the right host and port?"),
        (
            web.Response(text="ok", headers={"Server": "agent-server"}),
            "is no agent server: it answered 200 OK",
        ),
        (
            web.Response(text='{"x": ' + "[" * 100_000, headers={"Server": "agent-server"}),
            "is no agent server: it answered 200 OK",
        ),
        (web.Response(status=503, headers={"Server": "agent-server"}), "is shutting down"),
        (
            web.Response(status=307, headers={"Location": "http://127.0.0.1:9/"}),
            "redirects to http://127.0.0.1:9/",
        ),
    ],
    ids=["somebody else", "no JSON", "deep", "refuses", "leads elsewhere"],
)
async def test_what_is_no_healthy_agent_server_is_told(shell, aiohttp_server, answer, sentence):
    async def health(request: web.Request) -> web.Response:
        return answer

    app = web.Application()
    app.router.add_get("/health", health)
    server = await aiohttp_server(app)
    done = await asyncio.to_thread(shell.run, "health", "--url", f"http://127.0.0.1:{server.port}")
    assert (done.returncode, done.stdout) == (69, b"")
    assert f"agent-server: http://127.0.0.1:{server.port} {sentence}".encode() in done.stderr


def test_the_server_is_that_of_the_environment_as_for_other_commands(perform, running_server, tmp_path):
    done = perform("health", AGENT_SERVER_URL=f"{running_server.url}/")
    assert (done.returncode, done.stdout.decode()) == (0, f"ok ({running_server.url})\n")
    done = perform("health", "--data", str(tmp_path))
    assert b"no server runs with the data folder" in done.stderr


@pytest.mark.parametrize(
    ("path", "hint"),
    [("/v1", "leave out /v1 at the end of the URL"), ("/console/", "is its path /console right?")],
)
def test_a_url_that_goes_too_far_is_told(perform, running_server, path, hint):
    done = perform("health", "--url", f"{running_server.url}{path}")
    where = f"{running_server.url}{path.rstrip('/')}"
    assert done.stderr.decode() == f"agent-server: {where} leads nowhere on the agent server there; {hint}\n"
    assert done.returncode == 69


def test_a_url_that_is_none_is_wrong_usage(perform):
    done = perform("health", AGENT_SERVER_URL="localhost:8000")
    assert b"'localhost:8000' is no URL of a server; it looks like http://" in done.stderr
    assert done.returncode == 2


def test_every_option_is_shown_with_its_source_and_secrets_are_not(perform, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text(f'[server]\napi_key = "{KEY}"\nport = 81\n')
    file.chmod(0o600)
    done = perform("config", "--config", str(file), "--host", "::1", AGENT_SERVER_HOTS="x")
    lines = done.stdout.decode().splitlines()
    assert re.split(r"  +", lines[0]) == ["OPTION", "VALUE", "SOURCE"]
    rows = {row[0]: tuple(row[1:]) for row in (re.split(r"  +", line) for line in lines[1:])}
    assert rows["server.port"] == ("81", f"{file}:3:1")
    assert rows["server.host"] == ("::1", "--host")
    assert rows["server.api_key"] == ("[secret]", f"{file}:2:1")
    assert rows["limits.calls"] == ("64", "default")
    assert KEY not in done.stdout.decode()
    assert done.stderr.decode() == "agent-server: AGENT_SERVER_HOTS is no option; did you mean host?\n"


def test_options_are_one_json_object_per_line_for_programs(perform):
    done = perform("config", "--json", "--port", "5")
    found = {line["option"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found["server.port"] == {"option": "server.port", "value": 5, "source": "--port"}


def test_a_wrong_option_is_refused_as_the_server_refuses_it(perform):
    done = perform("config", AGENT_SERVER_PORT="x")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"agent-server: AGENT_SERVER_PORT must be 1..65535")
