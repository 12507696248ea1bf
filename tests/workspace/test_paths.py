"""No path leads out of the root, whatever somebody swaps meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    NotARegularFile,
    OutsideWorkspace,
    PathError,
    PathNotFound,
)
from agent_sdk.protocol.results import Transferred
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.paths import Root

ROUNDS = 400

# Swaps a folder and a symlink, each time in one step: `d` is always one of the two.
FLIP = """
import ctypes, os, sys
os.chdir(sys.argv[1])
os.mkdir("d")
os.symlink(sys.argv[2], "e")
exchange, here = 2, -100
renameat2 = ctypes.CDLL(None).renameat2
print("ready", flush=True)
while renameat2(here, b"d", here, b"e", exchange) == 0:
    pass
"""


@pytest.fixture
def flipping(tmp_path):
    """A folder `d` in `root` that is now a folder, now a symlink to `outside`."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    process = subprocess.Popen([sys.executable, "-c", FLIP, str(root), str(outside)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield root, outside
    process.kill()
    process.wait()
    process.stdout.close()


async def tried(work) -> object:
    """What a call gives, or the class of its error."""
    try:
        return await work
    except AgentServerError as exc:
        return type(exc)


async def tries(work, wanted=lambda result: True) -> list[object]:
    """What many calls give, until one of them gave what is wanted: on a busy machine the swaps stand still for long."""
    results = []
    while len(results) < ROUNDS or not any(map(wanted, results)):
        results.append(await tried(work(len(results))))
    return results


async def test_a_folder_that_becomes_a_symlink_at_any_moment_lets_nothing_out(flipping):
    root, outside = flipping
    async with LocalWorkspace(root) as workspace:
        files = workspace.files
        await tries(lambda nth: files.write(f"d/f{nth}", b"x"), lambda each: isinstance(each, Transferred))
        await tries(lambda nth: files.mkdir(f"d/m{nth}/n"), lambda each: each is None)
        read = await tries(lambda _: files.read("d/secret"), lambda each: each is OutsideWorkspace)
        removed = await tries(lambda _: files.remove("d/secret"))
        listed = await tries(lambda _: files.list("d"))
    assert os.listdir(outside) == ["secret"]
    assert b"secret" not in read
    assert None not in removed
    assert not [
        info for each in listed if isinstance(each, list) for info in each if info.path.endswith("secret")
    ]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def resolved(root: Root, path: str, **options) -> str:
    with root.entry(path, **options) as entry:
        return root.shown(entry.names)


@pytest.mark.parametrize(
    ("path", "shown"),
    [("a", "a"), ("./a//b/", "a/b"), ("a/../b", "b"), (".", "."), ("a/./..", "."), ("a/b/../../c", "c")],
)
def test_a_path_is_shown_relative_to_the_root(root, path, shown):
    (root / "a" / "b").mkdir(parents=True)
    assert resolved(Root(str(root)), path) == shown


def test_the_root_may_be_named_by_a_symlink_to_it(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    (root / "f").touch()
    alias = Root(str(tmp_path / "alias"))
    assert alias.path == str(root)
    assert resolved(alias, f"{tmp_path}/alias/f") == resolved(alias, f"{root}/f") == "f"


def test_a_root_below_its_own_alias_is_told_apart(tmp_path):
    (tmp_path / "x" / "x").mkdir(parents=True)
    (tmp_path / "x" / "x" / "f").touch()
    assert resolved(Root(str(tmp_path / "x" / "x")), f"{tmp_path}/x/x/f") == "f"


def test_a_neighbour_with_a_longer_name_is_outside(root, tmp_path):
    (tmp_path / "root-too").mkdir()
    with pytest.raises(OutsideWorkspace):
        resolved(Root(str(root)), f"{tmp_path}/root-too")


def test_magic_links_of_proc_are_only_text(root):
    with open("/etc/passwd") as opened:
        (root / "link").symlink_to(f"/proc/self/fd/{opened.fileno()}")
        (root / "top").symlink_to("/proc/self/root")
        for path in ("link", "top/etc"):
            with pytest.raises(OutsideWorkspace):
                resolved(Root(str(root)), path)


def test_too_many_symlinks_are_refused(root):
    for number in range(50):
        (root / f"l{number}").symlink_to(f"l{number + 1}")
    with pytest.raises(PathError, match="symbolic links"):
        resolved(Root(str(root)), "l0")
    assert resolved(Root(str(root)), "l15") == "l50"


def test_deep_folders_are_fine(root):
    deep = "/".join(["d"] * 200)
    (root / deep).mkdir(parents=True)
    assert resolved(Root(str(root)), deep) == deep


def test_the_root_of_the_machine_is_a_root(tmp_path):
    (tmp_path / "f").touch()
    assert resolved(Root("/"), f"{tmp_path}/f") == str(tmp_path / "f")[1:]


def test_unconfined_paths_go_anywhere(root, tmp_path):
    free = Root(str(root), confined=False)
    (root / "f").touch()
    (tmp_path / "g").touch()
    assert resolved(free, "f") == "f"
    assert resolved(free, "../g") == resolved(free, str(tmp_path / "g")) == str(tmp_path / "g")


def test_no_descriptor_is_left_open(root):
    (root / "a" / "b").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    resolved(Root(str(root)), "a/b/c")
    with pytest.raises(OutsideWorkspace):
        resolved(Root(str(root)), "a/../..")
    assert len(os.listdir("/proc/self/fd")) == before


# --- a working folder below the root ---


@pytest.fixture
async def below(tmp_path):
    """A workspace of `root` that works in `root/work`."""
    (tmp_path / "root/work").mkdir(parents=True)
    async with LocalWorkspace(tmp_path / "root", working_dir="work") as workspace:
        yield workspace


async def test_relative_paths_of_files_and_commands_start_at_the_working_folder(below):
    await below.files.write("in/f", b"x")
    assert (
        await below.execute(f"cat {below.root}/work/in/f; pwd", cwd="in")
    ).stdout == f"x{below.root}/work/in\n"
    assert [info.path for info in await below.files.list(depth=2)] == ["in", "in/f"]


async def test_what_is_beside_the_working_folder_is_shown_by_its_absolute_path(below):
    await below.files.write("../beside/f", b"x")
    shown = [info.path for info in await below.files.list("..", depth=2)]
    assert shown == [".", f"{below.root}/beside", f"{below.root}/beside/f"]
    assert await below.files.read(shown[2]) == b"x"


async def test_a_path_may_lead_up_to_the_root_and_not_out_of_it(below):
    assert (await below.execute("pwd", cwd="..")).stdout == f"{below.root}\n"
    with pytest.raises(OutsideWorkspace):
        await below.files.stat("../../x")


@pytest.mark.parametrize("path", [".", "..", "../work"])
async def test_neither_the_working_folder_nor_what_it_is_in_can_be_removed(below, path):
    with pytest.raises(InvalidParams):
        await below.files.remove(path, recursive=True)
    assert os.path.isdir(below.working_dir)


# --- what only looks like a file ---


@pytest.mark.parametrize(
    "path", ["/proc/self/mem", "/proc/1/environ", "/proc/version", "/sys/kernel/notes", "/dev/zero", "fifo"]
)
async def test_files_of_the_kernel_devices_and_fifos_do_not_travel(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    async with LocalWorkspace("/", working_dir=tmp_path) as workspace:
        with pytest.raises(NotARegularFile):
            await workspace.files.read(path)
        with pytest.raises(NotARegularFile):
            await workspace.download(path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("path", ["/proc/self/comm", "link/self/comm"])
async def test_nothing_is_written_into_the_kernel(tmp_path, path):
    (tmp_path / "link").symlink_to("/proc")
    async with LocalWorkspace("/", working_dir=tmp_path) as workspace:
        with pytest.raises((NotARegularFile, PathNotFound)):
            await workspace.files.write(path, b"x")
    assert Path("/proc/self/comm").read_text() != "x"
