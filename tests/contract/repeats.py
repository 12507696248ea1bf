"""What every workspace promises about calls that are named by an op_id: they come again, and are carried out once."""

import asyncio
import enum
import uuid
from collections import UserDict
from pathlib import PurePosixPath
from types import MappingProxyType

import pytest

from agent_sdk import ExecResult
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, OpMismatch
from agent_sdk.workspace.contract import Output


def op() -> str:
    """Users choose it as they like: it is a UUID."""
    return str(uuid.uuid4())


class Word(enum.StrEnum):
    """Text, and more than that."""

    PRINT = "printf %s:%s $A $B"


ARGUMENTS = [
    (("printf $A",), {"env": MappingProxyType({"A": "x"})}),
    (("printf $A",), {"env": UserDict(A="x")}),
    ((Word.PRINT,), {"env": {"B": Word.PRINT, "A": "x"}}),
    ((("printf", "x"),), {}),
    ((["printf", "\udcff"],), {}),
    ((["printf", "\ud800"],), {}),
    (("printf \udcff",), {"env": {"A": "\udcff"}}),
    (("printf x",), {"env": {"A": "\ud800"}}),
    (("printf x",), {"env": {"\ud800": "a"}}),
    (("pwd",), {"cwd": "\udcff"}),
    (("pwd",), {"cwd": "\ud800"}),
    (("pwd",), {"cwd": PurePosixPath(".")}),
    ((PurePosixPath("pwd"),), {}),
    (("pwd",), {"user": "\ud800"}),
    (("pwd",), {"timeout": float("nan")}),
    (("pwd",), {"timeout": 10**400}),
    (("pwd",), {"timeout": 10**5000}),
    (("pwd",), {"env": {"A": 1}}),
    (("pwd",), {"env": {1: "a", "b": "c"}}),
    (("pwd",), {"env": [("A", "x")]}),
    ((b"pwd",), {}),
    ((None,), {}),
    ((["printf", 1],), {}),
]


async def outcome(verb, *arguments, **options):
    """What comes of a command: what it said and its exit code, or which error in which words."""
    try:
        result = await verb(*arguments, **options)
    except AgentServerError as exc:
        return type(exc), exc.message
    return result.out, result.exit_code, result.reason


class RepeatContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.place
    async def test_a_command_that_is_repeated_under_its_op_id_runs_once(self, workspace):
        op_id, command = op(), "echo run >> runs; echo said; exit 3"
        first, second = await asyncio.gather(
            workspace.execute(command, op_id=op_id), workspace.execute(command, op_id=op_id)
        )
        third = await workspace.execute(command, op_id=op_id)
        assert {(result.stdout, result.exit_code) for result in (first, second, third)} == {("said\n", 3)}
        assert await workspace.files.read("runs") == b"run\n"

    async def test_a_process_that_is_started_again_under_its_op_id_is_the_same(self, workspace):
        op_id, command = op(), "echo run >> runs"
        first = await workspace.start(command, op_id=op_id)
        await first.wait()
        assert (await workspace.start(command, op_id=op_id)).id == first.id
        assert await workspace.files.read("runs") == b"run\n"

    @pytest.mark.place
    async def test_an_upload_that_is_repeated_under_its_op_id_writes_once(self, workspace, tmp_path):
        op_id, source = op(), tmp_path / "source"
        source.write_bytes(b"mine")
        first = await workspace.upload(source, "up", op_id=op_id)
        await workspace.files.write("up", b"theirs")
        assert await workspace.upload(source, "up", op_id=op_id) == first
        assert await workspace.files.read("up") == b"theirs"

    async def test_an_op_id_belongs_to_one_call(self, workspace, tmp_path):
        op_id = op()
        await workspace.execute("echo one", op_id=op_id)
        with pytest.raises(OpMismatch):
            await workspace.execute("echo two", op_id=op_id)
        with pytest.raises(OpMismatch):
            await workspace.start("echo one", op_id=op_id)

    @pytest.mark.parametrize(
        "op_id", ["", "mine", "A" * 36, f"{uuid.UUID(int=1)}\n", f"{{{uuid.UUID(int=1)}}}", 5]
    )
    async def test_an_op_id_that_is_no_uuid_is_refused(self, workspace, tmp_path, op_id):
        (tmp_path / "source").write_bytes(b"x")
        for verb, arguments in (
            (workspace.execute, ("echo ran > ran",)),
            (workspace.start, ("echo ran > ran",)),
            (workspace.upload, (tmp_path / "source", "ran")),
        ):
            with pytest.raises(InvalidParams, match="op_id: expected a UUID"):
                await verb(*arguments, op_id=op_id)
        assert await workspace.files.list() == []

    async def test_an_op_id_changes_nothing_of_what_is_taken(self, workspace):
        for arguments, options in ARGUMENTS:
            without = await outcome(workspace.execute, *arguments, **options)
            named = await outcome(workspace.execute, *arguments, **options, op_id=op())
            assert named == without, [*map(ascii, arguments), *options]

    async def test_an_op_id_changes_nothing_of_how_a_process_starts(self, workspace):
        async def started(*arguments, **options):
            process = await workspace.start(*arguments, **options)
            exit = await process.wait()
            out = b"".join([data async for data in process.output()])
            return ExecResult(status=exit.status, out=Output(head=out), exit_code=exit.exit_code)

        for arguments, options in ARGUMENTS:
            without = await outcome(started, *arguments, **options)
            named = await outcome(started, *arguments, **options, op_id=op())
            assert named == without, [*map(ascii, arguments), *options]

    @pytest.mark.parametrize("name", ["up\udcff", "up\ud800", PurePosixPath("up"), b"up", "", None])
    async def test_an_op_id_changes_nothing_of_where_an_upload_goes(self, workspace, tmp_path, name):
        (tmp_path / "source").write_bytes(b"mine")

        async def uploaded(**more):
            done = await workspace.upload(tmp_path / "source", name, **more)
            return ExecResult(status="exited", reason=repr(done))

        assert await outcome(uploaded, op_id=op()) == await outcome(uploaded)

    @pytest.mark.parametrize("name", ["s\udcff", "s\ud800", b"source", "", "nothing\0", None])
    async def test_an_op_id_changes_nothing_of_where_an_upload_comes_from(self, workspace, tmp_path, name):
        source = str(tmp_path / name) if isinstance(name, str) else name
        if name == "s\udcff":
            (tmp_path / name).write_bytes(b"mine")

        async def uploaded(**more):
            done = await workspace.upload(source, "up", **more)
            return ExecResult(status="exited", reason=repr(done))

        assert await outcome(uploaded, op_id=op()) == await outcome(uploaded)

    async def test_an_environment_is_the_same_whatever_it_is_kept_in(self, workspace):
        op_id = op()
        await workspace.execute("printf $A", env={"A": "x"}, op_id=op_id)
        again = await workspace.execute("printf $A", env=MappingProxyType({"A": "x"}), op_id=op_id)
        assert again.stdout == "x"
        with pytest.raises(OpMismatch):
            await workspace.execute("printf $A", env=MappingProxyType({"A": "y"}), op_id=op_id)
