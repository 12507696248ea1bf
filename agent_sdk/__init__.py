"""Write an agent once; run it here, in a container, or on somebody else's machines.

api:          Conversation(agent, workspace), here or there
definition:   Agent and LLM
tools:        @tool and the contract of a tool
middleware:   the contract of a middleware
models:       the contract of a model
cancellation: callbacks of users, and work that must come to its end
sync:         the same names, blocking
portal:       from blocking code into the event loop, and back
testing:      a model without a model
protocol:     what is true without a network
rpc:          the protocol, moving
idempotency:  calls that change something, once per op_id
log:          the event log
agent:        thinking: loop, models, tools
conversation: the contract of a Conversation, and conversations here
workspace:    the contract of a Workspace, and workspaces here
remote:       there
box:          a workspace behind a Unix socket, and what confines it
outbound:     HTTP to others: proxies, certificates, why it does not work
ids:          identities
version:      the version

Names are imported at their first use, so that `import agent_sdk` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agent_sdk.version import __version__

if TYPE_CHECKING:
    from agent_sdk.api import Conversation
    from agent_sdk.conversation.contract import Accepted, Cursor, Outcome, Snapshot, Stats
    from agent_sdk.definition import LLM, Agent
    from agent_sdk.middleware import Middleware, ModelCall, Section, Stop, TurnContext
    from agent_sdk.models import Completion
    from agent_sdk.protocol import errors, events
    from agent_sdk.protocol.events import Delta, Event
    from agent_sdk.protocol.specs import ConfirmationPolicy, Sandbox, ScriptedLLM
    from agent_sdk.remote.server import AgentServer
    from agent_sdk.remote.workspace import RemoteWorkspace
    from agent_sdk.tools import ToolResult, tool
    from agent_sdk.workspace.contract import ExecResult, Exit, FileInfo, Process, Transferred, Workspace
    from agent_sdk.workspace.local import LocalWorkspace

__all__ = [
    "LLM",
    "Accepted",
    "Agent",
    "AgentServer",
    "Completion",
    "ConfirmationPolicy",
    "Conversation",
    "Cursor",
    "Delta",
    "Event",
    "ExecResult",
    "Exit",
    "FileInfo",
    "LocalWorkspace",
    "Middleware",
    "ModelCall",
    "Outcome",
    "Process",
    "RemoteWorkspace",
    "Sandbox",
    "ScriptedLLM",
    "Section",
    "Snapshot",
    "Stats",
    "Stop",
    "ToolResult",
    "Transferred",
    "TurnContext",
    "Workspace",
    "__version__",
    "errors",
    "events",
    "tool",
]

_HOME = {
    "Conversation": "api",
    "Accepted": "conversation.contract",
    "Cursor": "conversation.contract",
    "Outcome": "conversation.contract",
    "Snapshot": "conversation.contract",
    "Stats": "conversation.contract",
    "Agent": "definition",
    "LLM": "definition",
    "LocalWorkspace": "workspace.local",
    "Middleware": "middleware",
    "ModelCall": "middleware",
    "Section": "middleware",
    "Stop": "middleware",
    "TurnContext": "middleware",
    "Completion": "models",
    "Delta": "protocol.events",
    "Event": "protocol.events",
    "ConfirmationPolicy": "protocol.specs",
    "Sandbox": "protocol.specs",
    "ScriptedLLM": "protocol.specs",
    "AgentServer": "remote.server",
    "RemoteWorkspace": "remote.workspace",
    "ToolResult": "tools",
    "tool": "tools",
    "ExecResult": "workspace.contract",
    "Exit": "workspace.contract",
    "FileInfo": "workspace.contract",
    "Process": "workspace.contract",
    "Transferred": "workspace.contract",
    "Workspace": "workspace.contract",
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
