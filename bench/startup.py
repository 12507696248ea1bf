"""What it costs to import the SDK and to start a server."""

from __future__ import annotations

import asyncio
import sys

from bench.measure import Row, percentile, rss_mib
from bench.server import running_server

_PROBE = (
    "import time,sys; began=time.process_time(); {what}; took=time.process_time()-began\n"
    "rss=[l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1]\n"
    "print(took, int(rss)/1024)"
)


async def measure() -> list[Row]:
    """Import of agent_sdk beside a bare interpreter; server start and idle memory."""
    bare = [await _probe("pass") for _ in range(5)]
    sdk = [await _probe("import agent_sdk") for _ in range(5)]
    names = "from agent_sdk import Agent, LLM, Conversation, LocalWorkspace, RemoteWorkspace, Sandbox, tool"
    used = [await _probe(names) for _ in range(5)]
    rows = [
        _seconds("import agent_sdk, CPU", sdk, 0.25),
        _memory("import agent_sdk, RSS", sdk, bare, 30),
        _seconds("import of all public names, CPU", used, 0.25),
        _memory("import of all public names, RSS", used, bare, 30),
    ]
    starts, memory = [], []
    for _ in range(3):
        async with running_server() as server:
            starts.append(server.seconds_to_health)
            memory.append(rss_mib(server.pid))
    start, idle = percentile(starts, 0.5), percentile(memory, 0.5)
    return [
        *rows,
        Row(name="server start to /health", value=start, unit="s", target="<= 0.8", met=start <= 0.8),
        Row(
            name="server RSS, idle",
            value=idle,
            unit="MiB",
            limit=percentile([rss for _, rss in bare], 0.5),
            limit_name="bare interpreter",
            target="<= 60",
            met=idle <= 60,
        ),
    ]


async def _probe(what: str) -> tuple[float, float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROBE.format(what=what), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    cpu, rss = out.split()
    return float(cpu), float(rss)


def _seconds(name: str, probes: list[tuple[float, float]], target: float) -> Row:
    value = percentile([cpu for cpu, _ in probes], 0.5)
    return Row(name=name, value=value, unit="s", target=f"<= {target}", met=value <= target)


def _memory(
    name: str, probes: list[tuple[float, float]], bare: list[tuple[float, float]], target: float
) -> Row:
    value = percentile([rss for _, rss in probes], 0.5)
    return Row(
        name=name,
        value=value,
        unit="MiB",
        limit=percentile([rss for _, rss in bare], 0.5),
        limit_name="bare interpreter",
        target=f"<= {target}",
        met=value <= target,
    )
