"""What is printed of addresses, statuses, limits and close codes is what the server does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from agent_sdk.protocol.errors import table
from agent_sdk.rpc import peer
from agent_server.config.options import ServerConfig
from agent_server.http import connection, errors, security
from agent_server.http.request import VERSION
from agent_server.session import subscription
from tests.server.wire import request
from tools.http import RULES, STATUSES, addresses, http, runtime_addresses
from tools.protocol import CLOSE_CODES

ROOT = Path(__file__).parents[2]
CODE = re.compile(
    r"[A-Z_]*(CLOSE|PROTOCOL_ERROR|POLICY|TOO_BIG|SLOW_READER|NO_ROOM|BUG|GONE|UNREADABLE)[A-Z_]*"
)
NEVER_SENT = {1000, 1006}
"""The one is nobody's fault, the other is none."""


def assigned(tree: ast.Module):
    """Names and values of constants, of tuples as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, constant in pairs:
                if isinstance(name, ast.Name) and isinstance(constant, ast.Constant):
                    yield name.id, constant.value


def sent() -> set[int]:
    """The close codes that the code has names for, or closes a WebSocket with."""
    found = set()
    for file in [*(ROOT / "agent_server").rglob("*.py"), *(ROOT / "agent_sdk" / "rpc").glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        named = [value for name, value in assigned(ast.parse(text)) if CODE.fullmatch(name)]
        written = [int(code) for code in re.findall(r"(?:close\(code=|dismiss\(|_end\()(\d{4})\b", text)]
        found |= {code for code in (*named, *written) if isinstance(code, int) and 1000 < code < 5000}
    return found


def test_every_close_code_that_is_sent_is_documented_and_no_other():
    assert {code for code, _, _ in CLOSE_CODES} - NEVER_SENT == sent() - NEVER_SENT


def test_every_address_says_what_it_answers():
    document = http()
    for address in (*addresses(), *runtime_addresses()):
        section = document.partition(f"### {address.heading}\n")[2].partition("\n### ")[0]
        assert re.search(r"^Answer: .+\.$", section, re.MULTILINE), address.heading


def test_every_status_is_documented():
    assert {errors.status_of(kind) for kind in table()} | {int(status) for status in errors._KINDS} <= set(
        STATUSES
    )


def test_the_numbers_are_those_of_the_server():
    config = ServerConfig()
    text = " ".join(RULES.split())
    codes = {code: meaning for code, _, meaning in CLOSE_CODES}
    for sentence in (
        f"within {config.handshake_seconds:g} s",
        f"After {security.WRONG_KEYS} wrong keys in a minute",
        f"pings after {config.heartbeat_seconds:g} s of silence and gives a connection up that does not answer "
        f"within {config.heartbeat_seconds / 2:g} s",
        f"{config.max_strangers} connections of a network",
        f"{config.max_incoming_bytes >> 20} MiB",
        f"every {subscription.KEEP_ALIVE_SECONDS:g} s of silence",
        f"retry: {subscription.RETRY_MS}",
        f"version {VERSION}",
    ):
        assert sentence in text
    assert security.WINDOW_SECONDS == 60
    assert f"{connection.STRANGER_BYTES >> 10} KiB" in codes[1008]
    assert f"{connection.FRAGMENTS} fragments" in codes[1008]
    assert f"{connection.CONTROLS_PER_SECOND} control frames" in codes[1008]
    assert f"{config.handshake_seconds:g} s" in codes[4401]
    assert f"{config.body_seconds:g} s" in STATUSES[408]
    assert peer.NO_ROOM in codes


@pytest.mark.parametrize("address", addresses(), ids=lambda address: address.path)
async def test_a_key_is_needed_where_the_document_says_so(server, address):
    path = address.path.replace("{id}", "x")
    async with await server.wire() as wire:
        status = (await wire.ask(request(address.method, path, [("Host", "localhost")]))).status
    assert (status == 401) is (address.key != "no")
