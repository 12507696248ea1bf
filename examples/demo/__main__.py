"""`python -m examples.demo` (make demo): an agent repairs a project whose tests fail.

Everything is real but, unless LLM_API_KEY is set, the model: a server in a process of its own, its
box, the commands, the files, the events. It leaves nothing behind.
"""

import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent_sdk import LLM, Agent, Conversation, RemoteWorkspace
from agent_sdk.protocol.errors import AgentServerError, visible
from agent_sdk.protocol.specs import Model
from agent_sdk.testing import ScriptedLLM, call, say
from agent_sdk.workspace.contract import Workspace
from agent_server.cli.terminal import Terminal, open_terminal
from agent_server.cli.transcript import open_viewer, usage

PROJECT = Path(__file__).parent / "project"
TESTS = f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {shlex.quote(sys.executable)} -B -m pytest"
TASK = f"The tests of this project fail. Repair the code, not the tests. Run them with: {TESTS}"

SCRIPT = ScriptedLLM(
    [
        call("terminal", command=TESTS, saying="Let me see what fails."),
        call("file_editor", command="view", path="basket.py", saying="The total ignores how many there are."),
        call(
            "file_editor",
            command="str_replace",
            path="basket.py",
            old_str="sum(cents for _, cents, _ in self._lines)",
            new_str="sum(cents * count for _, cents, count in self._lines)",
        ),
        call("terminal", command=TESTS, saying="Now the tests again."),
        say("`Basket.total` forgot to multiply by the count. It does now, and all tests pass."),
    ]
)


async def main() -> int:
    screen = open_terminal()
    model = choose_model()
    with tempfile.TemporaryDirectory(prefix="agent-server-demo-") as folder:
        async with server(Path(folder)) as (url, api_key):
            await title(screen, f"A server runs at {url}, with everything it keeps in {folder}")
            async with RemoteWorkspace(url, api_key) as workspace:
                repaired = await repair(screen, workspace, model, Path(folder))
    await title(screen, "The server is stopped, its folder is gone")
    await screen.line("The tests failed before and pass now." if repaired else "The project is not repaired.")
    return 0 if repaired else 1


def choose_model() -> Model:
    return LLM.from_env() if os.environ.get("LLM_API_KEY") else SCRIPT


async def repair(screen: Terminal, workspace: Workspace, model: Model, folder: Path) -> bool:
    """The whole task; whether the tests failed before and pass after."""
    await title(screen, "A project goes into the workspace")
    for file in sorted(PROJECT.iterdir()):
        if file.is_file():
            sent = await workspace.upload(file, file.name)
            await screen.line(f"{file.name}: {sent.size} bytes, sha256 {sent.sha256[:16]}…")
    await git(workspace)

    await title(screen, "Its tests, before")
    failed_before = not await tests_pass(screen, workspace)

    who = (
        "a script, not a model; set LLM_MODEL and LLM_API_KEY for a real one"
        if model is SCRIPT
        else model.model
    )
    await title(screen, f"An agent repairs it (its model: {who})")
    viewer = open_viewer(json=False)
    conversation = Conversation(
        agent=Agent(llm=model), workspace=workspace, callbacks=[viewer.event], on_delta=viewer.delta
    )
    await conversation.send_message(TASK)
    await viewer.watch(conversation.run())

    await title(screen, "Its tests, after")
    pass_after = await tests_pass(screen, workspace)

    await title(screen, "What changed, and what it cost")
    await screen.line(visible(await workspace.git.diff()))
    stats = await conversation.stats()
    price = (
        ""
        if stats.cost is not None
        else "; a script costs nothing"
        if model is SCRIPT
        else "; price not known"
    )
    used = usage(stats.input_tokens, stats.output_tokens, stats.cost)
    await screen.line(f"{stats.model_calls} model calls, {stats.tool_calls} tool calls: {used}{price}")
    got = await workspace.download("basket.py", folder / "basket.py")
    await screen.line(f"basket.py came back: {got.size} bytes, sha256 {got.sha256[:16]}…")
    return failed_before and pass_after


async def tests_pass(screen: Terminal, workspace: Workspace) -> bool:
    result = await workspace.execute(TESTS, timeout=60)
    await screen.line(visible(result.stdout + result.stderr).rstrip(), "dim")
    await screen.line(f"exit code {result.exit_code} after {result.duration:.1f} s")
    return result.exit_code == 0


async def git(workspace: Workspace) -> None:
    identity = "-c user.name=demo -c user.email=demo@localhost"
    await workspace.execute(
        f"git init --quiet && git add --all && git {identity} commit --quiet -m 'As it was'"
    )


async def title(screen: Terminal, text: str) -> None:
    await screen.line(f"\n=== {text}", "bold")


@asynccontextmanager
async def server(folder: Path) -> AsyncIterator[tuple[str, str]]:
    """A server with its defaults, but that it ends all it started, as a process of its own; its URL and key."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AGENT_SERVER_")}
    environ["AGENT_SERVER_BOXES_ON_STOP"] = "end"
    command = [
        sys.executable,
        "-m",
        "agent_server",
        "serve",
        "--port",
        "0",
        "--json",
        "--data",
        str(folder / "data"),
    ]
    log = folder / "server.log"
    with log.open("wb") as lines:
        process = await asyncio.create_subprocess_exec(
            *command, env=environ, stdout=asyncio.subprocess.PIPE, stderr=lines
        )
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {log.read_text()}")
        ready = json.loads(line)
        yield ready["url"], Path(ready["api_key_file"]).read_text().strip()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except (AgentServerError, RuntimeError) as exc:
        sys.exit(f"demo: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
