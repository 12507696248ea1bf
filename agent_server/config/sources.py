"""Where options come from: a TOML file, the environment, the command line. Each is checked, and its place kept.

What a server cannot start with is refused with a sentence for a person and an exit code for whoever started it.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

PREFIX = "AGENT_SERVER_"
LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
MINIMUM_KEY = 16

Names = tuple[str, ...]
Variables = dict[str, str]
Counts = dict[str, Annotated[int, Meta(ge=0, le=1000)]]
Network = IPv4Network | IPv6Network
Options = Mapping[str, Any]
"""The options of a table, by name, with their types."""

# What Kubernetes and container links tell every process about services, here about some `agent-server-…`:
# AGENT_SERVER_API_SERVICE_HOST, AGENT_SERVER_API_PORT=tcp://10.0.0.1:8000, AGENT_SERVER_API_PORT_8000_TCP_ADDR, …
_OF_A_SERVICE = re.compile(
    r"(.*_)?(SERVICE_(HOST|PORT(_.+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR|START|END))?|ENV_.+)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
_OF_CLIENTS = ("URL", "CONFIG")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

BAD_CONFIGURATION = 2
"""An option is wrong (as argparse exits)."""
CANNOT_CREATE = 73
"""The data folder cannot be made or written (EX_CANTCREAT of sysexits.h)."""
DISK_FAILED = 74
"""A running server lost the disk below its log (EX_IOERR)."""
TRY_LATER = 75
"""Somebody else has the port or the data folder (EX_TEMPFAIL)."""


class StartRefused(Exception):
    """The server cannot start. The text is one sentence that says what is wrong and what to do."""

    def __init__(self, sentence: str, *, exit_code: int = BAD_CONFIGURATION) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def is_secret(option: str) -> bool:
    """Return whether the value of an option is never to be shown, however wrong it is."""
    name = option.rpartition(".")[2]
    return name in ("key", "command_env") or name.endswith(("_key", "_keys"))


class Sources:
    """What was set, and where. Later sources win over earlier ones."""

    def __init__(self, tables: Mapping[str, Options], tenant: Options) -> None:
        """Begin with nothing set.

        Args:
            tables: the options that there are, by the name of their table.
            tenant: the options of each table below `runtime_api.tenants`.
        """
        self._tables = tables
        self._tenant = tenant
        self.values: dict[str, dict[str, Any]] = {table: {} for table in tables}
        self.places: dict[str, str] = {}
        """`table.option` to where its value stands, as users call it."""
        self.unknown: list[str] = []
        """A sentence for each variable of our prefix that is no option; the next release may know it."""

    def read_file(self, file: Path) -> None:
        """Take what a TOML file sets.

        Raises:
            StartRefused: it cannot be read, something in it is wrong, or others can read the secrets in it.
        """
        file = file.absolute()
        try:
            raw = file.read_bytes()
            status = file.stat()
        except OSError as exc:
            raise StartRefused(f"{file}: cannot be read: {exc.strerror}") from None
        try:
            text = raw.decode().removeprefix("\ufeff")
            content = tomllib.loads(text)
        except UnicodeDecodeError:
            raise StartRefused(f"{file}: is not UTF-8 text") from None
        except tomllib.TOMLDecodeError as exc:
            raise StartRefused(_syntax_error(file, text, str(exc))) from None
        places = Places(file, text)
        for table, values in content.items():
            if table not in self._tables or not isinstance(values, dict):
                raise StartRefused(self._unknown_table(places, table))
            if table == "runtime_api":
                tenants = self._tenants(values.pop("tenants", {}), places)
                self._set(table, "tenants", tenants, str(file))
            for name, value in values.items():
                place = places.of(table, name)
                found = _checked(self._tables[table], name, value, f"{place}: {table}.{name}")
                self._set(table, name, found, place)
        secret = next((name for name in sorted(self.values["server"]) if name.endswith("_key")), None)
        if any(tenant.get("key") for tenant in self.values["runtime_api"].get("tenants", {}).values()):
            secret = "key of a tenant"
        if secret is not None and status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise StartRefused(f"{file}: holds the {secret} and everybody can read it; run: chmod 600 {file}")
        # Of somebody else's file the group may be our only way to it, say where a cluster mounts a secret.
        if secret is not None and status.st_mode & stat.S_IRWXG and status.st_uid == os.geteuid():
            raise StartRefused(f"{file}: holds the {secret} and its group can read it; run: chmod 600 {file}")

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """Take what `AGENT_SERVER_*` variables set; those that are set to nothing do not count.

        Variables of services and of clients are left alone, other unknown ones are told in `unknown`.

        Raises:
            StartRefused: a value does not fit its option.
        """
        for variable, value in sorted(environ.items()):
            rest = variable.removeprefix(PREFIX)
            if rest == variable or not value or rest in _OF_CLIENTS:
                continue
            if _OF_A_SERVICE.fullmatch(rest) or (rest.endswith("PORT") and _ADDRESS.match(value)):
                continue
            name = rest.lower()
            table = next(
                (table for table in ("limits", "runtime_api") if name.startswith(f"{table}_")), "server"
            )
            name = name if table == "server" else name.removeprefix(f"{table}_")
            if name not in self._tables[table]:
                self.unknown.append(f"{variable} is no option{_suggestion(name, self._tables[table])}")
                continue
            found = _checked(self._tables[table], name, value, variable, text=True)
            self._set(table, name, found, variable)

    def read_arguments(self, given: Mapping[str, Any]) -> None:
        """Take options of the table `server` by name; those that are None do not count.

        Raises:
            StartRefused: a value does not fit its option.
        """
        for name, value in given.items():
            if value is not None:
                place = f"--{name.replace('_', '-')}"
                self._set("server", name, _checked(self._tables["server"], name, value, place), place)

    def _set(self, table: str, name: str, value: Any, place: str) -> None:
        self.values[table][name] = value
        self.places[f"{table}.{name}"] = place

    def _tenants(self, tables: Any, places: Places) -> dict[str, dict[str, Any]]:
        """Return the tables below `runtime_api.tenants`.

        Raises:
            StartRefused: an option of a tenant is wrong, or it has no key.
        """
        found: dict[str, dict[str, Any]] = {}
        for tenant, values in tables.items() if isinstance(tables, dict) else [("", None)]:
            table = f"runtime_api.tenants.{tenant}"
            if not isinstance(values, dict):
                place = (
                    places.of("runtime_api.tenants", tenant)
                    if tenant
                    else places.of("runtime_api", "tenants")
                )
                raise StartRefused(f"{place}: a tenant is a table: [runtime_api.tenants.NAME]")
            options = {
                name: _checked(self._tenant, name, value, f"{places.of(table, name)}: {table}.{name}")
                for name, value in values.items()
            }
            if bool(options.get("key")) == bool(options.get("key_file")):
                raise StartRefused(f"{places.of(table)}: {table} needs a key or a key_file")
            check_key(options.get("key"), f"{table}.key")
            found[tenant] = options
        return found

    def _unknown_table(self, places: Places, name: str) -> str:
        where = f"{places.of('', name)}: {name}"
        for table in ("server", "limits"):
            if name in self._tables[table]:
                return f"{where} belongs below a line with [{table}]"
        tables = "server, limits and runtime_api"
        return f"{where} is no table; there are {tables}{_suggestion(name, self._tables)}"


def is_key(text: str) -> bool:
    """Return whether it is long enough to be a key, and can be sent in a header."""
    return len(text) >= MINIMUM_KEY and text.isascii() and text.isprintable() and " " not in text


def check_key(key: str | None, name: str = "") -> None:
    """Refuse a key that is too short, or that no header could carry.

    Raises:
        StartRefused: it is; the sentence does not repeat it.
    """
    if key is not None and not is_key(key):
        raise StartRefused(
            f"{name or 'api_key'} must be at least {MINIMUM_KEY} printable ASCII characters without spaces"
            f"{'' if name else '; leave it out and the server makes a good one'}"
        )


def is_loopback(host: str) -> bool:
    """Return whether a server that listens on this address is reached from its own machine only."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    address = ip_address(host)
    return address is not None and address.is_loopback


def ip_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address that a text is, also one in brackets; None: it is none."""
    try:
        return ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def duration(text: str) -> float | None:
    """Return seconds for a number with a unit of s, m, h, d or w; None when it is something else."""
    found = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    return float(found[1]) * UNITS[found[2]] if found else None


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Return addresses and networks like `10.0.0.0/8`, as what they are.

    Raises:
        StartRefused: one of them is none.
    """
    try:
        return tuple(ipaddress.ip_network(text.strip()) for text in texts)
    except ValueError as exc:
        raise StartRefused(
            f"trusted_proxies: {exc}; write addresses and networks like 10.0.0.1 or 10.0.0.0/8"
        ) from None


def _checked(known: Options, name: str, value: Any, where: str, *, text: bool = False) -> Any:
    """Return the value of an option, converted.

    Raises:
        StartRefused: there is no such option, or the value does not fit it.
    """
    if name not in known:
        raise StartRefused(f"{where} is no option{_suggestion(name, known)}")
    kind = known[name]
    if isinstance(value, str) and is_secret(name):
        value = value.strip()  # files and variables often end in a line end
    if text and kind == Names:
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        if text and kind in (Variables, Counts):
            return msgspec.json.decode(value, type=kind)
        return msgspec.convert(value, kind, strict=not text)
    except msgspec.DecodeError:  # ValidationError is one
        got = "" if is_secret(name) else f" (got {_short(value)})"
        raise StartRefused(f"{where} must be {wanted(kind)}{got}") from None


def wanted(kind: Any) -> str:
    """Say what the value of an option may be."""
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


def _syntax_error(file: Path, text: str, message: str) -> str:
    """Return tomllib's words, with the place where an editor's users look for it."""
    found = re.search(r" \(at (line (\d+), column (\d+)|end of document)\)$", message)
    if found is None:
        return f"{file}: {message}"
    lines = text.splitlines() or [""]
    line, column = found[2] or len(lines), found[3] or len(lines[-1]) + 1
    return f"{file}:{line}:{column}: {message[: found.start()]}"


class Places:
    """Where the tables and keys of a file stand; tomllib keeps no places. Good for files as people write them."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._found: dict[str, str] = {}
        table = ""
        for number, line in enumerate(text.splitlines(), 1):
            if header := re.match(r"\s*\[\s*([A-Za-z0-9_.-]+)\s*\]", line):
                table = header[1]
                self._found.setdefault(table, f":{number}:{header.start(1) + 1}")
            elif key := re.match(r"""\s*(["']?([A-Za-z0-9_-]+)["']?)\s*=""", line):
                self._found.setdefault(f"{table}.{key[2]}".lstrip("."), f":{number}:{key.start(1) + 1}")

    def of(self, table: str, name: str = "") -> str:
        """Return the file with line and column of a table, or of a name in it; of the file alone when unknown."""
        return f"{self._file}{self._found.get(f'{table}.{name}'.strip('.'), '')}"
