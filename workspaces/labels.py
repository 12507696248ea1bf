"""The labels by which containers, networks and volumes of ours are known.

Foreign ones have none of them, and are never touched.
"""

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
CREATE = "io.agentserver.create"
"""Names one call of `Engine.create`, so that what it made is found when its answer is lost."""
