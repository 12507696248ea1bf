"""Limits and counters of a control group, of both versions."""

import pytest

from agent_sdk.workspace.limits import Cgroup

VERSION_1 = {
    "memory/memory.limit_in_bytes": "67108864",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3",
    "pids/pids.max": "256",
    "pids/pids.events": "max 7",
    "cpu,cpuacct/cpu.cfs_quota_us": "150000",
    "cpu,cpuacct/cpu.cfs_period_us": "100000",
}
VERSION_2 = {
    "memory.max": "67108864",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 4\noom_kill 3\noom_group_kill 0",
    "pids.max": "256",
    "pids.events": "max 7",
    "cpu.max": "150000 100000",
}
UNLIMITED_1 = {
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "pids/pids.max": "max",
    "cpu,cpuacct/cpu.cfs_quota_us": "-1",
    "cpu,cpuacct/cpu.cfs_period_us": "100000",
}
UNLIMITED_2 = {"memory.max": "max", "pids.max": "max", "cpu.max": "max 100000"}


@pytest.fixture
def cgroup(tmp_path):
    """Make the account that the kernel gives of a process, with these files in its group."""

    def make(version, files, path="/"):
        groups = tmp_path / "groups of this machine"
        for name, content in files.items():
            folder, _, file = name.rpartition("/")
            place = groups / folder / path.strip("/")
            place.mkdir(parents=True, exist_ok=True)
            (place / file).write_text(content + "\n")
        shown = str(groups).replace(" ", "\\040")
        if version == 2:
            lines = [f"30 20 0:26 / {shown} ro - cgroup2 cgroup2 rw"]
            (tmp_path / "cgroup").write_text(f"0::{path}\n")
        else:
            names = {name.partition("/")[0] for name in files}
            lines = [
                f"30 20 0:26 /above {shown}/{name} ro master:9 - cgroup cgroup rw,{name}" for name in names
            ]
            groups_of = [f"{nth}:{name}:/above{path.rstrip('/')}" for nth, name in enumerate(names, 1)]
            (tmp_path / "cgroup").write_text("\n".join([*groups_of, "0::/", ""]))
        (tmp_path / "mountinfo").write_text("\n".join(["20 1 0:5 / / ro - overlay overlay ro", *lines, ""]))
        return Cgroup(str(tmp_path))

    return make


@pytest.mark.parametrize(("version", "files"), [(1, VERSION_1), (2, VERSION_2)])
@pytest.mark.parametrize("path", ["/", "/machine/unit"])
def test_limits_and_counters_are_those_of_the_group_of_the_process(cgroup, version, files, path):
    found = cgroup(version, files, path)
    assert (found.memory_max, found.pids_max, found.cpus) == (64 << 20, 256, 1.5)
    assert (found.oom_kills, found.refused_forks) == (3, 7)


@pytest.mark.parametrize(("version", "files"), [(1, UNLIMITED_1), (2, UNLIMITED_2)])
def test_what_is_not_limited_is_none(cgroup, version, files):
    found = cgroup(version, files)
    assert (found.memory_max, found.pids_max, found.cpus) == (None, None, None)
    assert (found.oom_kills, found.refused_forks) == (0, 0)


@pytest.mark.parametrize(
    ("name", "content"), [("cgroup", "nonsense"), ("mountinfo", "a b c"), ("mountinfo", "")]
)
def test_what_makes_no_sense_is_not_known(cgroup, tmp_path, name, content):
    cgroup(2, VERSION_2)
    (tmp_path / name).write_text(content)
    found = Cgroup(str(tmp_path))
    assert (found.memory_max, found.pids_max, found.cpus, found.oom_kills) == (None, None, None, 0)
    assert Cgroup(str(tmp_path / "missing")).memory_max is None
