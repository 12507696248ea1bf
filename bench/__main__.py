"""`python -m bench [NAME …]`: print the table and write bench/results.json."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import time
from pathlib import Path

import msgspec

from bench import commands, containers, events, log, many, readers, startup, steps, transfer
from bench.measure import Row

SUITES = {
    "startup": startup.measure,
    "commands": commands.measure,
    "transfer": transfer.measure,
    "events": events.measure,
    "log": log.measure,
    "steps": steps.measure,
    "readers": readers.measure,
    "many": many.measure,
    "containers": containers.measure,
}


async def main(names: list[str]) -> int:
    """Run the named suites, or all."""
    unknown = set(names) - set(SUITES)
    if unknown:
        sys.stderr.write(f"bench: no suite {sorted(unknown)}; there are {', '.join(SUITES)}\n")
        return 2
    rows: list[Row] = []
    for name in names or list(SUITES):
        print(f"\n{name}")
        measured = await SUITES[name]()
        for row in measured:
            print(_line(row))
        rows += measured
    results = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rows": [{**msgspec.to_builtins(row), "ratio": row.ratio} for row in rows],
    }
    Path(__file__).with_name("results.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"
    )
    missed = [row.name for row in rows if row.met is False]
    print(
        f"\n{len(rows)} numbers, {len(missed)} behind their target{': ' if missed else ''}{', '.join(missed)}"
    )
    return 0


def _line(row: Row) -> str:
    limit = ""
    if row.limit is not None and row.ratio is not None:
        limit = f"{row.limit:10.2f} {row.limit_name} ({row.ratio:.2f}x)"
    mark = {True: "ok", False: "BEHIND", None: ""}[row.met]
    return f"  {row.name:48} {row.value:10.2f} {row.unit:9} {row.target:16} {mark:7} {limit}"


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
