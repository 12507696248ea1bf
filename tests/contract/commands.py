"""What every workspace promises about commands."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from agent_sdk.protocol.errors import InvalidParams, LimitExceeded, PolicyDenied
from agent_sdk.workspace.contract import Workspace
from agent_sdk.workspace.output import HEAD_BYTES, SPOOL_BYTES, TAIL_BYTES

PATIENCE = 30
"""Seconds until a test that hangs fails."""

EVERY_BYTE = bytes(range(256))
CHARACTERS = "a€😀".encode()

STUBBORN = "trap '' TERM INT HUP; echo $$ > pid; echo ready; while :; do sleep 1; done"
OBEDIENT = "echo $$ > pid; echo ready; sleep 1000"

HEARS_SIGNALS = 'for name in INT QUIT HUP TERM USR1; do trap "echo $name" $name; kill -$name $$; done'
SIGNALS_HEARD = "INT\nQUIT\nHUP\nTERM\nUSR1\n"


class Listener:
    """A callback that lets a test wait until a command has said something."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bytes]] = []
        self._more = asyncio.Event()

    def __call__(self, stream: str, data: bytes) -> None:
        self.pieces.append((stream, data))
        self._more.set()

    @property
    def said(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    async def hears(self, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE):
            while text not in self.said:
                self._more.clear()
                await self._more.wait()


async def alive(workspace: Workspace, pid_file: str = "pid") -> bool:
    """Whether the process lives whose number is in this file; a zombie does not."""
    state = await workspace.execute(f"grep -q '^State:.[^ZX]' /proc/$(cat {pid_file})/status")
    return state.exit_code == 0


async def cancelled_when_ready(work: Awaitable[Any], listener: Listener) -> None:
    """Cancel a call once its command has said `ready`, and wait for the end of the call."""
    task = asyncio.ensure_future(work)
    await listener.hears(b"ready")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class CommandContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.place
    async def test_a_command_may_be_told_to_run_as_who_it_is_anyway(self, workspace):
        own = (await workspace.execute("id -u")).stdout.strip()
        assert (await workspace.execute("id -u", user=own)).stdout.strip() == own
        process = await workspace.start(["id", "-u"], user=own)
        assert [data async for data in process.output()] == [f"{own}\n".encode()]

    @pytest.mark.place
    async def test_a_user_who_is_not_there_is_refused_by_name(self, workspace):
        for call in (workspace.execute, workspace.start):
            with pytest.raises(InvalidParams, match="there is no user 'nonesuch'"):
                await call("true", user="nonesuch")

    @pytest.mark.place
    async def test_a_command_answers_with_its_output_and_exit_code(self, workspace):
        result = await workspace.execute("echo out; echo err >&2; exit 3")
        assert (result.status, result.exit_code) == ("exited", 3)
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
        assert (result.timed_out, result.truncated) == (False, False)

    @pytest.mark.place
    async def test_text_is_run_by_bash(self, workspace):
        result = await workspace.execute("[[ ab == a* ]] && printf %s {1..3}")
        assert result.stdout == "123"

    async def test_a_list_is_run_as_it_is(self, workspace):
        result = await workspace.execute(["printf", "%s|", "a b", "$HOME", "*", "", "é"])
        assert result.stdout == "a b|$HOME|*||é|"

    async def test_every_byte_value_survives_in_both_streams_and_the_input(self, workspace):
        result = await workspace.execute("tee /dev/stderr", stdin=EVERY_BYTE)
        assert (result.out.head, result.err.head) == (EVERY_BYTE, EVERY_BYTE)

    async def test_a_character_may_arrive_in_parts(self, workspace):
        bytewise = "; ".join(f"printf '\\x{byte:02x}'; bash -c true" for byte in CHARACTERS)
        listener = Listener()
        result = await workspace.execute(bytewise, on_output=listener)
        assert result.stdout.encode() == listener.said == CHARACTERS

    async def test_wrong_utf_8_is_shown_replaced_and_kept_as_it_is(self, workspace):
        result = await workspace.execute(r"printf 'a\xffb'")
        assert (result.stdout, result.out.head) == ("a�b", b"a\xffb")

    async def test_input_is_empty_unless_given(self, workspace):
        assert (await workspace.execute("cat")).stdout == ""

    async def test_input_may_be_text(self, workspace):
        assert (await workspace.execute("cat", stdin="grüße\n")).stdout == "grüße\n"

    @pytest.mark.parametrize(
        "wrong",
        [
            {"stdin": 5},
            {"stdin": ["text"]},
            {"stdin": "\ud800"},
            {"timeout": "5"},
            {"command": 5},
            {"command": {}},
        ],
    )
    async def test_an_argument_of_a_wrong_kind_is_refused_by_its_name(self, workspace, wrong):
        with pytest.raises(InvalidParams, match=next(iter(wrong))):
            await workspace.execute(**{"command": "cat", **wrong})

    async def test_much_input_and_output_at_once_do_not_block_each_other(self, workspace):
        result = await workspace.execute("cat", stdin=EVERY_BYTE * 12_000)
        assert result.out.size == 256 * 12_000

    async def test_a_command_need_not_read_its_input(self, workspace):
        assert (await workspace.execute("exec true", stdin=EVERY_BYTE * 12_000)).exit_code == 0

    async def test_long_output_keeps_its_head_its_tail_and_an_exact_count(self, workspace):
        result = await workspace.execute("seq 1 500000")
        whole = "".join(f"{number}\n" for number in range(1, 500_001)).encode()
        assert result.out.size == len(whole)
        assert result.out.head == whole[:HEAD_BYTES]
        assert result.out.tail == whole[-TAIL_BYTES:]
        assert result.truncated
        assert f"{len(whole) - HEAD_BYTES - TAIL_BYTES} bytes left out" in result.stdout

    @pytest.mark.place
    async def test_a_signal_is_told_apart_from_an_exit_code(self, workspace):
        result = await workspace.execute("kill -KILL $$")
        assert (result.status, result.exit_code, result.signal) == ("killed", None, 9)

    async def test_both_streams_may_be_one_in_the_order_in_which_they_were_written(self, workspace):
        listener = Listener()
        command = 'for n in 1 2 3; do echo out $n; bash -c "echo err $n >&2"; done; cat nothing'
        for on_output in (None, listener):
            result = await workspace.execute(command, merge=True, on_output=on_output)
            assert result.stdout.startswith("out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\ncat: nothing: ")
            assert (result.stderr, result.exit_code) == ("", 1)
        assert listener.said.decode() == result.stdout

    @pytest.mark.place
    @pytest.mark.parametrize("merge", [False, True])
    async def test_the_whole_of_a_long_output_can_be_had(self, workspace, merge):
        result = await workspace.execute("seq 1 500000; echo end >&2", merge=merge)
        whole = "".join(f"{number}\n" for number in range(1, 500_001)).encode()
        assert result.truncated
        assert await result.whole() == whole + b"end\n" * merge
        assert await result.whole("stderr") == (b"" if merge else b"end\n")

    async def test_the_whole_output_of_a_command_that_runs_on_is_waited_for(self, workspace):
        result = await workspace.execute("echo a; sleep 0.5; echo b", yield_after=0.1)
        assert (result.status, await result.whole()) == ("running", b"a\nb\n")

    async def test_whole_output_that_is_not_kept_is_refused_and_not_cut(self, workspace):
        result = await workspace.execute(f"head -c {SPOOL_BYTES + TAIL_BYTES + 5} /dev/zero")
        with pytest.raises(LimitExceeded, match=f"5 bytes behind the first {SPOOL_BYTES} are gone"):
            await result.whole()

    @pytest.mark.parametrize(
        ("command", "options", "returncode", "said"),
        [
            ("exit 3", {}, 3, ""),
            ("kill -TERM $$", {}, 143, ""),
            ("kill -KILL $$", {}, 137, ""),
            ("sleep 1000", {"timeout": 0.3}, 124, ""),
            ("sleep 0.5", {"yield_after": 0.1}, None, ""),
            ("nothing-of-this-name", {}, 127, "not found"),
            (["nothing-of-this-name"], {}, 127, "nothing-of-this-name"),
            (["/"], {}, 126, "Permission denied"),
            (["true"], {"cwd": "nowhere"}, 127, "No such file or directory"),
        ],
    )
    async def test_one_number_says_how_a_command_ended(self, workspace, command, options, returncode, said):
        result = await workspace.execute(command, **options)
        assert result.returncode == returncode
        assert said in result.stderr

    @pytest.mark.place
    async def test_many_commands_run_at_once(self, workspace):
        results = await asyncio.gather(*(workspace.execute(f"echo {number}") for number in range(20)))
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]

    @pytest.mark.place
    async def test_signals_mean_to_a_command_what_they_mean_to_others(self, workspace):
        result = await workspace.execute(HEARS_SIGNALS)
        assert result.stdout == SIGNALS_HEARD

    # --- filters that a command writes through ---

    @pytest.mark.parametrize(
        ("command", "output"),
        [
            ("exec > >(tee -a log) 2>&1; echo one; echo two >&2", "one\ntwo\n"),
            pytest.param("echo hi > >(cat)", "hi\n", marks=pytest.mark.place),
            ("echo hi 2> >(cat >&2) > >(sed s/h/H/ | tee log)", "Hi\n"),
            (
                "printf 'exec > >(tee log)\\necho 1\\nseq 2 2000\\n' > script; bash script",
                "".join(f"{n}\n" for n in range(1, 2001)),
            ),
            ('echo hi > >(while read line; do bash -c "echo $line"; done)', "hi\n"),
            pytest.param(
                "mkfifo pipe; tee log < pipe & exec > pipe; echo hi", "hi\n", marks=pytest.mark.place
            ),
            ("exec > >(tee log); sleep 1000 & echo hi", "hi\n"),
        ],
    )
    async def test_what_a_command_wrote_through_a_filter_belongs_to_its_output(
        self, workspace, command, output
    ):
        await workspace.files.write("run", command.encode())
        for _ in range(3):
            await workspace.execute("rm -f pipe")
            assert (await workspace.execute(command)).stdout == output
        process = await workspace.start("rm -f pipe; . ./run")
        assert b"".join([piece async for piece in process.output()]).decode() == output

    async def test_what_goes_through_a_slow_filter_is_waited_for(self, workspace):
        works = "sed p | while read line; do for ((i = 0; i < 100000; i++)); do :; done; echo $line; done"
        result = await workspace.execute(f"exec > >({works}); echo a")
        assert result.stdout == "a\na\n"
        sleeps = await workspace.execute("exec > >(sleep 0.2; cat); echo a")
        assert sleeps.stdout == "a\n"

    async def test_the_time_of_a_command_counts_for_what_it_writes_through(self, workspace):
        result = await workspace.execute("exec > >(while :; do echo x; done)", timeout=0.3)
        assert result.timed_out

    # --- folder and environment ---

    @pytest.mark.place
    async def test_variables_are_added_to_the_environment(self, workspace):
        result = await workspace.execute('echo "$GREETING from $PATH"', env={"GREETING": "hello\nyou"})
        assert result.stdout.startswith("hello\nyou from /")

    async def test_names_of_the_server_are_reserved(self, workspace):
        with pytest.raises(PolicyDenied, match="AGENT_"):
            await workspace.execute("true", env={"AGENT_SERVER_OP": "1"})

    async def test_an_impossible_environment_is_refused(self, workspace):
        for env in ({"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}, {"A": "x" * 140_000}):
            with pytest.raises(InvalidParams, match="env"):
                await workspace.execute("true", env=env)

    @pytest.mark.place
    async def test_nothing_waits_for_a_pager_an_editor_or_a_password(self, workspace):
        result = await workspace.execute("echo $PAGER $GIT_PAGER $GIT_EDITOR $GIT_TERMINAL_PROMPT")
        assert result.stdout == "cat cat true 0\n"

    @pytest.mark.place
    async def test_a_command_starts_in_the_working_folder_or_below_it(self, workspace):
        info = await workspace.describe()
        await workspace.files.mkdir("a/b")
        assert (await workspace.execute("pwd")).stdout == info.working_dir + "\n"
        assert (await workspace.execute("pwd", cwd="a/b")).stdout == f"{info.working_dir}/a/b\n"
        assert (
            await workspace.execute("pwd", cwd=f"{info.working_dir}/a")
        ).stdout == f"{info.working_dir}/a\n"

    @pytest.mark.parametrize(
        ("cwd", "reason"),
        [
            ("src", "ENOENT: No such file or directory: src"),
            ("file", "ENOTDIR: Not a directory"),
            ("loop", "ELOOP: "),
        ],
    )
    async def test_a_folder_that_cannot_be_entered_is_a_result_with_a_reason(self, workspace, cwd, reason):
        await workspace.execute("touch file; ln -s loop loop")
        result = await workspace.execute("true", cwd=cwd)
        assert (result.status, result.exit_code) == ("spawn_failed", None)
        assert result.reason.startswith(reason)

    # --- programs that do not start ---

    @pytest.mark.place
    @pytest.mark.parametrize(
        ("argv", "exit_code", "errno"),
        [
            (["no-such-program"], 127, "ENOENT"),
            (["./no-such-file"], 127, "ENOENT"),
            (["./lost"], 127, "ENOENT"),
            (["./plain"], 126, "EACCES"),
            (["./folder"], 126, "EACCES"),
            (["./noise"], 126, "ENOEXEC"),
        ],
    )
    async def test_a_program_that_cannot_start_is_a_result_with_the_shells_exit_code(
        self, workspace, argv, exit_code, errno
    ):
        await workspace.execute(
            r"printf '#!/no/such/shell\n' > lost; printf '\0\1' > noise; chmod +x lost noise; touch plain; mkdir folder"
        )
        result = await workspace.execute(argv)
        assert (result.status, result.exit_code) == ("spawn_failed", exit_code)
        assert result.reason.startswith(f"{errno}: ")
        assert argv[0] in result.reason

    async def test_bash_says_itself_when_it_does_not_find_a_command(self, workspace):
        result = await workspace.execute("no-such-program")
        assert (result.status, result.exit_code) == ("exited", 127)
        assert "not found" in result.stderr

    @pytest.mark.parametrize(
        ("command", "field"),
        [
            ([], "argv"),
            ([""], "argv"),
            (["echo", "a\0b"], r"command: contains a NUL character at \[1\]"),
            (["echo", "a", "b", "x" * 131_072], r"argv(\[3\])?"),
            (["echo"] * 4097, "argv"),
        ],
    )
    async def test_an_impossible_command_is_refused_by_its_field(self, workspace, command, field):
        with pytest.raises(InvalidParams, match=field):
            await workspace.execute(command)

    @pytest.mark.parametrize("command", ["", "\n", "  ", "# nothing", "\n# nothing\n"])
    async def test_a_command_without_words_is_nothing_and_succeeds(self, workspace, command):
        result = await workspace.execute(command)
        assert (result.status, result.exit_code, result.stdout, result.stderr) == ("exited", 0, "", "")
        assert (await (await workspace.start(command)).wait(PATIENCE)).exit_code == 0

    # --- clocks ---

    @pytest.mark.parametrize(
        "child",
        [
            "sleep 100",
            pytest.param("setsid sleep 100", marks=pytest.mark.place),
            pytest.param("(while :; do echo again; sleep 0.01; done)", marks=pytest.mark.place),
            "(while :; do :; done)",
            "(sleep 100 | cat)",
            "tail -f /dev/null | while read line; do echo $line; done",
        ],
    )
    async def test_a_background_child_does_not_hold_up_the_answer(self, workspace, child):
        async with asyncio.timeout(PATIENCE):
            result = await workspace.execute(f"{child} & echo hi")
        assert "hi\n" in result.stdout

    @pytest.mark.place
    async def test_children_in_the_background_live_on(self, workspace):
        await workspace.execute("sleep 1000 & echo $! > pid")
        assert await alive(workspace)

    @pytest.mark.place
    async def test_what_a_background_child_says_later_can_be_read(self, workspace):
        result = await workspace.execute(
            "(until [ -e go ]; do sleep 0.01; done; echo late; touch said) & echo now"
        )
        await workspace.execute("touch go; until [ -e said ]; do sleep 0.01; done")
        process = workspace.process(result.process_id)
        assert b"".join([piece async for piece in process.output()]) == b"now\nlate\n"

    @pytest.mark.place
    async def test_a_timeout_ends_the_command_and_keeps_what_it_said(self, workspace):
        result = await workspace.execute("echo begun; echo $$ > pid; sleep 1000; echo never", timeout=0.9)
        assert result.timed_out
        assert (result.exit_code, result.signal, result.stdout) == (None, 15, "begun\n")
        assert result.duration >= 0.9
        assert not await alive(workspace)

    @pytest.mark.place
    async def test_a_timeout_ends_children_that_left_the_session(self, workspace):
        result = await workspace.execute(
            "setsid bash -c '(echo $BASHPID > pid; exec sleep 1000) & wait' & sleep 1000", timeout=0.5
        )
        assert result.timed_out
        assert not await alive(workspace)

    @pytest.mark.parametrize("field", ["timeout", "yield_after"])
    async def test_a_time_out_of_range_is_refused_by_its_field(self, workspace, field):
        for value in (0, -1, 0.0001, 1e12, float("nan"), float("inf")):
            with pytest.raises(InvalidParams, match=field):
                await workspace.execute("true", **{field: value})

    async def test_a_long_command_can_be_left_running_and_awaited_later(self, workspace):
        result = await workspace.execute(
            "until [ -e go ]; do sleep 0.01; done; echo late; exit 4", yield_after=0.1
        )
        assert (result.status, result.exit_code, result.stdout) == ("running", None, "")
        await workspace.files.write("go", b"")
        process = workspace.process(result.process_id)
        assert (await process.wait(PATIENCE)).exit_code == 4
        assert b"".join([piece async for piece in process.output()]) == b"late\n"

    async def test_a_command_that_is_left_running_still_has_its_timeout(self, workspace):
        result = await workspace.execute("sleep 1000", yield_after=0.1, timeout=0.3)
        exit = await workspace.process(result.process_id).wait(PATIENCE)
        assert (result.status, exit.status) == ("running", "timeout")

    # --- cancelling ---

    @pytest.mark.place
    async def test_cancelling_ends_the_command(self, workspace):
        listener = Listener()
        await cancelled_when_ready(workspace.execute(OBEDIENT, on_output=listener), listener)
        assert not await alive(workspace)

    @pytest.mark.place
    async def test_cancelling_ends_children_that_left_the_session(self, workspace):
        listener = Listener()
        await workspace.files.write("obedient", OBEDIENT.encode())
        command = "setsid bash -c 'bash obedient & wait' & wait"
        await cancelled_when_ready(workspace.execute(command, on_output=listener), listener)
        assert not await alive(workspace)

    @pytest.mark.place
    async def test_cancelling_ends_a_stopped_child(self, workspace):
        listener = Listener()
        command = (
            "bash -c 'echo $$ > pid; kill -STOP $$' & until grep -q '^State:.T' /proc/$!/status; do :; done; "
        )
        await cancelled_when_ready(
            workspace.execute(command + "echo ready; wait; sleep 1000", on_output=listener), listener
        )
        assert not await alive(workspace)

    @pytest.mark.place
    async def test_cancelling_ends_a_child_that_ignores_everything_but_kill(self, workspace):
        listener = Listener()
        await workspace.files.write("stubborn", STUBBORN.encode())
        await cancelled_when_ready(
            workspace.execute("setsid bash stubborn & wait", on_output=listener), listener
        )
        assert not await alive(workspace)

    # --- listening ---

    async def test_output_is_told_in_order_and_before_the_answer(self, workspace):
        listener = Listener()
        result = await workspace.execute("seq 1 100000", on_output=listener)
        assert len(listener.said) == result.out.size
        assert listener.said == "".join(f"{number}\n" for number in range(1, 100_001)).encode()

    async def test_both_streams_are_told_in_the_order_they_came(self, workspace):
        told: list[tuple[str, bytes]] = []

        async def tell(stream, data):
            told.append((stream, data))
            await workspace.files.write(f"heard-{len(told)}", b"")

        wait = "until [ -e heard-{} ]; do sleep 0.01; done; "
        await workspace.execute(
            "echo a; " + wait.format(1) + "echo b >&2; " + wait.format(2) + "echo c", on_output=tell
        )
        assert told == [("stdout", b"a\n"), ("stderr", b"b\n"), ("stdout", b"c\n")]

    async def test_a_slow_listener_does_not_slow_the_command(self, workspace):
        async def tell(stream, data):
            await workspace.execute("until [ -e ended ]; do sleep 0.01; done")

        result = await workspace.execute("echo begun; seq 1 100000; touch ended", on_output=tell)
        assert result.exit_code == 0

    @pytest.mark.place
    async def test_a_listener_that_fails_ends_the_command(self, workspace):
        async def tell(stream, data):
            raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            await workspace.execute(OBEDIENT, on_output=tell)
        assert not await alive(workspace)
