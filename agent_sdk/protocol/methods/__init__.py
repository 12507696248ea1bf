"""Every method of the protocol: a class is the method, its fields are the params, R is the result.

Client and server, docs and golden files are all made from these classes, so they cannot drift.
Params refuse unknown fields; results tolerate them. Times in params are whole milliseconds, in
results seconds. Bytes never travel in JSON: a field `channel` (also `stdout`, `stderr`) names a byte
stream the caller opened for them, 0 means none. On a connection without byte streams (plain HTTP)
answers that have bytes carry them as `text`, UTF-8 with wrong bytes replaced.

Calls of class Effect change something: `op_id` is their identity. The same op_id with the same
params attaches to the running call or gets its stored result; with other params it is refused.

method:       what every method is
connection:   initialize, ping, cancel; the notices
workspace:    commands, processes, shells, files, git
conversation: messages, turns, events, settings; tools of the client
"""

from __future__ import annotations

from typing import Any

from agent_sdk.protocol.methods import connection, conversation, workspace
from agent_sdk.protocol.methods.method import Method, Notice

GROUPS: dict[str, tuple[type[Method[Any]], ...]] = {
    "connection": connection.CONNECTION,
    "workspace": workspace.WORKSPACE,
    "sandbox": workspace.SANDBOX,
    "box": workspace.BOX,
    "conversation": conversation.CONVERSATION,
    "client": conversation.CLIENT,
}
NOTICES: tuple[type[Notice], ...] = connection.NOTICES + workspace.NOTICES


def all_methods() -> dict[str, type[Method[Any]]]:
    """Return the class of each method by its name."""
    return {method.method: method for members in GROUPS.values() for method in members}
