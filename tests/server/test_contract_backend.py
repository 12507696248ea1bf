"""Processes of this machine keep what every backend promises."""

from __future__ import annotations

import sys

import pytest

from agent_sdk.ids import new_id
from tests.contract.backend import BoxContract, ServerContract
from workspaces.backend import labels as names
from workspaces.backend.contract import Machine
from workspaces.backend.process import ProcessBackend


class Processes:
    @pytest.fixture
    def again(self, tmp_path):
        (tmp_path / "machines").mkdir(exist_ok=True)
        return lambda: ProcessBackend(tmp_path / "machines")

    @pytest.fixture
    async def backend(self, again):
        async with again() as backend:
            yield backend

    @pytest.fixture
    def labels(self):
        return {names.INSTANCE: "of this test"}


class TestServers(Processes, ServerContract):
    pass


class TestBoxes(Processes, BoxContract):
    @pytest.fixture
    async def described(self, labels, folder, tmp_path):
        (tmp_path / "workspace").mkdir()
        options = ["--folder", str(folder.run), "--root", str(tmp_path / "workspace"), "--linger", "60"]
        command = [sys.executable, "-m", "agent_sdk.box", *options, "--unclaimed"]
        return Machine(
            name=f"agent-test-{new_id()}",
            labels=labels,
            profile="box",
            command=(*command, "--ready", str(folder.run / "ready")),
            ports=(),
        )
