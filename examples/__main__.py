"""`python -m examples`: run every numbered example against a server of its own."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_sdk.protocol.errors import WorkspaceUnavailable
from workspaces.backend.docker.engine import Engine

HERE = Path(__file__).parent
NEEDS = {
    "04_docker.py": ("EXAMPLE_IMAGE", "agent-server:latest"),
    "06_any_image.py": ("EXAMPLE_IMAGES", "busybox:latest debian:bookworm-slim"),
}
"""Which images an example needs: the variable that names them, and what they are otherwise."""


def main() -> int:
    with tempfile.TemporaryDirectory() as data, installed() as path:
        command = [sys.executable, "-m", "agent_server", "serve", "--port", "0", "--json", "--data", data]
        options = {
            "AGENT_SERVER_BOXES_ON_STOP": "end",
            "AGENT_SERVER_RUNTIME_API": "process",
            "PYTHONPATH": path,
        }
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **options}) as server:
            try:
                assert server.stdout is not None
                ready = json.loads(server.stdout.readline())
                key = Path(ready["api_key_file"]).read_text().strip()
                there = {"AGENT_SERVER_URL": ready["url"], "AGENT_SERVER_API_KEY": key}
                api = {"API_URL": ready["url"], "API_KEY": key, "API_IMAGE": "agent-server:latest"}
                return run({**os.environ, **there, **api})
            finally:
                server.terminate()


@contextmanager
def installed() -> Iterator[str]:
    """A PYTHONPATH in which the example's middleware is as if it had been installed beside the server."""
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "call_limit-1.0.dist-info/entry_points.txt"
        names.parent.mkdir()
        names.write_text("[agent_server.middleware]\ncall_limit = 07_middleware:CallLimit\n")
        yield os.pathsep.join((folder, str(HERE), os.environ.get("PYTHONPATH", "")))


def run(environ: dict[str, str]) -> int:
    for example in sorted(HERE.glob("[0-9]*.py")):
        print(f"--- {example.name}", flush=True)
        images = environ.get(*NEEDS[example.name]).split() if example.name in NEEDS else []
        if why := asyncio.run(without(images)):
            print(f"left out: {why}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, example], env={**environ, "EXAMPLE_DIR": folder}, check=False
            )
        if done.returncode:
            print(f"{example.name} failed with {done.returncode}", file=sys.stderr)
            return 1
    return 0


async def without(images: list[str]) -> str:
    """Why no containers of these images can be started; empty when they can."""
    if not images:
        return ""
    try:
        async with Engine() as engine:
            for image in images:
                await engine.image(image, pull="never")
    except WorkspaceUnavailable as exc:
        return str(exc)
    return ""


if __name__ == "__main__":
    sys.exit(main())
