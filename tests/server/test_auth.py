import os
import signal
import stat

import pytest

from agent_sdk.protocol.errors import Overloaded, Unauthorized, UseHeader
from agent_server.config.options import RuntimeConfig, ServerConfig
from agent_server.config.sources import StartRefused
from agent_server.http.security import Authority, WrongKeys, bearer
from agent_server.keys import ApiKey, obtain_key, obtain_keys
from agent_server.runtime_api.service import Tenants

KEY = "0123456789abcdef"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def authority(clock):
    return Authority(ApiKey(KEY), WrongKeys(clock))


def test_the_first_start_makes_a_key_that_only_the_owner_can_read(tmp_path):
    key, text = obtain_key(ServerConfig(data=str(tmp_path)))
    assert key.file == tmp_path / "api_key"
    assert stat.S_IMODE(key.file.stat().st_mode) == 0o600
    assert len(text) >= 43
    assert key.is_same(text)


def test_the_next_start_finds_the_same_key(tmp_path):
    config = ServerConfig(data=str(tmp_path))
    assert obtain_key(config)[1] == obtain_key(config)[1]


def test_two_servers_make_different_keys(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    texts = {obtain_key(ServerConfig(data=str(tmp_path / name)))[1] for name in "ab"}
    assert len(texts) == 2


def test_a_key_that_others_can_read_is_refused(tmp_path):
    obtain_key(ServerConfig(data=str(tmp_path)))
    (tmp_path / "api_key").chmod(0o644)
    with pytest.raises(StartRefused, match="chmod 600"):
        obtain_key(ServerConfig(data=str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 32, b"two words that are long enough"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(StartRefused, match="holds no API key"):
        obtain_key(ServerConfig(data=str(tmp_path), api_key_file=str(tmp_path / "key")))


def test_a_missing_key_file_is_one_sentence(tmp_path):
    with pytest.raises(StartRefused, match="cannot be read: No such file"):
        obtain_key(ServerConfig(data=str(tmp_path), api_key_file=str(tmp_path / "key")))


def test_a_configured_key_file_is_read_without_its_newline(tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert obtain_key(ServerConfig(data=str(tmp_path), api_key_file=str(tmp_path / "key")))[1] == KEY


@pytest.mark.parametrize("given", ["", KEY[:-1], f"{KEY} ", f"{KEY}\0", KEY.upper(), "x" * 4000, "\udc80"])
def test_anything_but_the_key_is_unauthorised(authority, given):
    with pytest.raises(Unauthorized):
        authority.check(given, "10.0.0.1")


def test_no_key_at_all_is_unauthorised_and_not_counted(authority):
    for _ in range(20):
        with pytest.raises(Unauthorized):
            authority.check(None, "10.0.0.1")


def wrong(authority, address):
    with pytest.raises((Unauthorized, Overloaded)) as refused:
        authority.check("wrong", address)
    return refused.value


def test_the_sixth_wrong_key_in_a_minute_has_to_wait(authority, clock):
    first_five = [type(wrong(authority, "10.0.0.1")) for _ in range(5)]
    assert first_five == [Unauthorized] * 5
    clock.now += 10
    assert wrong(authority, "10.0.0.1").retry_after_ms == 50_001


def test_after_a_minute_a_wrong_key_is_just_wrong_again(authority, clock):
    for _ in range(6):
        wrong(authority, "10.0.0.1")
    clock.now += 61
    assert type(wrong(authority, "10.0.0.1")) is Unauthorized


def test_other_addresses_do_not_suffer(authority):
    for _ in range(6):
        wrong(authority, "10.0.0.1")
    assert type(wrong(authority, "10.0.0.2")) is Unauthorized


def test_neighbours_of_an_ipv6_network_count_as_one(authority):
    for last in range(5):
        wrong(authority, f"2001:db8::{last}")
    assert type(wrong(authority, "2001:db8::99")) is Overloaded


def test_the_right_key_is_accepted_among_wrong_ones(authority):
    for _ in range(10):
        wrong(authority, "10.0.0.1")
    authority.check(KEY, "10.0.0.1")


def test_wrong_keys_count_together_at_all_doors_of_a_server(clock):
    wrong_keys = WrongKeys(clock)
    authority = Authority(ApiKey(KEY), wrong_keys)
    tenants = Tenants(RuntimeConfig(), KEY, wrong_keys)
    for _ in range(3):
        wrong(authority, "10.0.0.1")
    for _ in range(2):
        with pytest.raises(Unauthorized):
            tenants.check(["wrong"], "10.0.0.1")
    assert type(wrong(authority, "10.0.0.1")) is Overloaded
    with pytest.raises(Overloaded):
        tenants.check(["wrong"], "10.0.0.1")
    assert tenants.check([KEY], "10.0.0.1").name == "default"


def test_addresses_are_forgotten_when_there_are_too_many(clock):
    wrong_keys = WrongKeys(clock)
    for number in range(10_050):
        wrong_keys.refusal(f"host{number}")
    assert len(wrong_keys._wrong) == 10_000


def test_the_key_comes_from_the_header():
    assert bearer([f"Bearer {KEY}"]) == KEY
    assert bearer([f"bearer {KEY}"]) == KEY
    assert bearer([]) is None


@pytest.mark.parametrize(
    ("headers", "flags"),
    [
        (["Basic dXNlcjpwYXNz"], {}),
        (["Basic !"], {}),
        (["Digest x"], {}),
        ([KEY], {}),
        ([f"Bearer {KEY}", f"Bearer {KEY}"], {}),
        (["Bearer " + "x" * 5000], {}),
        ([], {"query": True}),
        ([f"Bearer {KEY}"], {"query": True}),
    ],
)
def test_a_key_anywhere_else_is_told_where_it_belongs(headers, flags):
    with pytest.raises(UseHeader, match="Authorization: Bearer KEY"):
        bearer(headers, **flags)


def test_the_sentence_does_not_repeat_what_was_given():
    with pytest.raises(UseHeader) as refused:
        bearer(["Basic c2VjcmV0"])
    assert "c2VjcmV0" not in str(refused.value)


OLD, NEW = "old-key-0123456789", "new-key-0123456789"


async def ask(server, key: str, path: str = "/v1/conversations") -> int:
    async with server.http(key) as http, http.get(path) as answer:
        return answer.status


async def test_keys_of_a_file_are_read_again_at_sighup_and_who_has_one_that_is_gone_is_sent_away(
    start, tmp_path
):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEY}\n\n {OLD} \n")
    async with start(api_key=None, api_keys_file=str(file)) as server:
        assert [await ask(server, key) for key in (KEY, OLD, NEW)] == [200, 200, 401]
        async with await server.wire() as stays, await server.wire() as goes:
            await stays.upgrade(KEY)
            await stays.initialize()
            await goes.upgrade(None)
            await goes.initialize(auth=OLD)
            file.write_text("short")
            os.kill(os.getpid(), signal.SIGHUP)
            assert "keys:1: an API key is at least 16" in (await server.log.until("keys_not_read"))["problem"]
            assert await ask(server, OLD) == 200
            file.write_text(f"{KEY}\n{NEW}\n")
            os.kill(os.getpid(), signal.SIGHUP)
            assert (await goes.ended()).code == 4401
            assert (await server.log.until("keys_read"))["count"] == 2
            assert [await ask(server, key) for key in (KEY, OLD, NEW)] == [200, 401, 200]
            assert "result" in await stays.call("ping")
        assert OLD not in server.log.getvalue() and NEW not in server.log.getvalue()


async def test_the_key_of_metrics_opens_metrics_and_nothing_else(start):
    reader = "read-only-0123456789"
    async with start(metrics_key=reader) as server:
        assert [await ask(server, key, "/metrics") for key in (reader, server.key, "wrong")] == [
            200,
            200,
            401,
        ]
        assert [await ask(server, reader, path) for path in ("/v1/conversations", "/openrpc.json")] == [
            401,
            401,
        ]
        async with await server.wire() as wire:
            await wire.upgrade(None)
            assert (await wire.initialize(auth=reader))["error"]["data"]["kind"] == "unauthorized"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no API key"),
        ("# none\n", "holds no API key"),
        (f"{KEY}\ntwo words 0123456789", "keys:2: an API key"),
    ],
)
def test_a_file_of_keys_with_something_else_in_it_is_refused(tmp_path, content, says):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(StartRefused, match=says):
        obtain_keys(ServerConfig(data=str(tmp_path), api_keys_file=str(file)))
