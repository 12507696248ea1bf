"""Models behind proxies and TLS: the environment counts, and what cannot become better is not asked for again."""

from __future__ import annotations

import pytest

from agent_sdk.agent.llm.client import open_model
from agent_sdk.models import Completion
from agent_sdk.protocol.errors import ModelError, ModelRefused, ModelUnauthorized
from agent_sdk.protocol.specs import LLM
from tests.agent.llm.provider import HELLO, events
from tests.listeners import answering, certify, response, serving

ANSWER = response("200 OK", events("openai", "Hi").decode(), "Content-Type: text/event-stream")


async def ask(base_url: str, key: str | None = "sk-0123456789") -> Completion:
    client = open_model(LLM(model="openai-compatible/m", base_url=base_url, api_key=key, timeout=10.0))
    try:
        return await client.complete(HELLO)
    finally:
        await client.close()


async def refusal(base_url: str, key: str | None = "sk-0123456789") -> ModelError:
    with pytest.raises(ModelError) as refused:
        await ask(base_url, key)
    return refused.value


async def test_a_model_is_asked_through_the_proxy_of_the_environment(monkeypatch):
    async with answering(ANSWER) as (proxy, requests):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.setenv("no_proxy", "")
        assert (await ask("http://models.corp.example/v1")).text == "Hi"
        assert requests[0].startswith(b"POST http://models.corp.example/v1/chat/completions HTTP/1.1")
    async with answering(ANSWER) as (place, direct):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (await ask(f"http://{place}/v1")).text == "Hi"
        assert direct[0].startswith(b"POST /v1/chat/completions HTTP/1.1")


async def test_a_proxy_that_is_none_is_one_sentence(monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    assert "through the proxy 127.0.0.1:1 of the environment" in str(
        await refusal("http://models.example/v1")
    )


async def test_a_certificate_that_is_not_trusted_is_refused_for_good_and_one_that_is_is_fine(
    tmp_path, monkeypatch
):
    file = certify(tmp_path) / "own.pem"
    async with answering(ANSWER, serving(file)) as (place, _):
        error = await refusal(f"https://{place}/v1")
        assert isinstance(error, ModelRefused)
        assert "its certificate is not accepted: self" in str(error)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert (await ask(f"https://{place}/v1")).text == "Hi"


async def test_plain_http_and_tls_are_told_when_they_meet(tmp_path):
    async with answering(ANSWER) as (place, _):
        error = await refusal(f"https://{place}/v1")
        assert isinstance(error, ModelRefused) and "plain HTTP there, not TLS" in str(error)
    async with answering(ANSWER, serving(certify(tmp_path) / "own.pem")) as (place, _):
        error = await refusal(f"http://{place}/v1")
        assert isinstance(error, ModelRefused) and "speaks TLS there, not plain HTTP" in str(error)


@pytest.mark.parametrize(("key", "says"), [(None, True), ("abc", False), ("sk-0123456789", False)])
async def test_only_a_key_that_is_not_there_is_called_missing(key, says):
    async with answering(response("401 Unauthorized", "no")) as (place, _):
        error = await refusal(f"http://{place}/v1", key)
    assert isinstance(error, ModelUnauthorized)
    assert ("no API key is set" in str(error)) is says
