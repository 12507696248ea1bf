"""What of the machine is mounted into sandboxes: what was allowed, and nothing else, whatever is swapped meanwhile."""

from __future__ import annotations

import os

import pytest

from agent_sdk.protocol.errors import ImageUnavailable, PolicyDenied, ProfileMismatch
from agent_sdk.protocol.results import Mount
from tests.docker.boxes import box
from tests.docker.sandboxes import sandbox
from tests.docker.test_sandbox_body import PROFILE
from tests.docker.test_sandbox_images import image as image
from tests.docker.test_sandbox_images import refused
from workspaces.box.machine import Source, mount_differences, sources

pytestmark = pytest.mark.docker


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "shared"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("of the client\n")
    return folder


async def test_a_folder_that_is_allowed_is_there(started, shared):
    mounts = (f"{shared}/a/b:/data:ro",)
    async with started(sandbox_mounts=(str(shared),)) as server, sandbox(server, mounts=mounts) as workspace:
        said = await workspace.execute("cat /data/file; touch /data/x || echo read-only")
        assert said.stdout == "of the client\nread-only\n"


@pytest.mark.parametrize("swapped", ["a", "a/b"])
async def test_a_folder_swapped_for_a_symlink_is_refused_at_the_next_start(started, engine, shared, swapped):
    mounts = (f"{shared}/a/b:/data",)
    async with started(sandbox_mounts=(str(shared),)) as server, sandbox(server, mounts=mounts) as workspace:
        (shared / swapped).rename(shared / "away")
        (shared / swapped).symlink_to("/etc")
        with pytest.raises(PolicyDenied, match="leads elsewhere by now: .* is a symlink"):
            await workspace.execute("cat /data/passwd")
        (shared / swapped).unlink()
        (shared / "away").rename(shared / swapped)
        assert (await workspace.execute("cat /data/file")).stdout == "of the client\n"


async def test_a_folder_swapped_while_the_container_starts_is_noticed_before_anything_runs(opened, shared):
    async with opened(mounts=(str(shared),)) as sandboxes:
        create = sandboxes.host.labels

        def swap_then(owner):
            (shared / "a").rename(shared / "away")
            (shared / "a").mkdir()
            (shared / "a" / "b").symlink_to("/etc")
            return create(owner)

        sandboxes.host.labels = swap_then  # called when what is mounted was looked at already
        with pytest.raises(ProfileMismatch, match="what is mounted at /data is not what was allowed"):
            async with box(sandboxes, mounts=(f"{shared}/a/b:/data",)):
                pass


def test_sources_are_walked_to_without_symlinks_from_what_is_allowed(shared):
    (shared / "link").symlink_to("a")
    (found,) = sources([f"{shared}/a/b:/data"], [str(shared)])
    assert found == Source("/data", os.stat(shared / "a/b").st_dev, os.stat(shared / "a/b").st_ino)
    for source in (f"{shared}/link/b", f"{shared}/link", f"{shared.parent}"):
        with pytest.raises(PolicyDenied):
            sources([f"{source}:/data"], [str(shared)])
    assert sources(["/etc:/data"], ["/"])[0].inode == os.stat("/etc").st_ino


def test_a_mount_that_is_something_else_is_a_difference():
    there = Mount(target="/data", kind="ext4", device=1, inode=2)
    profile = type(PROFILE)(uid=1, gid=1, mounts=(there,))
    assert mount_differences([Source("/data", 1, 2)], profile) == []
    for wanted in (Source("/data", 1, 3), Source("/data", 2, 2), Source("/other", 1, 2)):
        assert len(mount_differences([wanted], profile)) == 1


@pytest.mark.parametrize("wanted", [{"writable": ("/a/b/c",)}, {"writable": ("/a/link",)}])
async def test_no_symlink_of_an_image_leads_a_mount_over_what_is_ours(server, engine, image, wanted):
    odd = image("RUN mkdir -p /a && ln -s /opt/agent /a/b && ln -s /x /a/link")
    await refused(server, engine, ImageUnavailable, "the image has a symlink at /a/", odd, **wanted)
