"""From `provider/name` to an address, a dialect and headers."""

import pytest

from agent_sdk.agent.llm.provider import PROVIDERS, Address, address_of
from agent_sdk.definition import LLM as UsersLLM
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.specs import LLM

KEY = "sk-0123456789abcdef"


def address(model: str, **options: object) -> Address:
    return address_of(LLM(model=model, **options))


@pytest.mark.parametrize(
    "model, url, name",
    [
        ("openai/gpt-5.5", "https://api.openai.com/v1/chat/completions", "gpt-5.5"),
        ("anthropic/claude-sonnet-5", "https://api.anthropic.com/v1/messages", "claude-sonnet-5"),
        (
            "openrouter/anthropic/claude-sonnet-5",
            "https://openrouter.ai/api/v1/chat/completions",
            "anthropic/claude-sonnet-5",
        ),
        (
            "groq/openai/gpt-oss-120b",
            "https://api.groq.com/openai/v1/chat/completions",
            "openai/gpt-oss-120b",
        ),
        ("ollama/qwen3:8b", "http://127.0.0.1:11434/v1/chat/completions", "qwen3:8b"),
    ],
)
def test_the_provider_picks_the_address(model: str, url: str, name: str):
    found = address(model)
    assert (found.url, found.model) == (url, name)


@pytest.mark.parametrize("model", ["Qwen/Qwen3-Coder", "my-model"])
def test_an_unknown_name_belongs_to_the_server_at_base_url(model: str):
    found = address(model, base_url="http://gpu:8000/v1")
    assert found.url == "http://gpu:8000/v1/chat/completions"
    assert (found.provider, found.model) == ("openai-compatible", model)


@pytest.mark.parametrize(
    "base_url",
    [
        "http://gpu:8000/v1",
        "http://gpu:8000/v1/",
        " http://gpu:8000/v1/chat/completions ",
        "http://gpu:8000/v1#part",
    ],
)
def test_spellings_of_a_base_url_mean_the_same(base_url: str):
    assert address("vllm/m", base_url=base_url).url == "http://gpu:8000/v1/chat/completions"


def test_a_query_stays_where_it_belongs():
    url = address("azure/gpt-5.5", base_url="https://x.openai.azure.com/openai/v1?api-version=preview").url
    assert url == "https://x.openai.azure.com/openai/v1/chat/completions?api-version=preview"


@pytest.mark.parametrize("model", ["gpt-5.5", "nobody/model"])
def test_an_unknown_provider_is_refused_with_the_list_of_known_ones(model: str):
    with pytest.raises(InvalidParams) as caught:
        address(model)
    assert all(name in caught.value.message for name in PROVIDERS)
    assert "base_url" in caught.value.message


@pytest.mark.parametrize("model", ["vllm/m", "azure/m", "openai-compatible/m"])
def test_a_provider_without_a_place_of_its_own_needs_a_base_url(model: str):
    with pytest.raises(InvalidParams, match="set base_url"):
        address(model)


def test_a_provider_without_a_model_is_refused():
    with pytest.raises(InvalidParams, match="no name"):
        address("openai/")


@pytest.mark.parametrize(
    "base_url",
    [
        "ftp://host/v1",
        "host/v1",
        "http://",
        "http://host:port/v1",
        "http://[::1/v1",
        "http://a b/v1",
        "file:///etc/passwd",
        "http://h\nost/v1",
        "http://host:0/v1",
    ],
)
def test_what_is_no_address_is_refused(base_url: str):
    with pytest.raises(InvalidParams, match="base_url"):
        address("vllm/m", base_url=base_url)


@pytest.mark.parametrize(
    "model, header, value",
    [
        ("openai/m", "Authorization", f"Bearer {KEY}"),
        ("anthropic/m", "x-api-key", KEY),
        ("azure/m", "api-key", KEY),
    ],
)
def test_each_provider_gets_the_key_in_its_header(model: str, header: str, value: str):
    headers = address(model, api_key=f"{KEY}\n", base_url="https://host/v1").headers
    assert headers[header] == value
    assert sum(KEY in sent for sent in headers.values()) == 1


def test_without_a_key_none_is_sent():
    assert "Authorization" not in address("ollama/m").headers


def test_own_headers_come_first():
    headers = address("openai/m", api_key=KEY, headers={"authorization": "Basic xyz", "X-Title": "t"}).headers
    assert (headers["authorization"], headers["X-Title"]) == ("Basic xyz", "t")
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "sk-\r\nHost: evil"},
        {"api_key": "schlüssel-✓"},
        {"headers": {"X-A": "a\r\nb: c"}},
        {"headers": {"X A": "a"}},
        {"headers": {"": "a"}},
    ],
)
def test_what_http_cannot_carry_is_refused_and_not_shown(options: dict[str, object]):
    with pytest.raises(InvalidParams) as caught:
        address("openai/m", **options)
    assert "evil" not in caught.value.message


def test_an_address_does_not_show_secrets():
    found = address("vllm/m", api_key=KEY, base_url="https://host/v1", headers={"X-Key": "pass-word-long"})
    assert repr(found) == "Address(vllm/m at host)"
    assert KEY in found.secrets
    assert "pass-word-long" in found.secrets


def test_the_llm_of_users_is_taken_as_well():
    assert address_of(UsersLLM(model="openai/m")).model == "m"
