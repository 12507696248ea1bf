"""Cursors, op_ids and data folders that cannot be right: each has one answer, which says what is wrong."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.methods import all_methods
from tests.server.test_serve import asked, command, started

MOUNTS = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts need root and unshare"
)


@pytest.mark.parametrize(
    ("resume", "field"),
    [
        ({"after_seq": -1}, "$.params.resume.after_seq"),
        ({"after_seq": 2**63}, "$.params.resume.after_seq"),
        ({"after_seq": 2**64}, "$.params.resume.after_seq"),
        ({"after_seq": 10**400}, ""),
        ({"after_seq": 1.5}, "$.params.resume.after_seq"),
        ({"after_seq": "1"}, "$.params.resume.after_seq"),
        ({"after_seq": True}, "$.params.resume.after_seq"),
        ({"after_seq": None}, "$.params.resume.after_seq"),
        ({"epoch": 7, "after_seq": 1}, "$.params.resume.epoch"),
        ([], "$.params.resume"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_cursor_that_is_none_is_refused_and_may_be_corrected(server, resume, field):
    async with server.session() as wire:
        id = wire.answered["conversation"]
    async with await server.wire() as wire:
        await wire.upgrade(server.key, f"/v1/conversations/{id}")
        error = (await wire.initialize(resume=resume))["error"]
        assert error["code"] in (-32602, -32700), error
        assert field in error["message"]
        assert (await wire.initialize(resume={"after_seq": 1}))["result"]["head_seq"] == 1


@pytest.mark.parametrize("after", [-1, 2**63, 2**64, "1", None])
async def test_a_page_after_no_seq_is_refused(server, after):
    async with server.session() as wire:
        error = (await wire.call("conversation.events", 1, after=after))["error"]
        assert (error["code"], "$.params.after" in error["message"]) == (-32602, True)


@pytest.mark.parametrize("after", ["-1", str(2**63), "1e3", "", "١"])
async def test_a_page_after_no_seq_is_refused_over_http(server, after):
    async with server.session() as wire, server.http() as http:
        path = f"/v1/conversations/{wire.answered['conversation']}/events"
        answer = await http.get(path, params={"after": after})
        assert (answer.status, "?after: expected int" in await answer.text()) == (400, True)
        stream = {"Accept": "text/event-stream", "Last-Event-ID": after or "x"}
        assert (await http.get(path, headers=stream)).status == 400


async def test_an_initialize_that_comes_twice_changes_nothing(server):
    async with server.session() as wire:
        error = (await wire.initialize(resume={"after_seq": 0}))["error"]
        assert (error["code"], error["message"]) == (-32600, "initialize came already")
        assert (await wire.call("conversation.state"))["result"]["id"] == wire.answered["conversation"]


@pytest.mark.parametrize(
    ("method", "first", "other"),
    [
        ("set_title", {"title": "one"}, {"title": "two"}),
        ("execute", {"shell": "echo one >> ran"}, {"shell": "echo two >> ran"}),
        ("update_secrets", {"secrets": {"A": "secret-one"}}, {"secrets": {"B": "secret-one"}}),
    ],
)
async def test_an_op_id_with_other_params_is_refused_also_after_a_restart(tmp_path, method, first, other):
    op_id = new_id()
    async with started(tmp_path / "data") as server, server.session() as wire:
        id = wire.answered["conversation"]
        answer = await wire.call(method, 1, op_id=op_id, **first)
        assert "result" in answer
        assert await wire.call(method, 1, op_id=op_id, **first) == answer
        error = (await wire.call(method, 2, op_id=op_id, **other))["error"]
        assert error["data"]["kind"] == "op_mismatch"
        assert (await asked(server, id, method, op_id=op_id, **other))["error"] == error
    async with started(tmp_path / "data") as server, server.session(f"/v1/conversations/{id}") as wire:
        assert (await wire.call(method, 1, op_id=op_id, **other))["error"]["data"]["kind"] == "op_mismatch"
        assert (await wire.call(method, 1, op_id=op_id, **first))["result"] == answer["result"]


def test_no_method_takes_a_run_id():
    """A turn is named by events and answers only, so nobody can ask for one that does not exist."""
    assert not [name for name, cls in all_methods().items() if "run_id" in cls.__struct_fields__]


async def test_an_unknown_request_is_not_found(server):
    async with server.session() as wire:
        error = (await wire.call("respond", op_id=new_id(), request_id="nothing", answer="approve"))["error"]
        assert error["data"]["kind"] == "request_not_found"


# --- data folders ---


def refused_on(mount: str, data: str) -> tuple[int, str]:
    """Exit code and words of a server whose data folder is on a file system of its own."""
    script = f'mount -t tmpfs -o {mount} none "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, data, *command("--port", "0", "--data", f"{data}")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@MOUNTS
@pytest.mark.parametrize("mount", ["ro", "size=4k"])
def test_a_data_folder_that_is_read_only_or_full_is_one_sentence(tmp_path, mount):
    code, words = refused_on(mount, str(tmp_path))
    assert code == 73
    assert str(tmp_path) in words
    assert len(words.strip().splitlines()) == 1


def test_a_data_folder_of_a_newer_server_is_one_sentence_and_stays_as_it_is(tmp_path):
    file = tmp_path / "data" / "log.db"
    file.parent.mkdir()
    database = sqlite3.connect(file)
    database.execute("PRAGMA user_version = 99")
    database.close()
    before = file.read_bytes()
    done = subprocess.run(
        command("--port", "0", "--data", str(tmp_path / "data")), capture_output=True, text=True
    )
    assert done.returncode == 73
    assert "newer version" in done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_bytes() == before
