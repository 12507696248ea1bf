"""A server whose boxes are other users, or in namespaces of their own: as its users start it, and as it ends."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import agent_server
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import PolicyDenied
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.remote.link import ask
from agent_sdk.remote.workspace import RemoteWorkspace
from tests.conftest import SHORT_LIVED, let_others_through
from tests.docker.floods import flooded
from tests.server.test_confinement import (
    AS_SOMEBODY,
    BOX_USER,
    WITHOUT_CAPABILITIES,
    as_root,
    both,
)

KEY = f"key-{secrets.token_hex(16)}"


@pytest.fixture
def data(tmp_path):
    let_others_through(tmp_path)
    return tmp_path / "data"


def options_of(data: Path) -> list[str]:
    return ["-m", "agent_server", "serve", "--port", "0", "--json", "--data", str(data)]


def environment(isolation: str, **options: str) -> dict[str, str]:
    ours = {"AGENT_SERVER_ISOLATION": isolation, "AGENT_SERVER_API_KEY": KEY}
    return {**os.environ, **SHORT_LIVED, **ours, **options}


@contextmanager
def serving(
    data: Path, isolation: str, *prefix: str, end: signal.Signals = signal.SIGTERM, **options: str
) -> Iterator[tuple[str, int]]:
    """A server, its address and its process."""
    with subprocess.Popen(
        [*(prefix or [sys.executable]), *options_of(data)],
        stdout=subprocess.PIPE,
        env=environment(isolation, **options),
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process.pid
        finally:
            process.send_signal(end)


def boxes_of(data: Path) -> list[int]:
    """Processes whose command line names the folder."""
    named = [
        found
        for found in psutil.process_iter(["cmdline"])
        if str(data) in " ".join(found.info["cmdline"] or ())
    ]
    return [found.pid for found in named if "agent_sdk.box" in " ".join(found.info["cmdline"])]


@as_root
@both
async def test_commands_of_a_server_are_another_user_and_cannot_find_its_secrets(data, isolation):
    with serving(data, isolation) as (url, pid):
        async with RemoteWorkspace(url, KEY) as workspace:
            assert (await workspace.execute("id -u")).stdout.strip() == str(BOX_USER)
            search = f"grep -rs '[k]{KEY[1:]}'"  # which does not find itself
            places = f"{data} $HOME /proc/{pid} /proc/[0-9]*/environ /proc/[0-9]*/cmdline"
            found = await workspace.execute(f"{search} {places}; cat {data}/log.db {data}/lock")
            assert found.stdout == ""


@as_root
@both
async def test_nothing_that_the_server_keeps_can_be_opened_by_its_boxes(data, isolation):
    with serving(data, isolation) as (url, _):
        async with RemoteWorkspace(url, KEY) as workspace:
            owner = Path((await workspace.describe()).root).name
            await workspace.execute("true")
            kept = [
                path for path in data.rglob("*") if owner not in path.parts and "runtime" not in path.parts
            ]
            assert {path.name for path in kept} >= {"log.db", "lock", "boxes", "workspaces"}
            opened = await workspace.execute(
                ["sh", "-c", 'for f; do test -r "$f" && echo "$f"; done', "-", *map(str, kept)]
            )
            in_view = (
                {str(data / name) for name in ("workspaces", "output")} if isolation == "bwrap" else set()
            )
            assert set(opened.stdout.split()) == in_view


@as_root
@both
async def test_no_flood_of_secrets_from_a_command_gets_past_the_server_or_holds_it_up(data, isolation):
    with serving(data, isolation) as (url, _):
        assert await flooded(lambda: RemoteWorkspace(url, KEY), data) == {}


@as_root
@both
async def test_the_next_server_goes_on_with_a_confined_box_of_one_that_was_killed(data, isolation):
    with serving(data, isolation, end=signal.SIGKILL) as (url, _):
        async with RemoteWorkspace(url, KEY) as workspace:
            process = await workspace.start("read line; echo got $line")
            conversation = workspace.conversation
    with serving(data, isolation) as (url, _):
        async with RemoteWorkspace(url, KEY, conversation=conversation) as workspace:
            again = workspace.process(process.id)
            await again.write(b"it\n")
            assert (await again.wait()).exit_code == 0
            await ask(workspace.link, Delete(op_id=new_id()))
        assert [path.name for path in (data / "workspaces").iterdir()] == []
    assert boxes_of(data) == []
    assert list((data / "boxes").iterdir()) == list((data / "output").iterdir()) == []


@as_root
@both
async def test_a_workspace_from_before_the_isolation_belongs_to_its_boxes_then(data, isolation):
    with serving(data, "none") as (url, _):
        async with RemoteWorkspace(url, KEY) as workspace:
            await workspace.execute("mkdir folder && echo one >folder/file && ln -s /etc/hostname link")
            conversation = workspace.conversation
    with serving(data, isolation) as (url, _):
        async with RemoteWorkspace(url, KEY, conversation=conversation) as workspace:
            changed = await workspace.execute(
                "echo two >>folder/file && cat folder/file && rm -r folder link"
            )
            assert changed.stdout == "one\ntwo\n"
    assert Path("/etc/hostname").stat().st_uid == 0


@as_root
async def test_a_key_that_got_another_name_in_a_workspace_before_is_not_given_to_boxes(data):
    kept = data / "api_key"
    with serving(data, "none") as (url, _):
        async with RemoteWorkspace(url, KEY) as workspace:
            kept.write_text("secret")
            kept.chmod(0o600)
            assert (await workspace.execute(f"ln {kept} innocent")).exit_code == 0
    starting = await asyncio.create_subprocess_exec(
        sys.executable,
        *options_of(data),
        env=environment("user"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    started = await starting.stdout.readline()
    if started:
        starting.terminate()
    _, said = await starting.communicate()
    assert started == b""
    assert b"innocent cannot be kept from boxes: it has other names outside of the workspace" in said
    assert kept.stat().st_uid == os.geteuid()


def python_for_everybody() -> list[str]:
    """An interpreter that any user may run and read, with this product; skips where there is none."""
    paths = os.pathsep.join((str(Path(agent_server.__file__).parent.parent), sysconfig.get_path("purelib")))
    own = os.path.realpath(sys.executable)
    for python in (own, "/usr/bin/python3"):
        program = "import sys; open('/proc/self/exe'); print(sys.version_info[:2])"
        command = [*AS_SOMEBODY, "env", f"PYTHONPATH={paths}", python]
        tried = subprocess.run(
            [*command, "-c", f"{program}; import agent_server.serve"], capture_output=True, text=True
        )
        if tried.returncode == 0 and tried.stdout.strip() == str(sys.version_info[:2]):
            return command
    pytest.skip(f"needs an interpreter of version {sys.version_info[:2]} that any user may run")


@as_root
async def test_a_server_without_privileges_uses_namespaces_and_its_key_is_not_in_them(data):
    data.mkdir()
    os.chown(data, 12345, 12345)
    with serving(data, "bwrap", *python_for_everybody(), HOME=str(data)) as (url, pid):
        async with RemoteWorkspace(url, KEY) as workspace:
            said = await workspace.execute(f"id -u; ls {data}; ls -d /proc/{pid}; cat {data}/log.db")
            assert said.stdout.split() == ["12345", "output", "workspaces"]
    assert boxes_of(data) == []


@as_root
def test_a_server_that_cannot_give_the_isolation_does_not_start(data):
    data.mkdir()
    done = subprocess.run(
        [*WITHOUT_CAPABILITIES, sys.executable, *options_of(data)],
        env=environment("user"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "isolation=user is not available: this server lacks the capabilities" in done.stderr
    assert "Traceback" not in done.stderr


@as_root
@both
async def test_a_working_folder_that_shows_commands_the_data_of_the_server_is_refused(data, isolation):
    with serving(data, isolation) as (url, _):
        for folder in (data, data / "workspaces", data.parent, data / ".." / "data"):
            with pytest.raises(PolicyDenied, match="working_dir: .* data folder of the server"):
                async with RemoteWorkspace(url, KEY, working_dir=str(folder)) as workspace:
                    await workspace.execute("true")
