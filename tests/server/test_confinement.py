"""Boxes that are other users, or in namespaces of their own: what they may do, and how they end."""

from __future__ import annotations

import os

import pytest

from agent_sdk.ids import new_id
from agent_sdk.remote.workspace import RemoteWorkspace
from tests.contract.workspace import WorkspaceContract
from workspaces.box_process import BoxProcess
from workspaces.confinement import confinement

BOX_USER = 10_001

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A server's data folder, as a server opens it to its boxes; the folders of pytest let nobody through."""
    folder = tmp_path_factory.mktemp("data")
    for above in folder.parents:
        if above.stat().st_uid == os.geteuid() and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    folder.chmod(0o711)
    for name in ("workspaces", "output", "runtime"):
        (folder / name).mkdir(mode=0o711)
    return folder


@pytest.fixture
async def confined(data, isolation):
    made = await confinement(isolation, BOX_USER, data)
    await made.check(data)
    return made


@pytest.fixture
async def box(data, confined):
    owner = new_id()
    root = data / "workspaces" / owner
    confined.give(root)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TESTS_RUN": os.environ["TESTS_RUN"]}
    yield BoxProcess(
        root,
        data / "boxes" / owner,
        spool=data / "output" / owner,
        environment=environment,
        confinement=confined,
    )
    confined.remove(root)


@pytest.fixture
async def workspace(box):
    async with box, RemoteWorkspace(box.url) as workspace:
        yield workspace


@as_root
@pytest.mark.parametrize("isolation", ["user"])
class TestAsAnotherUser(WorkspaceContract):
    pass


@as_root
@pytest.mark.parametrize("isolation", ["bwrap"])
class TestInNamespaces(WorkspaceContract):
    pass
