"""HTTP to others: through which proxy, trusting whom, and in one sentence why it does not work.

HTTP_PROXY, HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR hold as they do for other programs. A
login in ~/.netrc does not: every request carries the key that was given for it, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from urllib.parse import urlsplit

TLS_THERE = "it speaks TLS there, not plain HTTP; write https:// instead of http://"
HANDSHAKE_SECONDS = 5.0
_WRONG_NAME = frozenset({62, 64})
"""OpenSSL's numbers for certificates that are for another name or address."""
_EXPIRED = frozenset({9, 10})
_NO_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
)


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a URL; None: it is reached without one."""
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415  costs 30 ms

    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if not host or proxy_bypass(host):
        return None
    return getproxies().get({"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme))


async def trusted(url: str, given: ssl.SSLContext | None = None) -> ssl.SSLContext | bool:
    """Return which certificates count, as aiohttp takes it: those given, else those of the environment."""
    if given is not None or not url.startswith(("https:", "wss:")):
        return given or True
    return await asyncio.to_thread(ssl.create_default_context)  # aiohttp's is of the time of its import


def tls_problem(exc: BaseException, url: str) -> str | None:
    """Return what is wrong with the encryption at this address, and what to do; None: something else is."""
    cause = getattr(exc, "certificate_error", None) or getattr(exc, "os_error", None) or exc
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {cause.verify_message.rstrip('.')}; {_mend(cause.verify_code)}"
        )
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
        words = (cause.reason or str(cause)).replace("_", " ").lower()
        if cause.reason in _NO_TLS:
            return f"it speaks plain HTTP there, not TLS ({words}); write http:// instead of https://"
        return f"the TLS handshake failed: {words}"
    secure = url.startswith(("https:", "wss:"))
    if not secure and re.search(r"\\x15\\+x03|HTTPS", str(exc)):
        return TLS_THERE
    return None


async def speaks_tls(url: str) -> bool:
    """Return whether a server that is asked without encryption would take it. Nothing is sent to it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "ws") or proxy_for(url) is not None:
        return False
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, ssl=context)
    except OSError:
        return False
    writer.transport.abort()
    return True


def failure(exc: BaseException, url: str, *, direct: bool = False) -> str:
    """Return why a request came to nothing, as the end of a sentence; `direct`: it went through no proxy."""
    cause = getattr(exc, "os_error", None) or exc
    number = getattr(cause, "errno", None)
    if (problem := tls_problem(exc, url)) is not None:
        reason = problem
    elif isinstance(exc, TimeoutError):
        reason = str(exc) or "it did not answer in time"
    elif number and number > 0 and not isinstance(cause, ssl.SSLError):
        reason = os.strerror(number)
    else:
        reason = str(exc) or type(exc).__name__
    proxy = None if direct else proxy_for(url)
    if proxy is None:
        return reason
    login, at, shown = urlsplit(proxy).netloc.rpartition("@")
    reason = reason.replace(f"{login}{at}", "") if at else reason
    return f"{reason} (through the proxy {shown} of the environment; NO_PROXY lists hosts that need none)"


def _mend(code: int) -> str:
    if code in _WRONG_NAME:
        return "use a name that it was issued for"
    if code in _EXPIRED:
        return "renew it, or set the clock"
    if ssl.get_default_verify_paths().cafile is None:
        return "SSL_CERT_FILE, or this machine's own setting, names a file that is not there"
    return "name a file with its CA in SSL_CERT_FILE"
