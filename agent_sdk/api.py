"""Conversation(agent, workspace): here or there, decided in this function and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agent_sdk.conversation.contract import Callback, Cursor, OnDelta, OnReset, OnWaiting
from agent_sdk.conversation.contract import Conversation as ConversationContract
from agent_sdk.definition import Agent
from agent_sdk.protocol.checks import Iterations, Name, Secrets, Seq, Tags, Title, checked
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.specs import ConfirmationPolicy
from agent_sdk.workspace.contract import Workspace
from agent_sdk.workspace.disk import LocalPath


@checked
def Conversation(
    agent: Agent | None,
    workspace: Workspace | LocalPath = ".",
    *,
    id: Name | None = None,
    since: Cursor | Seq | None = None,
    callbacks: Sequence[Callback] = (),
    on_delta: OnDelta | None = None,
    on_reset: OnReset | None = None,
    on_waiting: OnWaiting | None = None,
    persistence_dir: LocalPath | None = None,
    max_iterations: Iterations = 500,
    confirmation: ConfirmationPolicy | None = None,
    secrets: Secrets | None = None,
    title: Title | None = None,
    tags: Tags | None = None,
    agent_runs: Literal["here"] | None = None,
) -> ConversationContract:
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

    options: dict[str, Any] = {
        "id": id,
        "callbacks": callbacks,
        "on_delta": on_delta,
        "on_waiting": on_waiting,
        "max_iterations": max_iterations,
        "confirmation": confirmation,
        "secrets": secrets,
        "title": title,
        "tags": tags,
    }
    if isinstance(workspace, RemoteWorkspace) and agent_runs is None:
        from agent_sdk.remote.conversation import RemoteConversation  # noqa: PLC0415

        if persistence_dir is not None:
            raise InvalidParams("persistence_dir: a remote conversation's log is kept by its server")
        return RemoteConversation(agent, workspace, since=since, on_reset=on_reset, **options)
    from agent_sdk.conversation.local import LocalConversation  # noqa: PLC0415

    if agent is None:
        raise InvalidParams("agent: a conversation that runs here needs one")
    place = Cursor("", since) if isinstance(since, int) else since
    return LocalConversation(agent, workspace, persistence_dir=persistence_dir, since=place, **options)
