"""Run `python -m …` and count the calls of the product's functions in it: `python bench/counted.py -m MODULE ARGS`.

COUNTED names a folder. SIGUSR1 begins to count; SIGUSR2 ends it and writes what was counted to `PID.json` there. Each
is answered by a line in the FIFO `PID`, so that whoever sent it need not guess when it took effect.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ["COUNTED"])
PACKAGES = tuple(f"{ROOT}/{name}/" for name in ("agent_sdk", "workspaces", "agent_server"))


class Calls:
    """The calls of this process while it counts."""

    def __init__(self) -> None:
        self.counting = False
        self.seen: Counter[CodeType] = Counter()

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Count a call; a resumed coroutine is one, too, as it is for a reader who follows it."""
        if self.counting and event == "call":
            self.seen[frame.f_code] += 1

    def begin(self, *_: object) -> None:
        """Forget what was counted, and count."""
        self.seen.clear()
        self.counting = True
        self._answer()

    def end(self, *_: object) -> None:
        """Stop counting and write it down."""
        self.counting = False
        found = [
            (code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname, calls)
            for code, calls in self.seen.items()
            if code.co_filename.startswith(PACKAGES)
        ]
        (FOLDER / f"{os.getpid()}.json").write_text(json.dumps(found))
        self._answer()

    def _answer(self) -> None:
        with (FOLDER / str(os.getpid())).open("w") as fifo:
            fifo.write("done\n")


def main() -> None:
    """Become the module that is named, as `python -m` would."""
    calls = Calls()
    signal.signal(signal.SIGUSR1, calls.begin)
    signal.signal(signal.SIGUSR2, calls.end)
    os.mkfifo(FOLDER / str(os.getpid()))  # from now on a signal may come
    threading.setprofile(calls.profile)
    sys.setprofile(calls.profile)
    sys.executable = str(FOLDER / "python")  # processes that it starts are counted, too
    sys.path[0] = str(ROOT)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
