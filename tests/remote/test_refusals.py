"""What a client is told when its server cannot be reached, or somebody else answers: the fault, and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.outbound import proxy_for
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    InvalidParams,
    NotFound,
    Unauthorized,
)
from agent_sdk.protocol.methods.workspace import Describe
from agent_sdk.protocol.specs import PROTOCOL_VERSION
from agent_sdk.remote.connection import checked_key, checked_url, other_version
from agent_sdk.remote.link import Fixed, ask
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from tests.listeners import answering, certify, response, serving, trusting

KEY = "a-key-of-this-test"


async def reason(url: str, key: str | None = KEY, **options) -> AgentServerError:
    """Why no workspace is there; it is asked for ever, so only what is final ends this."""
    with pytest.raises(AgentServerError) as refused:
        async with RemoteWorkspace(url, key, connect_timeout=None, **options):
            pass
    return refused.value


# --- TLS ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certify(tmp_path_factory.mktemp("certificates"))


async def test_a_certificate_that_is_not_trusted_is_named_with_what_to_do_and_asked_for_once(certificates):
    async with answering(b"", serving(certificates / "own.pem")) as (place, requests):
        error = await reason(f"https://{place}")
    assert "its certificate is not accepted: self" in str(error)
    assert str(error).endswith("name a file with its CA in SSL_CERT_FILE, or pass ssl=")
    assert requests == []


async def test_a_certificate_that_is_over_and_one_of_another_name_are_told_apart(certificates):
    async with answering(b"", serving(certificates / "late.pem")) as (place, _):
        error = await reason(f"https://{place}", ssl=trusting(certificates / "late.pem"))
        assert "certificate has expired; renew it" in str(error)
    async with answering(b"", serving(certificates / "own.pem")) as (place, _):
        url = f"https://localhost:{place.rpartition(':')[2]}"
        error = await reason(url, ssl=trusting(certificates / "own.pem"))
        assert "certificate is not valid for 'localhost'; use a name that it was issued for" in str(error)


async def test_a_certificate_that_ssl_or_the_environment_trusts_is_accepted(certificates, monkeypatch):
    file = certificates / "own.pem"
    async with answering(response("401 Unauthorized"), serving(file)) as (place, requests):
        assert isinstance(await reason(f"https://{place}", ssl=trusting(file)), Unauthorized)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert isinstance(await reason(f"https://{place}"), Unauthorized)
        monkeypatch.setenv("SSL_CERT_FILE", str(file.with_name("missing")))
        error = await reason(f"https://{place}")
        assert "SSL_CERT_FILE, or this machine's own setting, names a file that is not there" in str(error)
    assert len(requests) == 2


async def test_plain_http_where_tls_is_expected_and_tls_where_it_is_not_are_both_named(certificates):
    async with answering(b"", serving(certificates / "own.pem")) as (
        place,
        _,
    ):  # it just closes the connection
        assert "speaks TLS there, not plain HTTP; write https://" in str(await reason(f"http://{place}"))
    async with answering(response("400 Bad Request")) as (place, _):
        assert "plain HTTP there, not TLS" in str(await reason(f"https://{place}"))
    async with answering(response("400 Bad Request", "the request was sent to an HTTPS port")) as (place, _):
        assert "speaks TLS there, not plain HTTP; write https://" in str(await reason(f"http://{place}"))
    async with answering(bytes.fromhex("15030300020246")) as (place, _):  # the alert of a TLS server
        assert "speaks TLS there, not plain HTTP; write https://" in str(await reason(f"http://{place}"))


@pytest.mark.parametrize("given", [False, True, "ca.pem"])
def test_there_is_no_way_to_trust_everybody(given):
    with pytest.raises(InvalidParams, match="ssl must be an ssl.SSLContext"):
        RemoteWorkspace("https://host", ssl=given)


# --- whoever answers instead ---


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        (
            "",
            response("404 Not Found", "<html>"),
            "is no agent server: it answered 404 Not Found; is it the right host",
        ),
        ("/foo", response("404 Not Found"), "is its path /foo right?"),
        ("/v1", response("404 Not Found"), "leave out /v1 at the end of the URL"),
        ("", response("200 OK", "hello"), "is no agent server: it answered 200 OK"),
        ("", response("405 Method Not Allowed"), "is no agent server"),
        (
            "",
            response("426 Upgrade Required"),
            "a proxy there does not pass on WebSockets; have it pass the headers",
        ),
        (
            "",
            response("302 Found", "", "Location: https://other.example/"),
            "redirects to https://other.example/",
        ),
    ],
)
async def test_somebody_else_at_the_address_is_told_with_what_to_do_and_asked_once(path, answer, says):
    async with answering(answer) as (place, requests):
        error = await reason(f"http://{place}{path}")
    assert isinstance(error, ConnectionLost)
    assert says in str(error)
    assert len(requests) == 1


async def test_the_key_does_not_follow_a_redirect():
    async with answering(response("200 OK")) as (other, got):
        moved = response("307 Temporary Redirect", "", f"Location: http://{other}/v1/conversations/new")
        async with answering(moved) as (place, _):
            assert "the key is not sent; if it is right, pass that URL" in str(
                await reason(f"http://{place}")
            )
    assert got == []


async def test_a_path_that_leads_nowhere_on_an_agent_server_is_not_called_a_conversation(running_server):
    error = await reason(f"{running_server.url}/foo", running_server.api_key)
    assert type(error) is NotFound
    assert str(error).endswith("leads nowhere on the agent server there; is its path /foo right?")


async def test_a_key_that_is_wrong_and_one_that_is_missing_are_told_apart(running_server):
    assert "does not accept the API key" in str(await reason(running_server.url, "wrong-but-well-formed"))
    assert str(await reason(running_server.url, None)) == (
        f"{running_server.url}: an API key is needed, and none was given"
    )


# --- what is checked before ---


async def test_a_key_with_a_line_end_is_the_key(running_server):
    async with RemoteWorkspace(f" {running_server.url}/\n", f"{running_server.api_key}\r\n") as workspace:
        assert (await workspace.execute("echo ok")).stdout == "ok\n"


@pytest.mark.parametrize("key", ["two words", "line\nend", "caf\u00e9-0123456789", "nul\0", "\x1b[2J"])
def test_a_key_that_cannot_be_sent_is_refused_in_one_sentence_that_does_not_show_it(key):
    with pytest.raises(InvalidParams, match="api_key must be printable ASCII characters") as refused:
        RemoteWorkspace("http://host", key)
    assert key not in str(refused.value)


def test_a_key_of_nothing_is_none():
    assert checked_key(" \n") is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://h o st",
        "http://host/?a=b",
        "http://[",
    ],
)
def test_what_is_no_url_is_refused_before_anything_is_sent(url):
    with pytest.raises(InvalidParams, match=r"http://127\.0\.0\.1:8000"):
        checked_url(url)


def test_a_login_in_the_url_is_refused_and_not_shown():
    with pytest.raises(InvalidParams) as refused:
        checked_url("http://user:hunter2@host")
    assert "hunter2" not in str(refused.value)


def test_which_of_two_versions_is_the_older_one_is_said():
    unknown = InvalidParams("$.params: object contains unknown field `conversation`")
    assert "the server is the older one, update it" in str(other_version("http://host", unknown))
    older = InvalidParams("this server speaks 0", supported=[PROTOCOL_VERSION - 1])
    assert "the server is the older one" in str(other_version("http://host", older))
    newer = InvalidParams("this server speaks 9", supported=[PROTOCOL_VERSION + 1])
    assert "the client is the older one" in str(other_version("http://host", newer))
    other = InvalidParams("$.params.workspace: working_dir is a file")
    assert other_version("http://host", other) is other


# --- proxies ---


async def test_a_connection_goes_through_the_proxy_of_the_environment(monkeypatch):
    async with answering(response("401 Unauthorized")) as (proxy, requests):
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy}")
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        assert isinstance(await reason("http://agents.example:8000"), Unauthorized)
    assert requests[0].startswith(b"GET http://agents.example:8000/v1/conversations/new HTTP/1.1\r\n")


async def test_a_proxy_that_fails_is_named_without_its_login(monkeypatch):
    async with answering(response("407 Proxy Authentication Required")) as (proxy, requests):
        monkeypatch.setenv("https_proxy", f"http://user:hunter2@{proxy}")
        error = await reason("https://agents.example")
    assert requests[0].startswith(b"CONNECT agents.example:443 ")
    assert f"(through the proxy {proxy} of the environment; NO_PROXY lists hosts that need none)" in str(
        error
    )
    assert "hunter2" not in str(error)


def test_no_proxy_excepts_hosts(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,.corp.example,host:8000")
    assert proxy_for("http://agents.example") == "http://proxy.example:3128"
    assert proxy_for("ws://agents.example") == "http://proxy.example:3128"
    assert proxy_for("https://agents.example") is None
    assert [proxy_for(f"http://{host}/") for host in ("127.0.0.1:80", "a.corp.example", "host:8000")] == [
        None
    ] * 3


async def test_a_call_with_something_that_an_older_server_does_not_know_says_so():
    here, there = memory_pipes()

    async def refuse(params, call):
        raise InvalidParams("$.params: object contains unknown field merge")

    async with Peer(there, {Describe: refuse}, opener=False), Peer(here, opener=True) as peer:
        with pytest.raises(InvalidParams, match="merge: the other end is older than this client"):
            await ask(Fixed(peer), Describe())
