"""Who offers models, where, in which dialect, and what they accept: the table behind `provider/name`.

Only what differs between providers is here; how a dialect is spoken is in openai.py and anthropic.py.

A log outlives models: it may hold call ids of another provider, a tool name or arguments that a model
made up. Providers refuse such a request as a whole, and the conversation could never go on. So each
is replaced on its way out, always by the same, while the log keeps what the model wrote.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Raw, Struct

from agent_sdk.agent.llm.decoding import encode_json
from agent_sdk.models import AssistantTurn, Turn
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.specs import LLM
from agent_sdk.tools import is_json_object


class Provider(Struct, frozen=True, kw_only=True):
    """One provider."""

    base_url: str | None = None
    """Up to and including the version; None: only the user knows."""
    dialect: Literal["openai", "anthropic"] = "openai"
    key_header: str = "Authorization"
    """`Authorization` carries `Bearer KEY`, others the bare key."""
    limit: str = "max_tokens"
    """How the request names the longest answer."""
    asks_for_usage: bool = True
    """Whether a stream tells the usage only when asked; Mistral always does and refuses the question."""
    call_id: str = r"[\x21-\x7e]{1,40}"
    """What a tool call's id may look like in a request (a conversation can change its model)."""


PROVIDERS: dict[str, Provider] = {
    "openai": Provider(base_url="https://api.openai.com/v1", limit="max_completion_tokens"),
    "anthropic": Provider(
        base_url="https://api.anthropic.com/v1",
        dialect="anthropic",
        key_header="x-api-key",
        call_id=r"[a-zA-Z0-9_-]{1,64}",
    ),
    "azure": Provider(key_header="api-key", limit="max_completion_tokens"),
    "deepseek": Provider(base_url="https://api.deepseek.com/v1"),
    "gemini": Provider(base_url="https://generativelanguage.googleapis.com/v1beta/openai"),
    "groq": Provider(base_url="https://api.groq.com/openai/v1"),
    "mistral": Provider(
        base_url="https://api.mistral.ai/v1", asks_for_usage=False, call_id=r"[a-zA-Z0-9]{9}"
    ),
    "ollama": Provider(base_url="http://127.0.0.1:11434/v1"),
    "openai-compatible": Provider(),
    "openrouter": Provider(base_url="https://openrouter.ai/api/v1"),
    "together": Provider(base_url="https://api.together.xyz/v1"),
    "vllm": Provider(),
    "xai": Provider(base_url="https://api.x.ai/v1"),
}

_ENDS = {"openai": "/chat/completions", "anthropic": "/messages"}
_KEY_HEADERS = {"authorization", *(provider.key_header.lower() for provider in PROVIDERS.values())}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NO_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_kept: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class Address(Struct, frozen=True, kw_only=True):
    """Everything needed to send a request for one LLM."""

    provider: str
    """Name in the table, or `openai-compatible` when only base_url is known."""
    kind: Provider
    model: str
    """As the provider calls it."""
    url: str
    headers: dict[str, str]
    secrets: tuple[str, ...] = ()
    """Never to be shown; longest first."""

    def __repr__(self) -> str:
        return f"Address({self.provider}/{self.model} at {self.host})"

    @property
    def sends_key(self) -> bool:
        """Whether a request carries something to show who asks."""
        return any(name.lower() in _KEY_HEADERS for name in self.headers)

    @property
    def host(self) -> str:
        """Host and port, without credentials that a URL may hold."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


def address_of(llm: LLM) -> Address:
    """Return where and how to reach the model.

    A name without a known provider belongs, whole, to the OpenAI-style server at base_url
    (`Qwen/Qwen3-Coder` is what such servers call their models).

    Raises:
        InvalidParams: unknown provider without base_url, or an address, key or header that HTTP cannot carry.
    """
    name, slash, model = llm.model.partition("/")
    if not slash or name not in PROVIDERS:
        if llm.base_url is None:
            raise InvalidParams(
                f"the model {llm.model[:64]!r} names no known provider: write provider/name with one of "
                f"{', '.join(PROVIDERS)}, or set base_url to an OpenAI-style server"
            )
        name, model = "openai-compatible", llm.model
    kind = PROVIDERS[name]
    base_url = llm.base_url or kind.base_url
    if base_url is None:
        raise InvalidParams(f"{name} has no address of its own: set base_url, e.g. http://host:8000/v1")
    if not model:
        raise InvalidParams(f"the model {llm.model[:64]!r} has no name after the provider")
    key = (llm.api_key or "").strip()
    return Address(
        provider=name,
        kind=kind,
        model=model,
        url=_url(base_url, _ENDS[kind.dialect]),
        headers=_headers(kind, key, llm.headers),
        secrets=_secrets(key, llm.headers),
    )


def _url(base_url: str, end: str) -> str:
    try:
        parts = urlsplit(base_url.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        fits = False
    if not fits or re.search(r"[\x00-\x20\x7f]", base_url.strip()):
        raise InvalidParams("base_url is no address: it looks like https://host/v1")
    path = parts.path.rstrip("/").removesuffix(end) + end
    return parts._replace(path=path, fragment="").geturl()


def _headers(kind: Provider, key: str, extra: dict[str, str]) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream, application/json",
        "Accept-Encoding": "identity",  # compressed, the pieces of a stream would come late and in lumps
    }
    if kind.dialect == "anthropic":
        headers["anthropic-version"] = "2023-06-01"
    if key:
        headers[kind.key_header] = f"Bearer {key}" if kind.key_header == "Authorization" else key
    for name, value in headers.items():
        if not _VALUE.fullmatch(value):
            raise InvalidParams(
                f"the API key cannot be sent as the header {name}: it holds a line break or the like"
            )
    for name, value in extra.items():
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise InvalidParams(
                f"the header {name[:64]!r} cannot be sent: its name or value is not allowed in HTTP"
            )
    chosen = {name.lower() for name in extra}
    return {name: value for name, value in headers.items() if name.lower() not in chosen} | extra


def _secrets(key: str, extra: dict[str, str]) -> tuple[str, ...]:
    """What error messages must not show: the key, long values of own headers."""
    found = {key, *(value.removeprefix("Bearer ") for value in extra.values() if len(value) >= 12)}
    return tuple(sorted((secret for secret in found if len(secret) >= 4), key=len, reverse=True))


def is_blank(turn: Turn) -> bool:
    """Whether it is an answer without text and calls, which providers refuse to be shown again."""
    return isinstance(turn, AssistantTurn) and not turn.tool_calls and not turn.text.strip()


def sanitized_id(call_id: str, address: Address) -> str:
    """The call's id, or a digest of it where the provider would not take it."""
    if re.fullmatch(address.kind.call_id, call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def sanitized_name(tool: str) -> str:
    """The tool's name, with `_` for every character that providers do not allow."""
    return _NO_NAME.sub("_", tool)[:64] or "unnamed"


def sanitized_arguments(arguments: str) -> str:
    """JSON text of an object: the arguments, or an object that holds what the model wrote instead of one."""
    if arguments.strip() in ("", "null"):
        return "{}"
    if is_json_object(arguments):
        return arguments
    return msgspec.json.encode({"malformed_arguments": arguments}).decode()


def provider_state(address: Address, **members: Any) -> Raw:
    """Completion.provider: what this very model wants to see again, marked as its own."""
    return Raw(encode_json({"provider": address.provider, "model": address.model, **members}))


def state_of(turn: AssistantTurn, address: Address) -> dict[str, Any]:
    """What `provider_state` was given, if the same model said this turn; else nothing: signatures do not travel."""
    if turn.provider is None:
        return {}
    try:
        members = _kept.decode(turn.provider)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {}
    same = members.get("provider") == address.provider and members.get("model") == address.model
    return members if same else {}
