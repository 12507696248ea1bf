"""Which workspace a conversation may have, and what is noted of both beside the log.

Whatever this server does not allow, or makes no sense, is refused with the field named. The notes are read once, at its
start, and then kept in memory for all conversations.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.log.database import ConversationRow
from agent_sdk.protocol.errors import (
    ConversationNotFound,
    ImageUnavailable,
    InvalidParams,
    IsolationUnavailable,
    NotADirectory,
    PathNotFound,
    PolicyDenied,
)
from agent_sdk.protocol.results import Snapshot, Wait
from agent_sdk.protocol.specs import Sandbox, WorkspaceSpec
from agent_server.config.options import ServerConfig
from agent_server.data_folder import DataFolder
from workspaces.backend.contract import LEAST_MEMORY, UID, parse_size
from workspaces.box.machine import RESERVED

SHOWN_ID = 64
"""Characters of an id that does not exist, in an error."""
WHERE = "$.params.workspace.sandbox"
MOUNTS = 32
USUAL_RUNTIME = "runsc"
"""Allowed where the configuration names none."""
MOST_PIDS = 4096


class Note(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a server notes about a conversation beside its log."""

    owner: str
    """The conversation whose workspace it uses; its own id, or that of the one it shares with."""
    working_dir: str | None = None
    """An existing folder instead of one in the data folder."""
    sandbox: Sandbox | None = None
    """What its workspace is, if that is a container."""
    title: str | None = None
    tags: dict[str, str] = {}
    model: str | None = None

    @property
    def workspace(self) -> str:
        """What tells its workspace from others, as Snapshot.workspace has it."""
        return self.working_dir or self.owner


def note_of(row: ConversationRow) -> Note:
    """Return the note in a row; a fresh one where it cannot be read."""
    try:
        return msgspec.convert(row.meta, Note)
    except msgspec.ValidationError:
        return Note(owner=row.id)


def snapshot_of(row: ConversationRow, note: Note, missing: str) -> Snapshot:
    """Return what is known of a conversation that is not in memory; `missing`: of its agent, a sentence."""
    return Snapshot(
        id=row.id,
        state="damaged" if row.damaged else "running" if row.open_turn else "idle",
        epoch=row.epoch,
        head_seq=row.head_seq,
        title=note.title,
        tags=note.tags,
        created_at=row.created_at,
        updated_at=row.updated_at,
        model=note.model,
        workspace=note.workspace,
        waiting_for=missing,
        waits=(Wait(what="key", reason=missing),) if missing else (),
    )


def wanted_note(
    id: str, spec: WorkspaceSpec, notes: Mapping[str, Note], config: ServerConfig, folder: DataFolder
) -> Note:
    """Return what is noted of a new conversation that is to have this workspace.

    Args:
        id: of the conversation.
        spec: what was asked for.
        notes: of all others, by id.
        config: says what is allowed.
        folder: that of the server.

    Raises:
        ConversationNotFound: there is none of the id whose workspace is to be shared.
        PathNotFound, NotADirectory: `working_dir` is no folder.
        InvalidParams: the spec contradicts itself or makes no sense.
        PolicyDenied, ImageUnavailable, IsolationUnavailable: this server does not allow it, or cannot do it.
    """
    if sum(field is not None for field in (spec.share, spec.working_dir, spec.sandbox)) > 1:
        raise InvalidParams("$.params.workspace: share, working_dir and sandbox exclude each other")
    if spec.share is not None:
        other = notes.get(spec.share)
        if other is None:
            raise ConversationNotFound(
                f"no conversation {spec.share[:SHOWN_ID]!r} to share with",
                conversation=spec.share[:SHOWN_ID],
            )
        return Note(owner=other.owner, working_dir=other.working_dir, sandbox=other.sandbox)
    sandbox = None if spec.sandbox is None else checked(spec.sandbox, config)
    return Note(owner=id, working_dir=_existing_folder(spec.working_dir, folder), sandbox=sandbox)


def _existing_folder(given: str | None, folder: DataFolder) -> str | None:
    if given is None:
        return None
    path = Path(given).expanduser()
    if not path.is_absolute():
        raise InvalidParams(
            "$.params.workspace.working_dir: an absolute path of the server's machine is needed"
        )
    if not path.exists():
        raise PathNotFound(f"no such folder on the server: {given}", path=given)
    if not path.is_dir():
        raise NotADirectory(f"no folder: {given}", path=given)
    real, data = path.resolve(), folder.root.resolve()
    if folder.confinement.isolation != "none" and (real.is_relative_to(data) or data.is_relative_to(real)):
        raise PolicyDenied(
            f"$.params.workspace.working_dir: {given} is, holds or is in the data folder of the server, which commands "
            "must not reach; name another one, or none for a fresh one"
        )
    return str(real)


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
    runtimes = config.sandbox_runtimes or tuple(dict.fromkeys((config.sandbox_runtime, USUAL_RUNTIME)))
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
