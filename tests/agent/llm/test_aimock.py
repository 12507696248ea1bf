"""Both wire formats against an independent stand-in: what a provider does, done by somebody else's code."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from agent_sdk.agent.llm.client import ProviderClient, open_model
from agent_sdk.agent.middleware.retries import Persistent
from agent_sdk.models import (
    AssistantTurn,
    ModelClient,
    ModelRequest,
    ToolTurn,
    UserTurn,
)
from agent_sdk.protocol.errors import (
    ModelAnswerBroken,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelUnauthorized,
    ModelUnavailable,
)
from agent_sdk.protocol.specs import LLM, ToolSpec
from tests.agent.llm.provider import KEY

TERMINAL = ToolSpec(
    name="terminal",
    description="Run a command.",
    parameters={"type": "object", "properties": {"command": {"type": "string"}}},
)


def asking(text: str) -> ModelRequest:
    return ModelRequest(system="You help.", turns=[UserTurn(text)], tools=(TERMINAL,))


@pytest.fixture(params=["openai", "anthropic"])
def llm(request: pytest.FixtureRequest, aimock: str) -> LLM:
    models = {"openai": "openai/gpt-5.5", "anthropic": "anthropic/claude-sonnet-5"}
    return LLM(
        model=models[request.param],
        base_url=f"{aimock}/v1",
        api_key=KEY,
        input_cost=3.0,
        output_cost=15.0,
        headers={"X-Test-Id": request.node.name},
    )


@pytest.fixture
async def model(llm: LLM) -> AsyncIterator[ModelClient]:
    client = open_model(llm)
    yield client
    await client.close()


async def test_text_comes_in_pieces_and_whole(model: ModelClient):
    pieces: list[str] = []
    answer = await model.complete(asking("greet me"), on_delta=lambda text, _: pieces.append(text))
    assert answer.text == "Grüße aus Köln 🎉, and welcome to the rest of a longer text."
    assert "".join(pieces) == answer.text
    assert len(pieces) > 5
    assert answer.finish_reason == "stop"


async def test_an_answer_can_be_asked_for_in_one_piece(llm: LLM):
    client = ProviderClient(LLM(model=llm.model, base_url=llm.base_url, api_key=KEY, stream=False))
    answer = await client.complete(asking("greet me"))
    await client.close()
    assert answer.text.startswith("Grüße aus Köln 🎉")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (11, 7)


async def test_usage_is_counted_and_priced(model: ModelClient):
    usage = (await model.complete(asking("greet me"))).usage
    assert (usage.input_tokens, usage.output_tokens) == (11, 7)
    assert usage.cost == pytest.approx((11 * 3 + 7 * 15) / 1e6)


async def test_parallel_tool_calls_stay_apart(model: ModelClient):
    answer = await model.complete(asking("call two tools"))
    assert answer.text == "I will look."
    assert answer.finish_reason == "tool_calls"
    assert [(use.call_id, use.tool, use.arguments) for use in answer.tool_calls] == [
        ("call_a", "terminal", '{"command":"ls -la"}'),
        ("call_b", "file_editor", '{"command":"view","path":"a.txt"}'),
    ]


async def test_results_of_tools_go_back_and_the_model_goes_on(model: ModelClient):
    first = await model.complete(asking("call two tools"))
    turns = [
        UserTurn("call two tools"),
        AssistantTurn(text=first.text, tool_calls=first.tool_calls, provider=first.provider),
        ToolTurn(call_id="call_a", text="first result", is_error=True),
        ToolTurn(call_id="call_b", text="second result"),
    ]
    answer = await model.complete(ModelRequest(system="You help.", turns=turns, tools=(TERMINAL,)))
    assert answer.text == "Both came back."


async def test_malformed_arguments_are_kept_and_do_not_poison_the_next_request(model: ModelClient, llm: LLM):
    answer = await model.complete(asking("write nonsense"))
    if llm.model.startswith("openai"):  # the stand-in mends them in the other format
        assert answer.tool_calls[0].arguments == '{"command": "ls'
    turns = [
        UserTurn("write nonsense"),
        AssistantTurn(tool_calls=answer.tool_calls),
        ToolTurn(call_id="call_m", text="not valid JSON", is_error=True),
        UserTurn("greet me"),
    ]
    assert (await model.complete(ModelRequest(system="", turns=turns))).text.startswith("Grüße")


async def test_thinking_is_told_apart_from_text(model: ModelClient):
    thoughts: list[str] = []
    answer = await model.complete(asking("think first"), on_delta=lambda _, thought: thoughts.append(thought))
    assert (answer.text, answer.thinking) == ("Done.", "Let me think about it.")
    assert "".join(thoughts) == answer.thinking


async def failure(model: ModelClient, text: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await model.complete(asking(text))
    return caught.value


async def test_too_many_requests_say_when_to_come_back(model: ModelClient):
    error = await failure(model, "be busy")
    assert type(error) is ModelRateLimited
    assert error.retry_after_ms == 17_000
    assert error.details["status"] == 429
    assert "Rate limit reached" in error.message


@pytest.mark.parametrize("text, status", [("be down", 500), ("be overloaded", 529)])
async def test_a_failing_provider_is_unavailable(model: ModelClient, text: str, status: int):
    error = await failure(model, text)
    assert type(error) is ModelUnavailable
    assert error.details["status"] == status


async def test_a_refused_request_says_why(model: ModelClient):
    error = await failure(model, "refuse me")
    assert type(error) is ModelRefused
    assert "max_tokens is too large" in error.message


async def test_a_wrong_key_is_unauthorized_and_not_shown(llm: LLM):
    client = open_model(LLM(model=llm.model, base_url=llm.base_url, api_key="sk-wrong-key-0123456789"))
    error = await failure(client, "greet me")
    await client.close()
    assert type(error) is ModelUnauthorized
    assert "0123456789" not in repr(error) + str(error.details)


async def test_an_answer_cut_in_mid_stream_is_broken(model: ModelClient):
    pieces: list[str] = []
    with pytest.raises(ModelAnswerBroken, match="in the middle"):
        await model.complete(asking("stop in the middle"), on_delta=lambda text, _: pieces.append(text))
    assert "".join(pieces).startswith("One two")


async def test_a_garbled_answer_is_broken(model: ModelClient):
    assert type(await failure(model, "garble it")) is ModelAnswerBroken


async def test_a_request_nobody_expected_is_refused_or_unavailable(model: ModelClient):
    assert not isinstance(await failure(model, "say something unexpected"), ModelAnswerBroken)


async def test_after_two_failures_the_third_try_succeeds(model: ModelClient, llm: LLM):
    pauses: list[float] = []
    heard: list[tuple[str, int]] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def on_failure(error: ModelError, attempt: int, _: float | None) -> None:
        heard.append((error.kind, attempt))

    answer = await Persistent(model, llm, on_failure, sleep).complete(asking("recover"))
    assert answer.text == "Recovered."
    assert heard == [("model_rate_limited", 1), ("model_unavailable", 2)]
    assert pauses[0] == 2.0


async def test_the_stand_in_saw_well_formed_requests(model: ModelClient, aimock: str):
    await model.complete(asking("greet me"))
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
        session.get(f"{aimock}/__aimock/journal") as response,
    ):
        last = (await response.json())[-1]
    assert last["response"]["status"] == 200
    assert [tool["function"]["name"] for tool in last["body"]["tools"]] == ["terminal"]
    assert [message["role"] for message in last["body"]["messages"]] == ["system", "user"]
