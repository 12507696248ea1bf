"""A server as those see it who look after it: which conversations it has, and which of them may go."""

from __future__ import annotations

from collections.abc import Mapping
from ssl import SSLContext
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from agent_sdk.ids import new_id
from agent_sdk.outbound import proxy_for, trusted
from agent_sdk.protocol.checks import Name, Page, checked
from agent_sdk.protocol.errors import ErrorObject, from_wire
from agent_sdk.protocol.results import Snapshot, State
from agent_sdk.remote.connection import (
    LONGEST_BODY,
    checked_key,
    checked_trust,
    checked_url,
    refused,
    unreachable,
)

ANSWER_SECONDS = 30.0


class _Answer(Struct):
    error: ErrorObject | None = None


class AgentServer:
    """The conversations of one server. Each call is one HTTP request, and leaves no connection open."""

    @checked
    def __init__(self, url: str, api_key: str | None = None, *, ssl: SSLContext | None = None) -> None:
        """Describe the server; nothing is sent yet.

        Args:
            url: http:// or https://.
            api_key: the server's.
            ssl: which certificates count; None: those of the machine, or of SSL_CERT_FILE.

        Raises:
            InvalidParams: the URL or the key is not one.
        """
        self.url = checked_url(url)
        self._api_key = checked_key(api_key)
        self._ssl = checked_trust(ssl)

    def __repr__(self) -> str:
        return f"<AgentServer {self.url}>"

    @checked
    async def conversations(
        self,
        tags: Mapping[str, str] | None = None,
        state: State | None = None,
        limit: Page = 100,
        before: Name | None = None,
    ) -> list[Snapshot]:
        """Return a page of the conversations on the server, newest first.

        Args:
            tags: only those that have all of these.
            state: only those in this state.
            limit: the longest page, 1..1000 conversations.
            before: id of a conversation; only older ones are returned. For the next page give the last id of this one.

        Raises:
            InvalidParams: an argument is not acceptable.
            ConnectionLost: no agent server answers at the URL.
            Unauthorized, Overloaded, …: the server refuses.
        """
        query = [("limit", str(limit)), *(("tag", f"{name}={value}") for name, value in (tags or {}).items())]
        query += [
            (name, value) for name, value in (("state", state), ("before", before)) if value is not None
        ]
        found: list[Snapshot] = await self._ask("GET", "/v1/conversations", list[Snapshot], params=query)
        return found

    @checked
    async def delete(self, id: Name, *, unless_busy: bool = False) -> None:
        """Remove a conversation with its log and its workspace (not a `working_dir`), whatever it does.

        Args:
            id: of the conversation.
            unless_busy: leave it alone while a turn runs, or waits for an answer.

        Raises:
            ConversationNotFound: there is none of this id.
            StateConflict: the conversation is busy, and `unless_busy` is set.
            ConnectionLost, Unauthorized, Overloaded, …: no agent server answers at the URL, or it refuses.
        """
        params = {"op_id": new_id(), **({"unless_busy": True} if unless_busy else {})}
        call = {"jsonrpc": "2.0", "id": 1, "method": "conversation.delete", "params": params}
        answer = await self._ask("POST", f"/v1/rpc?conversation={quote(id, safe='')}", _Answer, json=call)
        if answer.error is not None:
            raise from_wire(answer.error)

    async def _ask(self, method: str, path: str, kind: Any, **given: Any) -> Any:
        import aiohttp  # noqa: PLC0415  costs 0.3 s; local work does without

        url, key = self.url, self._api_key
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session,
                session.request(
                    method,
                    f"{url}{path}",
                    headers={"Authorization": f"Bearer {key}"} if key else {},
                    allow_redirects=False,
                    proxy=proxy_for(url),
                    ssl=self._ssl or await trusted(url),
                    **given,
                ) as answer,
            ):
                body = await answer.read()
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise unreachable(url, exc) from None
        if answer.status == 200:
            try:
                return msgspec.json.decode(body, type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass
        raise refused(url, answer.status, answer.headers, body[:LONGEST_BODY], api_key=key)
