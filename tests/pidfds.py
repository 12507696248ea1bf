"""Programs to which the kernel refuses pidfds, as the seccomp profile of an old container engine does."""

import subprocess
import sys
from pathlib import Path

REFUSE_PIDFDS = """
import asyncio, ctypes, os, resource, struct, sys, time
from agent_sdk import LocalWorkspace

def refuse(call, errno):
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | errno), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.addressof(program), 0, 0) == 0

def refuse_pidfds(call, errno):
    refuse(call, errno)
    try:
        os.pidfd_open(os.getpid())
    except OSError as exc:
        print("refused", exc.errno)
"""


def without_pidfds(tmp_path: Path, text: str, *words: object) -> list[str]:
    """Run a Python program in a folder, in which it can refuse itself pidfds; returns the lines it printed."""
    run = subprocess.run(
        [sys.executable, "-c", REFUSE_PIDFDS + text, *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stderr == ""
    return run.stdout.splitlines()
