"""How many model calls a turn may make: the conversation's `max_iterations`."""

from __future__ import annotations

from agent_sdk.middleware import Middleware, ModelCall, Stop, TurnContext


class IterationLimit(Middleware, frozen=True):
    """Ends a turn that has made them all."""

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        limit = turn.max_model_calls
        if turn.model_calls >= limit:
            raise Stop(f"the turn has made {limit} model calls, which is its limit")
        return request
