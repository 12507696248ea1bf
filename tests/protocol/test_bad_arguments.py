"""Whatever a public name or a verb is given that cannot fit is refused by a sentence that names it, with no effect.

The table is not written by hand: the signatures say what each argument may be, and so what it may not.
"""

import inspect
import math
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pytest
from msgspec import Meta, Struct

import agent_sdk
import agent_sdk.conversation.contract
import agent_sdk.sync
import agent_sdk.workspace.contract
import workspaces
from agent_sdk import (
    LLM,
    Agent,
    AgentServer,
    ConfirmationPolicy,
    Conversation,
    Cursor,
    LocalWorkspace,
    RemoteWorkspace,
    Sandbox,
    Section,
    Stop,
    testing,
    tool,
)
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.protocol import specs
from agent_sdk.protocol.checks import ForSystem, checked
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.remote.files import RemoteFiles, RemoteGit
from agent_sdk.remote.process import RemoteProcess, RemoteShell
from agent_sdk.testing import ScriptedLLM, say
from agent_sdk.tools import FunctionTool
from workspaces import APIRemoteWorkspace, DockerWorkspace

HALF = "\ud800"
NUL = "a\0b"
UNTOLD = ("SSLContext", "OnLog", "OnProgress")
"""Types that are imported for type checkers only: the class itself says what is wrong."""
AGENT = Agent(llm=ScriptedLLM([say("hi")]))


class NoPieces(AsyncIterator[bytes]):
    """A file without content."""

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


def ignore(*told: object) -> None:
    pass


REAL: dict[str, Any] = {
    "agent": AGENT,
    "answer": "approve",
    "api_key": "k",
    "calls": (testing.Call("think"),),
    "chunks": NoPieces(),
    "cols": 80,
    "command": "touch effect",
    "data": b"effect",
    "epoch": "e",
    "error": "model_unavailable",
    "function": ignore,
    "id": "one",
    "image": "debian",
    "llm": AGENT.llm,
    "local": ".",
    "model": "openai/m",
    "name": "INT",
    "path": "effect",
    "policy": ConfirmationPolicy(),
    "port": 8000,
    "process_id": "p",
    "reason": "because",
    "remote": "effect",
    "request_id": "r",
    "rows": 24,
    "runtime_api_key": "k",
    "runtime_api_url": "http://127.0.0.1:1",
    "secrets": {},
    "seq": 0,
    "server_image": "image",
    "source": "effect",
    "steps": (say("hi"),),
    "target": "effect",
    "text": "Hello",
    "tool": "think",
    "url": "http://127.0.0.1:1",
}
"""What is right for each argument that has no default."""

MADE: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        LLM,
        Agent,
        AgentServer,
        ConfirmationPolicy,
        Conversation,
        Cursor,
        LocalWorkspace,
        RemoteWorkspace,
        Sandbox,
        Section,
        Stop,
        DockerWorkspace,
        APIRemoteWorkspace,
        FunctionTool,
        testing.ScriptedLLM,
        testing.Say,
        testing.Call,
        testing.Calls,
        testing.Fail,
        testing.Hang,
    )
} | {"specs.ScriptedLLM": specs.ScriptedLLM}
TOLD = {
    "Accepted",
    "Delta",
    "Event",
    "ExecResult",
    "Exit",
    "FileInfo",
    "Outcome",
    "Snapshot",
    "Stats",
    "Transferred",
}
"""What people are given, and do not make."""
PASSED_ON = {"Completion", "Middleware", "ModelCall", "ToolResult", "TurnContext"}
"""What code of a user has in hand in a turn: what it makes of that is looked at where it comes back."""
DESCRIBED = {"Process", "Workspace", "__version__", "errors", "events"}

CONTRACTS = {
    agent_sdk.workspace.contract.Workspace: "workspace",
    agent_sdk.workspace.contract.Files: "files",
    agent_sdk.workspace.contract.Git: "git",
    agent_sdk.workspace.contract.Process: "process",
    agent_sdk.workspace.contract.Shell: "shell",
    agent_sdk.conversation.contract.Conversation: "conversation",
}


def hints_of(function: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """What each argument may be, and whether it has a default."""
    if isinstance(function, type) and issubclass(function, Struct):
        fields = msgspec.structs.fields(function)
        return {field.name: (field.type, not field.required) for field in fields}
    called = function.__init__ if isinstance(function, type) else function
    # What takes options as one object is told what they may be by their class.
    described = inspect.getclosurevars(called).nonlocals.get("options", inspect.unwrap(called))
    hints = typing.get_type_hints(described, localns={name: Any for name in UNTOLD}, include_extras=True)
    return {
        name: (hints[name], parameter.default is not parameter.empty)
        for name, parameter in inspect.signature(called).parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def alternatives(hint: Any, marks: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """The types of a union, each with what limits it."""
    if get_origin(hint) is Annotated:
        kind, *own = get_args(hint)
        return alternatives(kind, (*marks, *own))
    if get_origin(hint) in (Union, UnionType):
        return [each for part in get_args(hint) for each in alternatives(part, marks)]
    return [(hint, marks)]


def wrong_for(hint: Any) -> list[Any]:
    """Values that a type does not allow."""
    kinds = alternatives(hint)
    plain = {get_origin(kind) or kind for kind, _ in kinds}
    if plain & {Any, object}:
        return []
    wrong: list[Any] = [object(), 3 + 4j]
    if NoneType not in plain:
        wrong.append(None)
    if not plain & {int, float, bool}:
        wrong.append(5)
    if not plain & {bool}:
        wrong.append(True)
    if not plain & {list, tuple, Sequence, Iterable, Callable} - {Callable}:
        wrong.append([object()])
    if not plain & {dict, Mapping}:
        wrong.append({"a": "b"})
    if not plain & {bytes}:
        wrong.append(b"bytes")
    if not plain & {str, Literal, PathLike}:
        wrong.append("text")
    for kind, marks in kinds:
        limits = [mark for mark in marks if isinstance(mark, Meta)]
        if kind in (int, float) and any(limit.ge is not None or limit.gt is not None for limit in limits):
            wrong += [-1, -(2**70)]
        if kind in (int, float):
            wrong += ["5", math.nan, math.inf, -math.inf]
        if kind is str:
            wrong.append(HALF)
            if ForSystem in marks or any(limit.pattern for limit in limits):
                wrong.append(NUL)
        if get_origin(kind) in (list, tuple, Sequence, Iterable):
            item = get_args(kind)[0]
            wrong += [*([] if str in plain else ["text"]), *([each] for each in wrong_for(item))]
        if get_origin(kind) in (dict, Mapping):
            key, value = get_args(kind)
            wrong += [{each: "x"} for each in wrong_for(key) if hashable(each)]
            wrong += [{"A": each} for each in wrong_for(value)]
        if get_origin(kind) is Literal:
            wrong.append("neither")
    return wrong


def hashable(value: Any) -> bool:
    return getattr(type(value), "__hash__", None) is not None


def given(hints: dict[str, tuple[Any, bool]]) -> dict[str, Any]:
    """What is right for the arguments without a default."""
    return {name: REAL[name] for name, (_, optional) in hints.items() if not optional}


VERBS = [
    pytest.param(what, verb, hints, id=f"{what}.{verb}")
    for contract, what in CONTRACTS.items()
    for verb, function in vars(contract).items()
    if inspect.isfunction(function) and not verb.startswith("_")
    if (hints := hints_of(function))
]


def test_every_public_name_is_looked_at():
    made = {make.__name__ for make in MADE.values()} | {"tool"}
    assert set(agent_sdk.__all__) <= made | TOLD | PASSED_ON | DESCRIBED
    assert set(workspaces.__all__) <= made


def wrong_among(hints: dict[str, tuple[Any, bool]]) -> Iterator[tuple[str, Any]]:
    """Each argument with each value that it cannot have."""
    for name, (hint, _) in hints.items():
        for wrong in wrong_for(hint):
            yield name, wrong


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_cannot_fit_is_refused_where_something_is_made(make):
    hints = hints_of(make)
    for name, wrong in wrong_among(hints):
        with pytest.raises(InvalidParams) as refused:
            pytest.fail(f"{name}={wrong!r} made {make(**{**given(hints), name: wrong})!r}")
        assert name in str(refused.value), wrong


@pytest.fixture
async def subjects(tmp_path, place):
    """What has the verbs, here and there. There, nobody is reached: what is wrong is refused before."""
    if place == "here":
        async with LocalWorkspace(tmp_path) as workspace:
            process = await workspace.start("sleep 100")
            conversation = Conversation(AGENT, workspace)
            yield {
                "workspace": workspace,
                "files": workspace.files,
                "git": workspace.git,
                "process": process,
                "shell": workspace.shell(),
                "conversation": conversation,
            }
            await conversation.close()
    else:
        workspace = RemoteWorkspace("http://127.0.0.1:1")
        link: Any = None
        yield {
            "workspace": workspace,
            "files": RemoteFiles(link),
            "git": RemoteGit(link),
            "process": RemoteProcess(link, "p"),
            "shell": RemoteShell(link, "default"),
            "conversation": Conversation(AGENT, workspace),
        }


@pytest.mark.parametrize("place", ["here", "there"])
@pytest.mark.parametrize(("what", "verb", "hints"), VERBS)
async def test_what_cannot_fit_is_refused_by_every_verb(subjects, tmp_path, what, verb, hints):
    function = getattr(subjects[what], verb)
    for name, wrong in wrong_among(hints):
        with pytest.raises(InvalidParams) as refused:
            used = function(**{**given(hints), name: wrong})
            if inspect.isawaitable(used):
                await used
            pytest.fail(f"{name}={wrong!r} passed")
        assert name in str(refused.value), wrong
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("make", [Conversation, agent_sdk.sync.Conversation, LocalConversation])
def test_an_option_that_does_not_exist_is_refused_by_what_was_called(make):
    with pytest.raises(
        TypeError, match=rf"^{make.__qualname__}(.__init__)?\(\) got an unexpected .* 'titel'"
    ):
        make(AGENT, titel="mine")


async def test_a_tuple_is_as_good_as_a_list():
    @checked
    def takes(words: list[str]) -> None:
        pass

    takes(("a", "b"))
    with pytest.raises(InvalidParams, match="words: expected a list of text, got "):
        takes(("a", 5))


@pytest.mark.parametrize("wrong", [5, "text", None])
def test_what_is_no_function_is_no_tool(wrong):
    with pytest.raises(InvalidParams, match="function: expected a function"):
        (tool()(wrong) if wrong is None else tool(wrong))


def test_a_tool_that_does_not_exist_is_refused_where_the_agent_is_made():
    with pytest.raises(
        InvalidParams, match="tools: there is no tool 'browser'; the built-in ones are terminal"
    ):
        Agent(llm=AGENT.llm, tools=["browser"])
