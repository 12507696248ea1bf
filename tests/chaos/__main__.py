"""Judge a kept run again: python -m tests.chaos FOLDER."""

import asyncio
import sys
from pathlib import Path

from tests.chaos.checker import check
from tests.chaos.history import load
from tests.chaos.server import final_logs

folder = Path(sys.argv[1])
records = list(load(folder))
violations = check(records, asyncio.run(final_logs(folder / "data" / "log.db")))
for rule, text in violations:
    print(f"rule {rule}: {text}")
print(f"{len(records)} records, {len(violations)} violations")
sys.exit(bool(violations))
