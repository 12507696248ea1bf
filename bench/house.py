"""How large the house is, and how far its data paths are: `python -m bench.house [--json]`.

Lines and files are counted in the checkout; who imports a module is read from the code. The calls and files of a path
are counted in a real client, server and box, each with a profiler, over one call on a warm connection. How often the
box looks at a process is left out: how many processes there are is the machine's. A test holds the limits.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct, to_builtins

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("agent_sdk", "workspaces", "agent_server")
SHORT = 50
"""Lines; a shorter file needs a reason."""


class House(Struct, frozen=True):
    """What stands in the checkout."""

    lines: int
    files: int
    files_with_one_user: int
    short_files: int
    longest_file: int


class Way(Struct, frozen=True):
    """What one call crosses, in all processes together."""

    files: int
    calls: int
    commits: int


def sources() -> Iterator[Path]:
    """Return the files of the product."""
    return (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))


def house() -> House:
    """Count lines, files, and those that only one other file imports."""
    lines = {_module(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    users: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        for used in _imported(path) & lines.keys() - {_module(path)}:
            users[used].add(_module(path))
    return House(
        lines=sum(lines.values()),
        files=len(lines),
        files_with_one_user=sum(len(by) == 1 for by in users.values()),
        short_files=sum(length < SHORT for length in lines.values()),
        longest_file=max(lines.values()),
    )


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


LARGEST = House(lines=48_280, files=203, files_with_one_user=47, short_files=33, longest_file=500)
"""What is added has to replace something."""
LONGEST = {
    "execute": Way(files=48, calls=590, commits=2),
    "turn": Way(files=75, calls=1_600, commits=5),
}
ROUNDS = 3
LOOKS = {
    "agent_sdk/workspace/process_tree.py": {
        "_look_at",
        "_is_copy",
        "Seen.identity",
        "_seen.<locals>.<genexpr>",
    },
    "agent_sdk/workspace/pipes.py": {"_look_at", "_sort", "_end", "_look.<locals>.<genexpr>"},
}
"""Called as often as there are processes."""


async def ways() -> dict[str, Way]:
    """Count the ways of a command and of a turn with one tool call."""
    async with _counted() as count:
        from agent_sdk import Agent, Conversation, RemoteWorkspace  # noqa: PLC0415  the hooks come first
        from agent_sdk.testing import ScriptedLLM, call, say  # noqa: PLC0415

        url, key = count.server
        llm = ScriptedLLM([call("terminal", command="true"), say("Done.")] * (1 + ROUNDS))
        async with RemoteWorkspace(url, key) as workspace:
            conversation = Conversation(Agent(llm=llm), workspace)

            async def turn() -> None:
                await conversation.send_message("Go on.")
                await conversation.run()

            await workspace.execute("true")
            await turn()
            return {
                "execute": await count.least(lambda: workspace.execute("true")),
                "turn": await count.least(turn),
            }


class _Count:
    def __init__(self, folder: Path, server: tuple[str, str], pid: int) -> None:
        from bench.counted import Calls  # noqa: PLC0415  it wants to know its folder first

        self.server = server
        self._folder, self._pid = folder, pid
        self._own = Calls()
        sys.setprofile(self._own.profile)

    async def least(self, action: Callable[[], Awaitable[object]]) -> Way:
        """Count the least that a run of the action crosses: clocks and other processes add to one, and not to each."""
        ways = [await self.one(action) for _ in range(ROUNDS)]
        return Way(*(min(getattr(way, field) for way in ways) for field in Way.__struct_fields__))

    async def one(self, action: Callable[[], Awaitable[object]]) -> Way:
        """Count what one run of the action crosses."""
        pids = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        for pid in pids:
            await self._send(pid, signal.SIGUSR1)
        self._own.seen.clear()
        self._own.counting = True
        await action()
        self._own.counting = False
        found = [
            (code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname, calls)
            for code, calls in self._own.seen.items()
            if code.co_filename.startswith(tuple(f"{ROOT}/{name}/" for name in PACKAGES))
        ]
        for pid in pids:
            await self._send(pid, signal.SIGUSR2)
            found += json.loads((self._folder / f"{pid}.json").read_text())
        return Way(
            files=len({file for file, _, _ in found}),
            calls=sum(calls for file, name, calls in found if name not in LOOKS.get(file, ())),
            commits=sum(calls for _, name, calls in found if re.search(r"Database\.transaction$", name)) // 2,
        )

    async def _send(self, pid: int, number: signal.Signals) -> None:
        os.kill(pid, number)
        await asyncio.to_thread((self._folder / str(pid)).read_text)


@asynccontextmanager
async def _counted() -> AsyncIterator[_Count]:
    folder = Path(tempfile.mkdtemp(prefix="house-"))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nCOUNTED={folder} exec {sys.executable} {ROOT}/bench/counted.py "$@"\n')
    python.chmod(0o755)
    os.environ["COUNTED"] = str(folder)
    process = await asyncio.create_subprocess_exec(
        *(
            str(python),
            "-m",
            "agent_server",
            "serve",
            "--port",
            "0",
            "--json",
            "--data",
            str(folder / "data"),
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "AGENT_SERVER_BOXES_ON_STOP": "end"},
    )
    try:
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        yield _Count(folder, (ready["url"], Path(ready["api_key_file"]).read_text().strip()), process.pid)
    finally:
        sys.setprofile(None)
        process.terminate()
        await process.wait()
        shutil.rmtree(folder)


async def main() -> None:
    """Print the house and its ways."""
    stands, far = house(), await ways()
    if "--json" in sys.argv:
        print(json.dumps({"house": to_builtins(stands), **to_builtins(far)}))
        return
    for name, value in to_builtins(stands).items():
        print(f"{name.replace('_', ' '):24} {value:8,}")
    for name, way in far.items():
        print(f"{name:24} {way.files:8,} files {way.calls:8,} calls {way.commits:4} commits")


if __name__ == "__main__":
    asyncio.run(main())
