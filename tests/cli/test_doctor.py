"""agent-server doctor: every check, its finding and its mend."""

import errno
import json
import re
import socket

import pytest

from agent_server.app import CANNOT_LISTEN
from agent_server.cli import doctor
from agent_server.cli.doctor import examine_engine, look
from agent_server.cli.main import parse
from agent_server.config.options import load
from agent_server.config.sources import StartRefused
from agent_server.serve import serving
from tests.conftest import let_others_through
from tests.docker.fake_engine import INFO, VERSION, FakeEngine
from tests.server.test_confinement import as_root

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
    "secrets key",
    "runtime api",
    "isolation",
    "port",
    "model",
    "colours",
    "docker",
]


def checks(shell, *words, **environ):
    done = shell.run("doctor", "--port", "0", "--json", *words, **environ)
    assert done.stderr == b""
    found = {check["name"]: check for check in map(json.loads, done.stdout.splitlines())}
    return found, done.returncode


def test_this_machine_can_run_a_server_and_looking_changes_nothing(shell):
    found, code = checks(shell)
    assert list(found)[: len(NAMES)] == NAMES
    assert {name for name, check in found.items() if check["state"] == "problem"} == set()
    assert {check["state"] == "ok" for check in found.values() if not check["mend"]} == {True}
    assert {check["mend"] == "" for check in found.values() if check["state"] == "ok"} == {True}
    assert (code, list(shell.folder.iterdir())) == (0, [])


def test_a_wrong_option_is_a_problem_and_the_rest_is_looked_at(shell):
    nowhere = {"AGENT_SERVER_LOG_LEVEL": "loud", "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    done = shell.run("doctor", "--port", "0", **nowhere)
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("problem  configuration AGENT_SERVER_LOG_LEVEL must be debug or info")
    assert lines[1].startswith("ok       python        3.")
    assert (len(lines), done.returncode) == (len(NAMES), 1)


def test_an_unknown_variable_is_a_warning(monkeypatch):
    monkeypatch.setenv("AGENT_SERVER_HOTS", "x")
    _, check = doctor.configuration(parse(["doctor"]))
    assert check.state == "warning"
    assert check.found.endswith("; AGENT_SERVER_HOTS is no option; did you mean host?")


def test_a_machine_without_bash_and_git_is_told_what_to_install(shell):
    found, code = checks(shell, PATH=str(shell.folder))
    assert (found["bash"]["state"], found["git"]["state"], code) == ("problem", "warning", 1)
    assert "install bash" in found["bash"]["mend"]


def config(**options):
    return load(overrides=options, environ={})


async def test_a_port_in_use_is_a_problem():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        check = await look("port", config(port=taken.getsockname()[1]))
    assert check.state == "problem"
    assert (check.found.partition(": ")[2], check.mend) == tuple(CANNOT_LISTEN[errno.EADDRINUSE].split("; "))


async def test_a_server_that_runs_already_is_fine(running_server):
    number = int(running_server.url.rpartition(":")[2])
    check = await look("port", config(port=number))
    assert (check.state, check.found) == ("ok", f"an agent server is running on 127.0.0.1 port {number}")


async def test_a_host_that_is_not_ours_is_a_problem():
    assert (await look("port", config(host="192.0.2.1", port=0))).state == "problem"


@pytest.mark.parametrize("place", ["{0}/a-file/data", "/proc/agent-server"])
async def test_a_data_folder_that_cannot_be_written_is_a_problem(tmp_path, place):
    (tmp_path / "a-file").touch()
    assert (await look("data folder", config(data=place.format(tmp_path)))).state == "problem"


async def test_a_key_that_others_can_read_is_a_problem(tmp_path):
    file = tmp_path / "api_key"
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    check = await look("server key", config(data=str(tmp_path)))
    assert (check.state, check.mend) == ("problem", f"run: chmod 600 {file}")


REFUSED = {
    "no key file": ({"api_key_file": "{0}/none"}, "server key"),
    "a short key in a file": ({"api_key_file": "{0}/short"}, "server key"),
    "no secrets key file": ({"secrets_key_file": "{0}/none"}, "secrets key"),
    "an empty secrets key file": ({"secrets_key_file": "{0}/empty"}, "secrets key"),
    "a short secrets key": ({"secrets_key": ("short",)}, "secrets key"),
}


@pytest.mark.parametrize(("options", "name"), REFUSED.values(), ids=REFUSED)
async def test_what_keeps_a_server_from_starting_is_a_problem_in_the_same_words(tmp_path, options, name):
    (tmp_path / "short").write_text("secret")
    (tmp_path / "empty").touch()
    given = {
        option: value.format(tmp_path) if isinstance(value, str) else value
        for option, value in options.items()
    }
    wanted = config(data=str(tmp_path / "data"), port=0, **given)
    check = await look(name, wanted)
    with pytest.raises(StartRefused) as refused:
        async with serving(wanted, on_ready=print):
            pass
    assert check.state == "problem"
    assert str(refused.value) in (f"{check.found}; {check.mend}", check.found)


async def test_a_tenant_without_its_key_file_is_a_problem(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[server]\nruntime_api = "process"\n[runtime_api.tenants.a]\nkey_file = "/none"\n'
    )
    check = await look("runtime api", load(tmp_path / "c.toml", environ={}))
    assert (check.state, "/none" in check.found) == ("problem", True)


async def test_without_a_secrets_key_one_is_recommended(tmp_path):
    check = await look("secrets key", config(data=str(tmp_path)))
    assert (check.state, "secrets_key" in check.mend) == ("warning", True)


@as_root
async def test_an_isolation_that_works_here_is_fine_and_leaves_nothing(tmp_path):
    let_others_through(tmp_path)
    check = await look("isolation", config(data=str(tmp_path / "data"), isolation="user"))
    assert (check.state, check.found) == ("ok", "user: a box can be started like this")
    assert list(tmp_path.iterdir()) == []


@as_root
async def test_a_folder_that_boxes_cannot_reach_is_a_problem(tmp_path):
    tmp_path.chmod(0o700)
    check = await look("isolation", config(data=str(tmp_path / "data"), isolation="user"))
    assert (check.state, "cannot reach the data folder" in check.found) == ("problem", True)
    assert "chmod o+x" in check.mend


async def test_a_runtime_api_without_its_engine_is_a_problem():
    ((name, check),) = (await engine_checks("unix:///nowhere/docker.sock", runtime_api="docker")).items()
    assert (name, check.state) == ("docker", "problem")


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
async def test_the_model_is_checked_without_asking_it(monkeypatch, environ, state, found):
    for name in ("LLM_MODEL", "LLM_API_KEY", "LLM_BASE_URL"):
        monkeypatch.setenv(name, environ.get(name, ""))
    check = await look("model", config())
    assert check.state == state
    assert found in check.found


async def engine_checks(url, **options):
    return {name: check async for name, check in examine_engine(config(engine=url, **options))}


async def test_a_machine_without_an_engine_is_only_warned():
    ((name, check),) = (await engine_checks("unix:///nowhere/docker.sock")).items()
    assert (name, check.state) == ("docker", "warning")
    assert check.found == "there is no engine at unix:///nowhere/docker.sock"
    assert check.mend == "start Docker, or set DOCKER_HOST; only containers need it"


@pytest.fixture
async def fake(tmp_path):
    async with FakeEngine(tmp_path).listening() as fake:
        yield fake


SAFE = {
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"],
    "LiveRestoreEnabled": True,
    "LoggingDriver": "local",
    "CgroupVersion": "2",
    "Runtimes": {"runc": {}, "runsc": {"runtimeArgs": ["--host-uds=all", "--host-fifo=open"]}},
}


async def test_an_engine_that_is_set_up_well_needs_no_mend(fake, tmp_path):
    fake.answer("GET /version", {**VERSION, "Components": [{"Name": "runc", "Version": "1.3.3"}]})
    fake.answer("GET /info", {**INFO, **SAFE})
    (tmp_path / "fake.sock").chmod(0o660)
    found = await engine_checks(fake.url)
    looked_at = {name: check.state for name, check in found.items() if name != "sandbox disks"}
    assert set(looked_at.values()) == {"ok"}, found
    assert found["docker"].found == "engine 28.2.2, API 1.50, linux/amd64"
    assert found["engine socket"].found == f"{tmp_path}/fake.sock, mode 660"
    assert found["sandbox disks"].state in ("ok", "warning")


@pytest.mark.parametrize(
    ("said", "name", "mend"),
    [
        ({"LiveRestoreEnabled": False}, "live restore", '"live-restore": true'),
        ({"LoggingDriver": "json-file"}, "engine logs", "max-size"),
        ({"SecurityOptions": None}, "seccomp", "seccomp-profile"),
        ({"SecurityOptions": ["name=seccomp,profile=unconfined"]}, "seccomp", "seccomp-profile"),
        ({"Runtimes": {"runc": {}, "runsc": {}}}, "runtimes", "--host-uds=all"),
        ({"MemoryLimit": False, "SwapLimit": False}, "cgroups", "cgroup_enable=memory"),
    ],
)
async def test_what_an_engine_lacks_is_a_warning_with_its_mend(fake, said, name, mend):
    fake.answer("GET /info", {**INFO, **SAFE, **said})
    check = (await engine_checks(fake.url))[name]
    assert check.state == "warning"
    assert mend in check.mend


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("1.1.5+ds1", "warning"),
        ("1.2.7", "warning"),
        ("1.2.8", "ok"),
        ("1.3.2", "warning"),
        ("1.3.3", "ok"),
        ("1.4.0-rc.1", "ok"),
        ("2.0.0", "ok"),
        ("", "ok"),
    ],
)
async def test_a_runc_with_known_ways_out_is_a_warning(fake, version, state):
    fake.answer("GET /version", {**VERSION, "Components": [{"Name": "runc", "Version": version}]})
    assert (await engine_checks(fake.url))["runc"].state == state


LIMITING = {"Driver": "btrfs", "DriverStatus": [["Build Version", "Btrfs v5.16"]]}
ON_XFS = {"Driver": "overlay2", "DriverStatus": [["Backing Filesystem", "xfs"], ["Supports d_type", "true"]]}
NOT_LIMITING = {"Driver": "overlay2", "DriverStatus": [["Backing Filesystem", "extfs"]]}


@pytest.mark.parametrize(
    ("said", "profiles", "state", "words"),
    [
        (LIMITING, ("locked", "task"), "ok", "as large as the workspace, by btrfs"),
        (ON_XFS, ("task",), "ok", "by overlay2 on xfs, where it is mounted with pquota"),
        (
            NOT_LIMITING,
            ("locked", "task"),
            "warning",
            "not limited: .* overlay2 on extfs, .* can fill its disk",
        ),
        ({}, ("task",), "warning", "not limited: .* a driver it does not name"),
        (NOT_LIMITING, ("locked",), "ok", "read-only"),
    ],
)
async def test_it_says_whether_the_roots_of_sandboxes_have_a_limit(fake, said, profiles, state, words):
    fake.answer("GET /info", {**INFO, **said})
    check = (await engine_checks(fake.url, sandbox_profiles=profiles))["sandbox roots"]
    assert (check.state, bool(check.mend)) == (state, state == "warning")
    assert re.search(words, check.found), check.found


async def test_a_socket_that_all_may_write_to_is_a_warning(fake, tmp_path):
    (tmp_path / "fake.sock").chmod(0o666)
    check = (await engine_checks(fake.url))["engine socket"]
    assert (check.state, check.found) == ("warning", f"all users may use {tmp_path}/fake.sock")


async def test_a_runtime_that_the_engine_does_not_have_is_a_problem(fake):
    check = (await engine_checks(fake.url, sandbox_runtime="runsc"))["runtimes"]
    assert (check.state, check.found) == ("problem", "runc; sandboxes use runsc")
    assert "daemon.json" in check.mend
