"""What the Runtime API is told: how large its runtimes are, and what its tenants may have."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

GIB = 1 << 30
CLASSES = {"gvisor": "runsc", "kata": "kata-runtime", "sysbox-runc": "sysbox-runc"}
"""Names that clients know, and how these are usually called in the engine's configuration; all of them isolate more
than its default."""

Cpus = Annotated[float, Meta(gt=0, le=100_000, description="a number of processors, above 0")]
Bytes = Annotated[int, Meta(ge=64 << 20, le=1 << 50, description="a number of bytes, at least 67108864")]
Runtimes = Annotated[int, Meta(ge=1, le=100_000, description="1..100000")]
StartSeconds = Annotated[float, Meta(ge=1, le=3600, description="1..3600 seconds")]


class TenantConfig(Struct, frozen=True, kw_only=True):
    """One tenant, a table `[runtime_api.tenants.NAME]`. A quota that it leaves out is the one of all tenants."""

    key: str | None = None
    """The key that the tenant sends as X-API-Key."""
    key_file: str | None = None
    """A file that holds the key."""
    sandboxes: Runtimes | None = None
    """Runtimes that the tenant may have at a time, paused and failed ones included."""
    cpus: Cpus | None = None
    """Processors that its running ones may have together."""
    memory: Bytes | None = None
    """Bytes of memory that its running ones, and paused containers, may have together."""

    def __repr__(self) -> str:
        return f"TenantConfig(sandboxes={self.sandboxes}, cpus={self.cpus}, memory={self.memory})"


class RuntimeConfig(Struct, frozen=True, kw_only=True):
    """The table `[runtime_api]`."""

    images: tuple[str, ...] = ("agent-server:*",)
    """Images that may be started, with `*` and `?`; `*` allows all."""
    runtime_classes: dict[str, str] = field(default_factory=lambda: dict(CLASSES))
    """What tenants may ask for as `runtime_class`, and the engine's runtime that it means; empty: its default."""
    network: str = ""
    """The network of containers, one that exists; empty: the engine's default."""
    url: str = ""
    """What clients reach this server by, e.g. `https://agents.example`; empty: the Host that they asked for.
    With `{id}`, e.g. `https://{id}.agents.example`, each runtime has a name of its own."""
    unit_cpus: Cpus = 1.0
    """Processors of a runtime whose resource_factor is 1."""
    unit_memory: Bytes = 2 * GIB
    """Bytes of memory of such a runtime."""
    unit_disk: Annotated[int, Meta(ge=0, le=1 << 50, description="a number of bytes, 0: no limit")] = 8 * GIB
    """Bytes that the data of such a runtime may take, where this machine can limit it: as root, with loop devices."""
    start_seconds: StartSeconds = 120.0
    """Seconds that a runtime may take until it is ready."""
    sandboxes: Runtimes | None = None
    """Runtimes that one tenant may have, paused and failed ones included; None: any number."""
    cpus: Cpus | None = None
    """Processors that the running ones may have together."""
    memory: Bytes | None = None
    """Bytes of memory that the running ones, and paused containers, may have together."""
    tenants: dict[str, TenantConfig] = {}
    """By name; none: there is one, `default`, whose key is the server's own."""
