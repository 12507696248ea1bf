"""Which middleware an agent has: those of every agent, and its own, by name where it comes over the wire."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent_sdk.agent.middleware.approval import Approval
from agent_sdk.agent.middleware.chain import Chain
from agent_sdk.agent.middleware.iteration_limit import IterationLimit
from agent_sdk.agent.middleware.prompt import Instructions, Prompt
from agent_sdk.agent.middleware.retries import Retries
from agent_sdk.agent.middleware.tool_output import ToolOutput
from agent_sdk.middleware import Middleware
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.specs import MiddlewareSpec

ENTRY_POINTS = "agent_server.middleware"
"""The group in which installed packages name their middleware: kind = module:Class."""


def chain_of(own: Sequence[Middleware], *, instructions: str) -> Chain:
    """Return what the loop calls, in this order.

    | middleware | why there |
    | --- | --- |
    | IterationLimit | before anything is done for a request that is not sent |
    | ToolOutput | around all others: whatever they return is cut |
    | Approval | sees the answer last, as the others have left it |
    | Prompt | what never changes comes first |
    | those of the agent | in the order in which it names them |
    | Instructions | last in the prompt |
    | Retries | next to the model, whoever that is by then |
    """
    before = (IterationLimit(), ToolOutput(), Approval(), Prompt())
    return Chain((*before, *own, Instructions(text=instructions), Retries()))


def made_of(spec: MiddlewareSpec) -> Middleware:
    """Return the middleware that a spec describes.

    Raises:
        InvalidParams: nobody has installed it here, or its options are not acceptable.
    """
    from importlib.metadata import entry_points  # noqa: PLC0415  costs much, and hardly any agent names one

    for entry in entry_points(group=ENTRY_POINTS, name=spec.kind):
        kind = entry.load()
        try:
            made: Middleware = msgspec.convert(spec.options, kind)
        except msgspec.ValidationError as exc:
            raise InvalidParams(f"middleware: {spec.kind}: {exc}", field="middleware") from None
        return made
    raise InvalidParams(
        f"middleware: there is no {spec.kind[:64]!r} where the agent runs; install a package there that names it as an "
        f"entry point in the group {ENTRY_POINTS}",
        field="middleware",
    )
