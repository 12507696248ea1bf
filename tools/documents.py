"""The references that are printed from the code.

python -m tools.documents            # write them
python -m tools.documents --check    # exit 1 when one is stale
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tools.configuration import configuration
from tools.http import http
from tools.openrpc import openrpc
from tools.protocol import protocol
from tools.sdk import sdk

ROOT = Path(__file__).parent.parent
DOCUMENTS: dict[str, Callable[[], str]] = {
    "agent_server/openrpc.json": lambda: json.dumps(openrpc(), indent=1, ensure_ascii=False) + "\n",
    "docs/protocol.md": protocol,
    "docs/http.md": http,
    "docs/configuration.md": configuration,
    "docs/sdk.md": sdk,
}


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write the documents, or with `--check` show how stale ones differ; returns the exit code."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m tools.documents [--check]\n")
        return 2
    stale = 0
    for name, make in DOCUMENTS.items():
        path, text = root / name, make()
        if not arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            continue
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if there != text:
            sys.stderr.writelines(
                difflib.unified_diff(there.splitlines(True), text.splitlines(True), name, "fresh", n=1)
            )
            sys.stderr.write(f"{name} is stale: run make docs\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
