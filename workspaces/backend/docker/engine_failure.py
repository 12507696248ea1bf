"""What an engine's failure means, and what to do about it: one sentence each.

Engines tell most of their failures apart only by text, which has not changed for years; what is not
recognised is passed on as it is.
"""

from __future__ import annotations

import json
import re
import ssl
from contextlib import suppress
from typing import Any

import aiodocker
import aiohttp
import tenacity

from agent_sdk.protocol.errors import (
    AgentServerError,
    EngineUnavailable,
    ImageUnavailable,
    IsolationUnavailable,
    NotFound,
    WorkspaceUnavailable,
)

NO_CONNECTION = 900
"""The status that aiodocker gives a connection that was not made or was lost."""
LONGEST_TEXT = 2048

FAILURES = (
    aiodocker.DockerError,
    aiohttp.ClientError,
    OSError,  # TimeoutError, too
    ValueError,  # no JSON, no UTF-8, a line without end, or JSON that msgspec does not accept
    LookupError,  # an error without its message
    TypeError,
)
"""What a call may raise when the engine, or what pretends to be one, fails."""

_KNOWN: tuple[tuple[str, type[WorkspaceUnavailable], str], ...] = (
    (r"no such image|image .*not found", ImageUnavailable, "pull it first, or correct its name"),
    (
        r"does not match the specified platform|exec format error|no matching manifest",
        ImageUnavailable,
        "it is for another platform: choose an image or a platform that fits this engine",
    ),
    (
        r"pull access denied|unauthorized|authentication required|no basic auth",
        ImageUnavailable,
        "correct its name, or give this user access to it: docker login",
    ),
    (
        r"manifest unknown|repository .*not found|name unknown|invalid reference format",
        ImageUnavailable,
        "correct its name",
    ),
    (
        r"no such host|i/o timeout|server misbehaving|network is unreachable|tls handshake|client\.timeout",
        ImageUnavailable,
        "the engine does not reach the registry: look at its network and proxy, or load the image: docker load",
    ),
    (r"no space left on device", EngineUnavailable, "make room on the engine's disk: docker system df"),
    (r"is already in use by container", WorkspaceUnavailable, "remove that one, or choose another name"),
    (
        r"port is already allocated|address already in use",
        WorkspaceUnavailable,
        "stop what uses the port, or let the engine choose one",
    ),
    (
        r"minimum memory limit|memory limit too (low|small)|invalid memory",
        WorkspaceUnavailable,
        "give it more memory",
    ),
    (
        r"unknown( or invalid)? runtime",
        IsolationUnavailable,
        "install the runtime and name it in the engine's daemon.json, or ask for runc",
    ),
    (
        r"could not select device driver",
        IsolationUnavailable,
        "install the container toolkit of the GPU's maker, or do without GPUs",
    ),
    (
        r"storage-opt is supported only|pquota",
        IsolationUnavailable,
        "leave out the size of its root: this engine's disk cannot limit it",
    ),
    (
        r"bind source path does not exist|error while creating mount source",
        WorkspaceUnavailable,
        "make the folder on the engine's machine, or correct its path",
    ),
    (
        r"invalid mode|invalid volume spec|invalid mount path",
        WorkspaceUnavailable,
        "write a mount as /host:/inside or /host:/inside:ro",
    ),
    (
        r"non-overlapping ipv4 address pool|all predefined address pools",
        EngineUnavailable,
        "remove networks that nobody uses: docker network prune",
    ),
    (r"network .*not found", WorkspaceUnavailable, "make the network, or correct its name"),
    (
        r"no such file or directory|executable file not found|permission denied: unknown",
        WorkspaceUnavailable,
        "correct the command, or choose an image that has it",
    ),
)


def is_lost(exc: BaseException) -> bool:
    """Whether the connection was not made or was lost: only then it helps to ask again at once."""
    if isinstance(exc, aiodocker.DockerError):
        return exc.status == NO_CONNECTION
    return isinstance(exc, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)


def failure(exc: BaseException, *, phase: str, what: str, where: str, seconds: float) -> AgentServerError:
    """Tell in our words why a call failed.

    Args:
        exc: one of FAILURES.
        phase: of the start of a container, for whoever shows it.
        what: the call, as in "could not {what}".
        where: the engine's address.
        seconds: after which it counted as hanging.
    """
    if is_lost(exc):
        reason, mend = _unreachable(exc, where)
        return EngineUnavailable(f"{reason}: {mend}", phase="engine")
    if isinstance(exc, TimeoutError):
        sentence = f"the engine could not {what} within {seconds:g} s: look at its load and its log"
        return EngineUnavailable(sentence, phase=phase)
    if not isinstance(exc, aiodocker.DockerError):
        sentence = f"what answers at {where} is no container engine, or a broken one ({_named(exc)})"
        return EngineUnavailable(f"{sentence}: look at DOCKER_HOST", phase="engine")
    text = _plain(exc.message)
    details: dict[str, Any] = {"phase": phase, "status": exc.status}
    sentence = f"the engine could not {what}: {text}"
    if exc.status == 404 and phase == "engine":  # asked for itself, not needed for something else
        return NotFound(sentence, **details)
    for pattern, kind, mend in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(f"{sentence}; {mend}", **details)
    if phase == "pull":
        return ImageUnavailable(sentence, **details)
    if exc.status == 404:
        return NotFound(sentence, **details)
    if exc.status >= 500:
        return EngineUnavailable(f"{sentence}; look at its log", **details)
    return WorkspaceUnavailable(sentence, **details)


def not_dialled(exc: BaseException) -> EngineUnavailable:
    """Tell why there is nothing to call: no address, a wrong one, or certificates that cannot be read."""
    if isinstance(exc, AssertionError):  # aiodocker's way to say that it has found no socket
        return EngineUnavailable(
            "there is no Docker socket on this machine: install and start Docker, or set DOCKER_HOST",
            phase="engine",
        )
    if isinstance(exc, ssl.SSLError | OSError):
        mend = "look at DOCKER_CERT_PATH: it needs ca.pem, cert.pem and key.pem"
        return EngineUnavailable(
            f"the certificates for the engine cannot be used ({_named(exc)}): {mend}", phase="engine"
        )
    mend = "use unix:///path/docker.sock or tcp://host:port"
    return EngineUnavailable(f"the engine's address makes no sense ({_named(exc)}): {mend}", phase="engine")


def _unreachable(exc: BaseException, where: str) -> tuple[str, str]:
    cause = exc.__context__ if isinstance(exc, aiodocker.DockerError) else exc
    if isinstance(cause, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return f"the engine at {where} and this client do not trust each other", "look at DOCKER_CERT_PATH"
    cause = getattr(cause, "os_error", cause)
    if isinstance(cause, PermissionError):
        mend = "add this user to the group of the socket (often: usermod -aG docker USER) and log in again"
        return f"this user may not use the engine at {where}", mend
    if isinstance(cause, FileNotFoundError):
        return f"there is no engine at {where}", "start Docker, or set DOCKER_HOST"
    if isinstance(cause, ConnectionRefusedError):
        return f"nothing listens at {where}", "start Docker, or set DOCKER_HOST"
    return (
        f"the Docker engine at {where} does not answer ({_named(cause)})",
        "see whether it runs: docker info",
    )


def _named(exc: BaseException | None) -> str:
    if isinstance(exc, tenacity.RetryError):
        exc = exc.last_attempt.exception()
    text = _plain(str(exc) if exc is not None else "")[:200]
    return text or type(exc).__name__


def _plain(text: object) -> str:
    """The engine's words as one short line."""
    words = str(text).strip()
    if words.startswith("{"):  # nobody has decoded it
        with suppress(ValueError, LookupError):
            words = str(json.loads(words)["message"])
    return " ".join(words.split()).rstrip(".")[:LONGEST_TEXT]
