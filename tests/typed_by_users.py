"""Programs of users as a type checker sees them; `make types` checks it, nothing runs it."""

from collections.abc import Callable
from typing import assert_type

from agent_sdk import Agent, events, tool
from agent_sdk.testing import ScriptedLLM, say


@tool
async def lookup_price(symbol: str, currency: str = "EUR") -> str:
    """Latest price of a stock."""
    return f"1 {currency}"


@tool(name="count", read_only=True)
def count_words(text: str) -> int:
    """How many words there are."""
    return len(text.split())


async def use() -> None:
    assert_type(await lookup_price("X", currency="USD"), str)
    assert_type(count_words("a b"), int)
    await lookup_price(1)  # type: ignore[arg-type]
    count_words(txt="a")  # type: ignore[call-arg]
    plain: Callable[[str], int] = count_words
    plain("a")
    Agent(llm=ScriptedLLM([say("Done.")]), tools=["terminal", lookup_price, count_words])


def on_event(event: events.Event) -> None:
    described: str = event.to_json()
    print(described)
