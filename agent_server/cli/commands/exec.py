"""agent-server exec: a command in a workspace; its bytes and its exit code are ours."""

from __future__ import annotations

import argparse

from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.workspace.contract import ExecResult, OutputName
from agent_server.cli.stdio import Inlet, Outlet
from agent_server.cli.terminal import STDERR, STDOUT, one_line
from agent_server.cli.workspace import entered


async def main(given: argparse.Namespace) -> int:
    """Run it; return its exit code, 128 + n when signal n ended it, 124 when its time was over."""
    command = _command(given)
    stdin = await Inlet().read_all() if given.stdin else None
    outlets = {"stdout": Outlet(STDOUT), "stderr": Outlet(STDERR)}

    async def pass_on(name: OutputName, data: bytes) -> None:
        await outlets[name].write(data)

    async with entered(given) as workspace:
        result = await workspace.execute(command, stdin=stdin, timeout=given.timeout, on_output=pass_on)
    code, sentence = verdict(result, given.timeout)
    if sentence:
        await outlets["stderr"].write(f"agent-server: {one_line(sentence)}\n".encode())
    return code


def verdict(result: ExecResult, timeout: float | None) -> tuple[int, str]:
    """Return the exit code, and what has to be said about it."""
    code = result.returncode
    if code is None:
        return 1, f"how the command ended is unknown: {result.reason or result.status}"
    match result.status:
        case "timeout":
            why = f" ({result.reason})" if result.reason else ""
            return code, f"the command was ended after {timeout} s{why}; --timeout gives it more time"
        case "spawn_failed":
            return code, f"the command did not start: {result.reason}"
    return code, result.reason


def _command(given: argparse.Namespace) -> str | list[str]:
    if given.text is not None and not given.program:
        return str(given.text)
    if given.program and given.text is None:
        return list(given.program)
    raise InvalidParams(
        "exec needs one command: a text for bash in quotes (agent-server exec 'ls | wc -l'), "
        "or a program after -- (agent-server exec -- ls -l)"
    )
