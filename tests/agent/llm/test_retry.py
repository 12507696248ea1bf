"""Asking again: what is worth it, how long the pauses are, who hears of it."""

import asyncio

import pytest

from agent_sdk.agent.llm.client import open_model
from agent_sdk.agent.middleware.retries import Persistent
from agent_sdk.models import Completion, ModelRequest, OnDelta, UserTurn
from agent_sdk.protocol.errors import (
    ModelAnswerBroken,
    ModelAnswerTooLarge,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelUnauthorized,
    ModelUnavailable,
)
from agent_sdk.protocol.specs import LLM, Fail, Say, ScriptedLLM

REQUEST = ModelRequest(system="", turns=(UserTurn("go"),))


class Flaky:
    """A model that fails with these errors, one after the other, and then answers."""

    def __init__(self, *failures: ModelError) -> None:
        self.failures = list(failures)
        self.asked = 0

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)
        return Completion(text="at last")

    async def close(self) -> None: ...


class Witness:
    """Hears of failures and does the waiting, without waiting."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, float | None]] = []
        self.slept: list[float] = []

    async def on_failure(self, failure: ModelError, attempt: int, retry_in: float | None) -> None:
        self.heard.append((failure.kind, attempt, retry_in))

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def ask(self, client: Flaky, retries: int = 5) -> Completion:
        llm = LLM(model="openai/x", retries=retries)
        return await Persistent(client, llm, self.on_failure, self.sleep).complete(REQUEST)


@pytest.mark.parametrize("failure", [ModelUnavailable, ModelRateLimited, ModelAnswerBroken])
async def test_a_passing_failure_is_tried_again(failure: type[ModelError]):
    witness = Witness()
    assert (await witness.ask(Flaky(failure("busy")))).text == "at last"
    assert witness.heard == [(failure.kind, 1, witness.slept[0])]


@pytest.mark.parametrize("failure", [ModelRefused, ModelUnauthorized, ModelAnswerTooLarge])
async def test_what_repeating_cannot_help_is_not_repeated(failure: type[ModelError]):
    witness, client = Witness(), Flaky(failure("no"))
    with pytest.raises(failure):
        await witness.ask(client)
    assert (client.asked, witness.heard, witness.slept) == (1, [(failure.kind, 1, None)], [])


async def test_the_last_failure_is_raised_after_everybody_heard_of_it():
    witness, client = Witness(), Flaky(*(ModelUnavailable(f"try {at}") for at in range(9)))
    with pytest.raises(ModelUnavailable, match="try 2"):
        await witness.ask(client, retries=2)
    assert [(attempt, pause is None) for _, attempt, pause in witness.heard] == [
        (1, False),
        (2, False),
        (3, True),
    ]


async def test_without_retries_a_model_is_asked_once():
    client = Flaky(ModelUnavailable("down"))
    with pytest.raises(ModelUnavailable):
        await Witness().ask(client, retries=0)
    assert client.asked == 1


async def test_a_refusal_after_a_passing_failure_ends_the_tries():
    witness, client = Witness(), Flaky(ModelUnavailable("busy"), ModelRefused("no"))
    with pytest.raises(ModelRefused):
        await witness.ask(client)
    assert [(kind, pause is None) for kind, _, pause in witness.heard] == [
        ("model_unavailable", False),
        ("model_refused", True),
    ]


async def test_the_pause_is_what_the_provider_asked_for():
    witness = Witness()
    await witness.ask(Flaky(ModelRateLimited("slow down", retry_after_ms=93_500)))
    assert witness.slept == [93.5]


async def test_pauses_double_up_to_a_minute():
    witness = Witness()
    await witness.ask(Flaky(*(ModelUnavailable("busy") for _ in range(12))), retries=20)
    assert all(0.5 <= pause <= 60 for pause in witness.slept)
    assert witness.slept == sorted(witness.slept)
    assert witness.slept[-1] == 60


async def test_many_that_failed_together_come_back_apart():
    witness = Witness()
    for _ in range(20):
        await witness.ask(Flaky(ModelUnavailable("busy")))
    assert len(set(witness.slept)) > 10


async def test_cancelling_ends_the_pause_and_is_no_failure():
    witness, pausing = Witness(), asyncio.Event()

    async def pause(_: float) -> None:
        pausing.set()
        await asyncio.Event().wait()

    asking = asyncio.ensure_future(
        Persistent(
            Flaky(ModelUnavailable("busy")), LLM(model="openai/x"), witness.on_failure, pause
        ).complete(REQUEST)
    )
    async with asyncio.timeout(10):
        await pausing.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert len(witness.heard) == 1


async def test_a_bug_is_not_taken_for_a_failing_model():
    class Buggy(Flaky):
        async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
            raise ZeroDivisionError

    witness = Witness()
    with pytest.raises(ZeroDivisionError):
        await witness.ask(Buggy())
    assert witness.heard == []


async def test_a_script_is_tried_again_without_a_pause():
    witness = Witness()
    script = ScriptedLLM(steps=(Fail("model_unavailable"), Fail("model_rate_limited"), Say("Here.")))
    answer = await Persistent(open_model(script), script, witness.on_failure).complete(REQUEST)
    assert answer.text == "Here."
    assert witness.heard == [("model_unavailable", 1, 0.0), ("model_rate_limited", 2, 0.0)]
