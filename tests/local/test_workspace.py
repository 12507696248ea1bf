"""A workspace on this machine keeps the contract, and what only it promises."""

import pytest

from agent_sdk.local.workspace import LocalWorkspace
from tests.contract.workspace import WorkspaceContract


class TestHere(WorkspaceContract):
    @pytest.fixture
    async def workspace(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        async with LocalWorkspace(root) as workspace:
            yield workspace
