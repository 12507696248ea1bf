"""Commands that print secrets in floods: nothing of them is kept or shown, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import random
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from agent_sdk import Conversation, RemoteWorkspace
from agent_sdk.protocol.events import Delta, ToolReturned, encode
from agent_sdk.testing import call, say
from tests.contract.vocabulary import PATIENCE, acting, past
from tests.docker.fresh import fresh

CHANCE = random.Random(9)
NAMES = [f"S{nth}" for nth in range(90)]
SECRETS = {name: CHANCE.randbytes(60).hex() for name in NAMES} | {
    "ONE_LETTER": "a" * 8000,
    "AGAIN": "abc" * 2000,
    "LINES": "\n".join(CHANCE.randbytes(20).hex() for _ in range(100)),
}
"""Nearly as many as are taken, of every kind that is dear to look for."""
SHORTEST = 16
"""Characters of a secret that are a leak; fewer may be left where a text was cut."""
LONGEST_SECONDS = 200
"""Until all of it is over on a machine that has much else to do."""

_EACH = "for name in ${!S*}; do value=${!name}; "
_FLOOD = "| head -c 2000000"
FLOODS = {
    "print_them_all": f"while env; do :; done {_FLOOD}",
    "print_them_in_one_line": f"for n in $(seq 200); do printf %s ${' $'.join(NAMES)}; done",
    "print_them_in_base64": f'{_EACH} printf %s "$value" | base64 -w0; echo; done',
    "print_them_in_hex": f'{_EACH} printf %s "$value" | od -An -v -tx1 | tr -d " \\n"; echo; done',
    "print_them_in_pieces": f'{_EACH} printf %s "${{value:0:50}}"; sleep 0.01; printf "%s\\n" "${{value:50}}"; done',
    "nearly_print_them": f'while {_EACH} printf "%s\\n" "${{value//[0-9]/-}}"; done; do :; done {_FLOOD}',
    "print_one_letter": f"tr '\\0' a </dev/zero {_FLOOD}",
    "print_one_letter_nearly_in_full": f'while printf %s "${{ONE_LETTER:1}}b"; do :; done {_FLOOD}',
    "print_what_repeats_itself": f"while printf %s abc; do :; done {_FLOOD}",
}
"""What a command does with the secrets in its environment, by the name of the attack."""


def pieces(text: str) -> set[str]:
    return {text[at : at + SHORTEST] for at in range(len(text) - SHORTEST + 1)}


def leaked(text: str) -> set[str]:
    """The pieces of secrets in a text, as they are or as they are printed."""
    values = [SECRETS[name].encode() for name in NAMES]
    forms = (form for value in values for form in (value.decode(), b64encode(value).decode(), value.hex()))
    return set().union(*map(pieces, forms)) & pieces(text)


async def flooded(place: Callable[[], RemoteWorkspace], data: Path) -> dict[str, set[str]]:
    """Have an agent run the commands while another conversation goes on; which attacks got how much past the server."""
    shown: list[str] = []

    def on_delta(delta: Delta) -> None:
        shown.append(delta.text + delta.thinking)

    agent = acting(
        *(call("terminal", command=command, timeout=PATIENCE) for command in FLOODS.values()), say("done")
    )
    async with (
        fresh(place()) as workspace,
        fresh(place()) as other,
        Conversation(agent, workspace, secrets=SECRETS, on_delta=on_delta) as conversation,
    ):
        await conversation.send_message("go")
        turn, answers = asyncio.create_task(conversation.run(timeout=LONGEST_SECONDS)), 0
        while not turn.done():
            async with asyncio.timeout(PATIENCE):
                assert (await other.execute("echo served")).stdout == "served\n"
            answers += 1
        assert (turn.result().status, answers > len(FLOODS)) == ("finished", True)
        events = await past(conversation)
    returned = [event for event in events if isinstance(event, ToolReturned)]
    assert {event.data["status"] for event in returned} == {"done"}
    found = {name: leaked(encode(event).decode()) for name, event in zip(FLOODS, returned, strict=True)}
    kept = b"".join(path.read_bytes() for path in data.glob("log.db*")).decode("latin-1")
    found["in the log"], found["in deltas"] = leaked(kept), leaked("".join(shown))
    return {name: pieces for name, pieces in found.items() if pieces}
