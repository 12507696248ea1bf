import os
import re
import stat
import sys

import pytest

from agent_server.data_folder import locked
from agent_server.refusal import StartRefused


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
