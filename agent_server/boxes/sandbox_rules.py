"""Which sandboxes a server makes for its clients: whatever it does not allow is refused, with the field named."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import inf

from msgspec.structs import replace

from agent_sdk.protocol.errors import ImageUnavailable, InvalidParams, IsolationUnavailable, PolicyDenied
from agent_sdk.protocol.specs import Sandbox
from agent_server.config.options import ServerConfig
from workspaces.backend.contract import LEAST_MEMORY, UID, parse_size
from workspaces.box.machine import OWN_KERNEL, RESERVED

WHERE = "$.params.workspace.sandbox"
MOUNTS = 32
MOST_PIDS = 4096


def checked(spec: Sandbox, config: ServerConfig) -> Sandbox:
    """Return the sandbox as it will be made: with its mounts resolved.

    Raises:
        InvalidParams: a field makes no sense.
        PolicyDenied, ImageUnavailable: this server does not allow it.
        IsolationUnavailable: this server cannot do it.
    """
    if not any(fnmatch.fnmatchcase(spec.image, pattern) for pattern in config.sandbox_images):
        raise ImageUnavailable(
            f"{WHERE}.image: this server runs no {spec.image[:200]!r}; it allows {_listed(config.sandbox_images)}",
            image=spec.image[:512],
            phase="image",
        )
    parse_size(f"{WHERE}.memory", spec.memory, least=LEAST_MEMORY)
    _check_profile(spec, config)
    runtimes = config.sandbox_runtimes or tuple(dict.fromkeys((config.sandbox_runtime, *OWN_KERNEL)))
    if spec.runtime is not None and spec.runtime not in runtimes:
        raise PolicyDenied(
            f"{WHERE}.runtime: this server allows {_listed(runtimes)}, not {spec.runtime}; "
            "its option sandbox_runtimes says which"
        )
    for field, size in (("disk", spec.disk), ("tmp", spec.tmp)):
        if size is not None:
            parse_size(f"{WHERE}.{field}", size)
    _check_network(spec.network, config.sandbox_networks)
    if len(spec.mounts) > MOUNTS:
        raise InvalidParams(f"{WHERE}.mounts: limit {MOUNTS}, got {len(spec.mounts)}")
    mounts = tuple(_mount(mount, config.sandbox_mounts) for mount in spec.mounts)
    _check_targets(spec.writable, [mount.split(":")[1] for mount in mounts])
    return replace(spec, mounts=mounts)


def check_most(spec: Sandbox, config: ServerConfig, *, cpus: int, memory: int) -> None:
    """Check that a sandbox is within what this server allows at most.

    Args:
        spec: as it was `checked`.
        config: its `sandbox_max_…`.
        cpus: of the engine's machine, which are the most where the configuration says nothing; 0: it does not say.
        memory: of that machine, in bytes, likewise.

    Raises:
        PolicyDenied: it is not.
    """
    most = config.sandbox_max_memory_bytes or memory or sys.maxsize
    limits = (
        ("memory", parse_size("memory", spec.memory), most, spec.memory, f"{most >> 20}m"),
        ("cpus", spec.cpus, config.sandbox_max_cpus or float(cpus) or inf, f"{spec.cpus:g}", ""),
        ("pids", spec.pids, config.sandbox_max_pids or _pids(), str(spec.pids), ""),
    )
    for name, wanted, limit, given, written in limits:
        if wanted > limit:
            raise PolicyDenied(
                f"{WHERE}.{name}: this server allows at most {written or f'{limit:g}'}, not {given}; "
                f"its option sandbox_max_{name} says how much"
            )


def _pids() -> int:
    """A share of what this machine can have."""
    with suppress(OSError, ValueError), open("/proc/sys/kernel/pid_max") as file:
        return max(256, min(MOST_PIDS, int(file.read()) // 8))
    return MOST_PIDS


def _check_profile(spec: Sandbox, config: ServerConfig) -> None:
    if spec.profile not in config.sandbox_profiles:
        raise PolicyDenied(
            f"{WHERE}.profile: this server allows {_listed(config.sandbox_profiles)}, not {spec.profile}; "
            "its option sandbox_profiles says which"
        )
    if spec.profile != "task":
        if spec.user is not None:
            raise InvalidParams(
                f'{WHERE}.user: commands are user {UID} there; another one takes profile="task"'
            )
        return
    if spec.writable:
        raise InvalidParams(f"{WHERE}.writable: with profile task all of the root is; leave it out")
    if any(not mount.endswith(":ro") for mount in spec.mounts):
        raise InvalidParams(
            f"{WHERE}.mounts: with profile task commands may be root, so each has to end in :ro"
        )


def _check_network(wanted: str, allowed: Iterable[str]) -> None:
    if wanted == "egress":
        raise IsolationUnavailable(
            f"{WHERE}.network: egress is not built yet; use none", wanted="network egress"
        )
    if wanted not in allowed:
        raise PolicyDenied(
            f"{WHERE}.network: this server allows {_listed(allowed)}, not {wanted}; "
            "its option sandbox_networks says which"
        )


def _mount(mount: str, allowed: Iterable[str]) -> str:
    """The mount with its source as it really is: a symlink must not lead out of what is allowed later."""
    source, target, *options = mount.split(":")[:4] if mount.count(":") in (1, 2) else ("", "")
    if not source.startswith("/") or not _is_plain(target) or options not in ([], ["ro"], ["rw"]):
        raise InvalidParams(f"{WHERE}.mounts: /host/path:/path/in/it[:ro] (got {mount[:200]!r})")
    real = os.path.realpath(source)
    if not any(real == folder or real.startswith(f"{folder}/") for folder in map(os.path.realpath, allowed)):
        raise PolicyDenied(
            f"{WHERE}.mounts: {source[:200]} is not below a folder this server allows; "
            "its option sandbox_mounts says which"
        )
    if not os.path.exists(real):
        raise InvalidParams(f"{WHERE}.mounts: there is no {source[:200]} on the server's machine")
    return ":".join([real, target, *options])


def _check_targets(writable: Sequence[str], mounted: Sequence[str]) -> None:
    """Check that what is mounted hides nothing of the system or of ours, and that none lies below another."""
    if len(writable) > MOUNTS:
        raise InvalidParams(f"{WHERE}.writable: limit {MOUNTS}, got {len(writable)}")
    seen: list[str] = list(RESERVED)
    for field, target in (
        *(("writable", each) for each in writable),
        *(("mounts", each) for each in mounted),
    ):
        if not _is_plain(target) or ":" in target or "\0" in target:
            raise InvalidParams(
                f"{WHERE}.{field}: a path like /data, absolute and plain (got {target[:200]!r})"
            )
        if target.split("/")[1] in SYSTEM or target in _AROUND:
            raise InvalidParams(
                f"{WHERE}.{field}: nothing can be mounted at {target[:200]} of a sandbox; it can at /data, /mnt, "
                "/srv, /home, /var, /opt/NAME or a folder of another name below /"
            )
        if (other := next((each for each in seen if _nested(each, target)), None)) is not None:
            raise InvalidParams(
                f"{WHERE}.{field}: {target[:200]} and {other[:200]} cannot be mounted one below the other; "
                "choose another place"
            )
        seen.append(target)


def _nested(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


SYSTEM = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "usr"}
)
"""What a system is made of: whatever is there instead would be run, or believed, in the place of the image's."""
_AROUND = ("/opt", "/var")


def _is_plain(target: str) -> bool:
    return target.startswith("/") and target != "/" and os.path.normpath(target) == target


def _listed(values: Iterable[str]) -> str:
    return ", ".join(values) or "nothing"
