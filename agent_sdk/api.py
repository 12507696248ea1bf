"""Conversation(agent, workspace): here or there, decided in this function and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from agent_sdk.conversation.contract import Conversation as ConversationContract
from agent_sdk.definition import ConversationOptions
from agent_sdk.protocol.errors import InvalidParams

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def _taking(options: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Decorate a function that gets options as one object: whoever calls it passes the options themselves."""

    def decorated(function: Callable[[T], R]) -> Callable[P, R]:
        @wraps(function)
        def made(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(options(*args, **kwargs))

        options.__init__.__qualname__ = function.__qualname__  # by which Python says what is missing
        made.__annotations__ = {
            **options.__init__.__annotations__,
            "return": function.__annotations__["return"],
        }
        made.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        del made.__wrapped__
        return made

    return decorated


@_taking(ConversationOptions)
def Conversation(options: ConversationOptions) -> ConversationContract:
    """Make a conversation; it opens at its first use.

    Args:
        agent: None attaches to an existing remote conversation as it is.
        workspace: a folder of this machine, or any workspace; a remote one must be entered.
        id: of the conversation to attach to; where there is none of this id, an agent makes it, on a server under
            a UUID, like str(uuid.uuid4()). A RemoteWorkspace that has not been used yet becomes the workspace of
            that conversation. None: a new conversation.
        since: of an existing conversation: the callbacks get the events after it, each exactly once; a Cursor
            that a callback stored with its effect goes on where an earlier process stopped. None: from now on.
        callbacks: called exactly once per event, in order.
        on_delta: gets streamed pieces of answers; they may be lost.
        on_reset: called when a remote conversation's history is gone and another follows; without it, every wait
            raises HistoryLost then.
        on_waiting: told by `run` what the turn waits for (a key, an approval, a tool of a client, the server), once
            each; `"raise"`: `run` raises TurnWaits instead.
        persistence_dir: folder of the log of a conversation that runs here; None: it lives in memory.
        max_iterations: model calls per turn.
        confirmation: which tool calls wait for approval; None: none.
        secrets: environment variables for the agent's commands, masked in what tools return.
        agent_runs: `here` keeps loop, log and keys in this process and sends only the workspace's calls.

    Raises:
        InvalidParams: an option is not acceptable, or contradicts another.
    """
    from agent_sdk.remote.workspace import RemoteWorkspace  # noqa: PLC0415  either side costs its imports

    if isinstance(options.workspace, RemoteWorkspace) and options.agent_runs is None:
        from agent_sdk.remote.conversation import RemoteConversation  # noqa: PLC0415

        if options.persistence_dir is not None:
            raise InvalidParams("persistence_dir: a remote conversation's log is kept by its server")
        return RemoteConversation(options, options.workspace)
    from agent_sdk.conversation.local import LocalConversation  # noqa: PLC0415

    if options.agent is None:
        raise InvalidParams("agent: a conversation that runs here needs one")
    return LocalConversation(**vars(options))
