"""A second engine that a test may kill: a dockerd of its own, with nothing in common with the usual one."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.docker.images import BUSYBOX, busybox, load

READY = b"API listen on"
# In a network of its own: an engine without a bridge removes docker0 at its start, also that of the usual one.
COMMAND = ["unshare", "--net", "dockerd"]
COMMAND += ["--bridge=none", "--iptables=false", "--ip-masq=false", "--ip-forward=false"]


class EngineProcess:
    """`async with` starts it with the busybox image, and ends it with everything in it."""

    def __init__(
        self, *, live_restore: bool = False, runtimes: Mapping[str, Any] = {}, disk: str | None = None
    ) -> None:
        # A short path: sockets below it have names of at most 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.url = f"unix://{self.folder}/docker.sock"
        self._live_restore = live_restore
        self._disk = disk
        """The kind of file system on which it keeps everything; None: that of this machine."""
        (self.folder / "daemon.json").write_text(json.dumps({"runtimes": runtimes}))
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            if self._disk is not None:
                await asyncio.to_thread(self._make_disk, self._disk)
            await self.start()
            archive = self.folder / "root.tar"
            archive.write_bytes(busybox())
            await asyncio.to_thread(load, archive, BUSYBOX, "PATH=/bin", "-H", self.url)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _make_disk(self, kind: str) -> None:
        image, data = self.folder / "disk.img", self.folder / "data"
        data.mkdir()
        with image.open("wb") as file:
            file.truncate(1 << 30)
        for command in ([f"mkfs.{kind}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(data)]):
            subprocess.run(command, check=True, capture_output=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, for the first time or after `kill`, and wait until it answers."""
        for stale in ("docker.pid", "exec/containerd/containerd.pid"):
            (self.folder / stale).unlink(missing_ok=True)  # its number may belong to another process by now
        command = [*COMMAND, "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec"]
        command += ["--pidfile", f"{self.folder}/docker.pid", "--host", self.url]
        command += ["--config-file", f"{self.folder}/daemon.json"]
        if self._live_restore:
            command.append("--live-restore")
        self._process = await asyncio.create_subprocess_exec(
            *command,
            # gVisor makes its root in there, as nobody, who may not enter the folder of the tests.
            env={name: value for name, value in os.environ.items() if name != "TMPDIR"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            limit=1 << 20,
        )
        said = []
        while READY not in (line := await self._process.stderr.readline()):
            said.append(line.decode(errors="replace"))
            assert line, f"the second engine did not start: {''.join(said)[-2000:]}"
        self._output = asyncio.ensure_future(self._drain())

    async def kill(self) -> None:
        """kill -9. Its containerd dies with it; containers and what holds them do not."""
        os.kill(self.pid, signal.SIGKILL)
        await self._ended()

    async def stop(self) -> None:
        """Have it end properly."""
        os.kill(self.pid, signal.SIGTERM)
        await self._ended()

    async def close(self) -> None:
        """End it with all its containers, and remove its folder. May be called when it is dead."""
        with suppress(AssertionError):
            if self._process is None:
                await self.start()
            docker = ["docker", "-H", self.url]
            listed = await asyncio.to_thread(
                subprocess.run, [*docker, "ps", "-aq"], capture_output=True, text=True
            )
            if ids := listed.stdout.split():
                await asyncio.to_thread(subprocess.run, [*docker, "rm", "-f", *ids], capture_output=True)
            await self.stop()
        await asyncio.to_thread(self._clear)

    async def _drain(self) -> None:
        while await self._process.stderr.readline():
            pass

    async def _ended(self) -> None:
        await self._process.wait()
        if self._output is not None:
            await self._output
        self._process = self._output = None

    def _clear(self) -> None:
        """What a kill has left: processes that were started for this folder, and mounts below it."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(self.folder).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        for mount in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", mount], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mounts(self) -> list[str]:
        mounts = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
        plain = (re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), mount) for mount in mounts)
        return [mount for mount in plain if mount.startswith(str(self.folder))]
