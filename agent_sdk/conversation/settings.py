"""A conversation's agent as a server keeps it beside the log, so that it goes on without a client.

Keys, headers and secrets are sealed, or left out where there is nothing to seal them with: then the
conversation waits for somebody who knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.agent.loop import RESTARTS
from agent_sdk.conversation.sealed import Sealer
from agent_sdk.protocol.specs import LLM, AgentSpec, ConfirmationPolicy

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


class Settings:
    """Turns an agent into what is stored, and back."""

    def __init__(self, sealer: Sealer | None, *, restarts: int = RESTARTS) -> None:
        """Take what seals them.

        Args:
            sealer: None: keys and secrets are left out.
            restarts: how many processes in a row may end, one soon after the other, while they run a turn; then it is
                given up, and what it runs is ended.
        """
        self.restarts = restarts
        self._sealer = sealer

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
        if self._sealer is not None and (keyed or secrets):
            sealed = self._sealer.seal(msgspec.json.encode(hidden), conversation)
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
        if sealed is not None and self._sealer is not None:
            try:
                hidden = msgspec.json.decode(self._sealer.unseal(sealed, conversation), type=_Hidden)
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
