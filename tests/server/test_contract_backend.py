"""Processes of this machine keep what every backend promises."""

from __future__ import annotations

import pytest

from tests.contract.backend import BackendContract
from workspaces.backend import labels as names
from workspaces.backend.process import ProcessBackend


class TestProcesses(BackendContract):
    @pytest.fixture
    def again(self, tmp_path):
        return lambda: ProcessBackend(tmp_path)

    @pytest.fixture
    async def backend(self, again):
        async with again() as backend:
            yield backend

    @pytest.fixture
    def labels(self):
        return {names.INSTANCE: "of this test"}
