"""Asking a model until it answers: which failures are worth another try, and how long to wait before it.

Providers say with Retry-After when they want to be asked again; otherwise the pause doubles, with a
random part, so that many conversations that failed together do not come back together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from msgspec.structs import replace
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random

from agent_sdk.middleware import Middleware, ModelCall, TurnContext
from agent_sdk.models import Completion, ModelClient, ModelRequest, OnDelta
from agent_sdk.protocol.errors import ModelError
from agent_sdk.protocol.events import ModelFailed
from agent_sdk.protocol.specs import LLM, Model
from agent_sdk.tools import as_utf8

SCRIPTED_RETRIES = 5
FIRST_PAUSE = 0.5
"""Seconds, as those below."""
LONGEST_PAUSE = 60.0
"""Of the pauses chosen here; what a provider asks for may be longer."""

OnFailure = Callable[[ModelError, int, float | None], Awaitable[None]]
"""Awaited with (error, attempt from 1, seconds until the next try or None when there is none)."""


class Retries(Middleware, frozen=True):
    """Asks again after failures that may pass, `LLM.retries` times at most, and writes each down as ModelFailed."""

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        async def write(error: ModelError, attempt: int, retry_in: float | None) -> None:
            await turn.append(
                ModelFailed(
                    run_id=turn.run_id,
                    error=error.kind,
                    message=as_utf8(error.message),
                    attempt=attempt,
                    retry_in=retry_in,
                )
            )

        return replace(request, client=Persistent(request.client, request.llm, write))


class Persistent(ModelClient):
    """Asks another client until it answers: after failures that may pass `llm.retries` times more (5 for a script)."""

    def __init__(
        self,
        client: ModelClient,
        llm: Model,
        on_failure: OnFailure,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Take the client, and what is awaited after every failed try, before the pause."""
        self._client = client
        self._on_failure = on_failure
        scripted = not isinstance(llm, LLM)
        self._first_pause = 0.0 if scripted else FIRST_PAUSE  # of a script nobody has to be spared
        self._retrying = AsyncRetrying(
            sleep=sleep,
            stop=stop_after_attempt(1 + (llm.retries if isinstance(llm, LLM) else SCRIPTED_RETRIES)),
            wait=self._seconds,
            retry=retry_if_exception(lambda exc: isinstance(exc, ModelError) and exc.retryable),
            before_sleep=self._failed,
            reraise=True,
        )

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        """Ask; a new try streams its pieces from the start. Cancelling ends the try or the pause at once.

        Raises:
            ModelError: of the last try; `on_failure` has heard of it.
        """
        try:
            return await self._retrying(self._client.complete, request, on_delta=on_delta)
        except ModelError as exc:
            await self._on_failure(exc, self._retrying.statistics["attempt_number"], None)
            raise

    async def close(self) -> None:
        await self._client.close()

    async def _failed(self, state: RetryCallState) -> None:
        await self._on_failure(_failure(state), state.attempt_number, state.upcoming_sleep)

    def _seconds(self, state: RetryCallState) -> float:
        asked = _failure(state).retry_after_ms
        if asked is not None:
            return asked / 1000
        first = self._first_pause
        doubling = wait_exponential(multiplier=first, max=LONGEST_PAUSE) + wait_random(0, first)
        return min(doubling(state), LONGEST_PAUSE)


def _failure(state: RetryCallState) -> ModelError:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, ModelError)
    return failure
