"""The examples run, and say what the documents say of them."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_sdk import testing
from agent_sdk.testing import Call
from examples.__main__ import installed

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, **environ):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(data, **options):
    """A server with these options; its address and its key."""
    command = [sys.executable, "-m", "agent_server", "serve", "--port", "0", "--json", "--data", str(data)]
    environ = {**os.environ, "AGENT_SERVER_BOXES_ON_STOP": "end", **options}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as server:
        try:
            ready = json.loads(server.stdout.readline())
            yield ready["url"], Path(ready["api_key_file"]).read_text().strip()
        finally:
            server.terminate()


@contextmanager
def provider(script):
    """An OpenAI-style server that plays a script; its address."""
    steps = list(script.steps)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            step = steps.pop(0)
            message = {"content": step.text}
            if isinstance(step, Call):
                function = {"name": step.tool, "arguments": json.dumps(step.arguments)}
                message["tool_calls"] = [{"id": f"call{len(steps)}", "function": function}]
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def there(server):
    return {"AGENT_SERVER_URL": server.url, "AGENT_SERVER_API_KEY": server.api_key}


@pytest.mark.parametrize("name", ["02_there.py", "04_docker.py", "05_runtime_api.py"])
def test_here_and_there_differ_in_the_workspace_line_only(name):
    here, there = ((EXAMPLES / name).read_text().splitlines() for name in ("01_here.py", name))
    differing = [(a, b) for a, b in zip(here, there, strict=True) if a != b]
    assert len(differing) == 1
    assert all("async with workspaces." in line for line in differing[0])


def test_here_and_there_give_the_same_events_and_the_same_files(running_server, tmp_path):
    before = set(running_server.data.rglob("said.txt"))
    here = run("01_here.py", EXAMPLE_DIR=str(tmp_path))
    assert run("02_there.py", **there(running_server)) == here
    (said,) = set(running_server.data.rglob("said.txt")) - before
    assert sorted(path.name for path in said.parent.iterdir()) == sorted(p.name for p in tmp_path.iterdir())
    assert said.read_bytes() == (tmp_path / "said.txt").read_bytes() == b"Hello from 42\n"
    assert (said.parent / "hello.py").read_bytes() == (tmp_path / "hello.py").read_bytes()


def test_a_server_that_a_runtime_api_starts_gives_the_same_events(tmp_path):
    with serving(tmp_path / "data", AGENT_SERVER_RUNTIME_API="process") as (url, key):
        there = run("05_runtime_api.py", API_URL=url, API_KEY=key, API_IMAGE="agent-server:latest")
    assert there == run("01_here.py", EXAMPLE_DIR=str(tmp_path))


def test_a_middleware_of_ones_own_works_here_and_there(tmp_path):
    here = run("07_middleware.py", EXAMPLE_DIR=str(tmp_path))
    with installed() as path, serving(tmp_path / "data", PYTHONPATH=path) as (url, key):
        there = run("07_middleware.py", AGENT_SERVER_URL=url, AGENT_SERVER_API_KEY=key)
    said = "status='limit', reason='the agent has made 3 tool calls, which is its limit'"
    assert said in here
    assert said in there


def test_a_middleware_that_a_server_has_not_installed_is_refused(running_server):
    with pytest.raises(AssertionError, match="InvalidParams: middleware: there is no 'call_limit' where"):
        run("07_middleware.py", **there(running_server))


def test_the_blocking_snippet_runs(running_server):
    assert run("03_blocking.py", **there(running_server)).endswith("Ada\nGrace\n")


@pytest.mark.parametrize("name", ["01_here.py", "02_there.py", "03_blocking.py"])
def test_an_example_leaves_nothing_open_when_its_model_is_reached_over_http(name, running_server, tmp_path):
    """The example as it stands, but for its model; and every warning is an error."""
    program = (EXAMPLES / name).read_text()
    script = re.search(r"ScriptedLLM\(\s*\[.*?\]\s*\)", program, re.DOTALL)[0]
    environ = {"EXAMPLE_DIR": str(tmp_path), "PYTHONWARNINGS": "error", "PYTHONPATH": str(EXAMPLES.parent)}
    with provider(eval(script, vars(testing).copy())) as url:
        changed = program.replace(script, f"__import__('agent_sdk').LLM(model='vllm/m', base_url={url!r})")
        (tmp_path / name).write_text(changed)
        done = subprocess.run(
            [sys.executable, tmp_path / name],
            env={**os.environ, **there(running_server), **environ},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == run(name, **there(running_server), EXAMPLE_DIR=str(tmp_path))
        or name == "03_blocking.py"
    )
