"""Servers to ask: our own few lines, and an independent stand-in, `@copilotkit/aimock`, in a real node process.

Install the latter with `npm install --prefix .cache/npm @copilotkit/aimock@1.43.0`; AIMOCK_DIR names another
folder. Without it these tests are skipped, or fail when AIMOCK_REQUIRED=1.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent_sdk.agent.llm.client import open_model
from agent_sdk.models import Completion
from agent_sdk.protocol.specs import LLM
from tests.agent.llm.provider import HELLO, KEY, Ask, Respond

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[2]


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


@pytest.fixture(params=["openai", "anthropic"])
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def ask(dialect: str) -> AsyncIterator[Ask]:
    """Serve with this handler, ask once, and close everything."""
    closing: list[Callable[[], Awaitable[None]]] = []

    async def ask(respond: Respond, **options: object) -> Completion:
        app = web.Application()
        app.router.add_post("/v1/{tail:.*}", respond)
        server = TestServer(app)
        await server.start_server()
        closing.append(server.close)
        client = open_model(
            LLM(model=f"{dialect}/m", api_key=KEY, base_url=str(server.make_url("/v1")), **options)
        )
        closing.append(client.close)
        async with asyncio.timeout(30):
            return await client.complete(HELLO)

    yield ask
    for close in reversed(closing):
        await close()
