"""The lines of a server in a container, in the log of the program that started it."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

if TYPE_CHECKING:
    from workspaces.backend.docker.server_container import OnLog

_LEVELS = {"debug", "info", "warning", "error", "critical"}
_TRUE_IN_ITS_CONTAINER = {"network_reachable", "host_names_refused"}
"""Warnings about an address that leads no further than to this machine."""


class ServerLog:
    """Called with each line. The logger is `workspaces`: silent below a warning, unless the program says otherwise."""

    def __init__(self, container: str, further: OnLog | None = None) -> None:
        """Take the container's name, and who else is to be called."""
        log = structlog.wrap_logger(
            logging.getLogger("workspaces"), wrapper_class=structlog.stdlib.BoundLogger
        )
        self._log = log.bind(container=container)
        self._further = further

    async def __call__(self, line: str) -> None:
        """Pass one line on: what the server said in JSON with its level and fields, all else as it is."""
        level, event, fields = _read(line)
        level = "debug" if event in _TRUE_IN_ITS_CONTAINER else level
        self._log.log(logging.getLevelNamesMapping()[level.upper()], event, **fields)
        if self._further is not None:
            waiting = self._further(line)
            if inspect.isawaitable(waiting):
                await waiting


def _read(line: str) -> tuple[str, str, dict[str, Any]]:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        event, level = str(fields.pop("event")), str(fields.pop("level"))
    except (msgspec.DecodeError, KeyError):
        return "info", line, {}
    fields.pop("time", None)
    taken = {"container", "timestamp", "exc_info", "stack_info", "stack", "positional_args"}
    return (level if level in _LEVELS else "info"), event, {k: v for k, v in fields.items() if k not in taken}
