"""Every option of the server: one frozen struct, filled from a TOML file, the environment and the command line.

Later sources win: defaults, file, `AGENT_SERVER_*`, command line. This is the only file of the server
that reads the environment. A file has the options in the table `server`, the limits of a connection in
`limits`, and the Runtime API in `runtime_api` with a table `runtime_api.tenants.NAME` for each tenant; the
environment has `AGENT_SERVER_PORT`, `AGENT_SERVER_LIMITS_CALLS`, `AGENT_SERVER_RUNTIME_API_IMAGES`, …
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from agent_sdk.local.environment import packed
from agent_sdk.protocol.specs import Limits
from agent_server.refusal import StartRefused
from agent_server.runtime_config import RuntimeConfig, TenantConfig

PREFIX = "AGENT_SERVER_"
MINIMUM_KEY = 16
SECRETS = frozenset({"api_key", "secrets_key"})

Port = Annotated[int, Meta(ge=0, le=65535, description="1..65535, or 0 for a free one")]
Seconds = Annotated[float, Meta(ge=0, le=86_400, description="0..86400 seconds")]
Timeout = Annotated[float, Meta(ge=0.1, le=3600, description="0.1..3600 seconds")]
Count = Annotated[int, Meta(ge=1, le=1_000_000, description="1..1000000")]
Names = tuple[str, ...]
Variables = dict[str, str]
Counts = dict[str, Annotated[int, Meta(ge=0, le=1000)]]
Size = Annotated[
    str,
    Meta(
        pattern=r"^(none|(1[6-9]|[2-9][0-9]|[0-9]{3,7})m|[0-9]{1,4}[gt])$",
        description="a size of 16m or more, like 2g, or none",
    ),
]


class ServerConfig(Struct, frozen=True, kw_only=True):
    """What a server is told. Times are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: Port = 8000
    data: str = ""
    """The folder of everything that lasts: key, log, workspaces. Empty: `agent-server` in the user's data folder."""
    api_key: str | None = None
    """The key that clients need. Without one, and without `api_key_file`, the server makes one in the data folder."""
    api_key_file: str | None = None
    """A file that holds the key."""
    secrets_key: Names = ()
    """Seals models' keys and secrets in the data folder, so that conversations that need them go on after a restart.
    The first of several seals, all unseal; 16 characters each, or more. Without one nothing secret is kept."""
    secrets_key_file: str | None = None
    """A file that holds such keys, one per line."""
    allow_hosts: Names = ()
    """Names, besides those of the loopback, that the Host header may have; `*` allows all."""
    allow_origins: Names = ()
    """Origins of web pages that may connect, e.g. `https://console.example`. Programs send none and need none."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto`: console on a terminal, else one JSON object per line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
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
    """What becomes of boxes in which something runs when the server stops. `keep`: they go on, and the next server
    finds them; whatever supervises the server must end its main process alone (systemd: `KillMode=process`)."""
    box_linger_seconds: Seconds = 3600.0
    """How long a box lives when its server is gone; then it ends what runs in it."""
    idle_seconds: Seconds = 1200.0
    """How long a conversation that nobody uses keeps its box and its place in memory; its box at least while a
    call runs in it."""
    handshake_seconds: Timeout = 10.0
    """How long a connection may take to send its request, and then its `initialize`."""
    body_seconds: Timeout = 30.0
    """How long the body of a request may take."""
    heartbeat_seconds: Timeout = 20.0
    """Silence after which a WebSocket is pinged; it is cut when no pong comes within half of it."""
    slow_reader_seconds: Timeout = 10.0
    """How long a connection may be over its budget of events before it is closed with 4408."""
    max_connections: Count = 16_000
    max_turns: Count = 1000
    """Agent turns at a time; further messages are refused before they are written."""
    max_boxes: Count = 500
    """Boxes at a time; a conversation that needs another one is refused what needs it."""
    max_pending_writes: Count = 10_000
    """Writes that may wait for the log before further ones are refused."""
    max_strangers: Count = 64
    """Connections of one address that have not shown a key yet."""
    runtime_api: Literal["off", "process", "docker"] = "off"
    """Whether it starts further servers for tenants, see docs/runtime_api.md: in processes of its own user, or in
    containers."""
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
    """Which networks they may ask for: `none`, `bridge`. With `bridge` commands reach whatever the engine's machine
    reaches, the addresses of cloud metadata included."""
    sandbox_mounts: Names = ()
    """Folders of this machine of which parts may be mounted into sandboxes."""
    sandbox_runtime: str = "runc"
    """The engine's runtime for sandboxes whose clients name none."""
    sandbox_disk: Size = "2g"
    """What the workspace of a sandbox may hold whose client names no size, where this machine can limit it: as root,
    with loop devices. `none`: no workspace has a limit."""
    sandbox_pool: Counts = {}
    """How many boxes of which image run already and wait for conversations, e.g. `{"python:3.12" = 2}`; in the
    environment as a JSON object. They have the limits that sandboxes have by default."""
    limits: Limits = Limits()
    runtimes: RuntimeConfig = RuntimeConfig()
    box_environment: dict[str, str] = {}
    """Not an option: what boxes inherit of the server's environment, see `box_environment`."""

    def __repr__(self) -> str:
        return f"ServerConfig(host={self.host!r}, port={self.port}, data={self.data!r})"


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
    if name not in ("limits", "runtimes", "box_environment")
}
_RUNTIMES = {
    name: hint
    for name, hint in get_type_hints(RuntimeConfig, include_extras=True).items()
    if name != "tenants"
}
_TENANT = get_type_hints(TenantConfig, include_extras=True)
_Given = dict[str, dict[str, Any]]
"""Table to option to value."""


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
_TABLES: dict[str, dict[str, Any]] = {"server": _OPTIONS, "limits": _LIMITS, "runtime_api": _RUNTIMES}


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
    given: _Given = {table: {} for table in _TABLES}
    if file is not None:
        _read_file(file, given)
    _read_environment(environ, given)
    options = given["server"]
    for name, value in (overrides or {}).items():
        if value is not None:
            options[name] = _checked(_OPTIONS, name, value, f"--{name.replace('_', '-')}")
    options["data"] = str(_data_folder(options.get("data", ""), environ))
    if options.get("api_key") and options.get("api_key_file"):
        raise StartRefused("api_key and api_key_file are both set; set one of them")
    if options.get("secrets_key") and options.get("secrets_key_file"):
        raise StartRefused("secrets_key and secrets_key_file are both set; set one of them")
    if options.get("files_root") and options.get("isolation") == "bwrap":
        raise StartRefused(
            "files_root and isolation bwrap are both set; bwrap shows commands their workspace alone"
        )
    _check_key(options.get("api_key"))
    return ServerConfig(
        **options,
        limits=Limits(**given["limits"]),
        runtimes=RuntimeConfig(**given["runtime_api"]),
        box_environment=box_environment(environ, options.get("command_env")),
    )


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


def _read_file(file: Path, given: _Given) -> None:
    try:
        raw = file.read_bytes()
        mode = file.stat().st_mode
    except OSError as exc:
        raise StartRefused(f"{file}: cannot be read: {exc.strerror}") from None
    try:
        text = raw.decode().removeprefix("\ufeff")
        content = tomllib.loads(text)
    except UnicodeDecodeError:
        raise StartRefused(f"{file}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as exc:
        raise StartRefused(_syntax_error(file, str(exc))) from None
    lines = _line_numbers(text)
    for table, values in content.items():
        if table not in _TABLES or not isinstance(values, dict):
            raise StartRefused(_unknown_table(file, table, lines))
        if table == "runtime_api":
            given[table]["tenants"] = _tenants(file, values.pop("tenants", {}), lines)
        for name, value in values.items():
            where = f"{file.name}{lines.get((table, name), '')}: {table}.{name}"
            given[table][name] = _checked(_TABLES[table], name, value, where)
    secret = next((name for name in sorted(SECRETS) if given["server"].get(name)), None)
    if any(tenant.key for tenant in given["runtime_api"].get("tenants", {}).values()):
        secret = "key of a tenant"
    if secret is not None and mode & (stat.S_IROTH | stat.S_IWOTH):
        raise StartRefused(f"{file}: holds the {secret} and everybody can read it; run: chmod 600 {file}")


def _tenants(file: Path, tables: Any, lines: Mapping[tuple[str, str], str]) -> dict[str, TenantConfig]:
    """The tables below `runtime_api.tenants`.

    Raises:
        StartRefused: an option of a tenant is wrong, or it has no key.
    """
    found: dict[str, TenantConfig] = {}
    for tenant, values in tables.items() if isinstance(tables, dict) else [("", None)]:
        table = f"runtime_api.tenants.{tenant}"
        if not isinstance(values, dict):
            raise StartRefused(f"{file.name}: a tenant is a table: [runtime_api.tenants.NAME]")
        options = {
            name: _checked(_TENANT, name, value, f"{file.name}{lines.get((table, name), '')}: {table}.{name}")
            for name, value in values.items()
        }
        if bool(options.get("key")) == bool(options.get("key_file")):
            raise StartRefused(f"{file.name}{lines.get((table, ''), '')}: {table} needs a key or a key_file")
        _check_key(options.get("key"), f"{table}.key")
        found[tenant] = TenantConfig(**options)
    return found


def _read_environment(environ: Mapping[str, str], given: _Given) -> None:
    for variable, value in sorted(environ.items()):
        if not variable.startswith(PREFIX) or not value or _is_not_ours(variable, value):
            continue
        name = variable.removeprefix(PREFIX).lower()
        table = next((table for table in ("limits", "runtime_api") if name.startswith(f"{table}_")), "server")
        name = name if table == "server" else name.removeprefix(f"{table}_")
        given[table][name] = _checked(_TABLES[table], name, value, variable, text=True)


def _is_not_ours(variable: str, value: str) -> bool:
    """Whether a variable of our prefix is for somebody else.

    The client reads AGENT_SERVER_URL. And Kubernetes tells every pod about a service called
    agent-server: AGENT_SERVER_PORT=tcp://10.0.0.1:8000, AGENT_SERVER_SERVICE_HOST, AGENT_SERVER_PORT_8000_TCP, …
    """
    rest = variable.removeprefix(PREFIX)
    if rest in ("URL", "CONFIG") or rest.startswith("SERVICE_"):
        return True
    return rest.startswith("PORT_") or (rest == "PORT" and "://" in value)


def _checked(known: Mapping[str, Any], name: str, value: Any, where: str, *, text: bool = False) -> Any:
    """The value of an option, converted.

    Raises:
        StartRefused: there is no such option, or the value does not fit it.
    """
    if name not in known:
        raise StartRefused(f"{where} is no option{_suggestion(name, known)}")
    kind = known[name]
    if text and kind == Names:
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        if text and kind in (Variables, Counts):
            return msgspec.json.decode(value, type=kind)
        return msgspec.convert(value, kind, strict=not text)
    except msgspec.DecodeError:  # ValidationError is one
        got = "" if name in SECRETS or kind == Variables else f" (got {_short(value)})"
        raise StartRefused(f"{where} must be {_wanted(kind)}{got}") from None


def _wanted(kind: Any) -> str:
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].description)
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    kinds = {
        Names: "a list of texts",
        Variables: "a table of names and texts",
        Counts: "a table of names and numbers from 0 to 1000",
    }
    return kinds.get(kind, "a text")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
    return f"{text[:60]}…" if len(text) > 60 else text


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_table(file: Path, name: str, lines: Mapping[tuple[str, str], str]) -> str:
    where = f"{file.name}{lines.get(('', name), '') or lines.get((name, ''), '')}: {name}"
    if name in _OPTIONS:
        return f"{where} belongs below a line with [server]"
    if name in _LIMITS:
        return f"{where} belongs below a line with [limits]"
    return f"{where} is no table; there are server, limits and runtime_api{_suggestion(name, _TABLES)}"


def _syntax_error(file: Path, message: str) -> str:
    """tomllib's words, with the line where an editor's users look for it."""
    found = re.search(r" \(at line (\d+), column \d+\)$", message)
    where = f"{file.name}:{found[1]}" if found else file.name
    return f"{where}: {message[: found.start()] if found else message}"


def _line_numbers(text: str) -> dict[tuple[str, str], str]:
    """`:line` of each (table, key) and (table, ""); tomllib keeps no places. Good for files as people write them."""
    found: dict[tuple[str, str], str] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([A-Za-z0-9_.-]+)\s*\]", line):
            table = header[1]
            found.setdefault((table, ""), f":{number}")
        elif key := re.match(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""", line):
            found.setdefault((table, key[1]), f":{number}")
    return found


def _data_folder(given: str, environ: Mapping[str, str]) -> Path:
    if given:
        return Path(given).expanduser().absolute()
    home = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return (Path(home).expanduser() / "agent-server").absolute()


def _check_key(key: str | None, name: str = "") -> None:
    if key is not None and (
        len(key) < MINIMUM_KEY or not key.isascii() or not key.isprintable() or " " in key
    ):
        raise StartRefused(
            f"{name or 'api_key'} must be at least {MINIMUM_KEY} printable ASCII characters without spaces"
            f"{'' if name else '; leave it out and the server makes a good one'}"
        )
