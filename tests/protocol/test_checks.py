"""What people write in Python is refused where they write it: one sentence with the field, the limit and the value."""

from typing import Any

import pytest

from agent_sdk import (
    LLM,
    Agent,
    ConfirmationPolicy,
    Conversation,
    LocalWorkspace,
    RemoteWorkspace,
    Sandbox,
    sync,
)
from agent_sdk.protocol import specs
from agent_sdk.protocol.checks import checked
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.methods.conversation import Configure
from agent_sdk.testing import ScriptedLLM, hang, say
from workspaces import APIRemoteWorkspace, DockerWorkspace

MODEL = ScriptedLLM([say("hi")])
AGENT = Agent(llm=MODEL)
KEY = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (LLM, {"temperature": "hot"}, "temperature: expected float or None, got 'hot'"),
        (LLM, {"temperature": 3}, "temperature: expected float <= 2.0, got 3"),
        (LLM, {"temperature": float("nan")}, "temperature: expected float >= 0.0, got nan"),
        (LLM, {"retries": 100}, "retries: expected int <= 20, got 100"),
        (LLM, {"retries": True}, "retries: expected int, got True"),
        (LLM, {"timeout": -1}, "timeout: expected float >= 0.001, got -1"),
        (LLM, {"max_output_tokens": 0}, "max_output_tokens: expected int >= 1, got 0"),
        (LLM, {"api_key": KEY.encode()}, "api_key: expected text or None, got bytes"),
        (LLM, {"headers": [KEY]}, "headers: expected a dict, got list"),
        (LLM, {"base_url": "localhost:8000"}, "base_url is no address: it looks like https://host/v1"),
        (LLM, {"base_url": "http://me:secret@host/v1"}, "base_url: it has a user name or password in it"),
        (LLM, {"base_url": "http://me@host/v1"}, "base_url: it has a user name or password in it"),
        (Sandbox, {"cpus": -1}, "cpus: expected float > 0.0, got -1"),
        (Sandbox, {"cpus": 5000}, "cpus: expected float <= 1024.0, got 5000"),
        (Sandbox, {"memory": "plenty"}, "memory: 'plenty' is no size"),
        (Sandbox, {"memory": 512}, "memory: expected text, got 512"),
        (Sandbox, {"mounts": "/data:/data"}, "mounts: expected a list, got '/data:/data'"),
        (Sandbox, {"network": "host"}, "network: expected one of 'none', 'egress', 'bridge', got 'host'"),
        (ConfirmationPolicy, {"mode": "ask"}, "mode: expected one of 'never', 'always', 'writes', got 'ask'"),
        (hang, {"seconds": "long"}, "seconds: expected float, got 'long'"),
        (Agent, {"llm": "gpt-5.5"}, "llm: expected LLM(…) or ScriptedLLM(…), got 'gpt-5.5'"),
        (Agent, {"llm": MODEL, "tools": "terminal"}, "tools: expected a list of names"),
        (
            Agent,
            {"llm": MODEL, "tools": [len]},
            "tools: expected names of tools and functions made with @tool",
        ),
        (Agent, {"llm": MODEL, "tools": ["think", "think"]}, "tools: there are two tools called 'think'"),
        (Conversation, {"agent": "me"}, "agent: expected Agent or None, got 'me'"),
        (Conversation, {"workspace": 5}, "workspace: expected Workspace or text or a path, got 5"),
        (Conversation, {"max_iterations": 0}, "max_iterations: expected 1..1000000, got 0"),
        (
            Conversation,
            {"tags": ["a"]},
            "tags: expected a dict of at most 64 texts to texts or None, got ['a']",
        ),
        (Conversation, {"tags": {"a": 1}}, "tags: expected a dict of at most 64 texts to texts"),
        (Conversation, {"title": 5}, "title: expected text of at most 1024 characters or None, got 5"),
        (Conversation, {"secrets": {"KEY": 5}}, "secrets: expected a dict of text to text or None, got dict"),
        (Conversation, {"callbacks": print}, "callbacks: expected a list of functions"),
        (Conversation, {"callbacks": [5]}, "callbacks: expected a list of functions, got [5]"),
        (Conversation, {"on_delta": 5}, "on_delta: expected a function or None, got 5"),
        (
            Conversation,
            {"confirmation": "always"},
            "confirmation: expected ConfirmationPolicy or None, got 'always'",
        ),
        (Conversation, {"agent_runs": "there"}, "agent_runs: expected 'here' or None, got 'there'"),
        (sync.Conversation, {"callbacks": [5]}, "callbacks: expected a list of functions, got [5]"),
        (LocalWorkspace, {"dir": 5}, "dir: expected text or a path, got 5"),
        (RemoteWorkspace, {"api_key": 5}, "api_key: expected text or None, got int"),
        (RemoteWorkspace, {"sandbox": "image"}, "sandbox: expected Sandbox or None, got 'image'"),
        (DockerWorkspace, {"volumes": "/a:/b"}, "volumes: expected a list of text, got '/a:/b'"),
        (DockerWorkspace, {"startup_timeout": -1}, "startup_timeout: expected 0.001..86400 seconds, got -1"),
        (APIRemoteWorkspace, {"resource_factor": "2"}, "resource_factor: expected int, got '2'"),
    ],
)
def test_a_value_is_refused_where_it_is_written(make: Any, options: dict[str, Any], said: str):
    required: dict[Any, dict[str, Any]] = {
        LLM: {"model": "openai/m"},
        Sandbox: {"image": "debian"},
        Conversation: {"agent": AGENT},
        sync.Conversation: {"agent": AGENT},
        RemoteWorkspace: {"url": "http://127.0.0.1:1"},
        APIRemoteWorkspace: {
            "runtime_api_url": "http://127.0.0.1:1",
            "runtime_api_key": "k",
            "server_image": "agent-server:latest",
        },
    }
    with pytest.raises(InvalidParams) as refused:
        make(**{**required.get(make, {}), **options})
    assert refused.value.message.startswith(said)
    assert KEY not in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("send_message", [5], "text: expected text, got 5"),
        ("send_message", ["x", "queue"], ""),
        ("run", ["soon"], "timeout: expected 0 or more seconds or None, got 'soon'"),
        ("interrupt", [5], "reason: expected text of at most 1024 characters, got 5"),
        ("respond", ["id", "yes"], "answer: expected one of 'approve', 'reject', got 'yes'"),
        ("update_secrets", ["KEY"], "secrets: expected a dict of text to text, got str"),
        ("switch_llm", ["gpt"], "llm: expected LLM or ScriptedLLM, got 'gpt'"),
        ("set_confirmation_policy", ["always"], "policy: expected ConfirmationPolicy, got 'always'"),
        ("set_title", [5], "title: expected text of at most 1024 characters or None, got 5"),
    ],
)
@pytest.mark.parametrize("place", ["here", "there"])
async def test_an_argument_is_refused_before_anything_is_done_with_it(place, verb, arguments, said):
    workspace = "." if place == "here" else RemoteWorkspace("http://127.0.0.1:1")
    conversation = Conversation(AGENT, workspace)
    with pytest.raises(InvalidParams if said else TypeError) as refused:
        await getattr(conversation, verb)(*arguments)
    assert str(refused.value).startswith(said)


def test_a_list_where_a_tuple_is_declared_becomes_one():
    assert Sandbox("debian", mounts=["/a:/b"]).mounts == ("/a:/b",)  # type: ignore[arg-type]


def test_what_comes_over_the_wire_is_held_to_the_same():
    with pytest.raises(InvalidParams, match="user name or password"):
        specs.LLM(model="openai/m", base_url="http://me:secret@host/v1")
    agent = AGENT.spec()
    assert Configure(op_id="1", agent=agent).agent is agent


def test_each_of_any_number_of_arguments_is_checked():
    @checked
    def takes(*numbers: int, **names: str) -> None:
        pass

    takes(1, 2, a="x", b="y")
    with pytest.raises(InvalidParams, match="numbers: expected int, got 'x'"):
        takes(1, "x")
    with pytest.raises(InvalidParams, match="names: expected text, got 5"):
        takes(a=5)
