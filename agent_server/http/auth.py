"""Who may use the server: the API key, and how often an address may be wrong about it.

The key is 256 random bits, or what the operator set (at least 16 characters), so guessing it is
hopeless; the limit on wrong keys keeps the noise down. The right key is therefore accepted even
from an address that is over the limit: a forgotten client with an old key must not lock its
neighbours out, who may all share one address behind a proxy.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from agent_sdk.protocol.errors import Overloaded, Unauthorized, UseHeader
from agent_server.config.hosts import network_of
from agent_server.config.options import ServerConfig
from agent_server.config.sources import MINIMUM_KEY, is_key
from agent_server.refusal import CANNOT_CREATE, StartRefused

KEY_FILE = "api_key"
LONGEST_HEADER = 4096
WRONG_KEYS = 5
WINDOW_SECONDS = 60.0
ADDRESSES = 10_000


class ApiKey:
    """The key of a server, or any of several. Only digests are kept; `file` is where people find it."""

    def __init__(self, value: str, file: Path | None = None) -> None:
        self._digests = [digest_of(value)]
        self.file = file

    def __repr__(self) -> str:
        return f"<ApiKey of {self.file or 'the configuration'}>"

    def replace(self, values: Iterable[str]) -> None:
        """From now on it is any of these."""
        self._digests = [digest_of(value) for value in values]

    def is_same(self, given: str) -> bool:
        """Compare in a time that tells nothing about the key, its length included."""
        return self.has(digest_of(given))

    def has(self, digest: bytes) -> bool:
        """Whether the digest is that of a key that counts."""
        return any([hmac.compare_digest(digest, each) for each in self._digests])


def digest_of(key: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def obtain_keys(config: ServerConfig) -> tuple[ApiKey, list[str]]:
    """Return what counts as the key, and the texts, which no log line may show.

    Raises:
        StartRefused: a key file cannot be read or written, or holds no key.
    """
    if not config.api_keys_file:
        key, text = obtain_key(config)
        return key, [text]
    file = Path(config.api_keys_file).expanduser()
    texts = read_keys(file)
    key = ApiKey(texts[0], file)
    key.replace(texts)
    return key, texts


def obtain_key(config: ServerConfig) -> tuple[ApiKey, str]:
    """Return the configured key, or the one in the data folder, which is made at the first start; and its text.

    Raises:
        StartRefused: a key file cannot be read or written, holds no key, or others can read the one we made.
    """
    if config.api_key:
        return ApiKey(config.api_key), config.api_key
    if config.api_key_file:
        file = Path(config.api_key_file).expanduser()
        text = read_key(file)
    else:
        file = Path(config.data) / KEY_FILE
        text = _read_own_key(file) if file.exists() else _make_key(file)
    return ApiKey(text, file), text


def read_key(file: Path) -> str:
    """Return the key in a file.

    Raises:
        StartRefused: it cannot be read, or holds none.
    """
    text = _read(file).strip()
    if not is_key(text):
        raise StartRefused(
            f"{file}: holds no API key of at least {MINIMUM_KEY} characters; remove it and the server makes one"
        )
    return text


def read_keys(file: Path) -> list[str]:
    """Return the keys in a file, one in a line; empty lines and those that begin with # do not count.

    Raises:
        StartRefused: it cannot be read, holds none, or something that is none.
    """
    lines = [(number, line.strip()) for number, line in enumerate(_read(file).splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not keys:
        raise StartRefused(
            f"{file}: holds no API key; write one of at least {MINIMUM_KEY} characters in a line"
        )
    for number, line in keys:
        if not is_key(line):
            raise StartRefused(
                f"{file}:{number}: an API key is at least {MINIMUM_KEY} printable ASCII characters without spaces"
            )
    return [line for _, line in keys]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise StartRefused(f"{file}: holds no API key: it is not ASCII text") from None
    except OSError as exc:
        raise StartRefused(f"{file}: the API key cannot be read: {exc.strerror}") from None


def _read_own_key(file: Path) -> str:
    try:
        mode = file.stat().st_mode
    except OSError as exc:
        raise StartRefused(f"{file}: the API key cannot be read: {exc.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StartRefused(f"{file}: others can read the API key; run: chmod 600 {file}")
    return read_key(file)


def _make_key(file: Path) -> str:
    text = secrets.token_urlsafe(32)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(f"{text}\n")
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as exc:
        raise StartRefused(
            f"{file}: the API key cannot be written: {exc.strerror}", exit_code=CANNOT_CREATE
        ) from None
    return text


class Attempts:
    """Wrong keys per network in the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def failed(self, address: str) -> None:
        """Count one wrong key."""
        times = self._wrong.setdefault(network_of(address), deque(maxlen=WRONG_KEYS))
        times.append(self._clock())
        self._wrong.move_to_end(network_of(address))
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)

    def wait(self, address: str) -> float:
        """Return the seconds until another wrong key gets an ordinary answer; 0: now."""
        times = self._wrong.get(network_of(address))
        if times is None or len(times) < WRONG_KEYS:
            return 0.0
        return max(0.0, times[0] + WINDOW_SECONDS - self._clock())


class Authority:
    """Says yes or no to a key."""

    def __init__(
        self, key: ApiKey, attempts: Attempts | None = None, *, for_metrics: ApiKey | None = None
    ) -> None:
        """Take what counts as the key; `for_metrics` opens `/metrics` and nothing else."""
        self._key = key
        self._for_metrics = for_metrics
        self._attempts = attempts or Attempts()

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
        wait = self._attempts.wait(address)
        if wait > 0:
            raise Overloaded(
                f"too many wrong API keys; wait {wait:.0f} s",
                limit=WRONG_KEYS,
                retry_after_ms=int(wait * 1000) + 1,
            )
        self._attempts.failed(address)
        raise Unauthorized("wrong API key")


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
