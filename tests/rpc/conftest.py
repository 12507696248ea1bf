"""Fixtures: two connected pipes; two connected peers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent_sdk.rpc.peer import Peer
from tests.rpc.links import TRANSPORTS, connect


@pytest.fixture(params=TRANSPORTS)
async def pipes(request, tmp_path):
    async with connect(request.param, tmp_path) as pair:
        yield pair


@pytest.fixture
def peers(pipes):
    """A function: handlers and options of the accepting side in, two peers out (the opener first)."""

    @asynccontextmanager
    async def link(handlers=None, *, own=None, **options) -> AsyncIterator[tuple[Peer, Peer]]:
        here, there = pipes
        before = asyncio.all_tasks()
        async with (
            Peer(there, handlers or {}, opener=False, strict=True, **options) as server,
            Peer(here, opener=True, **(own or {})) as client,
        ):
            yield client, server
        assert asyncio.all_tasks() <= before

    return link
