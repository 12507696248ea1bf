"""docs/http.md: what is answered at which address, printed from the routes of the server and their docstrings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import web
from msgspec import Struct

from agent_sdk.protocol import errors
from agent_server.app import Routes
from agent_server.config.options import ServerConfig
from agent_server.http import request
from agent_server.http.errors import status_of
from agent_server.http.security import OPEN_PATHS, RUNTIME_KEY
from agent_server.runtime_api import service as runtime_api
from agent_server.runtime_api.proxy import RuntimeProxy
from agent_server.runtime_api.runtime import Shown
from agent_server.runtime_api.service import RuntimeRoutes
from tools.docstrings import docstring
from tools.markdown import fields, table

STATUSES = {
    400: "what came is no HTTP/1.1, no JSON-RPC, or does not fit, like a parameter that the address does not know",
    401: "no key or a wrong one",
    403: "a web page whose `Origin` is not allowed, or something else that is not",
    404: "there is no such conversation, address or method",
    405: "the address has no such method",
    408: "the body did not arrive within 30 s",
    409: "it contradicts the state",
    413: "the body is longer than `limits.message_bytes`",
    421: "`Host` is no name of the server (`allow_hosts`)",
    426: "the address is a WebSocket, and the request no upgrade",
    429: "too many wrong keys, connections, or bytes that are on their way",
    431: "the head of the request is longer than 8 KiB",
    500: "a bug; the error names the incident under which it is logged",
    502: "a runtime does not answer",
    503: "the server is stopping, or the workspace is not there",
    504: "what was asked for took too long",
}

RULES = """\
An error is answered with its status and `{"error": {"code", "message", "data"}}`, the error object of
JSON-RPC; where it is worth a retry with `Retry-After`. A parameter that an address does not know is refused.

### Authentication

`Authorization: Bearer KEY`, in the upgrade request as well. A browser, which cannot set it there, sends the key
as `auth` of `initialize`, within 10 s. A key in the query is refused, because it ends up in logs; cookies do not
count. After 5 wrong keys in a minute a network (an IPv4 address, an IPv6 /64, the loopback) is answered 429,
but for the right key. `Host` must be a name of the server, `Origin` absent or allowed (`allow_origins`).
The [Runtime API](runtime_api.md) has keys of its own, in `X-API-Key`.

### The WebSocket

Subprotocol `agentrpc.v1` (or none), version 13, no extensions. The server pings after 20 s of silence and gives
a connection up that does not answer within 10 s. 64 connections of a network may be without a key; for a
further one the oldest of them is closed (HTTP 429, or 4429). What all clients together have on their way in
bodies and unfinished messages has a limit (`max_incoming_bytes`, 128 MiB): then 429, or 4429. Redirects are
not to be followed: the key is for one server.

### Server-Sent Events

```
retry: 1000

id: 7
data: {"type":"agent_message","seq":7,…}

: still here
```

Each event is one message without a name, `id` its `seq`; every 15 s of silence a comment comes. `Last-Event-ID`
counts before `after`. Where the log has no such `seq` the message `event: sync.reset` with
`{"from_seq":1}` comes first, and then all events. The stream ends with the server and with the conversation.
"""


class Address(Struct, frozen=True):
    """One thing that can be asked for."""

    method: str
    path: str
    key: str
    handler: Any

    @property
    def heading(self) -> str:
        """What it is found by on the page."""
        return f"`{self.method} {self.path}`"


def addresses() -> list[Address]:
    """Return those of every server."""
    table = Routes(cast(Any, SimpleNamespace())).table()
    return [Address(route.method, route.path, _key(route), route.handler) for route in table]


def runtime_addresses() -> list[Address]:
    """Return those of a server with the Runtime API."""
    nothing = cast(Any, None)
    routes = RuntimeRoutes(nothing, nothing, RuntimeProxy(nothing), nothing, ServerConfig()).table()
    return [
        Address(
            route.method.replace("*", "ANY"),
            route.path.replace("{rest:.*}", "…"),
            "that of the runtime" if "runtimes" in route.path else f"`{RUNTIME_KEY}`",
            route.handler,
        )
        for route in routes
    ]


def _key(route: web.RouteDef) -> str:
    if route.path in OPEN_PATHS:
        return "no"
    return "yes, or in `initialize`" if route.handler.__name__ == "socket" else "yes"


def http() -> str:
    """Return the page."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield "# HTTP\n"
    yield "Printed by `make docs` from the routes of the server; do not edit. What crosses a WebSocket, and the methods"
    yield "of `POST /v1/rpc`, are in [protocol.md](protocol.md).\n"
    yield from table(
        "request | key", *((address.heading, address.key) for address in (*addresses(), *runtime_addresses()))
    )
    yield "## Rules\n"
    yield RULES
    yield "## Statuses\n"
    yield "The kinds are those of [protocol.md](protocol.md#errors); 405, 408, 426, 431 and 502 belong to requests.\n"
    kinds = _kinds()
    yield from table(
        "status | when | kinds",
        *(
            (str(status), when, ", ".join(f"`{kind}`" for kind in kinds[status]))
            for status, when in STATUSES.items()
        ),
    )
    yield "## Addresses\n"
    for address in addresses():
        yield from _address(address)
    yield "## The Runtime API\n"
    yield "Only where the option `runtime_api` turns it on, see [runtime_api.md](runtime_api.md). Every call"
    yield f"carries the key of a tenant as `{RUNTIME_KEY}`; bodies are JSON, further members are not looked at. What"
    yield "belongs to another tenant is 404, as if there were none.\n"
    for address in runtime_addresses():
        yield from _address(address)
    yield "### The runtime\n"
    yield from fields(Shown)


def _address(address: Address) -> Iterator[str]:
    said = docstring(address.handler)
    yield f"### {address.heading}\n"
    yield f"{said.text}\n"
    parameters = (request.PARAMETERS | runtime_api.PARAMETERS).get(address.path, {})
    if parameters:
        yield from table("parameter | ", *((f"`?{name}`", what) for name, what in parameters.items()))
    body = runtime_api.BODIES.get(address.path)
    if body is not None:
        yield "The body:\n"
        yield from fields(body)
    yield f"Answer: {said.returns.replace('The runtime.', '[the runtime](#the-runtime).')}\n"
    if said.raises:
        yield from table("error | when", *((_names(names), what) for names, what in said.raises))


def _names(classes: str) -> str:
    found = [getattr(errors, name) for name in classes.split(", ")]
    return ", ".join(f"`{cls.kind}`, {status_of(cls)}" for cls in found)


def _kinds() -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for cls in errors.table():
        found[status_of(cls)].append(cls.kind)
    return found
