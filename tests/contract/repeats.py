"""What every workspace promises about calls that are named by an op_id: they come again, and are carried out once."""

import asyncio
import uuid

import pytest

from agent_sdk.protocol.errors import InvalidParams, OpMismatch


def op() -> str:
    """Users choose it as they like: it is a UUID."""
    return str(uuid.uuid4())


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
