"""An archive that comes is believed only as far as it was checked."""

import io
import os
import tarfile
from collections.abc import AsyncIterator

import pytest

from agent_sdk.protocol.errors import (
    AgentServerError,
    ChangedDuringRead,
    InvalidParams,
    NotADirectory,
    NotARegularFile,
    OutsideWorkspace,
    TransferBroken,
)
from agent_sdk.workspace.folders import packed, unpacked


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info.tobuf(tarfile.PAX_FORMAT)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


END = bytes(1024)
HOSTILE = {
    "a name that goes up": (entry("../stray") + END, OutsideWorkspace),
    "a name that goes down and up": (entry("a/../../stray") + END, OutsideWorkspace),
    "an absolute name": (entry("/tmp/stray") + END, OutsideWorkspace),
    "no name": (entry(".") + END, OutsideWorkspace),
    "a symlink out": (entry("link", tarfile.SYMTYPE, "../stray") + END, OutsideWorkspace),
    "a symlink out by way of another": (
        entry("d", tarfile.DIRTYPE)
        + entry("d/up", tarfile.SYMTYPE, "..")
        + entry("link", tarfile.SYMTYPE, "d/up/../stray")
        + END,
        OutsideWorkspace,
    ),
    "an absolute symlink": (entry("link", tarfile.SYMTYPE, "/etc/passwd") + END, OutsideWorkspace),
    "a file behind a symlink": (
        entry("d", tarfile.DIRTYPE) + entry("link", tarfile.SYMTYPE, "d") + entry("link/f") + END,
        NotADirectory,
    ),
    "a hard link": (entry("f", tarfile.LNKTYPE, "/etc/passwd") + END, NotARegularFile),
    "a device": (entry("null", tarfile.CHRTYPE) + END, NotARegularFile),
    "a FIFO": (entry("pipe", tarfile.FIFOTYPE) + END, NotARegularFile),
    "a name of a terabyte": (entry("x", b"x", size=1 << 40) + END, TransferBroken),
    "a file that is not there": (entry("f", size=1 << 40) + END, TransferBroken),
    "noise": (os.urandom(2048), TransferBroken),
    "nothing": (b"", TransferBroken),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_an_archive_cannot_leave_its_folder(tmp_path, name):
    data, error = HOSTILE[name]
    with pytest.raises(error) as refused:
        await unpacked(tmp_path / "a" / "folder", pieces(data))
    assert "\n" not in str(refused.value)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} <= {
        *("a", "a/folder", "a/folder/d", "a/folder/link", "a/folder/d/up")
    }


async def test_of_folders_that_were_made_for_an_archive_nothing_is_left_when_it_does_not_come(tmp_path):
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "kept", tmp_path / "kept" / "c"):
        with pytest.raises(TransferBroken):
            await unpacked(folder, pieces(os.urandom(2048)))
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


async def test_what_tar_has_made_is_unpacked(tmp_path):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as archive:
        (tmp_path / ("n" * 150)).write_text("long")
        archive.add(tmp_path / ("n" * 150), "d/" + "n" * 150)
    with pytest.raises(NotADirectory):  # it has no entry for the folder, and there is none
        (tmp_path / "taken").touch()
        await unpacked(tmp_path / "taken", pieces(made.getvalue()))
    await unpacked(tmp_path / "out", pieces(made.getvalue()))
    assert (tmp_path / "out" / "d" / ("n" * 150)).read_text() == "long"


async def test_a_file_that_changes_while_it_is_packed_is_not_passed_off_as_whole(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    with pytest.raises(ChangedDuringRead):
        async for _ in packed(tmp_path, ()):
            (tmp_path / "a").write_bytes(b"other")


@pytest.mark.parametrize("folder", ["", "a\0b"])
async def test_an_impossible_path_is_refused(folder):
    with pytest.raises(InvalidParams):
        await unpacked(folder, pieces(END))
    with pytest.raises(AgentServerError):
        await anext(packed(folder, ()))
