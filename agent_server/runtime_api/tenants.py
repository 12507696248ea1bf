"""Who may use the Runtime API, and how much of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from agent_sdk.protocol.errors import Unauthorized
from agent_server.config.options import RuntimeConfig
from agent_server.config.sources import StartRefused
from agent_server.http.security import WrongKeys
from agent_server.keys import ApiKey, read_key

HEADER = "X-API-Key"
DEFAULT = "default"


class Tenant(Struct, frozen=True, kw_only=True):
    """One tenant of the Runtime API and its quota; None: no limit."""

    name: str
    sandboxes: int | None
    cpus: float | None
    memory: int | None
    """Bytes."""


class Tenants:
    """All of them, by their keys."""

    def __init__(
        self, config: RuntimeConfig, own_key: str | ApiKey, wrong_keys: WrongKeys | None = None
    ) -> None:
        """Read the keys.

        Args:
            config: the table `runtime_api`.
            own_key: the server's key, which is the one of the only tenant where none is configured.
            wrong_keys: what counts wrong keys for the whole server; None: a counter of its own.

        Raises:
            StartRefused: a key file cannot be read, or two tenants have the same key.
        """
        self.secrets: list[str] = []
        """The texts of their keys, to be kept out of logs."""
        self._keys: list[tuple[ApiKey, Tenant]] = []
        self._wrong_keys = wrong_keys or WrongKeys()
        for name, tenant in config.tenants.items():
            text = tenant.key or read_key(Path(tenant.key_file or "").expanduser())
            if text in self.secrets:
                raise StartRefused(f"runtime_api.tenants.{name}: another tenant has the same key")
            self._add(
                text,
                Tenant(
                    name=name,
                    sandboxes=tenant.sandboxes or config.sandboxes,
                    cpus=tenant.cpus or config.cpus,
                    memory=tenant.memory or config.memory,
                ),
            )
        if not config.tenants:
            self._add(
                own_key,
                Tenant(name=DEFAULT, sandboxes=config.sandboxes, cpus=config.cpus, memory=config.memory),
            )

    def _add(self, key: str | ApiKey, tenant: Tenant) -> None:
        if isinstance(key, str):
            self.secrets.append(key)
            key = ApiKey(key)
        self._keys.append((key, tenant))

    def check(self, given: Sequence[str], address: str) -> Tenant:
        """Return whose key it is.

        Args:
            given: all values of X-API-Key.
            address: who sent it.

        Raises:
            Unauthorized: there is none, or a wrong one.
            Overloaded: a wrong one, and the address had too many of them; details: retry_after_ms.
        """
        if len(given) != 1:
            raise Unauthorized(f"one key is needed: {HEADER}: KEY")
        # All of them are compared, so that the time tells nothing.
        found = [tenant for key, tenant in self._keys if key.is_same(given[0])]
        if found:
            return found[0]
        raise self._wrong_keys.refusal(address)
