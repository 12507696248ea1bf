"""What people expect to find in a sandbox, in any image: who they are, where they are, and room to work."""

from __future__ import annotations

import pytest

from tests.docker.images import BARE, BUSYBOX, FULL
from tests.docker.sandboxes import container, sandbox
from tests.docker.test_sandbox_images import image as image
from tests.docker.test_sandbox_images import said

pytestmark = pytest.mark.docker

COMMIT = "git init -q r && cd r && {}git commit -q --allow-empty -m x && git log --format='%an <%ae>'"


@pytest.mark.parametrize("name", [FULL, BARE, BUSYBOX])
async def test_the_user_has_a_name_and_the_host_an_address(server, name):
    found = await said(
        server, name, "whoami; id -gn; echo $USER $LOGNAME; cd ~ && pwd; grep -w sandbox /etc/hosts"
    )
    assert found.split() == [*["agent"] * 4, "/workspace", "127.0.0.1", "sandbox"]


async def test_programs_find_the_user_the_host_and_their_identity_in_git(server):
    python = "import getpass, pwd, os, socket; print(getpass.getuser(), pwd.getpwuid(os.getuid()).pw_dir)"
    resolved = "print(socket.gethostbyname(socket.gethostname()))"
    async with sandbox(server, FULL) as workspace:
        assert (await workspace.execute(["python3", "-c", f"{python}; {resolved}"])).stdout.split() == [
            "agent",
            "/workspace",
            "127.0.0.1",
        ]
        assert (await workspace.execute(COMMIT.format(""))).stdout == "agent <agent@sandbox>\n"
        own = COMMIT.format("git config user.name Ada && git config user.email ada@example.org && ")
        assert (await workspace.execute(f"rm -rf r; {own}")).stdout == "Ada <ada@example.org>\n"


async def test_the_users_of_an_image_stay_and_a_name_that_is_taken_is_not_taken_twice(server, image):
    odd = image("RUN echo 'agent:x:7:7::/home:/bin/sh' >>/etc/passwd")
    assert await said(server, odd, "whoami; cut -d: -f1 /etc/passwd") == "sandbox\nagent\nsandbox\n"
    known = image("RUN echo 'build:x:10001:5::/b:/bin/sh' >/etc/passwd")
    assert await said(server, known, "whoami; echo $USER; cat /etc/passwd") == (
        "build\nbuild\nbuild:x:10001:5::/b:/bin/sh\n"
    )


async def test_files_of_users_are_found_where_an_image_has_put_them(server, image):
    odd = image(
        "RUN mkdir -p /nix && echo 'root:x:0:0::/:/bin/sh' >/nix/p && rm -f /etc/passwd && ln -s /nix/p /etc/passwd"
    )
    assert await said(server, odd, "whoami; cat /nix/p") == (
        "agent\nroot:x:0:0::/:/bin/sh\nagent:x:10001:10001:agent:/workspace:/bin/sh\n"
    )


async def test_programs_run_from_tmp_and_it_holds_as_much_as_the_workspace(server):
    async with sandbox(server, disk="150m") as workspace:
        ran = await workspace.execute(
            "printf '#!/bin/sh\\necho ran\\n' >/tmp/x && chmod +x /tmp/x && /tmp/x && stat -c %a /tmp;"
            "dd if=/dev/zero of=/tmp/big bs=1M count=100 2>/dev/null && echo fits; rm /tmp/big"
        )
        assert ran.stdout.split() == ["ran", "1777", "fits"]
        info = await workspace.describe()
        assert info.usage.memory < 100 << 20  # it is no memory


async def test_tmp_has_a_limit_of_its_own_and_does_not_outlive_the_container(server, engine):
    async with sandbox(server, tmp="32m", writable=("/home/me",)) as workspace:
        filled = await workspace.execute("dd if=/dev/zero of=/tmp/big bs=1M count=64; echo x >$HOME/x; cat x")
        assert (filled.stdout, "No space left" in filled.stderr) == ("x\n", True)
        assert (await workspace.execute("rm /tmp/big; echo y >/home/me/y; ls /home/me")).stdout == "y\n"
        await engine.kill((await container(engine, workspace))["Id"])
        assert (await workspace.execute("ls /tmp /home/me; cat x")).stdout == "/home/me:\n\n/tmp:\nx\n"
