"""The labels by which machines, and what they store, are known as ours.

Foreign ones have none of them, and are never touched.
"""

from collections.abc import Mapping

OURS = "io.agentserver."
INSTANCE = "io.agentserver.instance"
"""Id of whoever owns it: the data folder of a server, a DockerWorkspace, a Runtime API."""
ROLE = "io.agentserver.role"
BOX = "box"
SERVER = "server"
PORT = "io.agentserver.port"
"""Where the server in it listens."""
CONVERSATION = "io.agentserver.conversation"
GENERATION = "io.agentserver.generation"
"""Counts the containers of one conversation."""
EXPIRES = "io.agentserver.expires"
"""Seconds since the Unix epoch; after it anybody's sweep may remove it when it does not run."""
OWNER = "io.agentserver.owner"
"""Of clients: boot id, process id and its start in ticks, to see whether the owner still lives."""
NAME = "io.agentserver.name"
"""The container's own name. An image that was made of one of ours hands all of these labels on; a container of it has
another name, so it is nobody's of us."""
NOT_GIVEN = {EXPIRES: "", OWNER: ""}
"""What a container that is made without these gets: its image may have them, too, and it would be removed by them."""
CREATE = "io.agentserver.create"
"""Names one call of `Engine.create`, so that what it made is found when its answer is lost."""


def has(labels: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    """Return whether these labels are among them, with any value where that is None."""
    return all(name in labels and value in (None, labels[name]) for name, value in wanted.items())
