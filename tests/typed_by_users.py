"""Programs of users as a type checker sees them; `make types` checks it, nothing runs it."""

from collections.abc import Callable, Iterator
from typing import assert_type

import workspaces.sync
from agent_sdk import Agent, RemoteWorkspace, events, sync, tool
from agent_sdk.conversation.contract import Accepted, Outcome
from agent_sdk.testing import ScriptedLLM, say
from agent_sdk.workspace.contract import FileInfo, GitChange, Transferred, WorkspaceInfo


@tool
async def lookup_price(symbol: str, currency: str = "EUR") -> str:
    """Latest price of a stock."""
    return f"1 {currency}"


@tool(name="count", read_only=True)
def count_words(text: str) -> int:
    """How many words there are."""
    return len(text.split())


async def use() -> None:
    assert_type(await lookup_price("X", currency="USD"), str)
    assert_type(count_words("a b"), int)
    await lookup_price(1)  # type: ignore[arg-type]
    count_words(txt="a")  # type: ignore[call-arg]
    plain: Callable[[str], int] = count_words
    plain("a")
    Agent(llm=ScriptedLLM([say("Done.")]), tools=["terminal", lookup_price, count_words])


def on_event(event: events.Event) -> None:
    described: str = event.to_json()
    print(described)


async def use_there(workspace: RemoteWorkspace) -> None:
    assert_type(await workspace.describe(), WorkspaceInfo)
    assert_type(await workspace.files.stat("a"), FileInfo)
    assert_type(await workspace.git.changes(base="HEAD"), list[GitChange])
    await workspace.files.move("a", to="b")  # type: ignore[call-arg]
    await workspace.process("p").resize(rows="1", cols=2)  # type: ignore[arg-type]


def use_blocking(agent: Agent) -> None:
    with sync.RemoteWorkspace("http://127.0.0.1:8000", api_key="k", on_connection=print) as workspace:
        assert_type(workspace, sync.RemoteWorkspace)
        result = workspace.execute("ls", timeout=3, on_output=lambda name, data: print(name, data))
        assert_type(result, sync.ExecResult)
        assert_type(result.whole(), bytes)
        workspace.execute("ls", timeuot=3)  # type: ignore[call-arg]
        workspace.execute(5)  # type: ignore[arg-type]
        assert_type(workspace.files, sync.Files)
        assert_type(workspace.files.list("."), list[FileInfo])
        assert_type(workspace.files.write("a", b"b", mode=0o600), Transferred)
        workspace.files.read("a", ofset=1)  # type: ignore[call-arg]
        process = workspace.start(["cat"])
        assert_type(process, sync.Process)
        assert_type(process.id, str)
        assert_type(process.output(since=1), Iterator[bytes])
        assert_type(workspace.process(process.id), sync.Process)
        assert_type(workspace.shell(), sync.Shell)
    conversation = sync.Conversation(agent, workspace)
    assert_type(conversation.send_message("go", mode="interrupt"), Accepted)
    conversation.send_message("go", mode="later")  # type: ignore[arg-type]
    assert_type(conversation.run(timeout=5), Outcome)
    assert_type(conversation.events(follow=True), Iterator[events.Event])
    assert_type(conversation.id, str)
    sync.RemoteWorkspace("http://127.0.0.1:8000", api_kye="k")  # type: ignore[call-arg]


def use_containers() -> None:
    with workspaces.sync.DockerWorkspace(memory="2g", ports=[80], on_log=print) as workspace:
        assert_type(workspace, workspaces.sync.DockerWorkspace)
        assert_type(workspace.container, str | None)
        assert_type(workspace.port_url(80), str)
    workspaces.DockerWorkspace("image", keep=True, name="kept", volumes=["/a:/a"], heartbeat=5)
    workspaces.DockerWorkspace("image", {"A": "b"})  # type: ignore[call-arg]
    workspaces.DockerWorkspace("image", keep="yes")  # type: ignore[arg-type]
    workspaces.APIRemoteWorkspace("http://api", "key", server_image=5)  # type: ignore[arg-type]
    workspaces.sync.DockerWorkspace(memroy="2g")  # type: ignore[call-arg]
    workspaces.sync.DockerWorkspace(memory=2)  # type: ignore[arg-type]
    session = workspaces.sync.APIRemoteWorkspace("http://api", "key", "image", resource_factor=2)
    assert_type(session.session_id, str)
    workspaces.sync.APIRemoteWorkspace("http://api", "key")  # type: ignore[call-arg]
