"""Which Host and Origin headers are acceptable. A web page must never reach a server that trusts its own machine.

Host: against DNS rebinding, where a page's own name suddenly points here. Loopback names and what the
operator lists are fine. On a server that listens beyond the loopback so is every literal address,
because a rebound page has a name, never an address.

Origin: browsers send it, programs do not. Absent is fine, listed is fine, all else is refused, `null` included.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from agent_sdk.protocol.errors import HostNotAllowed, OriginNotAllowed

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
_NAME_AND_PORT = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_SHOWN = 100


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address is reached from its own machine only."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    address = _address(host)
    return address is not None and address.is_loopback


class HostRules:
    """What may stand in Host."""

    def __init__(self, listen: str, allowed: Sequence[str] = ()) -> None:
        """Take the address the server listens on and further names; `*` allows every name."""
        address = _address(listen)
        own = set() if address is not None and address.is_unspecified else {listen.lower()}
        self._names = LOOPBACK_NAMES | own | {name.lower() for name in allowed}
        self._beyond_loopback = not is_loopback(listen)

    def check(self, hosts: Sequence[str], target: str) -> None:
        """Accept a request.

        Args:
            hosts: all values of the Host header.
            target: the request target as it came.

        Raises:
            HostNotAllowed: details: host, and `status`, the HTTP status that fits.
        """
        if len(hosts) != 1:
            count = "no" if not hosts else "more than one"
            raise HostNotAllowed(f"the request has {count} Host header", status=400)
        if not target.startswith("/") and target != "*":
            raise HostNotAllowed("the request target must start with /", status=400)
        host = hosts[0]
        found = _NAME_AND_PORT.fullmatch(host)
        if found is None or not 0 < int(found["port"] or 1) <= 65535:
            raise HostNotAllowed("the Host header is no host name", status=400)
        if "*" not in self._names and not self._allows(found["name"].lower()):
            raise HostNotAllowed(
                f"this server is not {host[:_SHOWN]}; the operator can add the name to allow_hosts",
                host=host[:_SHOWN],
                status=421,
            )

    def _allows(self, name: str) -> bool:
        if name in self._names:
            return True
        address = _address(name)
        if address is None:
            return False
        return address.is_loopback or (self._beyond_loopback and not address.is_unspecified)


class OriginRules:
    """What may stand in Origin."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = frozenset(origin.lower().rstrip("/") for origin in allowed)

    def check(self, origins: Sequence[str]) -> str | None:
        """Accept a request; returns the allowed origin it came from, None for a program.

        Raises:
            OriginNotAllowed: details: origin.
        """
        if not origins:
            return None
        if len(origins) == 1 and origins[0].lower() in self._allowed:
            return origins[0]
        shown = ", ".join(origins)[:_SHOWN]
        raise OriginNotAllowed(
            f"web pages of {shown} may not connect; the operator can add the origin to allow_origins",
            origin=shown,
        )


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
