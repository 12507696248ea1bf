"""Mounts, devices and control groups."""

import ctypes
import os
import stat

from .attempt import LIBC, attack, checked, each, enough, lines, opens

AGAIN, BIND, DETACH = 0x20, 0x1000, 2
DEVICES = ("mem", "kmem", "port", "kmsg", "kvm", "fuse", "vsock", "net/tun", "loop-control", "mapper/control")
DISKS = ("sd", "vd", "xvd", "nvme", "dm-", "loop0")


def mount(source, kind, flags=0, target=b"/tmp"):
    checked(LIBC.mount(source, target, kind, ctypes.c_ulong(flags), None))
    if not flags & AGAIN:
        LIBC.umount2(target, DETACH)
    return f"at {target}"


MOUNTS = {
    "tmpfs": (b"none", b"tmpfs"),
    "proc": (b"proc", b"proc"),
    "sysfs": (b"sysfs", b"sysfs"),
    "bind": (b"/", None, BIND),
    "root_again": (None, None, AGAIN | BIND, b"/"),
    "runtime_again": (None, None, AGAIN | BIND, b"/opt/agent"),
    "over_the_box": (b"none", b"tmpfs", 0, b"/run/agent"),
    "over_the_runtime": (b"/tmp", None, BIND, b"/opt/agent"),
}
each("mount", mount, MOUNTS)


def make_a_device(kind, major, minor):
    path = os.path.join(os.getcwd(), f"device-{major}-{minor}")
    os.mknod(path, kind | 0o600, os.makedev(major, minor))
    os.unlink(path)
    return path


MADE = {"disk": (stat.S_IFBLK, 254, 0), "memory": (stat.S_IFCHR, 1, 1), "null": (stat.S_IFCHR, 1, 3)}
each("make_device", make_a_device, MADE)


def open_a_device(name):
    os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK))
    return "open"


each("open_device", open_a_device, {name.replace("/", "_"): (name,) for name in DEVICES})


@attack
def open_a_disk():
    disks = [name for name in os.listdir("/dev") if name.startswith(DISKS)]
    for name in disks:
        os.close(os.open(f"/dev/{name}", os.O_RDONLY))
    return enough(disks)


def control_groups():
    return [line.split()[4] for line in lines("/proc/self/mountinfo") if " - cgroup" in line]


@attack
def leave_a_program_to_the_release_agent():
    return enough([path for path in control_groups() if opens(f"{path}/release_agent")])


@attack
def move_between_control_groups():
    return enough([path for path in control_groups() if opens(f"{path}/cgroup.procs")])


@attack
def make_a_control_group():
    for path in control_groups():
        os.mkdir(f"{path}/child")
        os.rmdir(f"{path}/child")
    return enough(control_groups())
