"""What every workspace promises about processes that are started and left to themselves."""

import asyncio

import pytest

from agent_sdk.protocol.errors import (
    InvalidParams,
    NotADirectory,
    PathDenied,
    PathNotFound,
    ProcessNotFound,
    TimedOut,
)
from tests.contract.commands import PATIENCE, alive

WINDOW = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"


async def until_said(process, text: bytes, since: int = 0) -> bytes:
    """Read output until this text is in it."""
    said = b""
    async with asyncio.timeout(PATIENCE):
        async for piece in process.output(since):
            said += piece
            if text in said:
                return said
    raise AssertionError(f"it ended without saying {text!r}: {said!r}")


async def whole(process, **options) -> bytes:
    async with asyncio.timeout(PATIENCE):
        return b"".join([piece async for piece in process.output(**options)])


class ProcessContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.place
    async def test_a_process_is_followed_to_its_end(self, workspace):
        process = await workspace.start("echo a; sleep 0.1; echo b")
        assert await whole(process) == b"a\nb\n"
        assert (await process.wait(PATIENCE)).exit_code == 0

    async def test_output_can_be_read_from_any_offset_and_again(self, workspace):
        process = await workspace.start("seq 1 50000")
        await process.wait(PATIENCE)
        everything = await whole(process)
        assert await whole(process, since=100_000) == everything[100_000:]
        assert await whole(process, since=len(everything) + 5, follow=False) == b""

    async def test_without_follow_output_ends_with_what_there_is(self, workspace):
        process = await workspace.start("echo so far; sleep 1000")
        await until_said(process, b"so far\n")
        assert await whole(process, follow=False) == b"so far\n"

    async def test_both_streams_are_kept_apart(self, workspace):
        process = await workspace.start("echo out; echo err >&2")
        assert (await whole(process), await whole(process, stream="stderr")) == (b"out\n", b"err\n")

    @pytest.mark.place
    async def test_a_process_reads_what_is_written_to_it(self, workspace):
        process = await workspace.start(["cat"])
        await process.write(b"one ")
        await until_said(process, b"one ")
        await process.write(b"two")
        await process.close_stdin()
        assert await whole(process) == b"one two"
        assert (await process.wait(PATIENCE)).exit_code == 0

    async def test_how_much_input_a_process_was_given_is_known(self, workspace):
        process = await workspace.start("head -c 5; sleep 60")
        await process.write(b"hello")
        await until_said(process, b"hello")
        assert [info.stdin_bytes for info in await workspace.processes()] == [5]
        await process.signal("KILL")

    async def test_much_can_be_written_while_nobody_reads_yet(self, workspace):
        process = await workspace.start("read; until [ -e go ]; do sleep 0.01; done; wc -c")
        writing = asyncio.create_task(process.write(b"\n" + b"x" * 3_000_000))
        await workspace.files.write("go", b"")
        async with asyncio.timeout(PATIENCE):
            await writing
            await process.close_stdin()
        assert (await whole(process)).strip() == b"3000000"

    async def test_a_write_that_is_cancelled_leaves_its_beginning_and_the_next_one_follows(self, workspace):
        process = await workspace.start(["sh", "-c", "until [ -e go ]; do sleep 0.05; done; cat >got"])
        await process.write(b"begin ")
        writing = asyncio.create_task(process.write(b"x" * 9_000_000))
        while (await workspace.processes())[0].stdin_bytes <= len(b"begin "):
            assert not writing.done()
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await workspace.files.write("go", b"")
        await process.write(b" end")
        await process.close_stdin()
        assert (await process.wait()).exit_code == 0
        got = await workspace.files.read("got")
        assert got == b"begin " + b"x" * (len(got) - len(b"begin  end")) + b" end"
        assert len(got) == (await workspace.processes())[0].stdin_bytes < 9_000_000

    async def test_pieces_of_output_come_with_their_offsets(self, workspace):
        process = await workspace.start("printf 0123456789")
        await process.wait(PATIENCE)
        assert [chunk async for chunk in process.chunks(4)] == [(4, b"456789")]

    async def test_a_gap_in_the_output_shows_in_the_offsets(self, workspace):
        size = (256 << 20) + (8 << 20)
        process = await workspace.start(f"head -c {size} /dev/zero; printf end")
        await process.wait(PATIENCE)
        pieces = [(offset, len(data)) async for offset, data in process.chunks((256 << 20) - 10)]
        assert pieces[0] == ((256 << 20) - 10, 10)
        assert pieces[1][0] == size + 3 - (1 << 20)
        assert sum(length for _, length in pieces) == 10 + (1 << 20)

    async def test_writing_to_an_ended_process_is_refused(self, workspace):
        process = await workspace.start("true")
        await process.wait(PATIENCE)
        with pytest.raises(ProcessNotFound):
            await process.write(b"x")

    @pytest.mark.place
    async def test_a_signal_reaches_the_process_and_its_group(self, workspace):
        process = await workspace.start(
            "trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.05; done"
        )
        await until_said(process, b"ready")
        await process.signal("USR1")
        assert (await process.wait(PATIENCE)).exit_code == 5
        assert b"got it" in await whole(process)

    @pytest.mark.place
    async def test_a_killed_process_says_by_which_signal(self, workspace):
        process = await workspace.start(["sleep", "1000"])
        await process.signal("KILL")
        exit = await process.wait(PATIENCE)
        assert (exit.status, exit.signal, exit.exit_code) == ("killed", 9, None)

    @pytest.mark.parametrize("name", ["FOO", "0", "", "-9", "KILL "])
    async def test_an_unknown_signal_is_refused(self, workspace, name):
        process = await workspace.start(["sleep", "1000"])
        with pytest.raises(InvalidParams):
            await process.signal(name)

    async def test_a_signal_to_an_ended_process_is_refused(self, workspace):
        process = await workspace.start("true")
        await process.wait(PATIENCE)
        with pytest.raises(ProcessNotFound):
            await process.signal("TERM")

    async def test_waiting_can_have_a_limit_and_harms_nothing(self, workspace):
        process = await workspace.start("until [ -e go ]; do sleep 0.01; done; exit 6")
        with pytest.raises(TimedOut):
            await process.wait(0.05)
        await workspace.files.write("go", b"")
        assert (await process.wait(PATIENCE)).exit_code == 6

    async def test_cancelling_a_wait_leaves_the_process_alone(self, workspace):
        process = await workspace.start("echo $$ > pid; echo ready; sleep 1000")
        await until_said(process, b"ready")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await process.wait()
        assert await alive(workspace)

    @pytest.mark.place
    async def test_a_timeout_ends_the_tree(self, workspace):
        process = await workspace.start("sleep 1000 & echo $! > pid; wait", timeout=0.3)
        assert (await process.wait(PATIENCE)).status == "timeout"
        assert not await alive(workspace)

    @pytest.mark.place
    async def test_processes_are_listed_running_and_ended(self, workspace):
        first = await workspace.start("echo hi; exit 7")
        await first.wait(PATIENCE)
        second = await workspace.start(["sleep", "1000"])
        one, two = await workspace.processes()
        assert (one.id, one.running, one.exit.exit_code, one.stdout_bytes) == (first.id, False, 7, 3)
        assert (two.id, two.running, two.exit, two.command) == (second.id, True, None, ["sleep", "1000"])

    async def test_a_process_is_found_again_by_its_id(self, workspace):
        process = await workspace.start("exit 8")
        assert (await workspace.process(process.id).wait(PATIENCE)).exit_code == 8

    async def test_an_unknown_process_is_refused_at_its_first_use(self, workspace):
        process = workspace.process("nobody")
        with pytest.raises(ProcessNotFound, match="nobody"):
            await process.wait()

    @pytest.mark.place
    async def test_a_missing_program_is_a_file_not_found_error(self, workspace):
        with pytest.raises(PathNotFound, match="no-such-program") as caught:
            await workspace.start(["no-such-program"])
        assert isinstance(caught.value, FileNotFoundError)

    @pytest.mark.place
    @pytest.mark.parametrize("pty", [False, True])
    async def test_a_program_that_may_not_run_is_a_permission_error(self, workspace, pty):
        await workspace.files.write("plain", b"")
        with pytest.raises(PathDenied) as caught:
            await workspace.start(["./plain"], pty=pty)
        assert isinstance(caught.value, PermissionError)

    @pytest.mark.parametrize(("cwd", "error"), [("src", PathNotFound), ("file", NotADirectory)])
    async def test_a_folder_that_cannot_be_entered_is_an_error(self, workspace, cwd, error):
        await workspace.files.write("file", b"")
        with pytest.raises(error):
            await workspace.start("true", cwd=cwd)

    # --- terminals ---

    @pytest.mark.place
    async def test_a_terminal_is_one_and_has_a_size(self, workspace):
        process = await workspace.start("tty >/dev/null && stty size </dev/tty", pty=True, rows=33, cols=111)
        assert await whole(process) == b"33 111\r\n"

    @pytest.mark.place
    async def test_a_terminal_talks_to_its_program(self, workspace):
        process = await workspace.start(["cat"], pty=True)
        await process.write(b"hello\n")
        await until_said(process, b"hello\r\nhello\r\n")
        await process.close_stdin()
        assert (await process.wait(PATIENCE)).exit_code == 0

    @pytest.mark.place
    async def test_the_interrupt_key_interrupts(self, workspace):
        process = await workspace.start(
            "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done", pty=True
        )
        await until_said(process, b"ready")
        await process.write(b"\x03")
        assert (await process.wait(PATIENCE)).exit_code == 9

    @pytest.mark.place
    async def test_a_program_learns_the_new_size_of_its_terminal(self, workspace):
        process = await workspace.start(WINDOW, pty=True)
        await until_said(process, b"ready")
        await process.resize(rows=40, cols=120)
        assert b"40 120" in await until_said(process, b"40 120")

    @pytest.mark.parametrize(("rows", "cols"), [(0, 80), (24, 0), (65_536, 80), (-1, 80)])
    async def test_an_impossible_size_is_refused(self, workspace, rows, cols):
        process = await workspace.start(["sleep", "1000"], pty=True)
        with pytest.raises(InvalidParams):
            await process.resize(rows=rows, cols=cols)

    async def test_all_a_terminal_said_is_there_when_its_program_has_ended(self, workspace):
        process = await workspace.start("stty -opost; seq 1 20000", pty=True)
        assert await whole(process) == "".join(f"{number}\n" for number in range(1, 20_001)).encode()

    @pytest.mark.parametrize("filter", ["tee log", "sleep 0.2; cat"])
    async def test_what_went_through_a_filter_arrives_although_the_terminal_is_hung_up(
        self, workspace, filter
    ):
        process = await workspace.start(f"exec > >({filter}); echo hi; exit 3", pty=True)
        assert await whole(process) == b"hi\r\n"
        assert (await process.wait(PATIENCE)).exit_code == 3

    # With job control, shell and job have process groups of their own. (At its prompt, bash may miss a signal.)
    @pytest.mark.parametrize("jobs", ["", "set -m; "])
    async def test_a_signal_ends_what_runs_on_a_terminal(self, workspace, jobs):
        process = await workspace.start(f"{jobs}sh -c 'echo ready; exec sleep 1000'; exit $?", pty=True)
        await until_said(process, b"ready")
        await process.signal("HUP")
        exit = await process.wait(PATIENCE)
        assert (exit.status, exit.exit_code, exit.signal) == ("killed", None, 1)

    async def test_the_interrupt_key_right_after_the_start_ends_what_runs_on_a_terminal(self, workspace):
        for _ in range(10):
            process = await workspace.start(["sleep", "1000"], pty=True)
            await process.write(b"\x03")
            exit = await process.wait(PATIENCE)
            assert (exit.status, exit.exit_code, exit.signal) == ("killed", None, 2)

    async def test_a_program_on_a_terminal_may_end_with_any_exit_code(self, workspace):
        process = await workspace.start("exit 143", pty=True)
        exit = await process.wait(PATIENCE)
        assert (exit.status, exit.exit_code) == ("exited", 143)
