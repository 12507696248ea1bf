"""The container engine keeps what every backend promises."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from tests.contract.backend import BackendContract
from tests.docker.servers import SERVER
from workspaces.backend import labels as names
from workspaces.backend.docker.backend import DockerBackend
from workspaces.backend.docker.engine import Engine

pytestmark = pytest.mark.docker


class TestContainers(BackendContract):
    @pytest.fixture
    async def backend(self, engine):
        return DockerBackend(engine)

    @pytest.fixture
    def again(self):
        @asynccontextmanager
        async def opened():
            async with Engine() as engine:
                yield DockerBackend(engine)

        return opened

    @pytest.fixture
    def labels(self, instance):
        return {names.INSTANCE: instance}

    @pytest.fixture
    def image(self):
        return SERVER
