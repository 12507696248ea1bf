"""What people type and copy: the examples and the command line, with a container as the workspace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.servers import SERVER

pytestmark = pytest.mark.docker

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SNIPPET = """
from agent_sdk.sync import Agent, Conversation
from agent_sdk.testing import ScriptedLLM, call, say
from workspaces.sync import DockerWorkspace

agent = Agent(llm=ScriptedLLM([call("terminal", command="sort -o names.txt names.txt"), say("Sorted.")]))

with DockerWorkspace(server_image={image!r}) as workspace:
    workspace.file_upload({file!r}, "names.txt")
    conversation = Conversation(agent=agent, workspace=workspace, callbacks=[print])
    conversation.send_message("Sort names.txt."); conversation.run()
    workspace.file_download("names.txt", {file!r})
    print(workspace.execute_command("ls").stdout)
"""


def run(*command, **environ):
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environ}, capture_output=True, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_here_and_in_a_container_the_same_events_happen(tmp_path):
    here = run(EXAMPLES / "01_here.py", EXAMPLE_DIR=str(tmp_path))
    assert run(EXAMPLES / "04_docker.py", EXAMPLE_IMAGE=SERVER) == here
    assert here[0] == 0


def test_the_blocking_snippet_runs_as_it_is_written(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("Grace\nAda\n")
    code, said, trouble = run("-c", SNIPPET.format(image=SERVER, file=str(file)))
    assert (code, trouble) == (0, "")
    assert said.endswith("names.txt\n\n")
    assert file.read_text() == "Ada\nGrace\n"


def test_the_command_line_runs_a_command_in_a_container():
    words = (
        "-m",
        "agent_server",
        "exec",
        "--workspace",
        f"docker:{SERVER}",
        "--",
        "sh",
        "-c",
        "id -u; exit 3",
    )
    assert run(*words) == (3, "10001\n", "")


def test_the_command_line_runs_an_agent_in_a_container(tmp_path):
    script = tmp_path / "script.json"
    script.write_text(json.dumps([{"step": "say", "text": "Hello from in here."}]))
    code, said, _ = run(
        "-m", "agent_server", "run", "Say hello.", "--script", script, "--workspace", f"docker:{SERVER}"
    )
    assert code == 0
    assert "Hello from in here." in said


def test_the_command_line_says_in_one_line_that_there_is_no_engine(tmp_path):
    words = ("-m", "agent_server", "exec", "--workspace", "docker:", "true")
    code, said, trouble = run(*words, DOCKER_HOST=f"unix://{tmp_path}/docker.sock")
    assert (code, said) == (69, "")
    assert trouble == (
        f"agent-server: there is no engine at unix://{tmp_path}/docker.sock: start Docker, or set DOCKER_HOST\n"
    )
