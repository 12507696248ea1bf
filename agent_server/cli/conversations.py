"""Conversations: one, its events shown as they come, or those of a server.

run:    begin one, or go on with one, until its turn has ended
events: from a seq to its end, or for as long as it goes on
attach: its history, then what happens; a typed line is a message to the agent
ls:     those of a server
rm:     some of them, removed
prune:  those that nobody has used for long, removed
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from agent_sdk import LLM, Agent, Conversation, Event, ScriptedLLM
from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.conversation.contract import Conversation as ConversationContract
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConversationNotFound,
    InvalidParams,
    PathDenied,
    PathNotFound,
    StateConflict,
    TimedOut,
)
from agent_sdk.protocol.events import RequestOpened, RequestResolved, TurnEnded, UserMessage
from agent_sdk.protocol.results import BUSY, Snapshot
from agent_sdk.protocol.specs import Model, Step
from agent_server.cli.client import entered, find_server
from agent_server.cli.terminal import STDERR, STDIN, Inlet, Style, one_line, open_terminal, print_json
from agent_server.cli.transcript import Viewer, open_viewer, tell_waits
from agent_server.config.options import client_environment

STOP_SECONDS = 15.0
HELP = "a line is a message; /approve, /reject [reason], /pause, /run, /interrupt; Ctrl-C leaves, the agent goes on"
HEAD = ("CONVERSATION", "STATE", "UPDATED", "EVENTS", "MODEL", "TITLE")
PAGE = 500
_STYLES: dict[str, Style] = {"running": "green", "awaiting": "yellow", "failed": "red"}


async def attach(given: argparse.Namespace) -> int:
    """Show it until Ctrl-C, or until the lines of a piped input are answered."""
    left = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, left.set)
    async with _of_a_server(given) as conversation:
        typed = os.isatty(STDIN)
        if typed:
            await open_terminal(STDERR).line(f"[{HELP}]", "dim")
        await tell_waits(conversation)
        visit = Visit(conversation, open_viewer(json=False), typed=typed)
        await _first(visit.watch(given.since), visit.listen(), left.wait())
    return 0


class Visit:
    """One person at a conversation."""

    def __init__(self, conversation: ConversationContract, viewer: Viewer, *, typed: bool) -> None:
        """Describe it; `typed`: the lines come from a terminal, which shows them itself and never falls silent."""
        self._conversation = conversation
        self._viewer = viewer
        self._typed = typed
        self._echoes: list[str] = []
        self._answering = ""
        self._ended: set[str] = set()
        self._over = asyncio.Event()
        self._requests: list[str] = []

    async def watch(self, since: int) -> None:
        """Show events for ever."""
        await self._viewer.watch(self._show(since))

    async def listen(self) -> None:
        """Send lines until there are no more, and, for a piped input, until the last one is answered."""
        inlet, rest = Inlet(), b""
        while piece := await inlet.read():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                await self._say(line.decode(errors="replace").strip())
        await self._say(rest.decode(errors="replace").strip())
        if self._typed:
            return
        while not self._answering or self._answering not in self._ended:
            self._over.clear()
            await self._over.wait()

    async def _show(self, since: int) -> None:
        async for event in self._conversation.events(since, follow=True):
            if isinstance(event, UserMessage) and event.text in self._echoes:
                self._echoes.remove(event.text)
            else:
                await self._viewer.event(event)
            self._note(event)

    def _note(self, event: Event) -> None:
        match event:
            case TurnEnded(run_id=run):
                self._ended.add(run)
                self._over.set()
            case RequestOpened(request_id=request, request="approval"):
                self._requests.append(request)
            case RequestResolved(request_id=request) if request in self._requests:
                self._requests.remove(request)
            case _:
                pass

    async def _say(self, line: str) -> None:
        if not line:
            return
        try:
            if line.startswith("/"):
                await self._order(line)
            else:
                if self._typed:
                    self._echoes.append(line)
                self._answering = (await self._conversation.send_message(line)).run_id
        except AgentServerError as exc:
            if not self._typed:
                raise
            await self._complain(str(exc))

    async def _order(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        orders: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "/pause": self._conversation.pause,
            "/run": self._go_on,
            "/interrupt": lambda: self._conversation.interrupt(rest),
        }
        if word in ("/approve", "/reject"):
            if not self._requests:
                await self._complain("nothing waits for an approval")
                return
            answer: Literal["approve", "reject"] = "approve" if word == "/approve" else "reject"
            await self._conversation.respond(self._requests[0], answer, reason=rest)
        elif word in orders:
            await orders[word]()
        else:
            await self._complain(f"there is no {word}; {HELP}")

    async def _go_on(self) -> None:
        with suppress(TimedOut):
            await self._conversation.run(timeout=0.001)

    async def _complain(self, text: str) -> None:
        await open_terminal(STDERR).line(f"agent-server: {one_line(text)}")


async def _first(*work: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them is over, raise what it raised, and cancel the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel_and_wait(*tasks)


async def run(given: argparse.Namespace) -> int:
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
            sent = False
            try:
                await conversation.send_message(given.task)
                sent = True
                outcome = await viewer.watch(conversation.run())
            except BaseException as exc:
                if sent or isinstance(
                    exc, asyncio.CancelledError
                ):  # a turn may begin before that is answered
                    await _stop(conversation)
                raise
    return 0 if outcome.status == "finished" else 1


async def _stop(conversation: ConversationContract) -> None:
    with suppress(AgentServerError, TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await conversation.interrupt("stopped from the command line")


def _model(given: argparse.Namespace) -> Model | None:
    """Return the model to use; None: the one that an existing conversation has."""
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


async def show(given: argparse.Namespace) -> int:
    """Show the events of a conversation."""
    viewer = open_viewer(json=given.json)
    async with _of_a_server(given) as conversation:

        async def each() -> None:
            async for event in conversation.events(given.since, given.follow):
                await viewer.event(event)

        await tell_waits(conversation)
        await viewer.watch(each())
    return 0


@asynccontextmanager
async def _of_a_server(given: argparse.Namespace) -> AsyncIterator[ConversationContract]:
    async with (
        find_server(given).workspace(conversation=given.id) as workspace,
        Conversation(None, workspace, id=given.id) as conversation,
    ):
        yield conversation


async def list_them(given: argparse.Namespace) -> int:
    """Show them, newest first: a table, or one JSON object per line."""
    if len(dict(given.tag)) < len(given.tag):
        raise InvalidParams("--tag: a NAME is given twice, and no conversation has two values of it")
    found = await find_server(given).administration().conversations(dict(given.tag), given.state, given.limit)
    if given.json:
        await print_json(found)
    elif found:
        rows = [(_cells(snapshot), _STYLES.get(snapshot.state, "")) for snapshot in found]
        await open_terminal().table(HEAD, rows)
    else:
        await open_terminal().line("no conversations yet")
    return 0


def _cells(snapshot: Snapshot) -> tuple[str, ...]:
    updated = datetime.fromtimestamp(snapshot.updated_at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    title = one_line(snapshot.title or "")
    return (
        one_line(snapshot.id),
        _state(snapshot),
        updated,
        str(snapshot.head_seq),
        one_line(snapshot.model or "-"),
        title if len(title) <= 60 else f"{title[:59]}…",
    )


def _state(snapshot: Snapshot) -> str:
    """Return the state, and in a word each what the agent lacks."""
    waits = ", ".join(dict.fromkeys(wait.what for wait in snapshot.waits))
    return f"{snapshot.state} ({waits})" if waits else snapshot.state


async def remove(given: argparse.Namespace) -> int:
    """Remove some with their logs and workspaces.

    One that does not exist, or is busy, is told, and the others are removed all the same.
    """
    server, code = find_server(given).administration(), 0
    for id in given.ids:
        try:
            await server.delete(id, unless_busy=not given.force)
        except ConversationNotFound:
            sys.stderr.write(f"agent-server: no conversation {id!r}; agent-server ls shows those there are\n")
            code = 1
        except StateConflict as exc:
            state = exc.details.get("state", "busy")
            sys.stderr.write(
                f"agent-server: conversation {id} is {state}; rm --force removes it all the same\n"
            )
            code = 1
        else:
            await open_terminal().line(f"removed {id}")
    return code


async def prune(given: argparse.Namespace) -> int:
    """Remove those that are old and idle enough, and in which nothing goes on; says how many."""
    if given.older_than is None and given.idle is None:
        raise InvalidParams("say which: --older-than 30d, --idle 7d, or both")
    now, removed, before = time.time(), 0, None
    server = find_server(given).administration()
    while page := await server.conversations(limit=PAGE, before=before):
        before = page[-1].id
        for each in page:
            old = now - each.created_at >= (given.older_than or 0)
            idle = now - each.updated_at >= (given.idle or 0)
            if old and idle and each.state not in BUSY:
                try:
                    await server.delete(each.id, unless_busy=True)
                except (ConversationNotFound, StateConflict):  # somebody was faster
                    continue
                removed += 1
    await open_terminal().line(f"removed {removed} conversations")
    return 0
