"""What every workspace promises about persistent shells."""

import asyncio

import pytest

from agent_sdk.protocol.errors import InvalidParams
from tests.contract.commands import PATIENCE, alive

CTRL_C, CTRL_D, CTRL_Z = b"\x03", b"\x04", b"\x1a"

ASKS_WHERE_THE_CURSOR_IS = r"""
import os, sys, termios, tty
before = termios.tcgetattr(0)
tty.setraw(0)
os.write(1, b"\x1b[6n")
answer = os.read(0, 100)
termios.tcsetattr(0, termios.TCSANOW, before)
print("answered", answer.endswith(b"R"))
"""


async def begun(shell, command: str) -> None:
    """Run a command that says `ready` and goes on, and wait until it has said so."""
    result = await shell.run(command, quiet=0.1)
    said = result.output.text
    async with asyncio.timeout(PATIENCE):
        while "ready" not in said:
            said += (await shell.send(b"", quiet=0.1)).output.text


COMMANDS_THAT_LOSE_A_SHELL = [
    "enable -n builtin",
    "enable -n eval",
    "builtin() { :; }",
    "declare -r __last",
    "declare -n __n=other",
    "readonly PROMPT_COMMAND=true",
    "PS1='> '; enable -n builtin",
    "unset PS1; enable -n builtin",
    "shopt -s extdebug; trap false DEBUG",
    "shopt -s extdebug; trap 'return 2' DEBUG; PS1='> '",
]
"""They take away what it is driven by."""


class ShellContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.place
    async def test_a_shell_answers_with_output_exit_code_and_folder(self, workspace):
        result = await workspace.shell().run("echo hi; false")
        info = await workspace.describe()
        assert (result.status, result.output.text, result.exit_code) == ("done", "hi\n", 1)
        assert result.cwd == info.working_dir

    async def test_folder_variables_functions_and_options_stay(self, workspace):
        shell = workspace.shell()
        await shell.run(
            "mkdir -p a/b; cd a/b; name=value; export OTHER='x y'; f() { echo f:$1; }; shopt -s nullglob"
        )
        result = await shell.run('echo "$name/$OTHER"; f 1; basename "$PWD"; echo no*thing')
        assert result.output.text == "value/x y\nf:1\nb\n\n"

    async def test_shells_of_other_names_are_others(self, workspace):
        await workspace.shell("one").run("x=1")
        assert (await workspace.shell("two").run("echo [$x]")).output.text == "[]\n"

    async def test_the_last_exit_code_is_known_to_the_next_command(self, workspace):
        await workspace.shell().run("(exit 42)")
        assert (await workspace.shell().run("echo $?")).output.text == "42\n"

    @pytest.mark.parametrize(
        ("command", "output"),
        [
            ("cat <<'END'\n$x `y`\nEND", "$x `y`\n"),
            ("for i in 1 2\ndo\n  echo $i\ndone", "1\n2\n"),
            ("echo one\necho two", "one\ntwo\n"),
            ("printf '%s' 'tab\there'", "tab\there"),
            ("echo a \\\n  b", "a b\n"),
            ("echo 'it''s' \"fine\"  # not this", "its fine\n"),
            ("declare -A m=([a]=1); echo ${m[a]}", "1\n"),
        ],
    )
    async def test_any_bash_text_is_fine(self, workspace, command, output):
        result = await workspace.shell().run(command)
        assert (result.output.text, result.exit_code) == (output, 0)

    @pytest.mark.parametrize("command", ["echo 'abc", 'echo "abc', "if true; then", "echo $(", ")"])
    async def test_text_that_never_ends_is_an_error_of_that_command_alone(self, workspace, command):
        shell = workspace.shell()
        assert (await shell.run(command)).exit_code != 0
        assert (await shell.run("echo alive")).output.text == "alive\n"

    @pytest.mark.parametrize(
        "command", ["break", "continue", "return 3", "set -u; echo $nope", "echo ${x:?no}", "TMOUT=1"]
    )
    async def test_what_would_leave_a_script_leaves_the_shell_alone(self, workspace, command):
        shell = workspace.shell()
        assert (await shell.run(command)).status == "done"
        assert (await shell.run("echo alive")).output.text == "alive\n"

    @pytest.mark.parametrize(
        "command", ["unset -f $(compgen -A function)", "unset ${!__*}", "readonly PROMPT_COMMAND", "trap -"]
    )
    async def test_what_takes_a_shell_apart_leaves_one_that_works(self, workspace, command):
        shell = workspace.shell()
        assert (await shell.run(command)).status in ("done", "ended")
        assert (await shell.run("echo alive")).output.text == "alive\n"

    @pytest.mark.parametrize("command", COMMANDS_THAT_LOSE_A_SHELL)
    async def test_a_shell_that_was_left_without_what_it_is_driven_by_is_replaced(self, workspace, command):
        shell = workspace.shell()
        await shell.run("mkdir sub; cd sub; export KEPT='a b'")
        assert (await shell.run(command, timeout=PATIENCE, quiet=None)).status == "ended"
        assert (await shell.run('echo "$KEPT"; basename "$PWD"')).output.text == "a b\nsub\n"

    @pytest.mark.parametrize("attribute", ["-i", "-l", "-n"])
    async def test_a_command_is_run_as_it_was_sent_whatever_was_declared_of_the_variable_it_is_in(
        self, workspace, attribute
    ):
        shell = workspace.shell()
        await shell.run(f"declare {attribute} __command")
        assert (await shell.run("echo UPPER", timeout=PATIENCE, quiet=None)).output.text == "UPPER\n"

    async def test_a_program_may_show_the_prompt_of_its_shell(self, workspace):
        shell = workspace.shell()
        await shell.run("export PS1; name=kept")
        await shell.run("bash --norc -i", quiet=0.5)
        assert (await shell.send(b"exit 3\n")).exit_code == 3
        assert (await shell.run("echo $name")).output.text == "kept\n"

    @pytest.mark.parametrize("command", ['echo -e "$PS1"', "printf '%b\\n' \"$PS1\"", 'echo "${PS1@P}"'])
    async def test_a_prompt_that_is_printed_is_output_like_any_other(self, workspace, command):
        shell = workspace.shell()
        result = await shell.run(f"name=kept; echo one; {command}; echo two", timeout=PATIENCE, quiet=None)
        assert (result.status, result.exit_code) == ("done", 0)
        first, prompt, last = result.output.text.splitlines()
        assert (first, prompt.strip(), last) in (("one", "$", "two"), ("one", "#", "two"))
        assert (await shell.run("echo $name")).output.text == "kept\n"

    async def test_a_trap_that_looks_at_each_command_leaves_a_shell_that_works(self, workspace):
        shell = workspace.shell()
        await shell.run("shopt -s extdebug; trap '[[ $BASH_COMMAND != *refused* ]]' DEBUG; name=kept")
        result = await shell.run("echo refused; echo $name", timeout=PATIENCE, quiet=None)
        assert (result.status, result.output.text) == ("done", "kept\n")

    async def test_a_command_reads_from_its_terminal(self, workspace):
        shell = workspace.shell()
        result = await shell.run("tty; readlink /proc/self/fd/0; readlink /proc/$$/fd/1; test -t 0")
        assert (result.exit_code, len(set(result.output.text.splitlines()))) == (0, 1)

    @pytest.mark.parametrize("away", ["exec < words", "exec < <(cat words)", "exec <<'END'\none\ntwo\nEND"])
    async def test_where_a_shell_was_told_to_read_from_stays_until_it_is_told_otherwise(
        self, workspace, away
    ):
        shell = workspace.shell()
        await shell.run(f"printf 'one\\ntwo\\n' > words; {away}")
        assert [(await shell.run("read x; echo $x")).output.text for _ in range(2)] == ["one\n", "two\n"]
        assert (await shell.run("read x; echo $?")).output.text == "1\n"
        await shell.run("exec < /dev/tty")
        assert (await shell.run("read x", quiet=0.1)).status == "quiet"
        assert (await shell.send(b"three", enter=True)).status == "done"
        assert (await shell.run("echo $x")).output.text == "three\n"

    async def test_a_shell_without_an_input_says_so_to_whoever_reads(self, workspace):
        shell = workspace.shell()
        await shell.run("exec <&-")
        assert (await shell.run("read x")).exit_code == 1
        assert (await shell.run("exec < /dev/tty; test -t 0")).exit_code == 0

    async def test_a_prompt_that_was_added_to_and_exported_passes_to_the_shell_that_replaces(self, workspace):
        shell = workspace.shell()
        await shell.run('PS1="(venv) $PS1"; export PS1')
        for _ in range(3):
            result = await shell.run("enable -n builtin", timeout=PATIENCE, quiet=None)
            assert (result.status, "\x1b" in result.output.text) == ("ended", False)
            assert (await shell.run("echo ${PS1:0:6}")).output.text == "(venv)\n"

    async def test_a_shell_that_was_stopped_goes_on(self, workspace):
        shell = workspace.shell()
        result = await shell.run("kill -STOP $$; echo on", quiet=0.5)
        assert (result.status, result.output.text) == ("done", "on\n")
        assert (await shell.run("kill -STOP $$; echo on", timeout=0.5, quiet=None)).status == "timeout"
        assert (await shell.send(b"", timeout=PATIENCE)).output.text == "on\n"

    async def test_a_bash_in_the_place_of_the_shell_is_a_program_to_type_into(self, workspace):
        shell = workspace.shell()
        result = await shell.run("export PS1='next? '; exec bash --norc", until=b"next? ")
        assert result.status == "said"
        assert (await shell.send(b"exit 3\n")).exit_code == 3
        assert (await shell.run("echo alive")).output.text == "alive\n"

    async def test_a_command_of_any_length_arrives_whole(self, workspace):
        result = await workspace.shell().run(f"echo {'a' * 300_000} | wc -c")
        assert result.output.text.strip() == "300001"

    async def test_every_byte_value_is_shown_as_it_is(self, workspace):
        every = "".join(f"\\x{byte:02x}" for byte in range(256))
        result = await workspace.shell().run(f"printf '{every}'")
        assert result.output.head == bytes(range(256))

    @pytest.mark.parametrize("command", ["", "\n", "  \t", "# nothing", "\n# nothing\n\n"])
    async def test_a_command_without_words_is_done_at_once(self, workspace, command):
        shell = workspace.shell()
        await shell.run("false")
        result = await shell.run(command)
        assert (result.status, result.exit_code, result.output.text) == ("done", 0, "")

    @pytest.mark.place
    async def test_a_background_job_does_not_hold_up_the_answer(self, workspace):
        shell = workspace.shell()
        async with asyncio.timeout(PATIENCE):
            result = await shell.run("sleep 1000 & echo $! > pid; echo hi")
        assert result.output.text == "hi\n"
        assert await alive(workspace)
        assert (await shell.run("kill %1; wait %1 2>/dev/null; echo $?")).output.text == "143\n"

    async def test_what_a_background_job_says_later_comes_with_the_next_answer(self, workspace):
        shell = workspace.shell()
        async with asyncio.timeout(PATIENCE):  # no answer waits for the job, although it works
            await shell.run("(until [ -e go ]; do sleep 0.01; done; echo late; touch said) &")
            for _ in range(3):
                await shell.run("true")
        result = await shell.run("touch go; until [ -e said ]; do sleep 0.01; done; echo now")
        assert result.output.text == "late\nnow\n"

    @pytest.mark.parametrize(
        ("command", "output"),
        [
            pytest.param("echo hi > >(cat)", "hi\n", marks=pytest.mark.place),
            ("seq 3 > >(sed s/3/4/ | tee log)", "1\n2\n4\n"),
            ("printf 'exec > >(tee log)\\necho hi\\n' > script; bash script", "hi\n"),
        ],
    )
    async def test_what_a_command_wrote_through_a_filter_belongs_to_its_answer(
        self, workspace, command, output
    ):
        for _ in range(3):
            assert (await workspace.shell().run(command)).output.text == output

    async def test_a_shell_may_write_through_a_filter_for_good(self, workspace):
        shell = workspace.shell()
        await shell.run("exec > >(tee log) 2>&1")
        for _ in range(3):
            assert (await shell.run("echo hi; echo there")).output.text == "hi\nthere\n"

    @pytest.mark.parametrize("ends", ["exit 3", "exec bash -c 'echo there; exit 3'"])
    async def test_what_a_shell_wrote_through_a_filter_for_good_arrives_when_it_ends(self, workspace, ends):
        for _ in range(3):
            result = await workspace.shell().run(f"exec > >(sleep 0.2; cat); echo hi; {ends}")
            assert (result.status, result.exit_code) == ("ended", 3)
            assert result.output.text.startswith("hi\n")

    # --- commands that go on ---

    async def test_a_silent_command_is_answered_as_quiet_and_goes_on(self, workspace):
        shell = workspace.shell()
        result = await shell.run("read line; echo got $line", quiet=0.2)
        assert (result.status, result.exit_code) == ("quiet", None)
        result = await shell.send(b"something\n")
        assert (result.status, result.output.text, result.exit_code) == ("done", "got something\n", 0)

    async def test_a_call_may_wait_until_a_text_comes(self, workspace):
        shell = workspace.shell()
        ask = "printf 'na'; sleep 0.1; printf 'me? '; read name; echo $name; printf 'name? '; read name; echo $name"
        result = await shell.run(ask, until=b"name? ")
        assert (result.status, result.output.text, result.exit_code) == ("said", "name? ", None)
        result = await shell.send(b"Ada\n", until=b"name? ")
        assert (result.status, result.output.text) == ("said", "Ada\nname? ")
        result = await shell.send(b"Bob\n", until=b"never")
        assert (result.status, result.output.text, result.exit_code) == ("done", "Bob\n", 0)

    async def test_a_text_is_found_in_long_output_and_where_it_was_cut(self, workspace):
        result = await workspace.shell().run(
            "seq 1 200000; printf 'the '; sleep 0.1; echo end; read", until=b"the end"
        )
        assert result.status == "said"
        assert result.output.text.endswith("200000\nthe end\n")

    @pytest.mark.parametrize("until", [b"", b"x" * 1025])
    async def test_a_text_that_cannot_be_waited_for_is_refused(self, workspace, until):
        with pytest.raises(InvalidParams, match="until"):
            await workspace.shell().run("true", until=until)

    @pytest.mark.parametrize(
        ("reads", "typed", "enter", "got"),
        [
            ("read a; read b", b"y", None, "y|"),
            ("read a; read b", b"y\n", None, "y|"),
            ("read a; read b", b"y\n", True, "y||"),
            ("read -n1 a; read b", b"y", None, "y|"),
            pytest.param("read -n1 a; read b", b"y", True, "y||", marks=pytest.mark.place),
            ("stty raw; read -n1 a; stty sane; read b", b"y", None, "y|"),
        ],
    )
    async def test_enter_is_pressed_as_the_program_reads_or_as_one_says(
        self, workspace, reads, typed, enter, got
    ):
        shell = workspace.shell()
        first, second = reads.rsplit("; ", 1)
        await shell.run(f'{first}; echo -n "$a|"; {second}; echo -n "$b|"', quiet=0.3)
        assert (await shell.send(typed, enter=enter, quiet=0.3)).output.text == got

    async def test_a_timeout_answers_and_the_command_goes_on(self, workspace):
        shell = workspace.shell()
        result = await shell.run(
            "echo begun; until [ -e go ]; do sleep 0.01; done; echo ended", timeout=0.3, quiet=None
        )
        assert (result.status, result.output.text) == ("timeout", "begun\n")
        await workspace.files.write("go", b"")
        result = await shell.send(b"", timeout=PATIENCE)
        assert (result.status, result.output.text, result.exit_code) == ("done", "ended\n", 0)

    async def test_a_second_command_is_not_started_while_one_runs(self, workspace):
        shell = workspace.shell()
        await shell.run("sleep 1000", timeout=0.1)
        result = await shell.run("touch never")
        assert result.status == "busy"
        assert (await workspace.execute("ls never")).exit_code != 0

    @pytest.mark.place
    async def test_the_interrupt_key_ends_the_command_and_not_the_shell(self, workspace):
        shell = workspace.shell()
        await begun(shell, "x=kept; bash -c 'echo ready; exec sleep 1000'")
        result = await shell.send(CTRL_C)
        assert (result.status, result.exit_code) == ("done", 130)
        assert (await shell.run("echo $x")).output.text == "kept\n"

    async def test_the_interrupt_key_ends_a_loop(self, workspace):
        shell = workspace.shell()
        await begun(shell, "echo ready; while :; do :; done")
        assert (await shell.send(CTRL_C)).status == "done"

    async def test_the_end_of_file_key_ends_the_input(self, workspace):
        shell = workspace.shell()
        await shell.run("cat | tr a-z A-Z", quiet=0.1)
        await shell.send(b"abc\n", quiet=0.1)
        assert (await shell.send(CTRL_D)).status == "done"

    @pytest.mark.place
    async def test_a_suspended_command_can_be_brought_back(self, workspace):
        shell = workspace.shell()
        await begun(shell, "bash -c 'echo ready; until [ -e go ]; do sleep 0.01; done; echo ended'")
        assert (await shell.send(CTRL_Z)).status == "done"
        assert (await shell.run("touch go; fg >/dev/null")).output.text == "ended\n"

    async def test_typing_when_nothing_runs_types_nothing(self, workspace):
        shell = workspace.shell()
        assert (await shell.send(b"touch never\n")).status == "done"
        assert (await shell.run("ls never 2>&1 | wc -l; read -t 0 && echo typed")).output.text == "1\n"

    @pytest.mark.place
    async def test_cancelling_interrupts_the_command(self, workspace):
        shell = workspace.shell()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await shell.run("sleep 1000")
        assert (await shell.run("echo free")).output.text.strip() == "free"

    async def test_a_program_may_ask_where_the_cursor_is(self, workspace):
        await workspace.files.write("ask.py", ASKS_WHERE_THE_CURSOR_IS.encode())
        async with asyncio.timeout(PATIENCE):
            result = await workspace.shell().run("python3 ask.py")
        assert "answered True" in result.output.text

    @pytest.mark.place
    async def test_a_program_finds_a_terminal(self, workspace):
        result = await workspace.shell().run("[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo yes")
        assert result.output.text == "yes\n"

    # --- long output ---

    @pytest.mark.place
    async def test_the_whole_of_a_long_output_is_in_a_file(self, workspace):
        shell = workspace.shell()
        result = await shell.run("seq 1 300000")
        assert result.output.omitted > 0
        summed = await workspace.execute(f"cksum < {result.full_output}; seq 1 300000 | cksum")
        first, second = summed.stdout.splitlines()
        assert first == second

    async def test_output_too_long_to_read_has_a_file_though_nothing_is_left_out(self, workspace):
        result = await workspace.shell().run("seq 1 8000")
        assert result.output.omitted == 0
        assert (await workspace.execute(f"wc -l < {result.full_output}")).stdout.strip() == "8000"

    async def test_short_output_has_no_file(self, workspace):
        assert (await workspace.shell().run("seq 1 100")).full_output is None

    # --- its end ---

    @pytest.mark.parametrize(
        ("command", "exit_code"), [("exit 3", 3), ("set -e; false", 1), ("exec true", 0)]
    )
    async def test_a_shell_that_ends_leaves_folder_and_variables_to_a_fresh_one(
        self, workspace, command, exit_code
    ):
        shell = workspace.shell()
        await shell.run("mkdir sub; cd sub; export KEPT='a b'")
        result = await shell.run(f"echo bye; {command}")
        assert (result.status, result.output.text, result.exit_code) == ("ended", "bye\n", exit_code)
        result = await shell.run('echo "$KEPT"; basename "$PWD"')
        assert (result.status, result.output.text) == ("done", "a b\nsub\n")

    async def test_a_folder_whose_name_is_no_text_is_shown_escaped_and_left_to_a_fresh_shell(self, workspace):
        shell = workspace.shell()
        result = await shell.run(r"mkdir $'a\xff'; cd $'a\xff'; echo in")
        assert (result.status, result.output.text) == ("done", "in\n")
        assert result.cwd.endswith(r"/a\xff")
        assert (await shell.run("exit 3")).status == "ended"
        result = await shell.run(r"[ . -ef ../$'a\xff' ]; echo $?")
        assert result.output.text == "0\n"

    async def test_what_was_exported_in_the_last_command_is_kept_too(self, workspace):
        shell = workspace.shell()
        await shell.run("export LAST=1; exit")
        assert (await shell.run("echo $LAST")).output.text == "1\n"

    @pytest.mark.parametrize(
        ("command", "said", "exit_code"),
        [
            ("trap 'echo bye' EXIT; exit 4", "bye\n", 4),
            ("set -e; trap 'echo bye $?' EXIT; false", "bye 1\n", 1),
            ("trap 'echo bye; exit 9' 0; exit 4", "bye\n", 9),
            ("trap 'echo bye' EXIT; trap - EXIT; exit 4", "", 4),
            ("(trap 'echo inner' EXIT; exit 2); exit 4", "inner\n", 4),
            (
                "trap 'echo one' EXIT; old=$(trap -p EXIT); trap 'echo two' EXIT; eval \"$old\"; exit 4",
                "one\n",
                4,
            ),
        ],
    )
    async def test_what_a_shell_does_at_its_exit_costs_neither_folder_nor_variables(
        self, workspace, command, said, exit_code
    ):
        shell = workspace.shell()
        result = await shell.run(f"mkdir sub; cd sub; export KEPT='a b'; {command}")
        assert (result.status, result.output.text, result.exit_code) == ("ended", said, exit_code)
        assert (await shell.run('echo "$KEPT"; basename "$PWD"')).output.text == "a b\nsub\n"

    @pytest.mark.place
    @pytest.mark.parametrize("limit", [64, 32, 16])
    async def test_a_low_limit_of_descriptors_leaves_a_shell_that_works(self, workspace, limit):
        shell = workspace.shell()
        await shell.run(f"name=kept; ulimit -n {limit}")
        assert (await shell.run("echo $name; ulimit -n")).output.text == f"kept\n{limit}\n"

    @pytest.mark.place
    async def test_a_shell_that_can_open_nothing_any_more_is_replaced(self, workspace):
        shell = workspace.shell()
        await shell.run("mkdir sub; cd sub")
        assert (await shell.run("ulimit -n 8")).status == "ended"
        assert (await shell.run("basename $PWD")).output.text == "sub\n"

    @pytest.mark.place
    async def test_a_closed_shell_ends_everything_and_begins_anew_at_its_next_use(self, workspace):
        shell = workspace.shell()
        await shell.run(
            "export LOST=1; sleep 1000 & echo $! > pid; cd /; seq 1 20000; sleep 1000", timeout=0.5
        )
        await shell.close()
        assert not await alive(workspace)
        await shell.close()
        result = await shell.run("echo [$LOST]")
        assert (result.output.text, result.cwd) == ("[]\n", (await workspace.describe()).working_dir)

    @pytest.mark.place
    async def test_a_reset_ends_everything_and_starts_afresh(self, workspace):
        shell = workspace.shell()
        await shell.run(
            "cd /; export LOST=1; setsid sleep 1000 & echo $! > $OLDPWD/pid; sleep 1000", timeout=0.3
        )
        await shell.reset()
        result = await shell.run("echo [$LOST]")
        assert (result.output.text, result.cwd) == ("[]\n", (await workspace.describe()).working_dir)
        assert not await alive(workspace)
