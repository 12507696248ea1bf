"""Images, looked at and pulled where they are missing; and the files of containers that have not run.

A registry is shown the key that the `docker` command keeps for its user. Of the files nothing is written but the owners
and rights of what is there, before anything of the image could put a link in the way.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import posixpath
import re
import shutil
import subprocess
import tarfile
from contextlib import suppress
from functools import partial
from typing import Any

import aiodocker
import aiohttp
import msgspec

from agent_sdk.protocol.errors import EngineUnavailable, ImageUnavailable, NotFound
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.contract import Image, OnProgress, Pull
from workspaces.backend.docker.engine_connection import (
    ANSWER_SECONDS,
    UNREADABLE,
    EngineConnection,
    docker_folder,
    plain_name,
)
from workspaces.backend.docker.engine_info import EngineInfo

STALL_SECONDS = 60.0
"""A pull that says nothing for so long is given up."""
STEP_BYTES = 1 << 20
"""At least between two reports of progress."""
_REFERENCE = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")
_STAT = "X-Docker-Container-Path-Stat"
_NO_FILE = 0x8F280000
"""The bits of a Go file mode that say that it is something else than a regular file."""
_GIVEN_BYTES = 16 << 20
_OF_FOLDERS, _OF_FILES, _SETGID = 0o2770, 0o660, 0o2000
"""What a group may do where something is given to it; what is made in a folder with SETGID is the group's, too."""
HELPER_SECONDS = 20.0
HUB, HUB_ADDRESS = "docker.io", "https://index.docker.io/v1/"
HUB_NAMES = (HUB, "index.docker.io", "registry-1.docker.io")
_HELPER = re.compile("[A-Za-z0-9_-]+")
_BY_TOKEN = "<token>"
"""The name of a user that says that the secret is an identity token."""
_AROUND = 64 << 10
"""Bytes that an archive of one file has besides it, at most."""


class Images:
    """The images of an engine, and the files of its containers that have not run."""

    _connection: EngineConnection
    info: EngineInfo
    """What the engine said of itself at the start."""

    async def image(
        self,
        name: str,
        *,
        pull: Pull = "missing",
        platform: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Image:
        """Return an image, pulled when it is missing or another one is wanted. Cancelling ends the pull.

        Args:
            name: as `docker pull` takes it.
            pull: `always` asks the registry although it is there, `never` asks it in no case.
            platform: e.g. `linux/arm64`; None: it has to be for the engine's own.
            on_progress: called with `pull` and the bytes of its layers.

        Raises:
            ImageUnavailable: it is not there, cannot be pulled, stands still for 60 s, or is for another platform.
            EngineUnavailable: the engine does not answer.
        """
        if not _REFERENCE.fullmatch(name):
            raise ImageUnavailable(
                f"no image can have the name {name[:80]!r}: correct it", image=name[:80], phase="image"
            )
        image = None if pull == "always" else await _inspect(self._connection, name)
        wrong = image and _other_platform(image, self.info, platform)
        if image is not None and not wrong:
            return image
        if pull == "never" or (wrong and platform is None):
            why = wrong or f"the image {name} is not on the engine"
            mend = "name another image or platform" if wrong else f"docker pull {name}, or allow to pull it"
            raise ImageUnavailable(f"{why}: {mend}", image=name, phase="image")
        key = await in_thread(_key_for, name, self.info.registry)
        await _pull(self._connection, name, key, platform, on_progress)
        image = await _inspect(self._connection, name)
        if image is None:
            raise ImageUnavailable(f"the image {name} was pulled and is gone again", image=name, phase="pull")
        wrong = _other_platform(image, self.info, platform)
        if wrong:
            raise ImageUnavailable(f"{wrong}: name another image or platform", image=name, phase="pull")
        return image

    async def read_file(self, id: str, path: str, most: int) -> tuple[str, bytes]:
        """Return where a path of a container leads to, and the content if that is a file of at most `most` bytes.

        Raises:
            NotFound: there is no such container, or nothing at the path.
        """
        id = plain_name(id)
        target, content = await _read(self._connection, id, path, most)
        if target == path:
            return path, content
        with suppress(NotFound):  # all links of the way are resolved in it
            content = (await _read(self._connection, id, target, most))[1]
        return target, content

    async def give_to_group(self, id: str, folder: str, group: int) -> None:
        """Let a group write what is in a folder of a container, and what will be: of one that has never run.

        A folder that belongs to the group already is left as it is; of one with more than 16 MiB nothing but itself is
        given.

        Raises:
            NotFound: there is no such container or folder. WorkspaceUnavailable: it is read-only.
        """
        id = plain_name(id)
        what = f"give {folder} of a container to the group {group}"
        async with self._connection.stream(
            "GET", f"containers/{id}/archive", {"path": folder}, what=what
        ) as response:
            content = await _whole(response.content, _GIVEN_BYTES)
        given = await in_thread(_given, content, group)
        if given:
            async with self._connection.bounded(what):
                container = self._connection.docker.containers.container(id)
                await container.put_archive(posixpath.dirname(folder), given)


async def _inspect(connection: EngineConnection, name: str) -> Image | None:
    inspect = partial(connection.docker.images.inspect, name)
    try:
        said = await connection.ask(f"describe the image {name}", inspect)
    except NotFound:
        return None
    config = said.get("Config") or {}
    digests = said.get("RepoDigests") or [""]
    return Image(
        name=name,
        id=str(said["Id"]),
        digest=str(digests[0]).rpartition("@")[2],
        os=str(said.get("Os")),
        arch=str(said.get("Architecture")),
        size=int(said.get("Size") or 0),
        volumes=tuple(config.get("Volumes") or ()),
        user=str(config.get("User") or ""),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        command=tuple(config.get("Cmd") or ()),
        env=tuple(config.get("Env") or ()),
        working_dir=str(config.get("WorkingDir") or ""),
    )


def _other_platform(image: Image, info: EngineInfo, platform: str | None) -> str:
    """Why the image is not for the platform, or for the engine's own; empty when it is."""
    wanted = platform or f"{info.os}/{info.arch}"
    if wanted.split("/")[:2] == [image.os, image.arch]:
        return ""
    return f"the image {image.name} is for {image.os}/{image.arch}, not for {wanted}"


async def _pull(
    connection: EngineConnection, name: str, key: str, platform: str | None, on_progress: OnProgress | None
) -> None:
    params = {"fromImage": name, **({"platform": platform} if platform else {})}
    if "@" not in name and ":" not in name.rpartition("/")[2]:
        params["tag"] = "latest"  # otherwise the engine pulls all tags
    progress, stall = _Progress(on_progress), STALL_SECONDS * connection.patience
    call = connection.stream(
        "POST",
        "images/create",
        params,
        headers={"X-Registry-Auth": key} if key else {},
        what=f"pull the image {name}",
        phase="pull",
        seconds=STALL_SECONDS,
    )
    async with call as response:
        try:
            async with asyncio.timeout(stall) as patience:
                async for line in response.content:
                    patience.reschedule(asyncio.get_running_loop().time() + stall)
                    progress.take(line)
        except TimeoutError:
            sentence = f"the pull of the image {name} stood still for {stall:g} s"
            raise ImageUnavailable(
                f"{sentence}: try again, or docker pull {name}", image=name, phase="pull"
            ) from None
        except aiohttp.ClientError as exc:
            raise ImageUnavailable(
                f"the pull of the image {name} broke off ({exc}): try again", image=name, phase="pull"
            ) from None


class _Progress:
    """Adds up what the engine says of each layer."""

    def __init__(self, tell: OnProgress | None) -> None:
        self._tell = tell
        self._layers: dict[str, tuple[int, int]] = {}
        self._told = (-STEP_BYTES, 0)

    def take(self, line: bytes) -> None:
        """Take one line.

        Raises:
            aiodocker.DockerError: it says that the pull failed.
        """
        said = msgspec.json.decode(line, type=dict[str, Any]) if line.strip() else {}
        if "error" in said:
            raise aiodocker.DockerError(0, str(said["error"]))
        layer, detail = str(said.get("id", "")), said.get("progressDetail") or {}
        total = self._layers.get(layer, (0, 0))[1]
        if said.get("status") == "Downloading" and detail.get("total"):
            self._layers[layer] = (int(detail["current"]), int(detail["total"]))
        elif said.get("status") in ("Download complete", "Pull complete") and total:
            self._layers[layer] = (total, total)
        self._report()

    def _report(self) -> None:
        if self._tell is None or not self._layers:
            return
        done, total = (sum(part) for part in zip(*self._layers.values(), strict=True))
        if done - self._told[0] >= STEP_BYTES or (done == total and self._told != (done, total)):
            self._told = (done, total)
            self._tell("pull", done, total)


def _given(content: bytes, group: int) -> bytes:
    """The archive as it is to be, the folder itself first; empty: nothing has to be done. Blocks."""
    whole, given = len(content) <= _GIVEN_BYTES, io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as present,
        tarfile.open(fileobj=given, mode="w") as wanted,
    ):
        for number, entry in enumerate(present):
            if number == 0 and (entry.gid, entry.mode & _SETGID) == (group, _SETGID):
                return b""
            entry.gid, entry.gname = group, ""
            entry.pax_headers = {name: value for name, value in entry.pax_headers.items() if name != "gid"}
            if not entry.issym():
                entry.mode |= _OF_FOLDERS if entry.isdir() else _OF_FILES
            wanted.addfile(entry, present.extractfile(entry) if entry.isreg() else None)
            if not whole:
                break
    return given.getvalue()


async def _read(connection: EngineConnection, id: str, path: str, most: int) -> tuple[str, bytes]:
    what = f"read {path} of a container"
    async with connection.stream("GET", f"containers/{id}/archive", {"path": path}, what=what) as response:
        try:
            about: dict[str, Any] = msgspec.json.decode(base64.b64decode(response.headers[_STAT]))
            target, mode, size = str(about["linkTarget"]), int(about["mode"]), int(about["size"])
        except (LookupError, ValueError, TypeError) as exc:
            raise EngineUnavailable(
                f"the engine could not {what}: its answer makes no sense ({exc})", phase="create"
            ) from None
        if (target and target != path) or mode & _NO_FILE or not size <= most:
            return target or path, b""
        return path, _only_file(await _whole(response.content, size + _AROUND))


async def _whole(content: aiohttp.StreamReader, most: int) -> bytes:
    parts, got = [], 0
    async with asyncio.timeout(ANSWER_SECONDS):
        while got <= most and (part := await content.readany()):
            parts.append(part)
            got += len(part)
    return b"".join(parts)


def _only_file(archive: bytes) -> bytes:
    with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for entry in opened:
            if (file := opened.extractfile(entry)) is not None:
                return file.read()
    return b""


def _key_for(image: str, usual: str) -> str:
    """Return the key of an image's registry as engines take it; empty when there is none. Blocks.

    A credential helper that is configured is asked, for at most 20 s.

    Args:
        image: its name; one without a host is of the usual registry.
        usual: the address of that, as the engine names it.
    """
    first = image.partition("/")[0]
    is_host = "/" in image and (first == "localhost" or "." in first or ":" in first)
    registry = usual if not is_host else HUB_ADDRESS if first in HUB_NAMES else first
    with suppress(*UNREADABLE):
        config = json.loads((docker_folder() / "config.json").read_bytes())
        found = _from_helper(config, registry) or _from_file(config, registry)
        if found:
            return base64.urlsafe_b64encode(
                json.dumps({**found, "serveraddress": registry}).encode()
            ).decode()
    return ""


def _from_file(config: Any, registry: str) -> dict[str, str]:
    auths = config.get("auths") or {}
    # What somebody has logged in to as https://host/v1/ is the registry of that host.
    entry: Any = next((auths[each] for each in auths if each == registry), None) or next(
        (auths[each] for each in auths if _host(each) == _host(registry)), {}
    )
    if entry.get("identitytoken"):
        return {"identitytoken": str(entry["identitytoken"])}
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        return {"username": user, "password": password.rstrip("\0")}
    if entry.get("username") and entry.get("password"):
        return {"username": str(entry["username"]), "password": str(entry["password"])}
    return {}


def _from_helper(config: Any, registry: str) -> dict[str, str]:
    """Ask the helper of this registry, or the one for all of them."""
    helpers = config.get("credHelpers") or {}
    own = next((helpers[each] for each in helpers if _host(each) == _host(registry)), None)
    name = own or config.get("credsStore") or ""
    program = shutil.which(f"docker-credential-{name}") if _HELPER.fullmatch(name) else None
    if program is None:
        return {}
    with suppress(subprocess.SubprocessError, *UNREADABLE):
        asked = subprocess.run(
            [program, "get"], input=registry.encode(), capture_output=True, timeout=HELPER_SECONDS, check=True
        )
        said = json.loads(asked.stdout)
        if said["Username"] == _BY_TOKEN:
            return {"identitytoken": str(said["Secret"])}
        return {"username": str(said["Username"]), "password": str(said["Secret"])}
    return {}


def _host(address: str) -> str:
    host = address.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return HUB if host in HUB_NAMES else host
