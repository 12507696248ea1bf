"""Sandboxes and servers in containers, beside what the engine itself needs for a container."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec

from agent_sdk import RemoteWorkspace, Sandbox
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable
from agent_sdk.protocol.methods.connection import Ping
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.remote.link import ask
from bench.measure import Row, percentile, times
from bench.server import Server, running_server
from workspaces import DockerWorkspace
from workspaces.backend.docker.engine import engine_version

IMAGE = os.environ.get("BENCH_IMAGE", "agent-test/full:1")
SERVER_IMAGE = os.environ.get("SERVER_IMAGE", "agent-server:latest")
STARTS = 7
CLAIMS = 20
COMMANDS = 200
IDLE = 60
BURST = 50
WARM = 3
BOMBS = {
    "fork": "b() { b | b & }; b; sleep 5",
    "memory": "tail /dev/zero",
    "disk": "head -c 4G /dev/zero > fill; sleep 5",
    "output": "head -c 200M /dev/zero",
}


async def measure() -> list[Row]:
    """Everything about containers; nothing where there is no engine."""
    try:
        await engine_version()
        bare = await _bare_times()
    except (EngineUnavailable, OSError) as exc:
        print(f"  skipped: {exc}")
        return []
    return [*await _starts(bare), *await _warm(bare), *await _crowds(), *await _bombs()]


async def _bare_times() -> list[float]:
    """How long `docker run` takes for a container that does nothing."""
    await _bare()
    return [await _bare() for _ in range(STARTS)]


async def _bare() -> float:
    name = f"agent-bench-{new_id()}"
    began = time.perf_counter()
    ended = await _docker("run", "--network", "none", "--init", "--name", name, IMAGE, "true")
    took = time.perf_counter() - began
    await _docker("rm", "--force", name)
    if ended:
        raise OSError(f"there is no image {IMAGE}: make it with `python -m tests.docker.images`")
    return took


async def _docker(*arguments: str) -> int:
    null = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec("docker", *arguments, stdout=null, stderr=null)
    return await process.wait()


# --- one after the other ---


async def _starts(bare: list[float]) -> list[Row]:
    async with running_server() as server:
        cold = [await _first_command(server) for _ in range(1 + STARTS)][1:]
        async with sandbox(server) as workspace:
            taken = await times(COMMANDS, lambda: workspace.execute("true"))
    p50 = percentile(taken, 0.5) * 1000
    rows = [
        _start("sandbox, cold: start to first command, p50", cold, bare, 0.3),
        Row(name="execute true in a sandbox, p50", value=p50, unit="ms", target="<= 8", met=p50 <= 8),
    ]
    with suppress(AgentServerError):  # without that image there is no row
        served = [await _first_command_of_server() for _ in range(1 + STARTS)][1:]
        rows.insert(1, _start("DockerWorkspace: start to first command, p50", served, bare, 1.0))
    return rows


async def _first_command(server: Server) -> float:
    began = time.perf_counter()
    async with sandbox(server) as workspace:
        await workspace.execute("true")
        return time.perf_counter() - began


async def _first_command_of_server() -> float:
    began = time.perf_counter()
    async with DockerWorkspace(SERVER_IMAGE) as workspace:
        await workspace.execute("true")
        return time.perf_counter() - began


def _start(name: str, taken: list[float], bare: list[float], more: float) -> Row:
    value, limit = percentile(taken, 0.5), percentile(bare, 0.5)
    return Row(
        name=name,
        value=value,
        unit="s",
        limit=limit,
        limit_name="docker run",
        target=f"<= docker run + {more:g}",
        met=value <= limit + more,
    )


# --- from a pool ---


async def _warm(bare: list[float]) -> list[Row]:
    async with running_server(sandbox_pool=msgspec.json.encode({IMAGE: WARM}).decode()) as server:
        taken = []
        for _ in range(CLAIMS):
            await asyncio.sleep(3 * percentile(bare, 0.5))  # the pool is full again
            taken.append(await _first_command(server))
    p50 = percentile(taken, 0.5) * 1000
    return [
        Row(
            name="sandbox, warm: claim to first command, p50",
            value=p50,
            unit="ms",
            limit=percentile(bare, 0.5) * 1000,
            limit_name="docker run",
            target="<= 60",
            met=p50 <= 60,
        )
    ]


# --- many ---


async def _crowds() -> list[Row]:
    async with running_server(max_boxes="100") as server, AsyncExitStack() as stack:
        began = time.perf_counter()
        burst = await asyncio.gather(*(_entered(stack, server) for _ in range(BURST)))
        took = time.perf_counter() - began
        started = [workspace for workspace in burst if workspace is not None]
        more = [await _entered(stack, server) for _ in range(IDLE - len(started))]
        idle = started + [workspace for workspace in more if workspace is not None]
        answers = await asyncio.gather(*(workspace.execute("true") for workspace in idle))
    alive = sum(answer.exit_code == 0 for answer in answers)
    return [
        Row(
            name=f"{BURST} sandboxes started at once",
            value=len(started),
            unit="started",
            target=f"{BURST}",
            met=len(started) == BURST,
        ),
        Row(name=f"{BURST} sandboxes started at once, all", value=took, unit="s"),
        Row(
            name=f"{IDLE} idle sandboxes at once",
            value=alive,
            unit="answer",
            target=f"{IDLE}",
            met=alive == IDLE,
        ),
    ]


async def _entered(stack: AsyncExitStack, server: Server) -> RemoteWorkspace | None:
    try:
        workspace = await stack.enter_async_context(sandbox(server))
        await workspace.execute("true")
    except AgentServerError as exc:
        print(f"  a sandbox did not start: {exc}")
        return None
    return workspace


# --- bombs ---


async def _bombs() -> list[Row]:
    async with running_server() as server, AsyncExitStack() as stack:
        other = await stack.enter_async_context(RemoteWorkspace(server.url, server.api_key))
        boxes = [await stack.enter_async_context(sandbox(server)) for _ in BOMBS]
        pings: list[float] = []
        pinging = asyncio.create_task(_ping(other, pings))
        bombs = (box.execute(bomb, timeout=10.0) for box, bomb in zip(boxes, BOMBS.values(), strict=True))
        await asyncio.gather(*bombs, return_exceptions=True)
        pinging.cancel()
        await asyncio.wait([pinging])
    p99 = percentile(pings, 0.99) * 1000
    return [
        Row(
            name=f"ping of another conversation beside {len(BOMBS)} bombs, p99",
            value=p99,
            unit="ms",
            target="<= 50",
            met=p99 <= 50,
        )
    ]


async def _ping(workspace: RemoteWorkspace, taken: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await ask(workspace.link, Ping())
        taken.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)


@asynccontextmanager
async def sandbox(server: Server) -> AsyncIterator[RemoteWorkspace]:
    """A sandbox of its own, of which nothing stays."""
    place = RemoteWorkspace(server.url, server.api_key, sandbox=Sandbox(image=IMAGE))
    async with place as workspace:
        yield workspace
        await ask(workspace.link, Delete(op_id=new_id()))
