"""Images that are not made for sandboxes, or against them: each is harmless, or refused in one sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    ImageUnavailable,
    IsolationUnavailable,
    ProfileMismatch,
    WorkspaceUnavailable,
)
from tests.docker.images import BARE, BUSYBOX, FULL
from tests.docker.sandboxes import container, sandbox
from workspaces.backend import labels

pytestmark = pytest.mark.docker


@pytest.fixture
def image():
    """Make an image with these lines of a Dockerfile on top of another; it is removed at the end."""
    made = []

    def image(*lines, base=BUSYBOX):
        name = f"agent-test/odd:{new_id()}"
        dockerfile = "\n".join([f"FROM {base}", *lines, ""])
        subprocess.run(["docker", "build", "-q", "-t", name, "-"], input=dockerfile.encode(), check=True)
        made.append(name)
        return name

    yield image
    if made:
        subprocess.run(["docker", "rmi", "-f", *made], check=True, capture_output=True)


async def refused(server, engine, kind, says, image, **wanted):
    """See that commands are refused in this way, twice, and that nothing is left of it."""
    async with sandbox(server, image, **wanted) as workspace:
        for _ in range(2):
            with pytest.raises(kind, match=says) as raised:
                await workspace.execute("true")
            assert {"phase", "wanted"} & set(raised.value.details)
        assert await engine.containers({labels.CONVERSATION: workspace.conversation}) == []


async def said(server, image, command, **wanted):
    """What a command in a sandbox of this image says."""
    async with sandbox(server, image, **wanted) as workspace:
        result = await workspace.execute(command)
        assert result.exit_code == 0, result
        return result.stdout


async def test_an_image_that_is_not_there(server, engine):
    await refused(server, engine, ImageUnavailable, "not on the engine", "agent-test/missing:1", pull="never")


async def test_an_image_for_another_platform(server, engine):
    await refused(
        server, engine, ImageUnavailable, "linux/arm64", BUSYBOX, platform="linux/arm64", pull="never"
    )


async def test_a_runtime_that_the_engine_has_not(started, engine):
    async with started(sandbox_runtime="kata") as server:
        await refused(server, engine, IsolationUnavailable, "no runtime kata", BUSYBOX)


async def test_an_entrypoint_is_not_run(server, image):
    odd = image('ENTRYPOINT ["/bin/false"]', 'CMD ["/bin/false"]')
    assert await said(server, odd, "echo fine") == "fine\n"


async def test_a_user_does_not_count(server, image):
    assert await said(server, image("USER 0:0"), "id -u; id -g") == "10001\n10001\n"


async def test_a_user_of_the_same_number_with_groups_gets_none(server, image):
    odd = image("RUN echo 'x:x:10001:10001::/:/bin/sh' >/etc/passwd && echo 'disk:x:6:x' >/etc/group")
    assert await said(server, odd, "id -G") == "10001\n"


async def test_a_health_check_is_not_run(server, engine, image):
    async with sandbox(server, image("HEALTHCHECK --interval=1s CMD touch /workspace/checked")) as workspace:
        await workspace.execute("true")
        held = await container(engine, workspace)
        assert held["Config"]["Healthcheck"]["Test"] == ["NONE"]
        assert "Health" not in held["State"]


async def test_variables_are_for_commands_and_do_not_reach_the_box(server, engine, image):
    odd = image(
        "ENV LD_PRELOAD=/no/such.so PYTHONPATH=/evil PATH=/bin:/opt/its/own HOME=/root GREETING='hello you'"
    )
    async with sandbox(server, odd, env={"MORE": "1", "GREETING": "mine"}) as workspace:
        result = await workspace.execute('echo "$PYTHONPATH $PATH $HOME $MORE $GREETING"')
        assert result.stdout == "/evil /bin:/opt/its/own /workspace 1 mine\n"
        held = await container(engine, workspace)
        own = Path(f"/proc/{held['State']['Pid']}/environ").read_text()
    assert "HOME=/workspace" in own
    assert "LD_PRELOAD" not in own
    assert "PYTHONPATH" not in own


async def test_a_volume_is_limited_together_with_tmp(server, engine, image):
    async with sandbox(server, image("VOLUME /var/lib/db"), tmp="32m") as workspace:
        assert (await workspace.execute("echo x >/var/lib/db/x")).exit_code == 0
        written = await workspace.execute("dd if=/dev/zero of=/var/lib/db/big bs=1024k count=100")
        assert "No space left" in written.stderr
        assert (await workspace.execute("dd if=/dev/zero of=/tmp/x bs=1024k count=1")).exit_code != 0
        held = await container(engine, workspace)
        assert [mount for mount in held["Mounts"] if mount["Type"] == "volume"] == []


async def test_a_volume_where_none_can_be(server, engine, image):
    await refused(server, engine, ImageUnavailable, "volume at '/opt'", image("VOLUME /opt"))


@pytest.mark.parametrize("place", ["/workspace", "/run", "/tmp", "/opt"])
async def test_a_symlink_in_the_place_of_a_mount(server, engine, image, place):
    """The engine follows it within the image; what lies elsewhere then is no sandbox of ours."""
    odd = image(f"RUN /bin/busybox rm -rf {place} && mkdir -p /else && /bin/busybox ln -s /else {place}")
    await refused(server, engine, (ProfileMismatch, WorkspaceUnavailable), "mount|start", odd)


async def test_programs_that_change_the_user_change_nothing(server, image):
    odd = image("RUN /bin/busybox chmod 6755 /bin/busybox")
    assert (
        await said(server, odd, "/bin/busybox id -u; /bin/busybox stat -c %a /bin/busybox") == "10001\n6755\n"
    )


async def test_an_image_without_a_shell(server, image):
    odd = image("RUN /bin/busybox rm /bin/sh")
    assert await said(server, odd, "echo shell of our own") == "shell of our own\n"


async def test_labels_of_ours_in_an_image_are_overruled(server, engine, image):
    odd = image("LABEL io.agentserver.instance=stolen io.agentserver.role=server io.agentserver.owner=x")
    async with sandbox(server, odd) as workspace:
        await workspace.execute("true")
        held = (await container(engine, workspace))["Config"]["Labels"]
    assert held[labels.INSTANCE] != "stolen"
    assert held[labels.ROLE] == labels.BOX


async def test_an_image_with_much_in_it(server):
    assert (await said(server, FULL, "python3 -c 'print(1+1)'; git --version")).startswith("2\ngit version")


async def test_the_least_memory_is_enough_for_a_box(server):
    assert await said(server, BARE, "echo small", memory="32m") == "small\n"
