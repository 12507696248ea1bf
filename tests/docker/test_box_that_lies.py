"""Whatever runs in the place of a box is believed in nothing: one clear error, and nothing is left of it."""

from dataclasses import dataclass

import pytest

from agent_sdk.protocol.errors import ProfileMismatch, WorkspaceUnavailable
from tests.docker.boxes import box, containers
from workspaces.box.host import Once
from workspaces.box.runtime import MOUNT, BoxRuntime
from workspaces.box.sandboxes import Sandboxes, SandboxOptions

pytestmark = pytest.mark.docker

TOOLS = """
import os, signal, socket, struct, sys
def ready(line=b"ready\\n"):
    with open("/run/agent/ready", "wb", 0) as fifo:
        fifo.write(line)
def listening():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/run/agent/box.sock")
    listener.listen()
    ready()
    return listener
def send(pipe, text):
    pipe.sendall(struct.pack(">IB", len(text), 1) + text)
"""


@dataclass(frozen=True)
class Liar(BoxRuntime):
    """The interpreter of the real runtime with another program."""

    program: str

    @property
    def entrypoint(self):
        return [*self.python(MOUNT), "-c", TOOLS + self.program]


@pytest.fixture
async def sandboxes(tmp_path, box_runtime):
    (tmp_path / "boxes").mkdir()
    async with Sandboxes(tmp_path, SandboxOptions(runtimes=box_runtime, linger=120.0)) as sandboxes:
        yield sandboxes


async def refusal(sandboxes, engine, program, kind=WorkspaceUnavailable):
    truth = await sandboxes.host.runtime()

    async def runtime():
        return Liar(truth.path, program)

    sandboxes.host.runtime = Once(runtime)
    with pytest.raises(kind) as refused:
        async with box(sandboxes):
            pass
    assert await containers(engine, sandboxes) == []
    assert sandboxes.recorded("one") is None
    assert "\n" not in str(refused.value)
    assert refused.value.details["phase"] in ("ready", "claim", "profile")
    return str(refused.value)


async def test_one_that_ends_at_its_start_is_told_with_its_exit_code(sandboxes, engine):
    assert "exit code 7" in await refusal(sandboxes, engine, "sys.exit(7)")


async def test_one_that_says_something_else_is_no_box(sandboxes, engine):
    said = await refusal(sandboxes, engine, "ready(b'hello'); signal.pause()")
    assert said == "what started in the sandbox is no box"


async def test_one_that_says_it_listens_and_does_not_has_no_socket(sandboxes, engine):
    said = await refusal(sandboxes, engine, "ready(); signal.pause()")
    assert said == "the box has no socket: No such file or directory"


@pytest.mark.parametrize("instead", ["/run/agent/ready", "/run/docker.sock", "/run/agent/box.sock"])
async def test_a_link_in_the_place_of_its_socket_is_not_followed(sandboxes, engine, instead):
    program = f"os.symlink('{instead}', '/run/agent/box.sock'); ready(); signal.pause()"
    assert "in the place of the box's socket" in await refusal(sandboxes, engine, program)


@pytest.mark.parametrize(
    "answer",
    [
        "pipe.close()",
        "pipe.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n' * 100)",
        "pipe.sendall(b'\\xff' * 4096)",
        "send(pipe, b'{')",
        'send(pipe, b\'{"jsonrpc":"2.0","id":1,"result":{"protocol_version":"x"}}\')',
        'send(pipe, b\'{"jsonrpc":"2.0","id":1,"error":{"code":-32603,"message":"Traceback\\\\nno"}}\')',
    ],
    ids=["hangs up", "another protocol", "garbage", "no JSON", "another answer", "an error"],
)
async def test_one_that_speaks_something_else_is_ended(sandboxes, engine, answer):
    program = f"pipe, _ = listening().accept(); pipe.recv(65536); {answer}; signal.pause()"
    await refusal(sandboxes, engine, program)


async def test_one_whose_system_calls_are_not_filtered_is_ended(sandboxes, engine):
    program = "from agent_sdk.box.process import main; "
    program += "sys.argv.remove('--seccomp'); sys.exit(main([*sys.argv[1:], '--unclaimed']))"
    assert "not filtered twice" in await refusal(sandboxes, engine, program, ProfileMismatch)
