"""Every option of the server: one frozen struct, filled from a TOML file, the environment and the command line.

Later sources win: defaults, file, `AGENT_SERVER_*`, command line. This is the only file of the server
that reads the environment. A file has the options in the table `server`, the limits of a connection in
`limits`, and the Runtime API in `runtime_api` with a table `runtime_api.tenants.NAME` for each tenant; the
environment has `AGENT_SERVER_PORT`, `AGENT_SERVER_LIMITS_CALLS`, `AGENT_SERVER_RUNTIME_API_IMAGES`, …
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta, Struct, field

from agent_sdk.protocol.specs import Limits
from agent_sdk.workspace.environment import packed
from agent_server.config.sources import (
    PREFIX,
    Counts,
    Names,
    Network,
    Sources,
    StartRefused,
    Variables,
    check_key,
    duration,
    is_secret,
    networks,
)
from workspaces.backend.contract import parse_size

Port = Annotated[int, Meta(ge=0, le=65535, description="1..65535, or 0 for a free one")]
Seconds = Annotated[float, Meta(ge=0, le=86_400, description="0..86400 seconds")]
Timeout = Annotated[float, Meta(ge=0.1, le=3600, description="0.1..3600 seconds")]
Count = Annotated[int, Meta(ge=1, le=1_000_000, description="1..1000000")]
Size = Annotated[
    str,
    Meta(
        pattern=r"^(none|(1[6-9]|[2-9][0-9]|[0-9]{3,7})m|[0-9]{1,4}[gt])$",
        description="a size of 16m or more, like 2g, or none",
    ),
]
MostSize = Annotated[
    str,
    Meta(pattern=r"^([0-9]{1,9}[mgt])?$", description="a size like 8g, or nothing for as much as there is"),
]
Duration = Annotated[
    str, Meta(pattern=r"^(none|[0-9]{1,6}[smhdw])$", description="a duration like 90d or 12h, or none")
]
GIB = 1 << 30
CLASSES = {"gvisor": "runsc", "kata": "kata-runtime", "sysbox-runc": "sysbox-runc"}
"""Names that clients know, and how these are usually called in the engine's configuration; all of them isolate more
than its default."""

Cpus = Annotated[float, Meta(gt=0, le=100_000, description="a number of processors, above 0")]
Bytes = Annotated[int, Meta(ge=64 << 20, le=1 << 50, description="a number of bytes, at least 67108864")]
Runtimes = Annotated[int, Meta(ge=1, le=100_000, description="1..100000")]
StartSeconds = Annotated[float, Meta(ge=1, le=3600, description="1..3600 seconds")]


class Quota(Struct, frozen=True, kw_only=True):
    """What one tenant of the Runtime API may have."""

    sandboxes: Runtimes | None = None
    """Runtimes that one tenant may have at a time, paused and failed ones included; None: any number."""
    cpus: Cpus | None = None
    """Processors that the running ones may have together."""
    memory: Bytes | None = None
    """Bytes of memory that the running ones, and paused containers, may have together."""


class TenantConfig(Quota, frozen=True, kw_only=True):
    """One tenant, a table `[runtime_api.tenants.NAME]`. A quota that it leaves out is the one of all tenants."""

    key: str | None = None
    """The key that the tenant sends as X-API-Key."""
    key_file: str | None = None
    """A file that holds the key."""

    def __repr__(self) -> str:
        return f"TenantConfig(sandboxes={self.sandboxes}, cpus={self.cpus}, memory={self.memory})"


class RuntimeConfig(Quota, frozen=True, kw_only=True):
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
    tenants: dict[str, TenantConfig] = {}
    """By name; none: there is one, `default`, whose key is the server's own."""


class ServerConfig(Struct, frozen=True, kw_only=True):
    """What a server is told. Times are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: Port = 8000
    """The port to listen on."""
    data: str = ""
    """The folder of everything that lasts: key, log, workspaces. Empty: `agent-server` in the user's data folder."""
    api_key: str | None = None
    """The key that clients need. Without one, and without `api_key_file`, the server makes one in the data folder."""
    api_key_file: str | None = None
    """A file that holds the key."""
    api_keys_file: str | None = None
    """A file that holds any number of keys, one in a line, `#` begins a comment. SIGHUP has it read again: new keys
    count from then on, and connections that showed one that is gone are closed."""
    metrics_key: str | None = None
    """A further key, which opens `/metrics` and nothing else."""
    secrets_key: Names = ()
    """Encrypts models' keys and secrets in the data folder, so that conversations that need them go on after a restart.
    The first of several encrypts, all decrypt; 16 characters each, or more. Without one nothing secret is kept."""
    secrets_key_file: str | None = None
    """A file that holds such keys, one per line."""
    allow_hosts: Names = ()
    """Names, besides those of the loopback, that the Host header may have; `*` allows all."""
    allow_origins: Names = ()
    """Origins of web pages that may connect, e.g. `https://console.example`. Programs send none and need none."""
    trusted_proxies: Names = ()
    """Addresses and networks of proxies in front of this server, e.g. `10.0.0.0/8`: what they say of their clients in
    X-Forwarded-For counts where addresses are told apart."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto`: console on a terminal, else one JSON object per line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important lines that are logged."""
    drain_seconds: Annotated[float, Meta(ge=0, le=600, description="0..600 seconds")] = 20.0
    """How long running calls may go on after SIGTERM."""
    isolation: Literal["none", "user", "bwrap"] = "none"
    """How boxes are kept apart from this machine. `none`: plain processes of the server's user; `user`: of another
    user, which takes root or its capabilities; `bwrap`: in namespaces of their own, without a network."""
    box_user: Annotated[
        int, Meta(ge=1, le=2_147_483_647, description="1..2147483647, the number of a user")
    ] = 10_001
    """The user of boxes that are not the server's; its group has the same number."""
    boxes_on_stop: Literal["keep", "end"] = "keep"
    """What becomes of boxes when the server stops. `keep`: those that hold anything (commands, shells, what ended
    processes said) go on, and the next server finds them; whatever supervises the server must end its main process
    alone (systemd: `KillMode=process`)."""
    box_linger_seconds: Seconds = 3600.0
    """How long a box lives when its server is gone; then it ends what runs in it."""
    idle_seconds: Seconds = 1200.0
    """How long a conversation that nobody uses keeps its box and its place in memory; its box at least while a
    call runs in it."""
    retention: Duration = "none"
    """How long a conversation without an event is kept, like 90d; then it is removed with its log and workspace."""
    handshake_seconds: Timeout = 10.0
    """How long a connection may take to send its request, and then its `initialize`."""
    body_seconds: Timeout = 30.0
    """How long the body of a request may take."""
    heartbeat_seconds: Timeout = 20.0
    """Silence after which a WebSocket is pinged; it is cut when no pong comes within half of it."""
    slow_reader_seconds: Timeout = 10.0
    """How long a connection may be over its budget of events before it is closed with 4408."""
    max_connections: Count = 16_000
    """Network connections at a time, as far as the limit of open files allows; a quarter is for those with a key."""
    max_turns: Count = 1000
    """Agent turns at a time; further messages are refused before they are written."""
    max_turn_restarts: Count = 10
    """How many servers in a row may end, each within 10 minutes of the one before, while they run a turn and bring it
    no further; then it is given up, and its command is ended."""
    max_boxes: Count = 500
    """Boxes at a time; a conversation that needs another one is refused what needs it."""
    max_pending_writes: Count = 10_000
    """Writes that may wait for the log before further ones are refused."""
    max_incoming_bytes: Annotated[
        int, Meta(ge=1 << 20, le=1 << 40, description="1048576..1099511627776 bytes")
    ] = 128 << 20
    """Bytes of bodies and messages that all clients together may have on their way; one message always fits."""
    max_strangers: Count = 64
    """Connections of one network (an IPv4 address, an IPv6 /64, the loopback) that have not shown a key yet; for a
    further one the oldest of them gives way."""
    runtime_api: Literal["off", "process", "docker"] = "off"
    """Whether this server starts further servers for tenants: in processes of its own user, or in containers."""
    files_root: str = ""
    """The folder below which file calls are kept; empty: that of their workspace. `/` where the whole machine, a
    container, is one client's: then the rights of the commands' user alone count."""
    command_env: Variables = {}
    """Variables of all commands; in the environment as a JSON object. The server itself does not see them."""
    engine: str = ""
    """The container engine for sandboxes: unix:///path or tcp://host:port. Empty: what DOCKER_HOST or the Docker
    context names, or the usual sockets."""
    box_runtime: str = ""
    """The folder of box runtimes, one per version, each made at its first need. Empty: in the data folder."""
    sandbox_images: Names = ("*",)
    """Patterns of the images that clients may ask for, e.g. `registry.example/team/*`."""
    sandbox_networks: Names = ("none",)
    """Networks that clients may ask for: `none`, `bridge`. With `bridge` commands reach whatever the engine's machine
    reaches, the addresses of cloud metadata included."""
    sandbox_mounts: Names = ()
    """Folders of this machine of which parts may be mounted into sandboxes."""
    sandbox_runtime: str = "runc"
    """The engine's runtime for sandboxes whose clients name none."""
    sandbox_disk: Size = "2g"
    """What the workspace of a sandbox may hold whose client names no size, where this machine can limit it: as root,
    with loop devices. `none`: no workspace has a limit."""
    sandbox_profiles: Names = ("locked",)
    """Profiles that clients may ask for: `locked`, `task`. The root of `task` is writable, as large as the
    engine's disk where it cannot be limited, and its commands may be root in it, without any capability."""
    sandbox_runtimes: Names = ()
    """Runtimes of the engine that clients may name. Empty: that of `sandbox_runtime`, and `runsc`."""
    sandbox_max_memory: MostSize = ""
    """The most memory that a sandbox may have, e.g. `8g`; empty: as much as the engine's machine has."""
    sandbox_max_cpus: Annotated[float, Meta(ge=0, le=4096, description="0..4096")] = 0.0
    """The most processors that a sandbox may have; 0: as many as the engine's machine has."""
    sandbox_max_pids: Annotated[int, Meta(ge=0, le=65_536, description="0..65536")] = 0
    """The most processes and threads that a sandbox may have; 0: an eighth of what this machine can, at most 4096."""
    sandbox_pool: Counts = {}
    """How many boxes of which image run already and wait for conversations, e.g. `{"python:3.12" = 2}`; in the
    environment as a JSON object. They have the limits that sandboxes have by default."""
    limits: Limits = Limits()
    runtimes: RuntimeConfig = RuntimeConfig()
    box_environment: dict[str, str] = {}
    """Not an option: what boxes inherit of the server's environment, see `box_environment`."""
    places: dict[str, str] = {}
    """Not an option: where each option was set that is not at its default, by `table.option`."""
    unknown: Names = ()
    """Not an option: a sentence for each `AGENT_SERVER_*` variable that means nothing to this server."""

    def __repr__(self) -> str:
        return f"ServerConfig(host={self.host!r}, port={self.port}, data={self.data!r})"

    # --- what is written as text, as what it means ---

    @property
    def folder(self) -> Path:
        """The folder of everything that lasts."""
        return Path(self.data)

    @property
    def proxies(self) -> tuple[Network, ...]:
        """The addresses and networks of trusted proxies."""
        return networks(self.trusted_proxies)

    @property
    def retention_seconds(self) -> float | None:
        """How long a conversation without an event is kept; None: for ever."""
        return duration(self.retention)

    @property
    def sandbox_disk_bytes(self) -> int | None:
        """What the workspace of a sandbox may hold whose client names no size; None: workspaces have no limit."""
        return None if self.sandbox_disk == "none" else parse_size("sandbox_disk", self.sandbox_disk)

    @property
    def sandbox_max_memory_bytes(self) -> int | None:
        """The most memory that a sandbox may have; None: as much as there is."""
        return parse_size("sandbox_max_memory", self.sandbox_max_memory) if self.sandbox_max_memory else None

    @property
    def box_runtimes(self) -> Path | None:
        """The folder of box runtimes; None: in the data folder."""
        return Path(self.box_runtime) if self.box_runtime else None


class ClientEnvironment(Struct, frozen=True, kw_only=True):
    """What the environment tells client commands. Nothing is checked here: the server does that."""

    url: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    data: Path
    """The data folder of a server of this user."""
    llm: dict[str, str]
    """LLM_MODEL, LLM_API_KEY, LLM_BASE_URL, as far as they are set."""

    def __repr__(self) -> str:
        return f"ClientEnvironment(url={self.url!r}, data={self.data})"


_OPTIONS = {
    name: hint
    for name, hint in get_type_hints(ServerConfig, include_extras=True).items()
    if name not in ("limits", "runtimes", "box_environment", "places", "unknown")
}
_RUNTIMES = {
    name: hint
    for name, hint in get_type_hints(RuntimeConfig, include_extras=True).items()
    if name != "tenants"
}
TENANT = get_type_hints(TenantConfig, include_extras=True)


def _between(low: int, high: int) -> Any:
    return Annotated[int, Meta(ge=low, le=high, description=f"{low}..{high}")]


# Narrower than the struct: outside of these ranges a connection could not work at all.
_LIMITS: dict[str, Any] = {
    "frame_bytes": _between(64 << 10, 16 << 20),
    "message_bytes": _between(1 << 20, 1 << 30),
    "payload_bytes": _between(64 << 10, 64 << 10),
    "calls": _between(1, 10_000),
    "window_bytes": _between(64 << 10, 64 << 20),
    "queue_bytes": _between(1 << 20, 1 << 30),
    "json_depth": _between(8, 256),
}
TABLES: dict[str, dict[str, Any]] = {"server": _OPTIONS, "limits": _LIMITS, "runtime_api": _RUNTIMES}
"""Every option of each table, and what it may be."""
KEY_FILES = {"api_key_file", "api_keys_file", "secrets_key_file", "key_file"}
"""Options that name a file; `~` is the home of the server's user."""
FLAGS = ("host", "port", "data")
"""The options that commands take, too."""


def load_given(given: object) -> ServerConfig:
    """Read the configuration of a command: the file in its `config`, and those of FLAGS that it has and were typed.

    Raises:
        StartRefused: something in it is wrong; the sentence says where and what is right.
    """
    file = getattr(given, "config", None)
    return load(Path(file) if file else None, overrides={name: getattr(given, name, None) for name in FLAGS})


def load(
    file: Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServerConfig:
    """Read the configuration.

    Args:
        file: a TOML file; None: what `AGENT_SERVER_CONFIG` names, if anything.
        overrides: options by name, from the command line; None values are left out.
        environ: the environment; None: this process's. Variables that are set to nothing do not count.

    Raises:
        StartRefused: something in it is wrong; the sentence says where and what is right.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get(f"{PREFIX}CONFIG"):
        file = Path(environ[f"{PREFIX}CONFIG"])
    sources = Sources(TABLES, TENANT)
    if file is not None:
        sources.read_file(file)
    sources.read_environment(environ)
    sources.read_arguments(overrides or {})
    options, runtimes = sources.values["server"], sources.values["runtime_api"]
    options["data"] = str(_data_folder(options.get("data", ""), environ))
    tables = runtimes.pop("tenants", {})
    for table in (options, *tables.values()):
        for name in KEY_FILES & table.keys():
            table[name] = os.path.expanduser(table[name])
    keys = [name for name in ("api_key", "api_key_file", "api_keys_file") if options.get(name)]
    if len(keys) > 1:
        raise StartRefused(f"{keys[0]} and {keys[1]} are both set; set one of them")
    if options.get("secrets_key") and options.get("secrets_key_file"):
        raise StartRefused("secrets_key and secrets_key_file are both set; set one of them")
    if options.get("files_root") and options.get("isolation") == "bwrap":
        raise StartRefused(
            "files_root and isolation bwrap are both set; bwrap shows commands their workspace alone"
        )
    check_key(options.get("api_key"))
    check_key(options.get("metrics_key"), "metrics_key")
    if options.get("metrics_key") and options.get("metrics_key") == options.get("api_key"):
        raise StartRefused(
            "metrics_key and api_key are the same; metrics_key is for those who may not have api_key"
        )
    tenants = {name: TenantConfig(**values) for name, values in tables.items()}
    config = ServerConfig(
        **options,
        limits=Limits(**sources.values["limits"]),
        runtimes=RuntimeConfig(**runtimes, tenants=tenants),
        box_environment=box_environment(environ, options.get("command_env")),
        places=sources.places,
        unknown=tuple(sources.unknown),
    )
    networks(config.trusted_proxies)
    return config


class Setting(Struct, frozen=True, kw_only=True):
    """One option of a server as it is in force."""

    option: str
    """With its table, e.g. `server.port`."""
    value: Any
    """Secrets are replaced by `[secret]`; what is unset is None."""
    source: str
    """Where it was set; `default` where nobody set it."""


def settings(config: ServerConfig) -> list[Setting]:
    """Return all options in force, in the order of the documentation, without showing a secret."""
    tables = {"server": config, "limits": config.limits, "runtime_api": config.runtimes}
    found = {f"{table}.{name}": getattr(tables[table], name) for table in TABLES for name in TABLES[table]}
    for tenant, options in config.runtimes.tenants.items():
        found |= {f"runtime_api.tenants.{tenant}.{name}": getattr(options, name) for name in TENANT}
    places = config.places
    tenants = places.get("runtime_api.tenants", "default")
    return [
        Setting(
            option=option,
            value="[secret]" if value and is_secret(option) else value,
            source=places.get(option, tenants if option.startswith("runtime_api.tenants.") else "default"),
        )
        for option, value in found.items()
    ]


def client_environment(environ: Mapping[str, str] | None = None) -> ClientEnvironment:
    """Read what client commands need: server, key, model. Variables set to nothing do not count."""
    environ = os.environ if environ is None else environ
    return ClientEnvironment(
        url=environ.get(f"{PREFIX}URL") or None,
        api_key=environ.get(f"{PREFIX}API_KEY") or None,
        api_key_file=environ.get(f"{PREFIX}API_KEY_FILE") or None,
        data=_data_folder(environ.get(f"{PREFIX}DATA", ""), environ),
        llm={name: value for name, value in environ.items() if name.startswith("LLM_") and value},
    )


def box_environment(environ: Mapping[str, str], for_commands: Variables | None = None) -> dict[str, str]:
    """Return what a box may know of the server's environment: where programs and the home are, and the language.

    What is for its commands is packed into one variable: it must not change how the box itself starts.
    """
    wanted = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR")
    inherited = {name: value for name, value in environ.items() if name in wanted or name.startswith("LC_")}
    return {**inherited, **packed(for_commands)} if for_commands else inherited


def _data_folder(given: str, environ: Mapping[str, str]) -> Path:
    if given:
        return Path(given).expanduser().absolute()
    home = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return (Path(home).expanduser() / "agent-server").absolute()
