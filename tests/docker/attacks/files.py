"""Files that are not one's own."""

import os

from .attempt import GIVEN, RefusedError, attack, creates, each, enough, opens, readable

WRITES = {
    "core_pattern": "/proc/sys/kernel/core_pattern",
    "modprobe": "/proc/sys/kernel/modprobe",
    "sysrq_trigger": "/proc/sysrq-trigger",
    "sysctl_of_the_net": "/proc/sys/net/ipv4/ip_forward",
    "sysctl_of_memory": "/proc/sys/vm/overcommit_memory",
    "binfmt_misc": "/proc/sys/fs/binfmt_misc/register",
    "irq_affinity": "/proc/irq/default_smp_affinity",
    "power_state": "/sys/power/state",
    "ksm": "/sys/kernel/mm/ksm/run",
    "uevent_helper": "/sys/kernel/uevent_helper",
    "passwd": "/etc/passwd",
    "hosts": "/etc/hosts",
    "resolv_conf": "/etc/resolv.conf",
    "program_of_init": "/proc/1/exe",
    "limit_of_devices": "/sys/fs/cgroup/devices/devices.allow",
    "limit_of_memory": "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    "limit_of_memory_2": "/sys/fs/cgroup/memory.max",
}
READS = {
    "kcore": "/proc/kcore",
    "keys": "/proc/keys",
    "timer_list": "/proc/timer_list",
    "sched_debug": "/proc/sched_debug",
    "kmsg": "/proc/kmsg",
    "vmallocinfo": "/proc/vmallocinfo",
    "slabinfo": "/proc/slabinfo",
    "kpagecount": "/proc/kpagecount",
    "shadow": "/etc/shadow",
}
LISTS = {
    "firmware": "/sys/firmware",
    "debugfs": "/sys/kernel/debug",
    "scsi": "/proc/scsi",
    "acpi": "/proc/acpi",
}
FOLDERS = (
    "/",
    "/etc",
    "/usr",
    "/usr/bin",
    "/bin",
    "/lib",
    "/root",
    "/home",
    "/var",
    "/var/tmp",
    "/opt",
    "/boot",
)
FOLDERS += ("/opt/agent", "/run/agent", "/srv", "/mnt", "/media", "/proc", "/sys", "/dev")
NO_PROGRAMS = {"run": ("/run",), "dev_shm": ("/dev/shm",)}


def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return "open for writing"


def read(path):
    with open(path, "rb") as file:
        return enough([start] if (start := file.read(16)) else [])


def listed(path):
    return enough(os.listdir(path))


def run_a_program(folder):
    """A file there may be a program of its own, without a mark of `noexec`."""
    path = os.path.join(folder, "program")
    with open(path, "w") as file:
        file.write("#!/bin/sh\n")
    try:
        os.chmod(path, 0o755)
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise RefusedError("noexec")
        return path
    finally:
        os.unlink(path)


each("write", write, {name: (path,) for name, path in WRITES.items()})
each("read", read, {name: (path,) for name, path in READS.items()})
each("list", listed, {name: (path,) for name, path in LISTS.items()})
each("run_a_program_in", run_a_program, NO_PROGRAMS)


@attack
def make_a_folder_elsewhere():
    return enough([folder for folder in FOLDERS if creates(folder)])


@attack
def change_the_runtime():
    tree = [os.path.join(folder, name) for folder, _, names in os.walk("/opt/agent") for name in names]
    return enough([path for path in tree if opens(path)])


@attack
def take_the_place_of_the_box():
    folder = GIVEN.get("box", "/run/agent")
    os.rename(f"{folder}/box.sock", f"{folder}/other.sock")
    return "its socket has another name"


@attack
def read_a_file_of_the_host():
    path = GIVEN.get("host_file", "/nowhere")
    up = "/.." * 8
    ways = (
        path,
        f"/proc/1/root{path}",
        f"/proc/1/cwd{up}{path}",
        f"/proc/self/cwd{up}{path}",
        f"/host{path}",
    )
    return enough([way for way in ways if readable(way)])


@attack
def use_an_inherited_descriptor():
    names = [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    return enough([f"/proc/self/fd/{name}" for name in names if int(name) > 2 and not ours(name)])


def ours(descriptor):
    """The pipe through which this attack is told, and what reads this program."""
    return os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:")


@attack
def link_what_is_anothers():
    """A second name in one's own folder for a file that one may not write: whoever gives that folder away gives it."""
    linked = []
    for number, path in enumerate((*GIVEN.get("others", ()), "/etc/passwd", "/etc/hostname")):
        name = os.path.join(os.getcwd(), f"linked-{number}")
        try:
            os.link(path, name)
            os.unlink(name)
            linked.append(path)
        except OSError:
            pass
    return enough(linked)


@attack
def link_to_shadow():
    os.link("/etc/shadow", "/var/tmp/linked")
    return "linked"
