"""The event log: durable, in order, all or nothing, one file for many conversations."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import apsw
import pytest

from agent_sdk.idempotency import Asked
from agent_sdk.log.event_log import EventLog, Operation
from agent_sdk.protocol.errors import (
    Conflict,
    ConversationNotFound,
    LeaseLost,
    OpMismatch,
    StateConflict,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.events import AgentMessage, Event, TurnEnded, TurnStarted, UserMessage, decode

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["file", "memory"])
def path(request, tmp_path):
    return tmp_path / "data" / "events.sqlite" if request.param == "file" else None


@pytest.fixture
def file(tmp_path):
    return tmp_path / "events.sqlite"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)


def said(*texts: str) -> list[Event]:
    return [UserMessage(text=text) for text in texts]


async def texts(log: EventLog, conversation: str = "c") -> list[str]:
    events = [decode(body) for _, body in await log.read(conversation)]
    return [event.text for event in events if isinstance(event, UserMessage)]


async def test_appended_events_get_a_seq_without_gaps_and_a_time(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        first = await log.append("c", said("a", "b"))
        second = await log.append("c", said("c"))
        assert [event.seq for event in first + second] == [1, 2, 3]
        assert all(event.at > 0 for event in first + second)


async def test_what_is_read_is_what_was_appended(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        appended = await log.append("c", said("ä", "\0", "\U0001f600" * 3))
        assert [decode(body) for _, body in await log.read("c")] == appended


async def test_two_conversations_count_for_themselves(path):
    async with EventLog.open(path) as log:
        await log.create("a")
        await log.create("b")
        await log.append("a", said("x", "y"))
        assert [event.seq for event in await log.append("b", said("z"))] == [1]
        assert await log.head("a") == 2
        assert await texts(log, "b") == ["z"]


async def test_creating_twice_attaches_to_the_first(path):
    async with EventLog.open(path) as log:
        epoch = await log.create("c", {"who": "me"})
        assert await log.create("c", {"who": "you"}) == epoch
        assert [row.meta for row in await log.list()] == [{"who": "me"}]


async def test_a_conversation_that_was_deleted_and_made_again_has_another_epoch_and_no_past(path):
    async with EventLog.open(path) as log:
        epoch = await log.create("c")
        await log.append("c", said("a"))
        await log.delete("c")
        assert await log.create("c") != epoch
        assert await log.read("c") == []
        assert [event.seq for event in await log.append("c", said("b"))] == [1]


async def test_an_unknown_conversation_is_an_error(path):
    async with EventLog.open(path) as log:
        for call in (
            log.append("x", said("a")),
            log.read("x"),
            log.head("x"),
            log.delete("x"),
            log.set_meta("x", {}),
        ):
            with pytest.raises(ConversationNotFound):
                await call


async def test_a_page_ends_at_its_limits_but_has_at_least_one_event(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        await log.append("c", said("a" * 1000, "b" * 1000, "c" * 1000))
        assert [seq for seq, _ in await log.read("c", limit=2)] == [1, 2]
        assert [seq for seq, _ in await log.read("c", after=1)] == [2, 3]
        assert [seq for seq, _ in await log.read("c", max_bytes=2500)] == [1, 2]
        assert [seq for seq, _ in await log.read("c", max_bytes=10)] == [1]
        assert await log.read("c", after=3) == []


async def test_the_list_is_newest_first_and_knows_the_heads(path):
    async with EventLog.open(path) as log:
        for name in ("a", "b"):
            await log.create(name)
        [event] = await log.append("a", said("x"))
        await log.set_meta("a", {"workspace": "w"})
        rows = await log.list()
        assert [(row.id, row.head_seq, row.meta) for row in rows] == [
            ("b", 0, {}),
            ("a", 1, {"workspace": "w"}),
        ]
        assert rows[1].updated_at == event.at


async def test_appends_that_are_under_way_together_keep_their_order(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        futures = [log.submit("c", said(str(number))) for number in range(1500)]
        seqs = [record.event.seq for records in await asyncio.gather(*futures) for record in records]
        assert seqs == list(range(1, 1501))


async def test_a_bad_append_does_not_take_its_neighbours_along(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        futures = [log.submit("c", said("a")), log.submit("x", said("b")), log.submit("c", said("c"))]
        first, second, third = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(second, ConversationNotFound)
        assert await texts(log) == ["a", "c"]
        assert [first[0].event.seq, third[0].event.seq] == [1, 2]


async def test_events_that_cannot_be_encoded_are_appended_all_or_not_at_all(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        with pytest.raises(UnicodeEncodeError):
            await log.append("c", said("fine", "\ud800"))
        assert await log.read("c") == []


async def test_an_operation_is_remembered_with_what_it_appended(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        operation = Operation("op", b"digest", lambda events: str(events[0].seq).encode())
        assert len(await log.append("c", said("a"), op=operation)) == 1
        assert (await log.operations("c").find(Asked("op", b"digest"))).answer == b"1"
        assert await log.operations("c").find(Asked("other")) is None


async def test_the_same_operation_again_appends_nothing(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        operation = Operation("op", b"digest", b"done")
        await log.append("c", said("a"), op=operation)
        assert await log.append("c", said("a"), op=operation) == []
        assert await texts(log) == ["a"]


async def test_an_op_id_with_another_digest_is_refused(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        await log.append("c", said("a"), op=Operation("op", b"digest", b""))
        with pytest.raises(OpMismatch):
            await log.append("c", said("b"), op=Operation("op", b"other", b""))
        assert await texts(log) == ["a"]


async def test_a_closed_log_says_that_it_is_closed(path):
    async with EventLog.open(path) as log:
        await log.create("c")
    with pytest.raises(StateConflict):
        await log.append("c", said("a"))


async def test_closing_writes_what_is_queued_and_ends_the_threads(file):
    async with EventLog.open(file) as log:
        await log.create("c")
        futures = [log.submit("c", said(str(number))) for number in range(50)]
    assert all(future.done() for future in futures)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("event-log")]
    async with EventLog.open(file) as log:
        assert len(await log.read("c")) == 50


async def test_a_cancelled_append_is_still_written(file):
    async with EventLog.open(file) as log:
        await log.create("c")
        task = asyncio.create_task(log.append("c", said("a")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await log.append("c", said("b"))
        assert await texts(log) == ["a", "b"]


async def test_the_folder_is_made_for_the_owner_only(path, tmp_path):
    async with EventLog.open(tmp_path / "new" / "events.sqlite"):
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


async def test_a_file_where_the_folder_should_be_is_one_clear_sentence(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(OSError, match=r"the log cannot be written in .*data.*choose another folder"):
        async with EventLog.open(tmp_path / "data" / "events.sqlite"):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_an_unwritable_folder_is_one_clear_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="choose another folder"):
        async with EventLog.open(tmp_path / "events.sqlite"):
            pass


async def test_a_log_of_a_newer_version_is_refused_and_left_as_it_is(file):
    connection = apsw.Connection(str(file))
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = file.read_bytes()
    with pytest.raises(Conflict, match="newer version"):
        async with EventLog.open(file):
            pass
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello, this is no database\n" * 100, b""], ids=["text", "empty"])
async def test_a_file_that_is_no_log_is_refused_unless_it_is_empty(file, content):
    file.write_bytes(content)
    try:
        async with EventLog.open(file):
            assert content == b""
    except Conflict as exc:
        assert content
        assert "no event log" in str(exc)


async def test_somebody_elses_database_is_refused(file):
    connection = apsw.Connection(str(file))
    connection.execute("CREATE TABLE precious (x)")
    connection.close()
    with pytest.raises(Conflict, match="no event log"):
        async with EventLog.open(file):
            pass


async def test_the_format_has_a_version_and_every_commit_is_synced(file):
    async with EventLog.open(file):
        pass
    connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
    assert connection.execute("PRAGMA user_version").fetchall() == [(2,)]
    assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    connection.close()


async def test_a_second_writer_takes_the_conversation_and_the_first_is_told(file):
    async with EventLog.open(file) as first, EventLog.open(file) as second:
        await first.create("c")
        await first.append("c", said("a"))
        await second.create("c")
        await second.append("c", said("b"))
        with pytest.raises(LeaseLost):
            await first.append("c", said("c"))
        assert await texts(second) == ["a", "b"]


KILLED = """
import asyncio, sys
from pathlib import Path
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import UserMessage

async def write(log, worker):
    for number in range(10**9):
        [event] = await log.append("c", [UserMessage(text=f"{worker}:{number}")])
        print(event.seq, flush=True)

async def main():
    async with EventLog.open(Path(sys.argv[1])) as log:
        await log.create("c")
        await asyncio.gather(*(write(log, worker) for worker in range(8)))

asyncio.run(main())
"""


async def test_a_killed_process_loses_nothing_that_was_acknowledged(file):
    child = start(sys.executable, "-c", KILLED, str(file))
    assert child.stdout is not None
    heard = [int(child.stdout.readline()) for _ in range(500)]
    child.send_signal(signal.SIGKILL)
    heard += [int(line) for line in child.stdout.read().split(b"\n")[:-1]]
    child.stdout.close()
    child.wait()
    async with EventLog.open(file) as log:
        seqs = [seq for seq, _ in await log.read("c", limit=10**6, max_bytes=1 << 30)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert set(heard) <= set(seqs)


FULL = """
import asyncio, resource, sys
from pathlib import Path
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.events import UserMessage

async def main():
    async with EventLog.open(Path(sys.argv[1])) as log:
        await log.create("c")
        await log.append("c", [UserMessage(text="before")])
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            await log.append("c", [UserMessage(text="x" * (4 << 20))])
        except StorageFull as exc:
            print("full:", exc)
        print("read:", len(await log.read("c")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        await log.append("c", [UserMessage(text="after")])

asyncio.run(main())
"""


async def test_where_no_more_can_be_written_the_log_says_so_and_goes_on_when_there_is_room(file):
    """A file size limit stands in for the full disk: SQLite sees the failing write either way."""
    done = run(sys.executable, "-c", FULL, str(file))
    assert done.stdout.splitlines() == [
        f"full: no space is left for the log {file}; make room and try again",
        "read: 1",
    ], done.stderr
    async with EventLog.open(file) as log:
        assert await texts(log) == ["before", "after"]


NO_SPACE = """
import asyncio, sys
from pathlib import Path
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.events import UserMessage

async def main():
    file = Path(sys.argv[1])
    ballast = file.with_name("ballast")
    ballast.write_bytes(b"x" * (1 << 20))
    async with EventLog.open(file) as log:
        await log.create("c")
        written = 0
        try:
            while True:
                await log.append("c", [UserMessage(text="x" * 50_000)])
                written += 1
        except StorageFull as exc:
            print("full:", exc)
        print("read:", len(await log.read("c", max_bytes=1 << 30)) == written)
        ballast.unlink()
        [event] = await log.append("c", [UserMessage(text="after")])
        print("after:", event.seq == written + 1)

asyncio.run(main())
"""


@pytest.mark.skipif(run("unshare", "-rm", "true").returncode != 0, reason="needs a mount namespace")
async def test_on_a_full_disk_the_log_can_be_read_and_goes_on_when_there_is_room(tmp_path):
    mount = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'
    file = tmp_path / "events.sqlite"
    done = run("unshare", "-rm", "sh", "-c", mount, str(tmp_path), sys.executable, "-c", NO_SPACE, str(file))
    assert done.stdout.splitlines() == [
        f"full: no space is left for the log {file}; make room and try again",
        "read: True",
        "after: True",
    ], done.stderr


class FailingDisk(apsw.VFS):
    """The machine's file system, until its fsync begins to fail."""

    def __init__(self) -> None:
        self.broken = False
        self.failures = 0
        super().__init__("failing-disk", "unix")

    def xOpen(self, name, flags):
        return FailingFile(self, name, flags)


class FailingFile(apsw.VFSFile):
    def __init__(self, disk, name, flags) -> None:
        self.disk = disk
        super().__init__("unix", name, flags)

    def xSync(self, flags):
        if self.disk.broken:
            self.disk.failures += 1
            raise apsw.exception_for(apsw.SQLITE_IOERR_FSYNC)
        super().xSync(flags)


@pytest.fixture
def disk():
    before = apsw.vfs_names()[0]
    disk = FailingDisk()
    apsw.set_default_vfs("failing-disk")
    yield disk
    apsw.set_default_vfs(before)
    disk.unregister()


async def test_after_a_failed_fsync_nothing_is_acknowledged_any_more(disk, file):
    """The kernel may have dropped what it could not write, so a later fsync that succeeds proves nothing."""
    async with EventLog.open(file) as log:
        await log.create("c")
        await log.append("c", said("before"))
        disk.broken = True
        with pytest.raises(WorkspaceUnavailable):
            await log.append("c", said("lost"))
        disk.broken = False
        with pytest.raises(WorkspaceUnavailable, match="restart"):
            await log.append("c", said("refused"))
        assert await texts(log) == ["before"]
        assert isinstance(await asyncio.shield(log.failed), WorkspaceUnavailable)


async def test_a_commit_that_failed_on_the_disk_is_not_tried_again_for_anybody(disk, file):
    async with EventLog.open(file) as log:
        await log.create("c")
        disk.broken = True
        futures = [log.submit("c", said(str(number))) for number in range(20)]
        errors = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(error, WorkspaceUnavailable) for error in errors)
        assert disk.failures == 1


async def test_a_log_on_a_disk_that_works_has_not_failed(path):
    async with EventLog.open(path) as log:
        with pytest.raises(ConversationNotFound):
            await log.append("x", said("a"))
        assert not log.failed.done()


async def test_a_log_knows_which_conversations_have_something_to_do(path):
    async with EventLog.open(path) as log:
        await log.create("c")
        seen = []
        for events in (
            said("go"),
            [TurnStarted(run_id="r")],
            said("and this"),
            [AgentMessage(run_id="r", text="this", seen_seq=3)],
            [TurnEnded(run_id="r", status="finished")],
            [TurnStarted(run_id="s"), AgentMessage(run_id="s", text="nothing new", seen_seq=5)],
            said("too late for this one"),
            [TurnEnded(run_id="s", status="finished")],
            [TurnStarted(run_id="t"), TurnEnded(run_id="t", status="interrupted")],
            said("more"),
        ):
            await log.append("c", events)
            seen += [row.open_turn for row in await log.list()]
        assert seen == ["", "r", "r", "r", None, "s", "s", "", None, ""]


async def test_what_a_deleted_conversation_took_is_given_back_to_the_disk(file):
    async with EventLog.open(file, sole=True) as log:
        for name in ("kept", "gone"):
            await log.create(name)
            await log.append(name, said(*["x" * 100_000] * 100))
        assert len(await log.list(["gone", "unknown"])) == 1
        await log.delete("gone")
        assert [row.id for row in await log.list()] == ["kept"]
    assert file.stat().st_size < 12_000_000


@pytest.mark.parametrize("lost", ["", "-wal"])
async def test_nothing_is_acknowledged_into_a_file_that_was_removed(file, lost):
    async with EventLog.open(file) as log:
        await log.create("c")
        await log.append("c", said("kept"))
        Path(f"{file}{lost}").unlink()
        with pytest.raises(WorkspaceUnavailable, match="was removed or replaced while it was in use"):
            await log.append("c", said("lost"))
        async with asyncio.timeout(60):
            await log.failed
