"""The server as a process: its start, the two ways to end it, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil
import pytest

from agent_sdk.ids import new_id
from tests.conftest import SHORT_LIVED
from tests.server.wire import GUARD, TEXT, Wire, call, frame, request, upgrade

LONG = {"argv": ["sleep", "600"], "timeout_ms": 600_000}


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict) -> None:
        self.process = process
        self.pid = process.pid
        self.port = urlsplit(ready["url"]).port
        self.key_file = Path(ready["api_key_file"])
        self.key = self.key_file.read_text().strip()

    @asynccontextmanager
    async def session(self, path: str = "/v1/conversations/new") -> AsyncIterator[Wire]:
        async with await Wire.open(self.port) as wire:
            await wire.upgrade(self.key, path)
            wire.answered = (await wire.initialize())["result"]
            yield wire

    def boxes(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.pid).children() if "agent_sdk.box" in child.cmdline()]

    async def ended(self) -> int:
        async with asyncio.timeout(30):
            return await self.process.wait()


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "agent_server", "serve", "--json", *options]


@asynccontextmanager
async def started(
    data: Path, *, through: Sequence[str] = (), stderr: IO[bytes] | None = None, **environment: str
) -> AsyncIterator[ServerProcess]:
    """Start one, `through` a command that runs another, e.g. with less of something."""
    process = await asyncio.create_subprocess_exec(
        *through,
        *command("--port", "0", "--data", str(data)),
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, **SHORT_LIVED, **environment},
    )
    try:
        async with asyncio.timeout(GUARD):
            yield ServerProcess(process, json.loads(await process.stdout.readline()))
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def refused(*options: str, **environment: str) -> tuple[int, str]:
    """Exit code and standard error of a server that does not start."""
    process = await asyncio.create_subprocess_exec(
        *command(*options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(GUARD):
        out, err = await process.communicate()
    assert out == b""
    return process.returncode, err.decode()


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[ServerProcess]:
    async with started(tmp_path / "data") as running:
        yield running


# --- start ---


async def test_it_says_where_it_is_and_where_the_key_is(server, tmp_path):
    assert server.key_file == tmp_path / "data" / "api_key"
    assert stat.S_IMODE(server.key_file.stat().st_mode) == 0o600


async def test_no_key_is_on_a_command_line(server):
    async with server.session() as wire:
        await wire.call("execute", op_id=new_id(), shell="true")
        lines = [" ".join(process.cmdline()) for process in [psutil.Process(server.pid), *server.boxes()]]
        assert len(lines) == 2
        assert all(server.key not in line for line in lines)


async def test_a_second_server_on_the_same_data_is_refused(server, tmp_path):
    code, sentence = await refused("--port", "0", "--data", str(tmp_path / "data"))
    assert code == 75
    assert f"pid {server.pid}, started" in sentence
    assert "Traceback" not in sentence


async def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, sentence = await refused("--port", port, "--data", str(tmp_path / "data"))
    assert code == 75
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in sentence


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_an_address_of_somebody_else_is_one_sentence(tmp_path, host):
    code, sentence = await refused("--host", host, "--port", "0", "--data", str(tmp_path / "data"))
    assert code in (2, 75)
    assert f"cannot listen on {host}" in sentence
    assert "--host" in sentence


async def test_an_unwritable_data_folder_is_one_sentence(tmp_path):
    (tmp_path / "data").write_text("a file")
    code, sentence = await refused("--port", "0", "--data", str(tmp_path / "data"))
    assert code == 73
    assert "choose another with --data" in sentence


async def test_a_log_that_is_something_else_is_one_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "log.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    code, sentence = await refused("--port", "0", "--data", str(tmp_path / "data"))
    assert code == 73
    assert "the event log" in sentence
    assert "Traceback" not in sentence


async def test_a_wrong_option_is_one_sentence(tmp_path):
    code, sentence = await refused("--data", str(tmp_path / "data"), AGENT_SERVER_PORT="99999")
    assert code == 2
    assert "AGENT_SERVER_PORT must be 1..65535" in sentence


async def test_a_server_that_was_killed_starts_again(tmp_path):
    async with started(tmp_path / "data") as first:
        async with first.session() as wire:
            id = wire.answered["conversation"]
        first.process.kill()
        await first.ended()
    async with started(tmp_path / "data") as second, second.session(f"/v1/conversations/{id}") as wire:
        assert wire.answered["head_seq"] == 1


# --- end ---


async def test_term_ends_an_idle_server_with_0(server):
    server.process.send_signal(signal.SIGTERM)
    assert await server.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_clients_are_told_that_the_server_stops(server, number):
    async with server.session() as wire:
        server.process.send_signal(number)
        notice = await wire.message()
        assert notice["method"] == "draining"
        assert notice["params"]["retry_after_ms"] > 0
        assert (await wire.ended()).code == 4503
    assert await server.ended() == 0


async def test_a_call_that_runs_is_finished_and_new_ones_are_refused(server):
    async with server.session() as wire:
        given = {
            "op_id": new_id(),
            "shell": "echo begun > begun; until [ -e go ]; do sleep 0.05; done; echo done",
        }
        await wire.send(frame(TEXT, call("execute", 1, **given)))
        await wire.call("execute", 2, op_id=new_id(), shell="until [ -e begun ]; do sleep 0.05; done")
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.message())["method"] == "draining"
        error = (await wire.call("execute", 3, op_id=new_id(), shell="true"))["error"]
        assert (error["code"], error["data"]["reason"]) == (-32001, "draining")
        async with await Wire.open(server.port) as late:
            answer = await late.ask(
                request("GET", "/ready", [("Host", "localhost")]),
            )
            assert answer.status == 503
        # Reading goes on.
        described = (await wire.call("workspace.describe", 4))["result"]
        Path(described["root"], "go").write_text("")
        answer = await wire.message()
        assert (answer["id"], answer["result"]["stdout_text"]) == (1, "done\n")
        assert (await wire.ended()).code == 4503
    assert await server.ended() == 0


async def test_a_call_that_does_not_finish_is_ended_with_its_processes(tmp_path):
    async with (
        started(tmp_path / "data", AGENT_SERVER_DRAIN_SECONDS="0.5") as server,
        server.session() as wire,
    ):
        await wire.send(frame(TEXT, call("execute", 1, op_id=new_id(), **LONG)))
        pids = await running(wire)
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.ended()).code == 4503
        assert await server.ended() == 0
        assert not any(psutil.pid_exists(pid) for pid in pids)


async def running(wire) -> list[int]:
    """The processes of the workspace, once there is one."""
    number = 100
    while True:
        number += 1
        if found := (await wire.call("process.list", number))["result"]:
            return [process["pid"] for process in found]


async def test_the_second_signal_ends_it_at_once(server):
    async with server.session() as wire:
        await wire.send(frame(TEXT, call("execute", 1, op_id=new_id(), **LONG)))
        await running(wire)
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.message())["method"] == "draining"
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.ended()).code == 4503
        assert await server.ended() == 0


async def test_over_http_new_work_is_refused_and_reading_goes_on(server):
    async with server.session() as wire:
        id = wire.answered["conversation"]
        await wire.send(frame(TEXT, call("execute", 1, op_id=new_id(), **LONG)))
        await running(wire)
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.message())["method"] == "draining"
        assert (await asked(server, id, "execute", op_id=new_id(), shell="true"))["error"]["code"] == -32001
        assert (await asked(server, id, "conversation.state"))["result"]["id"] == id
        async with await Wire.open(server.port) as late:
            answer = await late.ask(upgrade(server.key))
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.ended()).code == 4503


async def asked(server, id: str, method: str, **params) -> dict:
    """The answer to a call over HTTP."""
    body = call(method, **params)
    headers = [
        ("Host", "localhost"),
        ("Authorization", f"Bearer {server.key}"),
        ("Content-Length", str(len(body))),
    ]
    async with await Wire.open(server.port) as wire:
        return (await wire.ask(request("POST", f"/v1/rpc?conversation={id}", headers, body))).json


async def test_a_frozen_client_does_not_hold_the_end_up(server):
    async with server.session(), await Wire.open(server.port) as half:
        await half.send(b"GET /health HTTP/1.1\r\n")
        server.process.send_signal(signal.SIGTERM)
        assert await server.ended() == 0


async def test_a_running_turn_is_let_go_of_and_goes_on_by_itself_after_the_restart(tmp_path):
    steps = [
        {
            "step": "call",
            "tool": "terminal",
            "arguments": {"command": "touch begun; until [ -e go ]; do sleep 0.05; done"},
        },
        {"step": "call", "tool": "terminal", "arguments": {"command": "echo again"}},
        {"step": "say", "text": "finished"},
    ]
    agent = {"llm": {"kind": "scripted", "steps": steps}, "tools": ["terminal"]}
    async with started(tmp_path / "data") as server, server.session() as wire:
        id = wire.answered["conversation"]
        await wire.call("conversation.configure", 1, op_id=new_id(), agent=agent)
        await wire.call("send_message", 2, op_id=new_id(), text="work")
        await wire.call("execute", 3, op_id=new_id(), shell="until [ -e begun ]; do sleep 0.05; done")
        root = Path((await wire.call("workspace.describe", 4))["result"]["root"])
        server.process.send_signal(signal.SIGTERM)
        assert (await wire.message())["method"] == "draining"
        assert (await wire.ended()).code == 4503
        assert await server.ended() == 0
    (root / "go").write_text("")
    async with started(tmp_path / "data") as server, server.session(f"/v1/conversations/{id}") as wire:
        await wire.call("events.subscribe", 1, after_seq=0)
        assert await last_event(wire) == ("finished", "finished")


async def last_event(wire) -> tuple[str, str]:
    while True:
        message = await wire.message()
        for event in message.get("params", {}).get("events", []):
            if event["type"] == "turn_ended":
                return event["status"], event["final_text"]


async def test_a_server_on_a_copy_leaves_the_boxes_of_the_original_alone(tmp_path):
    async with started(tmp_path / "data") as server, server.session() as wire:
        await wire.call("execute", op_id=new_id(), shell="true")
        [box] = server.boxes()
        shutil.copytree(tmp_path / "data", tmp_path / "copy", ignore=shutil.ignore_patterns("*.sock"))
        async with (
            started(tmp_path / "copy") as other,
            other.session(f"/v1/conversations/{wire.answered['conversation']}") as copy,
        ):
            assert "result" in await copy.call("execute", op_id=new_id(), shell="true")
            assert other.boxes() != [box]
        assert box.is_running()
        assert "result" in await wire.call("execute", 2, op_id=new_id(), shell="true")


@pytest.mark.parametrize("lost", ["log.db", "log.db-wal"])
async def test_a_server_whose_log_was_removed_ends_with_74_instead_of_acknowledging(tmp_path, lost):
    log = tmp_path / "server.log"
    with log.open("wb") as stderr:
        async with started(tmp_path / "data", stderr=stderr) as server, server.session() as wire:
            assert "result" in await wire.call("set_title", 1, op_id=new_id(), title="kept")
            (tmp_path / "data" / lost).unlink()
            with suppress(AssertionError, asyncio.IncompleteReadError, ConnectionError):
                answer = await wire.call("set_title", 2, op_id=new_id(), title="lost")
                assert answer["error"]["data"]["kind"] == "workspace_unavailable"
            assert await server.ended() == 74
    assert f"{lost} was removed or replaced while it was in use" in log.read_text()


async def test_an_idle_server_whose_log_was_replaced_ends_with_74(tmp_path):
    async with started(tmp_path / "data") as server:
        (tmp_path / "data" / "log.db").rename(tmp_path / "data" / "log.old")
        (tmp_path / "data" / "log.db").touch()
        assert await server.ended() == 74


async def test_what_a_server_makes_is_its_users_alone_and_its_commands_keep_their_umask(tmp_path):
    async with started(tmp_path / "data") as server, server.session() as wire:
        await wire.call("execute", op_id=new_id(), shell="touch made")
        files = [path for path in (tmp_path / "data").rglob("*") if "workspaces" not in path.parts]
        assert {path.name for path in files} >= {"log.db", "log.db-wal", "place"}
        assert [path for path in files if path.lstat().st_mode & 0o077] == []
        [made] = (tmp_path / "data" / "workspaces").glob("*/made")
        before = os.umask(0)
        os.umask(before)
        assert stat.S_IMODE(made.stat().st_mode) == 0o666 & ~before
