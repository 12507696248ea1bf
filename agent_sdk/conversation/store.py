"""A conversation's agent as a server keeps it beside the log, so that it goes on without a client.

Keys, headers and secrets are encrypted, or left out where there is nothing to encrypt them with: then
the conversation waits for somebody who knows them. AES-256 in GCM, with a key made from the given text
by HKDF. The text has to be long and random by itself: nothing here makes guessing slow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.agent.loop import RESTARTS
from agent_sdk.protocol.specs import LLM, AgentSpec, ConfirmationPolicy

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SHORTEST_KEY = 16
NONCE_BYTES = 12
NAME_BYTES = 4

_FORMAT = b"\x01"
KEY = "the model's API key"
_AGAIN = "configure the conversation again"


class _Kept(Struct, frozen=True, kw_only=True):
    agent: AgentSpec
    max_iterations: int
    confirmation: ConfirmationPolicy
    keyed: bool
    """The model had a key or headers."""
    secrets: tuple[str, ...]
    """Their names."""


class _Hidden(Struct, frozen=True, kw_only=True):
    api_key: str | None
    headers: dict[str, str]
    secrets: dict[str, str]


class Restored(NamedTuple):
    """An agent from the settings."""

    agent: AgentSpec
    max_iterations: int
    confirmation: ConfirmationPolicy
    secrets: dict[str, str]
    missing: str
    """What of it could not be restored and what to do about that, a sentence; empty: nothing."""


class AgentStore:
    """Turns an agent into what is stored, and back."""

    def __init__(self, cipher: Cipher | None, *, restarts: int = RESTARTS) -> None:
        """Take what seals them.

        Args:
            cipher: None: keys and secrets are left out.
            restarts: how many processes in a row may end, one soon after the other, while they run a turn; then it is
                given up, and what it runs is ended.
        """
        self.restarts = restarts
        self._cipher = cipher

    def pack(
        self,
        conversation: str,
        agent: AgentSpec,
        *,
        max_iterations: int,
        confirmation: ConfirmationPolicy,
        secrets: Mapping[str, str],
    ) -> tuple[bytes, bytes | None]:
        """Return what everybody may read, and the sealed rest."""
        llm = agent.llm
        hidden = _Hidden(api_key=None, headers={}, secrets=dict(secrets))
        if isinstance(llm, LLM):
            hidden = replace(hidden, api_key=llm.api_key, headers=llm.headers)
            agent = replace(agent, llm=replace(llm, api_key=None, headers={}))
        keyed = bool(hidden.api_key or hidden.headers)
        kept = _Kept(
            agent=agent,
            max_iterations=max_iterations,
            confirmation=confirmation,
            keyed=keyed,
            secrets=tuple(sorted(secrets)),
        )
        sealed = None
        if self._cipher is not None and (keyed or secrets):
            sealed = self._cipher.seal(msgspec.json.encode(hidden), conversation)
        return msgspec.json.encode(kept), sealed

    def missing(self, conversation: str, plain: bytes, sealed: bytes | None) -> str:
        """Return Restored.missing alone; empty, too, when the agent cannot be read at all."""
        try:
            return self.unpack(conversation, plain, sealed).missing
        except msgspec.DecodeError:
            return ""

    def unpack(self, conversation: str, plain: bytes, sealed: bytes | None) -> Restored:
        """Return what `pack` was given, as far as it can be read.

        Raises:
            msgspec.ValidationError: another version stored what this one does not know.
        """
        kept = msgspec.json.decode(plain, type=_Kept)
        agent, hidden, missing = kept.agent, None, ""
        if sealed is not None and self._cipher is not None:
            try:
                hidden = msgspec.json.decode(self._cipher.unseal(sealed, conversation), type=_Hidden)
            except ValueError:
                hidden = None
        if hidden is not None and isinstance(agent.llm, LLM):
            llm = replace(agent.llm, api_key=hidden.api_key, headers=hidden.headers)
            agent = replace(agent, llm=llm)
        if hidden is None and (kept.keyed or kept.secrets):
            what = KEY if kept.keyed else f"the secrets {', '.join(kept.secrets)}"
            missing = (
                f"{what}, which this server does not store: {_AGAIN}, or start the server with a secrets_key"
                " before the next time"
                if sealed is None
                else f"{what}, sealed with a key that this server was not given: {_AGAIN},"
                " or start the server with the secrets_key of then"
            )
        secrets = {} if hidden is None else hidden.secrets
        return Restored(agent, kept.max_iterations, kept.confirmation, secrets, missing)


class Cipher:
    """Seals with the first key, unseals with any: put a new one in front, and drop the old one when all is sealed anew.

    Raises:
        ValueError: there is no key, or one has less than 16 characters.
        ImportError: the extra `secrets` is not installed.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ValueError("sealing needs at least one key")
        for key in keys:
            if len(key) < SHORTEST_KEY:
                raise ValueError(f"a key needs at least {SHORTEST_KEY} characters (got {len(key)})")
        self._ciphers = dict(_cipher(key) for key in reversed(keys))
        self._first = next(reversed(self._ciphers))

    def __repr__(self) -> str:
        return f"<Cipher with {len(self._ciphers)} keys>"

    def seal(self, data: bytes, about: str) -> bytes:
        """Return the data sealed; unsealing needs the same `about`, such as the conversation it belongs to."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self._first].encrypt(nonce, data, about.encode())
        return _FORMAT + self._first + nonce + sealed

    def unseal(self, sealed: bytes, about: str) -> bytes:
        """Return what was sealed.

        Raises:
            ValueError: it was sealed with a key that is not there, is about something else, or was changed.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415  comes with an extra

        name, rest = sealed[1 : 1 + NAME_BYTES], sealed[1 + NAME_BYTES :]
        cipher = self._ciphers.get(name)
        if sealed[:1] != _FORMAT or cipher is None:
            raise ValueError("it was sealed with a key that this program was not given")
        try:
            return cipher.decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], about.encode())
        except (InvalidTag, ValueError):
            raise ValueError("what was sealed has been changed, or is about something else") from None


def _cipher(text: str) -> tuple[bytes, AESGCM]:
    """Return the name of a key, which tells nothing about it, and what seals with it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415  comes with an extra
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"agent-server sealing").derive(text.encode())
    return sha256(b"name" + key).digest()[:NAME_BYTES], AESGCM(key)
