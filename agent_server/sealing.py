"""The keys that secrets are sealed with in the data folder, from the configuration."""

from __future__ import annotations

from pathlib import Path

from agent_sdk.conversation.sealed import SHORTEST_KEY, Sealer
from agent_server.config.options import ServerConfig
from agent_server.refusal import StartRefused

_SHORT = f"secrets_key: each key needs at least {SHORTEST_KEY} characters; `openssl rand -base64 32` makes a good one"


def obtain_sealer(config: ServerConfig) -> tuple[Sealer | None, list[str]]:
    """Return what seals, None where no key is configured, and the keys, which no log line may show.

    Raises:
        StartRefused: the file of the keys cannot be read, a key is too short, or a package is missing.
    """
    keys = list(config.secrets_key)
    if config.secrets_key_file:
        keys = _read(Path(config.secrets_key_file).expanduser())
    if not keys:
        return None, []
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise StartRefused(_SHORT)
    try:
        return Sealer(keys), keys
    except ImportError:
        raise StartRefused(
            "secrets_key needs the package cryptography: pip install 'remote-agent-server[secrets]'"
        ) from None


def _read(file: Path) -> list[str]:
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
