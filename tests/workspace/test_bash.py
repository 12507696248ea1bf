"""What a terminal shows is told apart from what the shell says about itself, however it is cut."""

import asyncio

import pytest

from agent_sdk.workspace.bash import _Filter as Filter
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.output import HEAD_BYTES
from agent_sdk.workspace.shell import _Sought as Sought
from agent_sdk.workspace.spool import Spool

NONCE = "0123456789abcdef"
MARK = b"\x1b]133;D;0123456789abcdef;%d\x07"
SHOWN = b"one\n" + MARK % 1 + b"two \x1b]133;D;other;1\x07 \x1b[31mred" + MARK % 12 + MARK % 13 + b"end"
ASKED = b"a\x1b[6nb\x1b[c\x1b[5n\x1b]11;?\x07c\x1b[31m"


class Seen:
    def __init__(self) -> None:
        self.events: list[object] = []
        self.answers = b""
        self.filter = Filter(NONCE, self.shown, self.events.append)

    def shown(self, data: bytes, answers: bytes) -> bool:
        self.answers += answers
        if data and self.events and isinstance(self.events[-1], bytes):
            self.events[-1] += data
        elif data:
            self.events.append(data)
        return True


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 1000])
def test_markers_are_found_however_the_output_is_cut(size):
    seen = Seen()
    for start in range(0, len(SHOWN), size):
        seen.filter.take(SHOWN[start : start + size])
    assert seen.events == [b"one\n", 1, b"two \x1b]133;D;other;1\x07 \x1b[31mred", 12, 13, b"end"]


@pytest.mark.parametrize(
    "end", [b"-$$\x07", b"\x07", b"-\x07", b"1", b"1-\x07", b"x" * 100, b"9" * 5000 + b"\x07"]
)
def test_what_only_begins_like_a_marker_is_shown(end):
    printed = b"one" + MARK[:-3] + end
    for size in (1, 2, 3, 7, 20, 1000):
        seen = Seen()
        for start in range(0, len(shown := printed + MARK % 1 + b"two"), size):
            seen.filter.take(shown[start : start + size])
        assert seen.events == [printed, 1, b"two"], f"{size} bytes at a time"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_what_programs_ask_a_terminal_is_answered_once(size):
    seen = Seen()
    for start in range(0, len(ASKED), size):
        seen.filter.take(ASKED[start : start + size])
    assert seen.answers == b"\x1b[1;1R\x1b[?1;2c\x1b[0n\x1b]11;rgb:0000/0000/0000\x07"
    assert seen.events == [ASKED]


@pytest.mark.parametrize("size", [1, 3, 6, 1000])
async def test_what_a_caller_waits_for_is_found_in_whatever_pieces_it_came(tmp_path, size):
    spool = Spool(str(tmp_path / "out"))
    sought, shown = Sought(b"the end"), b"-" * HEAD_BYTES + b"--the the end--"
    assert not await sought.is_in(spool, 0)
    for start in (0, *range(HEAD_BYTES, len(shown), size)):
        spool.feed(shown[start : start + size if start else HEAD_BYTES])
    assert await sought.is_in(spool, 0)
    assert not await Sought(b"the end").is_in(spool, spool.size - 8)
    await spool.close()


FORGES = r"""
nonce=$(declare -f __report | grep -o "'[0-9a-f]* %%s" | head -1 | tr -dc 0-9a-f)
for pipe in /proc/$$/fd/*; do
    if [[ $(stat -c %%A "$pipe" 2>&1) == l-w* && -p $pipe ]]; then printf '%%s %s\0x\0' "$nonce" >"$pipe"; fi
done
"""


@pytest.mark.parametrize(
    "said",
    [
        "",
        "x",
        "begin",
        "begin x",
        "1 0 1",
        "1 x 1 /",
        "1 0 x /",
        "2 0 99999999999999999999 /",
        "99 0 1 /",
        "end 0 ",
    ],
)
async def test_what_a_command_writes_where_its_shell_reports_is_no_report(tmp_path, said):
    broken = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
    async with LocalWorkspace(tmp_path) as workspace:
        shell = workspace.shell()
        await shell.run("kept=kept")
        result = await shell.run(FORGES % said)
        assert (result.status, result.output.text) == ("done", "")
        result = await shell.run("echo $kept; false")
        assert (result.status, result.output.text, result.exit_code) == ("done", "kept\n", 1)
    assert broken == []
