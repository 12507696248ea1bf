"""What users say of a server, checked before anything is sent: its URL and its key."""

from __future__ import annotations

import re
import ssl
from urllib.parse import urlsplit

from agent_sdk.protocol.errors import InvalidParams

EXAMPLE = "http://127.0.0.1:8000"
_KEY = re.compile(r"[\x21-\x7e]+")
_SHOWN = 200


def checked_url(given: str, option: str = "url", schemes: tuple[str, ...] = ("http", "https")) -> str:
    """Return the URL without spaces around it and slashes at its end.

    Raises:
        InvalidParams: it is none, or holds what does not belong there: a login, a query.
    """
    url = given.strip()
    shown = repr(url[:_SHOWN])
    starts = " or ".join(f"{scheme}://" for scheme in schemes)
    try:
        parts = urlsplit(url)
        fits = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        raise InvalidParams(f"{option} is no URL: {shown}; it looks like {EXAMPLE}") from None
    if "@" in parts.netloc:
        raise InvalidParams(f"{option} must not hold a login: it ends up in logs; pass the key as api_key")
    if not fits or re.search(r"[\x00-\x20\x7f]", url):
        raise InvalidParams(
            f"{option} must start with {starts} and name a host, like {EXAMPLE} (got {shown})"
        )
    if parts.query or parts.fragment:
        raise InvalidParams(f"{option} must end before ? and #, like {EXAMPLE} (got {shown})")
    return url.rstrip("/")


def checked_address(given: str) -> str:
    """Return the URL of a server, or of a box: `unix:///path`.

    Raises:
        InvalidParams: it is none.
    """
    if given.startswith("unix:///"):
        return given
    return checked_url(given, schemes=("http", "https", "unix"))


def checked_key(given: str | None, option: str = "api_key") -> str | None:
    """Return the key without the spaces and line ends around it, which files and variables often have.

    Raises:
        InvalidParams: it holds what no key has.
    """
    key = (given or "").strip()
    if key and not _KEY.fullmatch(key):
        raise InvalidParams(
            f"{option} must be printable ASCII characters without spaces or line ends; "
            f"the one that was given has something else among its {len(key)}"
        )
    return key or None


def checked_trust(given: ssl.SSLContext | None) -> ssl.SSLContext | None:
    """Return the certificates that count.

    Raises:
        InvalidParams: it is no SSLContext; a connection without checks would give the key to anybody.
    """
    if given is not None and not isinstance(given, ssl.SSLContext):
        raise InvalidParams(
            "ssl must be an ssl.SSLContext, e.g. ssl.create_default_context(cafile='ca.pem') for a CA of your own "
            f"(got {given!r})"
        )
    return given
