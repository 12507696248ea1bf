"""Secrets at rest: bytes that only who has the key can read, bound to what they are about.

AES-256 in GCM, with a key made from the given text by HKDF. The text has to be long and random by
itself: nothing here makes guessing slow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SHORTEST_KEY = 16
NONCE_BYTES = 12
NAME_BYTES = 4

_FORMAT = b"\x01"


class Sealer:
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
        return f"<Sealer with {len(self._ciphers)} keys>"

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
