"""Asking a model until it answers: which failures are worth another try, and how long to wait before it.

Providers say with Retry-After when they want to be asked again; otherwise the pause doubles, with a
random part, so that many conversations that failed together do not come back together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from msgspec import Struct
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

OnFailure = Callable[[ModelError, int, float | None], Awaitable[None]]
"""Awaited with (error, attempt from 1, seconds until the next try or None when there is none)."""


class Backoff(Struct, frozen=True, kw_only=True):
    """How long to wait between tries, in seconds, and who does the waiting."""

    first: float = 0.5
    longest: float = 60.0
    """Of the pauses chosen here; what a provider asks for may be longer."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


AT_ONCE = Backoff(first=0.0, longest=0.0)
"""For scripted models: nobody has to be spared."""


class Retries(Middleware, frozen=True):
    """Asks again after failures that may pass, `LLM.retries` times at most, and writes each down as ModelFailed."""

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        return replace(request, client=_Persistent(request.client, request.llm, turn))


class _Persistent(ModelClient):
    """Asks another client until it answers."""

    def __init__(self, client: ModelClient, llm: Model, turn: TurnContext) -> None:
        self._client = client
        self._llm = llm
        self._turn = turn

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        return await complete_with_retries(
            self._client, request, self._llm, on_delta=on_delta, on_failure=self._failed
        )

    async def close(self) -> None:
        await self._client.close()

    async def _failed(self, error: ModelError, attempt: int, retry_in: float | None) -> None:
        await self._turn.append(
            ModelFailed(
                run_id=self._turn.run_id,
                error=error.kind,
                message=as_utf8(error.message),
                attempt=attempt,
                retry_in=retry_in,
            )
        )


async def complete_with_retries(
    client: ModelClient,
    request: ModelRequest,
    llm: Model,
    *,
    on_delta: OnDelta | None = None,
    on_failure: OnFailure,
    backoff: Backoff | None = None,
) -> Completion:
    """Ask, and ask again after retryable failures, at most `llm.retries` times more (5 for a script).

    `on_failure` is awaited after every failed try, before the pause. A new try streams its pieces
    from the start. Cancelling ends the try or the pause at once.

    Raises:
        ModelError: of the last try; `on_failure` has heard of it.
    """
    pause = backoff or (Backoff() if isinstance(llm, LLM) else AT_ONCE)

    async def tell(state: RetryCallState) -> None:
        await on_failure(_failure(state), state.attempt_number, state.upcoming_sleep)

    retrying = AsyncRetrying(
        sleep=pause.sleep,
        stop=stop_after_attempt(1 + (llm.retries if isinstance(llm, LLM) else SCRIPTED_RETRIES)),
        wait=lambda state: _seconds(state, pause),
        retry=retry_if_exception(lambda exc: isinstance(exc, ModelError) and exc.retryable),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return await retrying(client.complete, request, on_delta=on_delta)
    except ModelError as exc:
        await on_failure(exc, retrying.statistics["attempt_number"], None)
        raise


def _failure(state: RetryCallState) -> ModelError:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, ModelError)
    return failure


def _seconds(state: RetryCallState, pause: Backoff) -> float:
    asked = _failure(state).retry_after_ms
    if asked is not None:
        return asked / 1000
    doubling = wait_exponential(multiplier=pause.first, max=pause.longest) + wait_random(0, pause.first)
    return min(doubling(state), pause.longest)
