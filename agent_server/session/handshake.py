"""What `initialize` means over a WebSocket and over plain HTTP alike: who may, which conversation, the answer."""

from __future__ import annotations

from msgspec.structs import asdict

from agent_sdk.protocol.errors import ConversationNotFound, InvalidParams
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize, Initialized
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.version import __version__
from agent_server.config.options import ServerConfig
from agent_server.conversations.loaded import LoadedConversation
from agent_server.conversations.registry import SHOWN_ID, Conversations
from agent_server.work import Work

NEW = "new"
SERVER = ClientInfo(name="agent-server", version=__version__)
_LEAST = Limits(
    frame_bytes=1,
    message_bytes=64 << 10,
    payload_bytes=1,
    calls=1,
    window_bytes=1,
    queue_bytes=1,
    json_depth=1,
)


def check_initialize(params: Initialize) -> None:
    """Accept the params of `initialize`.

    Raises:
        InvalidParams: another version, or limits with which nothing could be sent.
    """
    if params.protocol_version != PROTOCOL_VERSION:
        older = "server" if params.protocol_version > PROTOCOL_VERSION else "client"
        raise InvalidParams(
            f"$.params.protocol_version: this server ({SERVER.name} {SERVER.version}) speaks {PROTOCOL_VERSION}, got "
            f"{params.protocol_version}; the {older} is the older one, update it",
            supported=[PROTOCOL_VERSION],
        )
    for name, value in asdict(_LEAST).items():
        if getattr(params.limits, name) < value:
            raise InvalidParams(f"$.params.limits.{name}: expected int >= {value}")


async def named_or_new(conversations: Conversations, work: Work, wanted: str, params: Initialize) -> str:
    """Return the id of the conversation a client is bound to, which is made when it wants a new one.

    Raises:
        ConversationNotFound: there is none of that id.
        InvalidParams: a workspace is described for an existing one, or an id is chosen.
        OpMismatch: the chosen id is taken, by a conversation with another workspace.
        Overloaded: a new one, and the server drains.
    """
    if wanted == NEW:
        if params.conversation is None or params.conversation not in conversations:
            work.admit()
        return await conversations.create(params.workspace, params.conversation)
    if wanted not in conversations:
        raise ConversationNotFound(f"no conversation {wanted[:SHOWN_ID]!r}", conversation=wanted[:SHOWN_ID])
    if params.conversation is not None:
        raise InvalidParams("$.params.conversation: an existing conversation has its id already")
    if params.workspace is not None:
        raise InvalidParams("$.params.workspace: an existing conversation has its workspace already")
    return wanted


async def initialized(config: ServerConfig, loaded: LoadedConversation, connection: str) -> Initialized:
    """Return the answer to `initialize`."""
    state = await loaded.state()
    return Initialized(
        protocol_version=PROTOCOL_VERSION,
        server=SERVER,
        limits=config.limits,
        connection_id=connection,
        heartbeat_s=config.heartbeat_seconds,
        conversation=loaded.id,
        epoch=state.epoch,
        head_seq=state.head_seq,
        state=state,
    )
