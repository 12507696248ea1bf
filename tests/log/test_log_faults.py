"""The disk fails, fills up or the process is killed in the middle of a system call: acknowledged is acknowledged."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent_sdk.log.event_log import EventLog

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode != 0,
    reason="needs strace",
)

WRITERS = """
import asyncio, os, sys
from pathlib import Path
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.protocol.events import UserMessage

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())

async def write(log, name):
    await log.create(name)
    for number in range(40):
        try:
            [event] = await log.append(name, [UserMessage(text="x" * 5000)])
        except AgentServerError as exc:
            tell("refused", name, exc.kind)
        else:
            tell("acknowledged", name, event.seq)

async def main():
    async with EventLog.open(Path(sys.argv[1]), sole=True) as log:
        await asyncio.gather(*(write(log, name) for name in "abcd"), return_exceptions=True)
        tell("failed", log.failed.done())

asyncio.run(main())
"""


# The first 15 fsyncs and 80 writes or so make the file.


def traced(file: Path, rule: str) -> list[list[str]]:
    """What four writers say, a list of words per line, while a system call of theirs fails by this rule."""
    command = ("strace", "-f", "-o", "/dev/null", f"--inject={rule}", sys.executable, "-c", WRITERS)
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()]


def acknowledged(lines: list[list[str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for kind, *words in lines:
        if kind == "acknowledged":
            found.setdefault(words[0], []).append(int(words[1]))
    return found


async def whole(file: Path, lines: list[list[str]]) -> None:
    """Fails unless everything that was acknowledged is there, without gaps."""
    async with EventLog.open(file, sole=True) as log:
        assert log.recovered == ()
        for name, seqs in acknowledged(lines).items():
            there = [seq for seq, _ in await log.read(name)]
            assert there == list(range(1, len(there) + 1))
            assert set(seqs) <= set(there)


@pytest.mark.parametrize("step", [18, 25, 40])
async def test_nothing_is_acknowledged_after_an_fsync_that_failed(tmp_path, step):
    lines = traced(tmp_path / "log.db", f"fdatasync:error=EIO:when={step}")
    kinds = [kind for kind, *_ in lines]
    first = kinds.index("refused")
    assert "acknowledged" in kinds[:first]
    assert "acknowledged" not in kinds[first:]
    assert {words[1] for kind, *words in lines if kind == "refused"} == {"workspace_unavailable"}
    assert lines[-1] == ["failed", "True"]
    await whole(tmp_path / "log.db", lines)


@pytest.mark.parametrize("step", [150, 300])
async def test_writes_that_find_no_room_are_refused_and_the_next_ones_go_on(tmp_path, step):
    lines = traced(tmp_path / "log.db", f"pwrite64:error=ENOSPC:when={step}..{step + 12}")
    assert {words[1] for kind, *words in lines if kind == "refused"} == {"storage_full"}
    assert [kind for kind, *_ in lines[-5:]] == ["acknowledged"] * 4 + ["failed"]
    assert lines[-1] == ["failed", "False"]
    await whole(tmp_path / "log.db", lines)


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
@pytest.mark.parametrize("step", [20, 40])
async def test_a_process_that_is_killed_in_a_commit_has_lost_nothing_it_acknowledged(tmp_path, call, step):
    step *= 1 if call == "fdatasync" else 9
    lines = traced(tmp_path / "log.db", f"{call}:signal=KILL:when={step}")
    assert acknowledged(lines)
    assert lines[-1][0] != "failed"
    await whole(tmp_path / "log.db", lines)
