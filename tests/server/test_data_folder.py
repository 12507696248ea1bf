import os
import re
import stat
import subprocess
import sys

import pytest

from agent_server.config.sources import StartRefused
from agent_server.data_folder import locked


def test_the_folder_is_made_for_its_owner_alone(tmp_path):
    with locked(tmp_path / "a" / "data") as folder:
        assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700


def test_a_second_server_is_told_who_has_the_folder(tmp_path):
    with locked(tmp_path), pytest.raises(StartRefused) as refused, locked(tmp_path):
        pass
    assert refused.value.exit_code == 75
    assert re.search(rf"running server \(pid {os.getpid()}, started \d{{4}}-", str(refused.value))


def test_the_next_server_gets_the_folder(tmp_path):
    with locked(tmp_path):
        pass
    with locked(tmp_path) as folder:
        assert folder.workspace("c1") == tmp_path / "workspaces" / "c1"


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "data").write_text("")
    with (
        pytest.raises(StartRefused, match="cannot be written: .*; choose another with --data") as refused,
        locked(tmp_path / "data"),
    ):
        pass
    assert refused.value.exit_code == 73


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_folder_that_cannot_be_made_is_one_sentence():
    from pathlib import Path  # noqa: PLC0415

    with pytest.raises(StartRefused, match="cannot be written"), locked(Path("/proc/agent-server")):
        pass


def test_a_second_server_is_kept_out_also_when_the_file_lock_was_removed(tmp_path):
    with locked(tmp_path):
        (tmp_path / "lock").unlink()
        with pytest.raises(StartRefused, match="belongs to a running server"), locked(tmp_path):
            pass


def test_a_folder_that_was_moved_is_no_copy(tmp_path):
    with locked(tmp_path / "one") as folder:
        (folder.root / "instance").write_text("me")
    (tmp_path / "one").rename(tmp_path / "two")
    with locked(tmp_path / "two") as folder:
        assert not folder.copied
        assert (folder.root / "instance").read_text() == "me"


@pytest.mark.parametrize("copy", [("cp", "-a"), ("cp", "-r"), ("tar",)], ids=lambda copy: copy[0] + copy[-1])
def test_a_copy_forgets_what_runs_for_the_original_and_keeps_the_files(tmp_path, copy):
    with locked(tmp_path / "one") as folder:
        for name in ("boxes/b/box.json", "runtimes/r/session.json", "workspaces/w/file"):
            (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.root / name).write_text("{}")
        (folder.root / "instance").write_text("me")
    if copy == ("tar",):
        (tmp_path / "two").mkdir()
        subprocess.run("tar -C one -c . | tar -C two -x", shell=True, cwd=tmp_path, check=True)
    else:
        subprocess.run([*copy, "one", "two"], cwd=tmp_path, check=True)
    with locked(tmp_path / "two") as folder:
        assert folder.copied
        assert not (folder.root / "instance").exists()
        assert not (folder.root / "boxes" / "b" / "box.json").exists()
        assert not (folder.root / "runtimes").exists()
        assert (folder.root / "workspaces" / "w" / "file").read_text() == "{}"
        assert len(list(folder.root.glob("runtimes.of-the-original-*/r/session.json"))) == 1
    with locked(tmp_path / "two") as folder:
        assert not folder.copied
    with locked(tmp_path / "one") as folder:
        assert not folder.copied
        assert (folder.root / "boxes" / "b" / "box.json").exists()


def test_a_folder_of_others_is_refused_and_stays_as_it_was(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o755)
    (tmp_path / "home" / "letter").write_text("")
    words = r"holds other things, and others may enter it \(mode 0755\)"
    with pytest.raises(StartRefused, match=words), locked(tmp_path / "home"):
        pass
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter"]
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o755


async def test_a_data_folder_that_was_open_to_others_is_closed(tmp_path):
    data, key = tmp_path / "data", tmp_path / "key"
    data.mkdir()
    for name in ("log.db", "log.db-wal", "other"):
        (data / name).write_text("")
        (data / name).chmod(0o644)
    key.write_text("")
    key.chmod(0o644)
    os.link(key, data / "linked")
    (data / "link").symlink_to(key)
    data.chmod(0o755)
    with locked(data) as folder:
        await folder.confine("none", 0)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (data, *data.iterdir())}
    assert {modes[name] for name in ("log.db", "log.db-wal", "other")} == {0o600}
    assert (modes["data"], modes["workspaces"]) == (0o700, 0o700)
    assert stat.S_IMODE(key.stat().st_mode) == 0o644, "what has a name elsewhere is not ours to change"
