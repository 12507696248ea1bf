import pytest

from agent_sdk.protocol.errors import HostNotAllowed, OriginNotAllowed
from agent_server.config.sources import StartRefused, is_loopback, networks
from agent_server.http.connection import ProxyRules, network_of
from agent_server.http.security import HostRules, OriginRules

LOCAL = HostRules("127.0.0.1")
PUBLIC = HostRules("0.0.0.0", ["box.example"])

FINE = [
    (LOCAL, "localhost"),
    (LOCAL, "LOCALHOST:8000"),
    (LOCAL, "127.0.0.1:8000"),
    (LOCAL, "127.1.2.3"),
    (LOCAL, "[::1]:8000"),
    (PUBLIC, "127.0.0.1:1"),
    (PUBLIC, "box.example:443"),
    (PUBLIC, "10.0.0.7:8000"),
    (PUBLIC, "[2001:db8::1]:8000"),
    (HostRules("127.0.0.1", ["*"]), "anything.example"),
    (HostRules("my-machine.lan"), "my-machine.lan:8000"),
]
REFUSED = [
    (LOCAL, ["evil.example:8000"], 421),
    (LOCAL, ["10.0.0.7:8000"], 421),
    (LOCAL, ["localhost.evil.example"], 421),
    (LOCAL, ["127.0.0.1.evil.example"], 421),
    (LOCAL, ["localhost."], 421),
    (LOCAL, ["0.0.0.0"], 421),
    (LOCAL, ["0x7f000001"], 421),
    (LOCAL, ["2130706433"], 421),
    (PUBLIC, ["evil.example"], 421),
    (PUBLIC, ["0.0.0.0:8000"], 421),
    (LOCAL, [], 400),
    (LOCAL, ["localhost", "localhost"], 400),
    (LOCAL, [""], 400),
    (LOCAL, ["localhost:0"], 400),
    (LOCAL, ["localhost:99999"], 400),
    (LOCAL, ["localhost:80:80"], 400),
    (LOCAL, ["user@localhost"], 400),
    (LOCAL, ["localhost/x"], 400),
    (LOCAL, ["loc alhost"], 400),
]


@pytest.mark.parametrize(("rules", "host"), FINE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_host_that_is_this_server_is_accepted(rules, host):
    rules.check([host], "/v1/rpc")


@pytest.mark.parametrize(("rules", "hosts", "status"), REFUSED)
def test_a_host_that_is_somebody_else_is_refused(rules, hosts, status):
    with pytest.raises(HostNotAllowed) as refused:
        rules.check(hosts, "/v1/rpc")
    assert refused.value.details["status"] == status


@pytest.mark.parametrize("target", ["http://evil.example/health", "http://localhost/", "evil.example:80", ""])
def test_only_a_path_is_a_target(target):
    with pytest.raises(HostNotAllowed):
        LOCAL.check(["localhost"], target)


def test_a_long_host_is_cut_in_the_answer():
    with pytest.raises(HostNotAllowed) as refused:
        LOCAL.check(["x" * 5000], "/")
    assert len(str(refused.value)) < 250


ORIGINS = OriginRules(["https://console.example", "http://localhost:3000/"])


@pytest.mark.parametrize(
    "origin", ["https://console.example", "HTTPS://Console.Example", "http://localhost:3000"]
)
def test_a_listed_origin_may_connect(origin):
    assert ORIGINS.check([origin]) == origin


def test_a_program_sends_no_origin_and_may_connect():
    assert ORIGINS.check([]) is None


FOREIGN = [
    ["https://evil.example"],
    ["null"],
    [""],
    ["https://console.example", "https://console.example"],
    ["https://console.example, https://evil.example"],
    ["http://localhost.evil"],
    ["http://localhost"],
    ["http://127.0.0.1:8000"],
    ["http://localhost:3001"],
    ["https://console.example."],
    ["https://user@console.example"],
    ["https://console.example.evil"],
    ["http://console.example"],
    ["http://[::1]:8000"],
    ["file://"],
]


@pytest.mark.parametrize("origins", FOREIGN)
def test_any_other_origin_is_refused(origins):
    with pytest.raises(OriginNotAllowed):
        ORIGINS.check(origins)


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("a.lan", False),
    ],
)
def test_which_addresses_are_reached_from_this_machine_only(host, answer):
    assert is_loopback(host) is answer


PROXIES = ProxyRules(networks(["10.0.0.0/8", "2001:db8:1::/48"]))


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ([], "10.0.0.1"),
        (["192.0.2.1"], "192.0.2.1"),
        (["1.1.1.1, 192.0.2.1"], "192.0.2.1"),  # whoever the client says it speaks for is not believed
        (["1.1.1.1", "192.0.2.1, 10.2.3.4"], "192.0.2.1"),
        (["10.9.9.9, 10.2.3.4"], "10.9.9.9"),
        (["192.0.2.1:4711"], "192.0.2.1"),
        (["[2001:db8::1]:4711, 2001:db8:1::5"], "2001:db8::1"),
        (["2001:db8::1"], "2001:db8::1"),
        (["::ffff:192.0.2.1"], "192.0.2.1"),
        (["192.0.2.1, unknown, 10.2.3.4"], "10.2.3.4"),
        (["192.0.2.1,"], "10.0.0.1"),
        (["x" * 10_000], "10.0.0.1"),
        (["300.1.1.1"], "10.0.0.1"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_no_trusted_proxy(forwarded, client):
    assert PROXIES.client("10.0.0.1", forwarded) == client


def test_only_listed_proxies_are_trusted():
    assert PROXIES.trusts("10.255.0.1") and PROXIES.trusts("::ffff:10.0.0.1")
    assert not PROXIES.trusts("192.0.2.1") and not PROXIES.trusts("local")
    assert not ProxyRules().trusts("127.0.0.1")


def test_what_is_no_network_is_refused_in_one_sentence():
    with pytest.raises(
        StartRefused, match=r"'proxy' does not appear .*; write addresses and networks like 10\.0\.0\.1"
    ):
        networks(["proxy"])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("127.0.0.1", "127.9.9.9", True),
        ("127.0.0.1", "::1", True),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_which_addresses_count_as_one(one, other, same):
    assert (network_of(one) == network_of(other)) is same
