"""agent-server run: one conversation to its end, its events live."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from pathlib import Path

import msgspec

from agent_sdk import LLM, Agent, Conversation, ScriptedLLM
from agent_sdk.conversation.contract import Conversation as ConversationContract
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, PathDenied, PathNotFound
from agent_sdk.protocol.specs import Model, Step
from agent_server.cli.viewer import open_viewer
from agent_server.cli.workspace import entered
from agent_server.config.options import client_environment

STOP_SECONDS = 15.0


async def main(given: argparse.Namespace) -> int:
    """Run it; 0 only when the agent finished. Stopping this program stops the turn, on a server, too."""
    model = _model(given)
    viewer = open_viewer(json=given.json)
    async with entered(given) as workspace:
        conversation = Conversation(
            Agent(llm=model) if model else None,
            workspace,
            id=given.conversation,
            callbacks=[viewer.event],
            on_delta=viewer.delta,
            max_iterations=given.max_iterations,
        )
        async with conversation:
            await conversation.send_message(given.task)
            try:
                outcome = await viewer.watch(conversation.run())
            except BaseException:
                await _stop(conversation)
                raise
    return 0 if outcome.status == "finished" else 1


async def _stop(conversation: ConversationContract) -> None:
    with suppress(AgentServerError, TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await conversation.interrupt("stopped from the command line")


def _model(given: argparse.Namespace) -> Model | None:
    """The model to use; None: the one that an existing conversation has."""
    if given.script is not None and given.model is not None:
        raise InvalidParams("--script and --model contradict each other; use one of them")
    if given.script is not None:
        return ScriptedLLM(steps=_steps(given.script))
    environment = dict(client_environment().llm)
    if given.model is not None:
        environment["LLM_MODEL"] = given.model
    if not environment.get("LLM_MODEL"):
        if given.conversation is not None:
            return None
        raise InvalidParams(
            "no model is named; use --model or set LLM_MODEL (e.g. openai/gpt-5.5, its key in LLM_API_KEY), "
            "or use --script FILE"
        )
    return LLM.from_env(environment)


def _steps(name: str) -> tuple[Step, ...]:
    try:
        return msgspec.json.decode(Path(name).expanduser().read_bytes(), type=tuple[Step, ...])
    except FileNotFoundError:
        raise PathNotFound(f"{name}: no such script file", path=name) from None
    except OSError as exc:
        raise PathDenied(f"{name}: the script cannot be read: {exc.strerror}", path=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        example = '[{"step": "say", "text": "Done."}]'
        raise InvalidParams(
            f"{name} is no script: {exc}; a script is a JSON list of steps like {example}"
        ) from None
