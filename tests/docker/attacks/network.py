"""Whom one can talk to."""

import json
import os
import resource
import selectors
import socket
import struct

from .attempt import GIVEN, attack, call, each, enough, lines

CROWD = 64
"""Connections that a box may be left with."""
PATIENCE = 5
"""Seconds in which a box has taken or refused another connection."""
WAIT = 0.3
"""Seconds for an answer."""
TOPS = ("/run", "/var", "/tmp", "/workspace")
ENGINES = ("docker.sock", "containerd.sock", "podman.sock", "crio.sock")
SEQPACKET, RAW, STREAM, DATAGRAM, NETLINK = 5, 3, 1, 2, 16
FAMILIES = {
    "netrom": (6, DATAGRAM),
    "key": (15, RAW),
    "packet": (17, RAW),
    "rds": (21, SEQPACKET),
    "can": (29, RAW),
    "tipc": (30, SEQPACKET),
    "bluetooth": (31, RAW),
    "alg": (38, SEQPACKET),
    "vsock": (40, STREAM),
    "kcm": (41, DATAGRAM),
    "xdp": (44, RAW),
    "icmp": (2, RAW, 1),
    "netlink_netfilter": (NETLINK, RAW, 12),
    "netlink_audit": (NETLINK, RAW, 9),
    "netlink_xfrm": (NETLINK, RAW, 6),
    "netlink_generic": (NETLINK, RAW, 16),
    "netlink_uevent": (NETLINK, RAW, 15),
    "netlink_connector": (NETLINK, RAW, 11),
}


def make_a_socket(family, kind, protocol=0):
    return call(41, family, kind, protocol)


each("socket", make_a_socket, FAMILIES)


def reach(*addresses):
    """Those of the addresses that take a connection."""
    return enough([f"{host}:{port}" for host, port in addresses if connects(host, port)])


def hosts():
    """Addresses at which the host may be found from inside."""
    found = ["127.0.0.1", "172.17.0.1", "192.168.65.7", "10.0.2.2"]
    for line in lines("/proc/net/route")[1:]:
        gateway = int(line.split()[2], 16)
        found.append(socket.inet_ntoa(struct.pack("<I", gateway)))
    return found


@attack
def reach_the_engine_by_network():
    return enough([host for host in hosts() for port in (2375, 2376) if is_an_engine(host, port)])


@attack
def reach_a_service_of_the_host():
    return reach(*((host, GIVEN.get("host_port", 1)) for host in hosts()))


@attack
def reach_metadata():
    return reach(("169.254.169.254", 80), ("fd00:ec2::254", 80), ("100.100.100.200", 80))


@attack
def reach_the_internet():
    return reach(("1.1.1.1", 443), ("8.8.8.8", 53), ("2606:4700:4700::1111", 443))


@attack
def have_a_route():
    return enough(lines("/proc/net/route")[1:])


@attack
def have_an_interface():
    return enough([name for _, name in socket.if_nameindex() if name != "lo" and is_up(name)])


def is_up(name):
    return int(lines(f"/sys/class/net/{name}/flags")[0], 16) & 1


@attack
def ask_for_a_name():
    servers = [line.split()[1] for line in lines("/etc/resolv.conf") if line.startswith("nameserver ")]
    query = b"\0\1\1\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"
    return enough([host for host in (*servers, "127.0.0.11", "8.8.8.8") if datagram(host, 53, query, True)])


@attack
def greet_neighbours():
    links = [f"ff02::1%{name}" for _, name in socket.if_nameindex() if name != "lo"]
    all_of_them = (*links, "255.255.255.255", "224.0.0.1", "172.17.0.2")
    return enough([host for host in all_of_them if datagram(host, 9, b"x")])


@attack
def connect_to_abstract_sockets():
    names = [line.split()[-1] for line in lines("/proc/net/unix")[1:] if line.split()[-1].startswith("@")]
    return enough([name for name in names if speaks("\0" + name[1:])])


@attack
def reach_the_engine_by_socket():
    walked = [(folder, name) for top in TOPS for folder, _, names in os.walk(top) for name in names]
    return enough(
        [f"{folder}/{name}" for folder, name in walked if name in ENGINES and speaks(f"{folder}/{name}")]
    )


def connects(host, port):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.settimeout(WAIT)
        try:
            one.connect((host, port))
        except OSError:
            return False
        return True


def is_an_engine(host, port):
    try:
        with socket.create_connection((host, port), WAIT) as one:
            one.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            answer = one.recv(4096)
    except OSError:
        return False
    return b"Api-Version" in answer or b"HTTPS" in answer


def datagram(host, port, data, answered=False):
    """Whether it leaves, or is answered."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(kind, socket.SOCK_DGRAM) as one:
            if kind == socket.AF_INET:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            one.settimeout(WAIT)
            one.sendto(data, socket.getaddrinfo(host, port, kind, socket.SOCK_DGRAM)[0][4])
            return bool(one.recv(512)) if answered else True
    except OSError:
        return False


@attack
def use_the_socket_of_the_box():
    """Ask it for what it tells those who keep it, and be company to it for ever."""
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(5)
        one.connect(f"{GIVEN.get('box', '/run/agent')}/box.sock")
        client = {"name": "attack", "version": "1"}
        hello = {"protocol_version": 1, "client": client, "auth": "guessed"}
        for id, method, params in ((1, "initialize", hello), (2, "workspace.describe", {})):
            call_ = json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode()
            one.sendall(struct.pack(">IB", len(call_), 1) + call_)
        answer = b""
        while b'"id":2' not in answer.replace(b" ", b"") and (more := one.recv(1 << 16)):
            answer += more
    return enough([answer] if b'"result"' in answer else [])


@attack
def crowd_the_box():
    """Hold ten thousand connections to it that say nothing, so that it has no descriptor left for anybody."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held, refused = [], None
    with selectors.EpollSelector() as hang_ups:
        for _ in range(10_000):
            try:
                one = socket.socket(socket.AF_UNIX)
                one.settimeout(WAIT)
                one.connect(f"{GIVEN.get('box', '/run/agent')}/box.sock")
            except OSError as exc:  # no descriptor is left here, or nobody takes it in there
                refused = exc
                break
            held.append(one)
            hang_ups.register(one, selectors.EVENT_READ)
        if not held:
            raise refused
        left = len(held)
        while left > CROWD and (over := hang_ups.select(PATIENCE)):
            left -= len(over)
            for key, _ in over:
                hang_ups.unregister(key.fileobj)
    return enough([f"{left} of {len(held)}"] if left > CROWD else [])


def speaks(path):
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(WAIT)
            one.connect(path)
    except OSError:
        return False
    return True
