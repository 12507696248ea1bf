"""An independent stand-in for the providers: `@copilotkit/aimock`, a real server in a real node process.

Install it with `npm install --prefix .cache/npm @copilotkit/aimock@1.43.0`; AIMOCK_DIR names another
folder. Without it these tests are skipped, or fail when AIMOCK_REQUIRED=1.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[2]
KEY = "sk-stand-in-key"


@pytest.fixture(scope="module")
def aimock() -> Iterator[str]:
    """The address of a running aimock, without a path."""
    folder = Path(os.environ.get("AIMOCK_DIR") or CHECKOUT / ".cache" / "npm")
    program = folder / "node_modules" / "@copilotkit" / "aimock" / "dist" / "cli.js"
    node = shutil.which("node")
    if node is None or not program.is_file():
        missing = "node is not installed" if node is None else f"{program} does not exist"
        reason = f"aimock is missing ({missing}): npm install --prefix .cache/npm @copilotkit/aimock@1.43.0"
        if os.environ.get("AIMOCK_REQUIRED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    arguments = ["--port", "0", "--fixtures", str(HERE / "aimock.json"), "--strict"]
    with subprocess.Popen(
        [node, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "AIMOCK_API_KEYS": KEY},
    ) as process:
        try:
            yield _listening(process)
        finally:
            process.kill()


def _listening(process: subprocess.Popen[str]) -> str:
    """The address in the line that says so; the process goes on writing into the pipe, but not much."""
    said = []
    for line in process.stdout or ():
        said.append(line)
        if found := re.search(r"listening on (http://[\d.]+:\d+)", line):
            return found[1]
    pytest.fail("aimock did not start:\n" + "".join(said))
