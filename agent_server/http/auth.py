"""Who may use the server: a key, and how often an address may be wrong about it.

The key is 256 random bits, or what the operator set (at least 16 characters), so guessing it is
hopeless; the limit on wrong keys keeps the noise down. The right key is therefore accepted even
from an address that is over the limit: a forgotten client with an old key must not lock its
neighbours out, who may all share one address behind a proxy.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from agent_sdk.protocol.errors import AgentServerError, Overloaded, Unauthorized, UseHeader
from agent_server.config.hosts import network_of
from agent_server.keys import ApiKey, digest_of

LONGEST_HEADER = 4096
WRONG_KEYS = 5
WINDOW_SECONDS = 60.0
ADDRESSES = 10_000


class WrongKeys:
    """Wrong keys per network in the last minute, whatever they were shown for: all doors of a server share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def refusal(self, address: str) -> AgentServerError:
        """Count a wrong key, and return what to answer it.

        Unauthorized, or where the network of the address had too many of them Overloaded, with retry_after_ms.
        """
        network, now = network_of(address), self._clock()
        times = self._wrong.setdefault(network, deque(maxlen=WRONG_KEYS))
        wait = times[0] + WINDOW_SECONDS - now if len(times) == WRONG_KEYS else 0.0
        if wait > 0:
            return Overloaded(
                f"too many wrong API keys; wait {wait:.0f} s",
                limit=WRONG_KEYS,
                retry_after_ms=int(wait * 1000) + 1,
            )
        times.append(now)
        self._wrong.move_to_end(network)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)
        return Unauthorized("wrong API key")


class Authority:
    """Says yes or no to a key."""

    def __init__(
        self, key: ApiKey, wrong_keys: WrongKeys | None = None, *, for_metrics: ApiKey | None = None
    ) -> None:
        """Take what counts as the key; `for_metrics` opens `/metrics` and nothing else."""
        self._key = key
        self._for_metrics = for_metrics
        self._wrong_keys = wrong_keys or WrongKeys()

    def check(self, given: str | None, address: str, *, metrics: bool = False) -> bytes:
        """Accept a key; returns its digest.

        Args:
            given: what was shown.
            address: who shows it.
            metrics: whether it is shown for `/metrics`.

        Raises:
            Unauthorized: there is none, or a wrong one.
            Overloaded: a wrong one, and the address had too many of them; details: retry_after_ms.
        """
        if given is None:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY")
        digest = digest_of(given)
        if self._key.has(digest):
            return digest
        if metrics and self._for_metrics is not None and self._for_metrics.has(digest):
            return digest
        raise self._wrong_keys.refusal(address)


def bearer(headers: Sequence[str], *, query: bool = False) -> str | None:
    """Return the key in the Authorization headers; None when there is no such header.

    Args:
        headers: all values of Authorization.
        query: whether the address carries something that looks like a key; it would end up in logs.

    Raises:
        UseHeader: the key came some other way, or the header is not of the form `Bearer KEY`.
    """
    if query:
        raise UseHeader("a key in the address ends up in logs; use the header Authorization: Bearer KEY")
    if not headers:
        return None
    scheme, _, key = headers[0].partition(" ")
    if len(headers) > 1 or len(headers[0]) > LONGEST_HEADER:
        raise UseHeader("one header Authorization: Bearer KEY is needed")
    if scheme.lower() != "bearer":
        raise UseHeader("this scheme is not supported; use the header Authorization: Bearer KEY")
    return key
