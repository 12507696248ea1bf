"""make demo, as it is run on a fresh clone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def demo(shell, **environ):
    command = [sys.executable, "-m", "examples.demo"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**shell.environ, **environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_the_demo_repairs_the_project_and_leaves_nothing_behind(shell):
    temporary = shell.folder / "tmp"
    temporary.mkdir()
    # What is meant for another server must not reach the demo's.
    done = demo(shell, TMPDIR=str(temporary), AGENT_SERVER_PORT="1", AGENT_SERVER_LOG_LEVEL="loud")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(temporary.iterdir()) == []
    said = done.stdout
    assert said.index("2 failed, 2 passed") < said.index("a script, not a model") < said.rindex("4 passed")
    assert "\n-        return sum(cents for _, cents, _ in self._lines)\n" in said
    assert "\n+        return sum(cents * count for _, cents, count in self._lines)\n" in said
    assert said.endswith("The tests failed before and pass now.\n")


def test_a_model_that_cannot_be_used_is_one_sentence(shell):
    done = demo(shell, LLM_API_KEY="some-key")
    assert done.stderr == "demo: LLM_MODEL is not set; it names the model, e.g. LLM_MODEL=openai/gpt-5.5\n"
    assert done.returncode == 1
