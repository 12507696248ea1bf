"""Which Host, Origin and X-Forwarded-For headers are acceptable.

A web page must never reach a server that trusts its own machine.

Host: against DNS rebinding, where a page's own name suddenly points here. Loopback names and what the
operator lists are fine. On a server that listens beyond the loopback so is every literal address,
because a rebound page has a name, never an address.

Origin: browsers send it, programs do not. Absent is fine, listed is fine, all else is refused, `null` included.

X-Forwarded-For: counts only from proxies that the operator lists, and only as far as they wrote it themselves: from
the right, the first address that is none of theirs.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from agent_sdk.protocol.errors import HostNotAllowed, OriginNotAllowed

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
_NAME_AND_PORT = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
# `2001:db8::1`, `[2001:db8::1]:443`, `192.0.2.1`, `192.0.2.1:443`
_FORWARDED = re.compile(r"\[(?P<six>[^\]]+)\](?::\d+)?|(?P<four>[0-9.]+):\d+|(?P<bare>[^\[\]]+)")
LONGEST_FORWARDED = 4096
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


class ProxyRules:
    """Which proxies are believed about whom they speak for."""

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        """Take addresses and networks, like `10.0.0.0/8`.

        Raises:
            ValueError: one of them is none; the text is a sentence.
        """
        self._networks = []
        for text in trusted:
            try:
                self._networks.append(ipaddress.ip_network(text.strip()))
            except ValueError as exc:
                raise ValueError(f"{exc}; write addresses and networks like 10.0.0.1 or 10.0.0.0/8") from None

    def trusts(self, address: str) -> bool:
        """Whether it is one of them."""
        parsed = _plain(address) if self._networks else None
        return parsed is not None and any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded: Sequence[str]) -> str:
        """Return for whom a trusted proxy speaks.

        Args:
            peer: its address.
            forwarded: all values of X-Forwarded-For.
        """
        client = peer
        for entry in reversed(",".join(forwarded)[-LONGEST_FORWARDED:].split(",")):
            found = _FORWARDED.fullmatch(entry.strip())
            parsed = _plain(found["six"] or found["four"] or found["bare"]) if found else None
            if parsed is None:
                break  # whoever wrote that is not to be believed any further
            client = str(parsed)
            if not self.trusts(client):
                break
        return client


def network_of(address: str) -> str:
    """Return what counts as one: all of the loopback, the network of an IPv6 customer (/64), an IPv4 address."""
    parsed = _plain(address)
    if parsed is None:
        return address
    if parsed.is_loopback:
        return "loopback"
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address without its zone; one of IPv4 in the clothes of IPv6 is one of IPv4."""
    parsed = _address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
