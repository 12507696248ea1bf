"""The examples that need a container engine."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.docker.conftest import remove_all
from tests.docker.images import BARE, BUSYBOX

pytestmark = pytest.mark.docker

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_any_image_will_do_for_a_sandbox(start, engine, tmp_path, box_runtime):
    async with start(box_runtime=str(box_runtime)) as server:
        there = {"AGENT_SERVER_URL": server.url, "AGENT_SERVER_API_KEY": server.key}
        example = await asyncio.create_subprocess_exec(
            *(sys.executable, EXAMPLES / "06_any_image.py"),
            env={**os.environ, **there, "EXAMPLE_IMAGES": f"{BUSYBOX} {BARE}"},
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await example.communicate()
        assert example.returncode == 0
        assert said.decode().splitlines() == [
            f"{image}: sorted 1 2 3, as user 10001, python missing, root read-only"
            for image in (BUSYBOX, BARE)
        ]
    left = await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip())
    assert not left, f"left behind on the engine: {left}"
