"""The terminal tool in a real shell."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import pytest

from agent_sdk.agent.history import MODEL_CHARS
from agent_sdk.agent.mask import Mask
from agent_sdk.agent.tools.terminal import TerminalTool
from agent_sdk.protocol.errors import ToolError
from agent_sdk.tools import ToolContext, ToolResult
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.output import SPOOL_BYTES, TAIL_BYTES


class Terminal:
    """A terminal tool with its workspace, called as a model calls it."""

    def __init__(self, workspace: LocalWorkspace) -> None:
        self.workspace = workspace
        self.secrets: dict[str, str] = {}
        self.mask = Mask()
        self.tool = TerminalTool("mine")

    async def __call__(self, command: str | None = None, **more) -> ToolResult:
        arguments = more if command is None else {"command": command, **more}
        context = ToolContext(workspace=self.workspace, secrets=self.secrets, part=self.mask.part)
        return await self.tool.run(json.dumps(arguments), context)

    async def says(self, command: str, **more) -> str:
        """What the command printed, without the notes."""
        result = await self(command, **more)
        return result.text.partition("[The command completed")[0].strip()


def cut_apart(text: str) -> tuple[str, int, str, str]:
    """Head, number of bytes left out, where they are, and tail of a cut output."""
    found = re.search(r"(?s)^(.*)\n\[\.\.\. (\d+) bytes left out; (.*?) \.\.\.\]\n(.*)\n\[The command", text)
    assert found is not None
    return found[1], int(found[2]), found[3], found[4]


@pytest.fixture
async def terminal(tmp_path):
    (tmp_path / "work").mkdir()
    async with LocalWorkspace(tmp_path / "work") as workspace:
        yield Terminal(workspace)


async def test_a_result_is_what_was_printed_then_the_exit_code_then_the_folder(terminal):
    result = await terminal("echo one; echo two >&2; (exit 3)")
    folder = terminal.workspace.root
    assert result.text == (
        f"one\ntwo\n[The command completed with exit code 3.]\n[Current working directory: {folder}]"
    )
    assert result.data == {"exit_code": 3, "cwd": folder, "status": "done"}
    assert not result.is_error


async def test_folder_variables_functions_and_options_stay(terminal):
    await terminal("mkdir -p a && cd a && export X=1 && y=2 && f() { echo f:$1; }")
    assert await terminal.says("echo $X $y $(f z) ${PWD##*/}") == "1 2 f:z a"


async def test_several_lines_and_here_documents_are_one_command(terminal):
    command = "for i in 1 2; do\n  echo $i\ndone\ncat <<'END'\n$HOME `x` \"y\"\nEND\necho last"
    assert await terminal.says(command) == '1\n2\n$HOME `x` "y"\nlast'


async def test_a_syntax_error_is_an_exit_code(terminal):
    result = await terminal("if then fi )")
    assert result.data["exit_code"] == 2
    assert "syntax error" in result.text
    assert await terminal.says("echo fine") == "fine"


async def test_a_command_that_takes_too_long_goes_on_and_can_be_waited_for(terminal, tmp_path):
    os.mkfifo(tmp_path / "go")
    result = await terminal(f"echo begin; cat {tmp_path}/go; echo end", timeout=0.2)
    assert result.data["status"] == "timeout"
    assert result.data["exit_code"] is None
    assert "begin\n[The command still runs after 0.2 seconds" in result.text
    await asyncio.to_thread((tmp_path / "go").write_text, "now\n")
    assert await terminal.says("") == "now\nend"


async def test_a_second_command_is_not_run_while_the_first_one_runs(terminal, tmp_path):
    await terminal("sleep 3600", timeout=0.1)
    result = await terminal(f"touch {tmp_path}/second", timeout=5)
    assert result.data["status"] == "busy"
    assert "NOT run" in result.text
    assert not (tmp_path / "second").exists()
    await terminal("C-c", is_input=True)
    assert await terminal.says("echo free") == "free"


async def test_a_program_can_be_answered(terminal):
    await terminal("read -p 'Name? ' name && echo Hello, $name", timeout=0.2)
    result = await terminal("Ada", is_input=True)
    assert "Hello, Ada" in result.text
    assert result.data["exit_code"] == 0


@pytest.mark.parametrize(
    ("asks", "answers", "got"),
    [
        ("read -n1 -p 'go? ' a; echo; read -p 'name: ' b", ["y", "Bob"], "a=y b=Bob."),
        ("read -n3 a; read b", ["yes", "Bob"], "a=yes b=Bob."),
        ("read -s a; read b", ["y", "Bob"], "a=y b=Bob."),
        ("read a; read b", ["y\nBob\n"], "a=y b=Bob."),
        ("read a; read b", ["y", "ENTER"], "a=y b=."),
    ],
)
async def test_what_is_typed_answers_one_question_and_not_the_next(terminal, asks, answers, got):
    await terminal(f"{asks}; echo a=$a b=$b.", timeout=0.3)
    for answer in answers[:-1]:
        await terminal(answer, is_input=True, timeout=0.3)
    assert got in (await terminal(answers[-1], is_input=True)).text


async def test_text_without_enter_stays_on_its_line(terminal):
    await terminal("read a; echo got $a.", timeout=0.3)
    assert (await terminal("on", is_input=True, enter=False, timeout=0.3)).data["status"] == "timeout"
    assert "got once." in (await terminal("ce", is_input=True, enter=True)).text


async def test_lines_that_end_a_block_are_typed_as_they_are(terminal, tmp_path):
    (tmp_path / "repl.py").write_text("import code\ncode.interact(banner='', exitmsg='')\n")
    await terminal(f"{sys.executable} {tmp_path}/repl.py", timeout=2)
    result = await terminal("for n in range(2):\n    print('n is', n)\n\n", is_input=True, timeout=0.5)
    assert "n is 0\nn is 1" in result.text
    await terminal("C-d", is_input=True)


async def test_a_line_may_be_the_name_of_a_key(terminal):
    await terminal("read word; echo got $word.", timeout=0.3)
    assert "got END." in (await terminal("END\n", is_input=True)).text


async def test_keys_stop_suspend_and_end_input(terminal):
    await terminal("sleep 3600", timeout=0.1)
    assert (await terminal("C-c", is_input=True)).data["exit_code"] == 130
    await terminal("cat", timeout=0.1)
    await terminal("typed", is_input=True, timeout=0.2)
    assert (await terminal("C-d", is_input=True)).data["exit_code"] == 0
    await terminal("sleep 3600", timeout=0.1)
    assert (await terminal("C-z", is_input=True)).data["status"] == "done"
    assert "sleep 3600" in await terminal.says("jobs")
    await terminal("kill %1")


async def test_typing_with_nothing_running_is_refused(terminal):
    typed = await terminal("yes", is_input=True)
    polled = await terminal("")
    assert (typed.is_error, polled.is_error) == (True, True)
    assert "nothing was typed" in typed.text


async def test_a_background_job_does_not_hold_the_answer(terminal):
    result = await terminal("sleep 3600 & echo started")
    assert "started" in result.text
    assert result.data["status"] == "done"


async def test_a_fresh_shell_knows_nothing_of_the_old_one(terminal):
    await terminal("cd /tmp; X=1")
    await terminal("sleep 3600", timeout=0.1)
    assert "fresh shell" in (await terminal("", reset=True)).text
    assert await terminal.says("echo [$X] $PWD") == f"[] {terminal.workspace.root}"


async def test_a_fresh_shell_may_get_its_first_command_at_once(terminal):
    await terminal("X=1")
    assert await terminal.says("echo [$X]", reset=True) == "[]"


async def test_a_shell_that_ends_is_replaced(terminal):
    result = await terminal("exit 7")
    assert result.data == {**result.data, "status": "ended", "exit_code": 7}
    assert await terminal.says("echo here") == "here"


async def test_colours_and_progress_bars_are_plain_text(terminal):
    command = r"printf '\033[31mred\033[0m\n10%%\r50%%\r100%%\ndone\n'"
    assert await terminal.says(command) == "red\n100%\ndone"


async def test_long_output_is_cut_in_its_middle_and_kept_in_a_file(terminal):
    result = await terminal("seq 100000")
    whole = "".join(f"{n}\n" for n in range(1, 100_001))
    assert len(result.text) <= MODEL_CHARS
    head, cut, where, tail = cut_apart(result.text)
    assert whole.startswith(head) and whole.endswith(tail + "\n")
    assert cut == result.bytes_cut == len(whole) - len(head) - len(tail) - 1
    assert where == f"the whole output is in {result.data['full_output']}"
    assert Path(result.data["full_output"]).read_text() == whole


async def test_the_bytes_that_are_left_out_are_counted_once_and_exactly(terminal):
    result = await terminal("yes aä€😀 | head -c 3000000")
    head, cut, _, tail = cut_apart(result.text)
    assert "�" not in head
    assert cut + len((head + tail).encode()) in (3_000_000, 3_000_000 - 1)
    assert result.bytes_cut == cut


async def test_what_even_the_file_lacks_is_said(terminal):
    size = SPOOL_BYTES + TAIL_BYTES + 1000
    result = await terminal(f"head -c {size} /dev/zero | tr '\\0' x")
    head, cut, where, tail = cut_apart(result.text)
    assert cut == result.bytes_cut == size - len(head) - len(tail)
    assert where == f"all but 1000 bytes of the output are in {result.data['full_output']}"


@pytest.mark.parametrize("size", [23_000, 25_000, 28_000, 29_000, 29_500, 30_000, 31_000])
async def test_a_cut_result_always_has_a_file_and_is_cut_only_once(terminal, size):
    result = await terminal(f"head -c {size} /dev/zero | tr '\\0' x")
    assert len(result.text) <= MODEL_CHARS
    assert result.text.count("left out") == bool(result.bytes_cut)
    assert not result.bytes_cut or Path(result.data["full_output"]).stat().st_size == size


async def test_endless_output_does_not_stop_the_terminal(terminal):
    result = await terminal("yes", timeout=0.3)
    assert result.data["status"] == "timeout"
    assert len(result.text) < 31_000
    assert (await terminal("C-c", is_input=True)).data["exit_code"] == 130


async def test_a_pager_does_not_wait_for_anybody(terminal):
    result = await terminal(
        "git --version | ${PAGER:-less}; seq 200 | ${GIT_PAGER:-less} | tail -1", timeout=20
    )
    assert result.data["status"] == "done"


async def test_output_that_comes_in_two_calls_shows_no_half_of_a_secret(terminal, tmp_path):
    os.mkfifo(tmp_path / "go")
    terminal.mask.hide(["hunter2-hunter2-correct-horse"])
    command = f"printf 'it is hunter2-'; cat {tmp_path}/go; echo hunter2-correct-horse ok"
    first = await terminal(command, timeout=1)
    assert first.data["status"] == "timeout"
    await asyncio.to_thread((tmp_path / "go").write_text, "")
    second = await terminal("")
    assert first.text.startswith("it is <secret-hidden>\n[The command still runs")
    assert second.text.startswith("<secret-hidden> ok\n[The command completed")


async def test_output_that_comes_in_many_calls_shows_no_piece_of_a_secret(terminal, tmp_path):
    gates = [tmp_path / f"go{number}" for number in range(3)]
    for gate in gates:
        os.mkfifo(gate)
    terminal.mask.hide(["hunter2-correct-horse-battery-staple"])
    pieces = ["it is hunter2-cor", "rect-ho", "rse-batt", "ery-staple ok"]
    prints = [f"printf %s '{piece}'" for piece in pieces]
    command = "; ".join(f"{print}; cat {gate}" for print, gate in zip(prints, gates, strict=False))
    told = [await terminal(f"{command}; {prints[-1]}", timeout=1)]
    for gate in gates:
        await asyncio.to_thread(gate.write_text, "")
        told.append(await terminal("", timeout=1))
    shown = [result.text.partition("[The command")[0].strip() for result in told]
    assert shown == ["it is <secret-hidden>", "<secret-hidden>", "<secret-hidden>", "<secret-hidden> ok"]


@pytest.mark.parametrize("then", ["sleep 60", "true"], ids=["runs on", "ends"])
async def test_output_that_comes_with_another_command_shows_no_half_of_a_secret(terminal, tmp_path, then):
    go = tmp_path / "go"
    os.mkfifo(go)
    terminal.mask.hide(["hunter2-hunter2-correct-horse"])
    rest = f"cat {go}; echo hunter2-correct-horse; {then}"
    await terminal(f"printf 'it is hunter2-'; {rest}", timeout=1)
    await asyncio.to_thread(go.write_text, "")
    while (other := await terminal("echo ok")).text.startswith("[Your command was NOT run"):
        await asyncio.to_thread(os.sched_yield)  # nothing has come yet
    assert other.text.startswith("<secret-hidden>\n")


async def test_secrets_are_variables_also_in_a_fresh_shell_and_when_they_change(terminal):
    terminal.secrets = {"TOKEN": 'it\'s "a" $secret\nof two lines'}
    assert await terminal.says('printf %s "$TOKEN" | wc -c; env | grep -c ^TOKEN=') == "29\n1"
    await terminal("", reset=True)
    assert await terminal.says('printf %s "$TOKEN" | wc -c') == "29"
    terminal.secrets = {"TOKEN": "12345678"}
    assert await terminal.says("echo $TOKEN") == "12345678"


async def test_cancelling_stops_the_command_and_leaves_the_shell_usable(terminal, tmp_path):
    os.mkfifo(tmp_path / "pid")
    await terminal("X=kept")
    task = asyncio.create_task(terminal(f"echo $$ > {tmp_path}/pid; sleep 3600"))
    await asyncio.to_thread((tmp_path / "pid").read_text)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await terminal.says("echo $X") == "kept"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"command": 3}, "command"),
        ({"command": "ls", "timeout": -1}, "timeout"),
        ({"command": "ls", "folder": "/"}, "folder"),
        ({"command": "ls", "reset": True, "is_input": True}, "reset"),
    ],
)
async def test_wrong_arguments_are_named(terminal, arguments, named):
    with pytest.raises(ToolError, match=named):
        await terminal(**arguments)
