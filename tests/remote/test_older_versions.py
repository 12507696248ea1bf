"""What is newer than the other end matters only where it is used: the rest of a call is what it always was."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

import msgspec
import pytest

from agent_sdk import LocalWorkspace, RemoteWorkspace
from agent_sdk.conversation.log import operation
from agent_sdk.idempotency import asked
from agent_sdk.ids import new_id
from agent_sdk.protocol import specs
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.methods import all_methods
from agent_sdk.protocol.methods.conversation import Configure
from agent_sdk.protocol.methods.method import Method, without_defaults
from agent_sdk.protocol.methods.workspace import Download, Execute, FilesStat, ShellRun, Upload
from agent_sdk.protocol.specs import AgentSpec, ScriptedLLM
from agent_sdk.remote.link import Fixed
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.workspace.service import workspace_handlers
from tests.protocol.examples import example

LACKS = {
    Execute: {"user", "merge", "env", "yield_after_ms", "stdout_since", "stderr_since"},
    ShellRun: {"until", "since", "quiet_ms"},
    Upload: {"unpack", "since"},
    Download: {"pack", "exclude", "since", "offset", "length", "as_is"},
    FilesStat: {"follow"},
}
"""What an older version does not know."""
STRICT = [
    kind
    for kind in (*all_methods().values(), *(each for each in vars(specs).values() if isinstance(each, type)))
    if issubclass(kind, msgspec.Struct) and kind.__struct_config__.forbid_unknown_fields
]


def older(method: type[Method]) -> type[Method]:
    """The method as a version knew it that did not have these fields yet."""
    fields = [
        (field.name, field.type, msgspec.field(default=field.default, default_factory=field.default_factory))
        for field in msgspec.structs.fields(method)
        if field.name not in LACKS[method]
    ]
    return msgspec.defstruct(
        method.__name__,
        fields,
        bases=(Method,),
        namespace={"method": method.method},
        kw_only=True,
        frozen=True,
        forbid_unknown_fields=True,
    )


@pytest.fixture
async def workspace(tmp_path):
    """A workspace here whose other end is older."""
    (tmp_path / "root").mkdir()
    here, there = memory_pipes()
    async with AsyncExitStack() as stack:
        local = await stack.enter_async_context(LocalWorkspace(tmp_path / "root"))
        handlers = workspace_handlers(local)

        async def answer(method, params, call):
            fields = {name: getattr(params, name) for name in params.__struct_fields__}
            return await handlers[method](method(**fields), call)

        known = {older(method): partial(answer, method) for method in LACKS}
        await stack.enter_async_context(Peer(there, {**handlers, **known}, opener=False, strict=True))
        peer = await stack.enter_async_context(Peer(here, opener=True))
        yield RemoteWorkspace.over(Fixed(peer))


async def test_an_older_end_accepts_all_that_needs_nothing_new(workspace, tmp_path):
    assert (await workspace.execute("cat", stdin=b"hi")).stdout == "hi"
    assert (await workspace.shell().run("echo hi")).output.text.strip() == "hi"
    (tmp_path / "f").write_bytes(b"content")
    await workspace.upload(tmp_path / "f", "f")
    await workspace.download("f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == b"content"
    assert (await workspace.files.stat("f")).size == 7


async def test_an_older_end_refuses_what_it_does_not_know_with_a_sentence_that_says_so(workspace):
    with pytest.raises(InvalidParams, match="merge: the other end is older than this client"):
        await workspace.execute("true", merge=True)


@pytest.mark.parametrize("kind", STRICT, ids=lambda kind: kind.__name__)
def test_what_stands_at_its_default_is_left_out(kind):
    needed = {field.name for field in msgspec.structs.fields(kind) if field.required}
    given = kind(
        **{
            field.name: example(field.type)
            for field in msgspec.inspect.type_info(kind).fields
            if field.required
        }
    )
    again = msgspec.json.decode(
        msgspec.json.encode(given), type=kind
    )  # equal, and nothing of it the same object
    tag = {kind.__struct_config__.tag_field} - {None}
    assert set(without_defaults(again)) == needed | tag
    assert msgspec.json.decode(msgspec.json.encode(without_defaults(again)), type=kind) == given


@pytest.mark.parametrize("kind", STRICT, ids=lambda kind: kind.__name__)
def test_what_was_set_is_written(kind):
    given = example(kind)
    written = msgspec.json.encode(without_defaults(given))
    assert msgspec.json.decode(written, type=kind) == given
    assert msgspec.json.decode(written) == msgspec.json.decode(msgspec.json.encode(given))


def test_a_call_is_the_same_for_a_version_that_knows_further_fields():
    class NewerAgent(AgentSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
        brand_new: tuple[str, ...] = ("default",)

    class NewerExecute(Execute, frozen=True, kw_only=True):
        brand_new: dict[str, str] = {}

    command = {"op_id": new_id(), "shell": "true"}
    assert asked(NewerExecute(**command)) == asked(Execute(**command))
    assert asked(NewerExecute(**command, brand_new={"a": "b"})) != asked(Execute(**command))

    def configured(kind: type[AgentSpec], **fields):
        return operation(Configure(op_id=command["op_id"], agent=kind(llm=ScriptedLLM(steps=()), **fields)))

    assert configured(NewerAgent).digest == configured(AgentSpec).digest
    assert configured(NewerAgent, brand_new=("other",)).digest != configured(AgentSpec).digest
