"""Networks of the engine, which the product uses and never makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiodocker


async def networks(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Those with these labels."""
    async with aiodocker.Docker() as docker:
        found = await docker.networks.list(
            filters={"label": [f"{name}={text}" for name, text in labels.items()]}
        )
        return list(found)


async def make_network(name: str, labels: Mapping[str, str]) -> None:
    """Make one, which has to be removed."""
    async with aiodocker.Docker() as docker:
        await docker.networks.create({"Name": name, "CheckDuplicate": True, "Labels": dict(labels)})


async def remove_network(name: str) -> None:
    """Remove it, by its name or id."""
    async with aiodocker.Docker() as docker:
        await (await docker.networks.get(name)).delete()
