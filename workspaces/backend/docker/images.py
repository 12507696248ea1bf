"""The images of containers: looked at, and pulled where they are missing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Literal

import aiodocker
import aiohttp
import msgspec
from msgspec import Struct

from agent_sdk.protocol.errors import ImageUnavailable
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.docker.docker_config import key_for
from workspaces.backend.docker.engine_api import EngineApi
from workspaces.backend.docker.engine_info import EngineInfo
from workspaces.backend.docker.engine_lines import lines_of

STALL_SECONDS = 60.0
"""A pull that says nothing for so long is given up."""
STEP_BYTES = 1 << 20
"""At least between two reports of progress."""
_REFERENCE = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")

Pull = Literal["missing", "always", "never"]
OnProgress = Callable[[str, int, int | None], None]
"""Called with the phase, and how much of how much is done; None: nobody knows how much there is."""


class Image(Struct, frozen=True, kw_only=True):
    """An image that is on the engine."""

    name: str
    """As it was asked for."""
    id: str
    digest: str
    """By which a registry knows it; empty for one that was made here."""
    os: str
    arch: str
    size: int
    """Bytes."""
    volumes: tuple[str, ...]
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    env: tuple[str, ...]
    working_dir: str = ""


async def ensure_image(
    api: EngineApi,
    info: EngineInfo,
    name: str,
    *,
    pull: Pull = "missing",
    platform: str | None = None,
    on_progress: OnProgress | None = None,
) -> Image:
    """See Engine.image."""
    if not _REFERENCE.fullmatch(name):
        raise ImageUnavailable(
            f"no image can have the name {name[:80]!r}: correct it", image=name[:80], phase="image"
        )
    image = None if pull == "always" else await _inspect(api, name)
    wrong = image and _other_platform(image, info, platform)
    if image is not None and not wrong:
        return image
    if pull == "never" or (wrong and platform is None):
        why = wrong or f"the image {name} is not on the engine"
        mend = "name another image or platform" if wrong else f"docker pull {name}, or allow to pull it"
        raise ImageUnavailable(f"{why}: {mend}", image=name, phase="image")
    key = await in_thread(key_for, name, info.registry)
    await _pull(api, name, key, platform, on_progress)
    image = await _inspect(api, name)
    if image is None:
        raise ImageUnavailable(f"the image {name} was pulled and is gone again", image=name, phase="pull")
    wrong = _other_platform(image, info, platform)
    if wrong:
        raise ImageUnavailable(f"{wrong}: name another image or platform", image=name, phase="pull")
    return image


async def _inspect(api: EngineApi, name: str) -> Image | None:
    said = await api.find(f"images/{name}/json", what=f"describe the image {name}")
    if said is None:
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
    api: EngineApi, name: str, key: str, platform: str | None, on_progress: OnProgress | None
) -> None:
    params = {"fromImage": name, **({"platform": platform} if platform else {})}
    if "@" not in name and ":" not in name.rpartition("/")[2]:
        params["tag"] = "latest"  # otherwise the engine pulls all tags
    headers = {"X-Registry-Auth": key} if key else {}
    progress = _Progress(on_progress)
    what = f"pull the image {name}"
    stalled, stall = False, STALL_SECONDS * api.patience
    call = api.stream(
        "POST",
        "images/create",
        what=what,
        phase="pull",
        seconds=STALL_SECONDS,
        headers=headers,
        params=params,
    )
    async with call as stream:
        try:
            async with asyncio.timeout(stall) as patience:
                async for line in lines_of(stream):
                    patience.reschedule(asyncio.get_running_loop().time() + stall)
                    progress.take(line)
        except TimeoutError:
            stalled = True
        except aiohttp.ClientError as exc:
            raise ImageUnavailable(
                f"the pull of the image {name} broke off ({exc}): try again", image=name, phase="pull"
            ) from None
    if stalled:
        sentence = f"the pull of the image {name} stood still for {stall:g} s"
        raise ImageUnavailable(f"{sentence}: try again, or docker pull {name}", image=name, phase="pull")


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
        if not line.strip():
            return
        said = msgspec.json.decode(line, type=dict[str, Any])
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
