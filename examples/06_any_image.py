"""A container for each conversation, managed by the server. Any image will do: nothing has to be installed in it."""

import asyncio
import os

import workspaces
from agent_sdk import Sandbox

IMAGES = os.environ.get("EXAMPLE_IMAGES", "busybox:latest debian:bookworm-slim").split()


async def main() -> None:
    url, key = os.environ["AGENT_SERVER_URL"], os.environ["AGENT_SERVER_API_KEY"]
    for image in IMAGES:
        sandbox = Sandbox(image=image)
        async with workspaces.RemoteWorkspace(url, key, sandbox=sandbox) as workspace:
            await workspace.files.write("numbers", b"3\n1\n2\n")
            sorted_ = await workspace.execute("sort numbers | (mapfile -t all; echo ${all[@]})")
            python = await workspace.execute("python3 --version")
            written = await workspace.execute("echo x > /etc/hosts")
            user = await workspace.execute("id -u")
            print(f"{image}: sorted {sorted_.stdout.strip()}, as user {user.stdout.strip()}, ", end="")
            print(f"python {'found' if python.exit_code == 0 else 'missing'}, ", end="")
            print(f"root {'writable' if written.exit_code == 0 else 'read-only'}")


asyncio.run(main())
