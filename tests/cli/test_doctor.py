"""agent-server doctor: every check, its finding and its mend."""

import asyncio
import json
import socket

import pytest
from aiohttp import web

NAMES = [
    "configuration",
    "python",
    "processes",
    "sqlite",
    "open files",
    "bash",
    "git",
    "box",
    "data folder",
    "disk",
    "server key",
    "port",
    "model",
    "docker",
]


def checks(shell, *words, **environ):
    done = shell.run("doctor", "--port", "0", "--json", *words, **environ)
    assert done.stderr == b""
    found = {check["name"]: check for check in map(json.loads, done.stdout.splitlines())}
    return found, done.returncode


def test_this_machine_can_run_a_server(shell):
    found, code = checks(shell)
    assert list(found) == NAMES
    assert {name for name, check in found.items() if check["state"] == "problem"} == set()
    assert code == 0


def test_whatever_is_not_well_has_a_mend(shell):
    found, _ = checks(shell)
    assert {check["state"] == "ok" for check in found.values() if not check["mend"]} == {True}
    assert {check["mend"] == "" for check in found.values() if check["state"] == "ok"} == {True}


def test_people_get_a_line_for_each_check(shell):
    lines = shell.run("doctor", "--port", "0").stdout.decode().splitlines()
    assert len(lines) == len(NAMES)
    assert lines[1].startswith("ok       python        3.")


def test_it_changes_nothing(shell):
    checks(shell)
    assert list(shell.folder.iterdir()) == []


def test_a_wrong_option_is_a_problem_and_the_rest_is_looked_at(shell):
    found, code = checks(shell, AGENT_SERVER_LOG_LEVEL="loud")
    assert found["configuration"]["state"] == "problem"
    assert found["configuration"]["found"].startswith("AGENT_SERVER_LOG_LEVEL must be debug or info")
    assert (list(found), code) == (NAMES, 1)


def test_a_port_in_use_is_a_problem(shell):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found, code = checks(shell, "--port", str(taken.getsockname()[1]))
    assert (found["port"]["state"], code) == ("problem", 1)
    assert found["port"]["mend"].endswith("--port 0 takes a free one")


def test_a_server_that_runs_already_is_fine(shell, running_server):
    found, _ = checks(shell, "--port", running_server.url.rpartition(":")[2])
    assert found["port"]["state"] == "ok"
    assert found["port"]["found"].startswith("an agent server is running on 127.0.0.1 port ")


@pytest.mark.parametrize("place", ["a-file/data", "/proc/agent-server"])
def test_a_data_folder_that_cannot_be_written_is_a_problem(shell, place):
    (shell.folder / "a-file").touch()
    found, code = checks(shell, "--data", place)
    assert (found["data folder"]["state"], code) == ("problem", 1)


def test_a_key_that_others_can_read_is_a_problem(shell):
    (shell.folder / "data").mkdir()
    (shell.folder / "data" / "api_key").write_text("0123456789abcdef")
    (shell.folder / "data" / "api_key").chmod(0o644)
    found, _ = checks(shell, "--data", "data")
    assert found["server key"]["state"] == "problem"
    assert found["server key"]["mend"] == f"chmod 600 {shell.folder}/data/api_key"


def test_a_machine_without_bash_and_git_is_told_what_to_install(shell):
    found, code = checks(shell, PATH=str(shell.folder))
    assert (found["bash"]["state"], found["git"]["state"], code) == ("problem", "warning", 1)
    assert "install bash" in found["bash"]["mend"]


@pytest.mark.parametrize(
    ("environ", "state", "found"),
    [
        ({}, "warning", "LLM_MODEL is not set"),
        ({"LLM_MODEL": "nobody/x"}, "warning", "names no known provider"),
        ({"LLM_MODEL": "openai/x"}, "warning", "no LLM_API_KEY for api.openai.com"),
        ({"LLM_MODEL": "openai/x", "LLM_API_KEY": "k"}, "ok", "x at api.openai.com"),
        ({"LLM_MODEL": "x", "LLM_BASE_URL": "http://127.0.0.1:9/v1"}, "ok", "x at 127.0.0.1:9"),
    ],
)
def test_the_model_is_checked_without_asking_it(shell, environ, state, found):
    check = checks(shell, **environ)[0]["model"]
    assert check["state"] == state
    assert found in check["found"]


def test_a_machine_without_an_engine_is_only_warned(shell):
    found, code = checks(shell, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert found["docker"]["state"] == "warning"
    assert "the Docker engine does not answer" in found["docker"]["found"]
    assert code == 0


async def test_an_engine_that_answers_tells_its_version(shell):
    async def version(request):
        return web.json_response({"Version": "28.2.2", "ApiVersion": "1.50", "MinAPIVersion": "1.24"})

    app = web.Application()
    app.router.add_get("/{rest:.*}", version)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(shell.folder / "docker.sock")).start()
    host = f"unix://{shell.folder}/docker.sock"
    found, _ = await asyncio.to_thread(checks, shell, DOCKER_HOST=host)
    await runner.cleanup()
    assert (found["docker"]["state"], found["docker"]["found"]) == ("ok", "engine 28.2.2")
