from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

from tests.chaos.proxy import Proxy


@dataclass
class Place:
    """Where the proxy leads."""

    port: int
    up: asyncio.Event = field(default_factory=asyncio.Event)


def place_of(server) -> Place:
    return Place(urlsplit(server.url).port)


@pytest.fixture
async def proxy(running_server) -> AsyncIterator[Proxy]:
    """A way to the server that can be cut."""
    async with Proxy(place_of(running_server)) as proxy:
        yield proxy
