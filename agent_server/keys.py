"""The keys of a server, from its configuration and the files that it names: of its clients, and for secrets at rest."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from agent_sdk.conversation.store import SHORTEST_KEY, Cipher
from agent_server.config.options import ServerConfig
from agent_server.config.sources import CANNOT_CREATE, MINIMUM_KEY, StartRefused, is_key

KEY_FILE = "api_key"
_SHORT = f"secrets_key: each key needs at least {SHORTEST_KEY} characters; `openssl rand -base64 32` makes a good one"


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
        """Return whether the digest is that of a key that counts."""
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
    file = Path(config.api_keys_file)
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
        file = Path(config.api_key_file)
        text = read_key(file)
    else:
        file = config.folder / KEY_FILE
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


def obtain_sealer(config: ServerConfig) -> tuple[Cipher | None, list[str]]:
    """Return what seals, None where no key is configured, and the keys, which no log line may show.

    Raises:
        StartRefused: the file of the keys cannot be read, a key is too short, or a package is missing.
    """
    keys = list(config.secrets_key)
    if config.secrets_key_file:
        keys = _read_secrets_keys(Path(config.secrets_key_file))
    if not keys:
        return None, []
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise StartRefused(_SHORT)
    try:
        return Cipher(keys), keys
    except ImportError:
        raise StartRefused(
            "secrets_key needs the package cryptography: pip install 'remote-agent-server[secrets]'"
        ) from None


def _read_secrets_keys(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise StartRefused(f"{file}: holds no secrets_key: it is not text") from None
    except OSError as exc:
        raise StartRefused(f"{file}: the secrets_key cannot be read: {exc.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise StartRefused(f"{file}: holds no secrets_key")
    return keys
