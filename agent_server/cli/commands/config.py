"""agent-server config: every option of a server, its value and where it was set. It starts nothing."""

from __future__ import annotations

import argparse

import msgspec

from agent_server.cli.stdio import Outlet
from agent_server.cli.terminal import STDERR, STDOUT, json_line, one_line, open_terminal
from agent_server.config.options import Setting, load_given, settings

HEAD = ("OPTION", "VALUE", "SOURCE")


async def main(given: argparse.Namespace) -> int:
    """Show them: a table, or one JSON object per line. Secrets are hidden."""
    config = load_given(given)
    found = settings(config)
    if given.json:
        await Outlet(STDOUT).write(b"".join(json_line(msgspec.json.encode(setting)) for setting in found))
        return 0
    terminal = open_terminal()
    rows = [_row(setting) for setting in found]
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(2)]
    await terminal.line(_line(HEAD, widths), "bold")
    for setting, row in zip(found, rows, strict=True):
        await terminal.line(_line(row, widths), "dim" if setting.source == "default" else "")
    warnings = open_terminal(STDERR)
    for sentence in config.unknown:
        await warnings.line(f"agent-server: {one_line(sentence)}", "yellow")
    return 0


def _row(setting: Setting) -> tuple[str, str, str]:
    value = setting.value if isinstance(setting.value, str) else msgspec.json.encode(setting.value).decode()
    return setting.option, one_line(value) or '""', setting.source


def _line(row: tuple[str, str, str], widths: list[int]) -> str:
    option, value, source = row
    return f"{option.ljust(widths[0])}  {value.ljust(widths[1])}  {source}"
