"""What tests of servers in containers share: the image, and whether anything is left of a container."""

import os

from agent_sdk.protocol.errors import NotFound
from workspaces.backend import labels

SERVER = os.environ.get("SERVER_IMAGE", "agent-test/server:1")
"""What `make image` makes, with that tag for tests."""


async def state(engine, name):
    """The engine's word for it; None when there is no such container."""
    try:
        return (await engine.inspect(name))["State"]["Status"]
    except NotFound:
        return None


async def volumes_of(engine, name):
    """Names of the volumes that a container mounts."""
    mounts = (await engine.inspect(name))["Mounts"]
    return {mount["Name"] for mount in mounts if mount["Type"] == "volume"}


async def there(engine, volumes):
    """Those of these volumes that exist."""
    return volumes & {volume["Name"] for volume in await engine.volumes({})}


async def of_instance(engine, container):
    """Names of all containers that belong to the same owner as this one."""
    instance = (await engine.inspect(container))["Config"]["Labels"][labels.INSTANCE]
    return [found["Names"][0].strip("/") for found in await engine.containers({labels.INSTANCE: instance})]
