"""An answer being put together: pieces, limits, cost."""

import pytest

from agent_sdk.agent.llm.openai import Parser
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.protocol.errors import ModelAnswerTooLarge
from agent_sdk.protocol.specs import LLM


def answer(**prices: float | None) -> Parser:
    llm = LLM(model="openai/m", **prices)
    parser = Parser(llm, address_of(llm))
    parser.done = True
    return parser


def test_pieces_are_passed_on_as_they_come():
    heard: list[tuple[str, str]] = []
    llm = LLM(model="openai/m")
    growing = Parser(llm, address_of(llm), lambda text, thinking: heard.append((text, thinking)))
    growing.think("Hm.")
    growing.say("Y")
    growing.say("")
    growing.say("es.")
    assert heard == [("", "Hm."), ("Y", ""), ("es.", "")]
    assert (growing.text, growing.thinking) == ("Yes.", "Hm.")


def test_too_many_tool_calls_are_refused():
    growing = answer()
    for _ in range(64):
        growing.open_call()
    with pytest.raises(ModelAnswerTooLarge, match="64"):
        growing.open_call()


@pytest.mark.parametrize("piece", ["x" * 1024, "ü" * 512], ids=["ASCII", "two bytes each"])
def test_arguments_that_are_too_long_are_refused(piece: str):
    growing = answer()
    draft = growing.open_call()
    for _ in range(1024):
        growing.add_arguments(draft, piece)
    assert len(growing.completion().tool_calls[0].arguments.encode()) == 1 << 20
    with pytest.raises(ModelAnswerTooLarge, match="1048576"):
        growing.add_arguments(draft, "x")


def test_white_space_around_the_name_of_a_tool_is_none_of_it():
    growing = answer()
    growing.open_call().tool = " terminal\n"
    assert growing.completion().tool_calls[0].tool == "terminal"


def test_the_name_of_a_tool_is_cut():
    growing = answer()
    growing.open_call().tool = "t" * 10_000
    assert len(growing.completion().tool_calls[0].tool) == 256


@pytest.mark.parametrize(
    "prices, cost",
    [
        ((2.0, 10.0, 0.5), (200 * 2 + 800 * 0.5 + 100 * 10) / 1e6),
        ((2.0, 10.0, None), (1000 * 2 + 100 * 10) / 1e6),
        ((None, 10.0, None), None),
        ((2.0, None, None), None),
    ],
)
def test_the_cost_comes_from_the_prices_and_is_never_nonsense(
    prices: tuple[float | None, float | None, float | None], cost: float | None
):
    growing = answer(input_cost=prices[0], output_cost=prices[1], cached_input_cost=prices[2])
    growing.count(given=1000, said=100, cached=800)
    assert growing.usage.cost == (cost if cost is None else pytest.approx(cost))


def test_writing_into_the_cache_costs_a_quarter_more():
    growing = answer(input_cost=4.0, output_cost=0.0)
    growing.count(given=1000, said=0, written=400)
    assert growing.usage.cost == pytest.approx((600 * 4 + 400 * 5) / 1e6)


@pytest.mark.parametrize(
    "given, said, cached, counted",
    [(-1, -1, -1, (0, 0, 0)), (10, 5, 99, (10, 5, 10)), (10**30, 0, 0, (2**53, 0, 0))],
)
def test_counts_stay_in_a_sane_range(given: int, said: int, cached: int, counted: tuple[int, int, int]):
    growing = answer()
    growing.count(given=given, said=said, cached=cached)
    assert (growing.usage.input_tokens, growing.usage.output_tokens, growing.usage.cached_tokens) == counted
