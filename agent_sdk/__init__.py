"""Write an agent once; run it here, in a container, or on somebody else's machines.

api:          Conversation(agent, workspace), here or there
definition:   Agent and LLM
tools:        @tool and the contract of a tool
workspace:    the contract of a Workspace
conversation: the contract of a Conversation
callbacks:    calling what users gave us
sync:         the same names, blocking
portal:       from blocking code into the event loop, and back
testing:      a model without a model
protocol:     what is true without a network
rpc:          the protocol, moving
agent:        thinking: loop, models, tools
local:        here
remote:       there
outbound:     HTTP to others: proxies, certificates, why it does not work
disk:         files of this machine as streams
folders:      whole folders as streams
digest:       the SHA-256 of files that move
serve:        a workspace behind a Peer
box:          a workspace behind a Unix socket
box_service:  what serves its connections
seccomp:      a filter of system calls for a box
capabilities: what the box of a task keeps of root
profile:      what is in force for a box
limits:       what in a box ran into a limit
cgroup:       the limits of a control group, and how often they were run into
ids:          identities
version:      the version

Names are imported at their first use, so that `import agent_sdk` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agent_sdk.version import __version__

if TYPE_CHECKING:
    from agent_sdk.api import Conversation
    from agent_sdk.conversation import Accepted, Cursor, Outcome, Snapshot, Stats
    from agent_sdk.definition import LLM, Agent
    from agent_sdk.local.workspace import LocalWorkspace
    from agent_sdk.protocol import errors, events
    from agent_sdk.protocol.events import Delta, Event
    from agent_sdk.protocol.specs import ConfirmationPolicy, Sandbox, ScriptedLLM
    from agent_sdk.remote.server import AgentServer
    from agent_sdk.remote.workspace import RemoteWorkspace
    from agent_sdk.tools import tool
    from agent_sdk.workspace import ExecResult, Exit, FileInfo, Process, Transferred, Workspace

__all__ = [
    "LLM",
    "Accepted",
    "Agent",
    "AgentServer",
    "ConfirmationPolicy",
    "Conversation",
    "Cursor",
    "Delta",
    "Event",
    "ExecResult",
    "Exit",
    "FileInfo",
    "LocalWorkspace",
    "Outcome",
    "Process",
    "RemoteWorkspace",
    "Sandbox",
    "ScriptedLLM",
    "Snapshot",
    "Stats",
    "Transferred",
    "Workspace",
    "__version__",
    "errors",
    "events",
    "tool",
]

_HOME = {
    "Conversation": "api",
    "Accepted": "conversation",
    "Cursor": "conversation",
    "Outcome": "conversation",
    "Snapshot": "conversation",
    "Stats": "conversation",
    "Agent": "definition",
    "LLM": "definition",
    "LocalWorkspace": "local.workspace",
    "Delta": "protocol.events",
    "Event": "protocol.events",
    "ConfirmationPolicy": "protocol.specs",
    "Sandbox": "protocol.specs",
    "ScriptedLLM": "protocol.specs",
    "AgentServer": "remote.server",
    "RemoteWorkspace": "remote.workspace",
    "tool": "tools",
    "ExecResult": "workspace",
    "Exit": "workspace",
    "FileInfo": "workspace",
    "Process": "workspace",
    "Transferred": "workspace",
    "Workspace": "workspace",
    "errors": "protocol.errors",
    "events": "protocol.events",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOME[name]}")
    value = getattr(home, name, home)  # `errors` and `events` are the modules themselves
    globals()[name] = value
    return value
