"""Pods that are processes of this machine, for where there is no container engine.

A runtime's image, processors and memory are not looked at here: it runs what this server runs, as its user.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.environment import packed
from agent_server.runtime_api.pods import Pod, Pods, PodSpec
from agent_server.runtime_api.server_process import ServerProcess

OPTIONS = {
    "AGENT_SERVER_BOXES_ON_STOP": "end",
    "AGENT_SERVER_DRAIN_SECONDS": "5",
    "AGENT_SERVER_LOG_FORMAT": "json",
}


class ProcessPod(Pod):
    """A pod that is a process. Paused means ended, with its data kept."""

    def __init__(self, spec: PodSpec, environment: Mapping[str, str]) -> None:
        self._spec = spec
        for_commands = packed(spec.environment) if spec.environment else {}
        self._server = ServerProcess(
            spec.folder,
            name=spec.runtime_id,
            api_key=spec.api_key,
            environment={**environment, **for_commands, **OPTIONS},
        )

    def __repr__(self) -> str:
        return f"<ProcessPod {self._spec.runtime_id}>"

    @property
    def url(self) -> str:
        return self._server.url

    async def start(self, seconds: float) -> None:
        await self._server.start(seconds)

    async def died(self) -> str:
        code = await self._server.died()
        if code is None:
            return "the server ended"
        return f"the server was ended by signal {-code}" if code < 0 else f"the server ended with {code}"

    async def pause(self) -> None:
        await self._server.stop()

    async def end(self) -> None:
        await self._server.stop()  # its folder is the runtime's, which removes it

    async def let_go(self) -> None:
        self._server.let_go()

    async def last_words(self) -> str:
        return await in_thread(self._server.last_words)


class ProcessPods(Pods):
    """Makes pods that are processes of this machine."""

    paused_keeps_memory = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take what servers know of the environment, besides their options."""
        self._environment = dict(environment)

    def pod(self, spec: PodSpec) -> ProcessPod:
        return ProcessPod(spec, self._environment)

    def disk(self, wanted: int | None) -> int | None:
        return None

    async def sweep(self, known: Callable[[], Collection[str]]) -> None:
        """Nothing is to be found: the folder of a process is written down before it starts."""
