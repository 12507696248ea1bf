"""The boxes of a server: one when it is needed, another when that is lost, the same after a restart."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import signal
from contextlib import asynccontextmanager

import pytest

from agent_sdk.conversation.contract import Waits
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.protocol.errors import ConnectionLost, OutcomeUnknown, PathNotFound, WorkspaceUnavailable
from agent_sdk.protocol.events import Waiting
from agent_sdk.protocol.methods.connection import Initialize, Initialized
from agent_sdk.protocol.methods.workspace import Describe
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.remote.link import persistent
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.unix import serve_unix
from agent_server import logs
from agent_server.boxes.link import BoxLink
from agent_server.boxes.name import BoxName
from agent_server.boxes.registry import Boxes
from agent_server.boxes.watch import told_if_long
from agent_server.config.options import ServerConfig, load
from agent_server.conversations.loaded import BoxPlace
from agent_server.data_folder import DataFolder
from tests.server.test_box_process import ENVIRONMENT, gone
from tests.server.wire import GUARD
from workspaces.box.process import BoxProcess


@pytest.fixture
def folder(tmp_path):
    folder = DataFolder(tmp_path)
    folder.workspace("c").mkdir(parents=True)
    return folder


@asynccontextmanager
async def opened(folder, patience=5.0, **options):
    """The boxes of one server."""
    config = ServerConfig(**{"box_environment": ENVIRONMENT, "boxes_on_stop": "end", **options})
    with logs.opened(style="json", level="debug", stream=io.StringIO()) as log:
        async with Boxes(config, folder, log, lambda: None, patience=patience) as boxes:
            yield boxes


@pytest.fixture
async def boxes(folder):
    async with opened(folder) as boxes:
        yield boxes


async def ended(pid):
    """Wait until this process has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(pidfd, over.set)
    try:
        async with asyncio.timeout(GUARD):
            await over.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


@pytest.fixture
async def link(boxes):
    return boxes.link("c")


async def describe(link):
    return await persistent(link, lambda peer: peer.call(Describe()))


async def lost(link):
    """Wait until the box is known to be lost; returns its last words."""
    told = asyncio.get_running_loop().create_future()
    link.events.listen(told.set_result)
    async with asyncio.timeout(GUARD):
        return (await told).reason


async def kill(link):
    telling = asyncio.ensure_future(lost(link))
    await asyncio.sleep(0)
    os.kill((await describe(link)).pid, signal.SIGKILL)
    await telling


# --- while the server runs ---


async def test_nothing_runs_before_the_first_use(link, boxes):
    assert (link.is_running, boxes.running, await link.idle()) == (False, 0, True)


async def test_many_first_uses_start_one_box(link, boxes):
    told = await asyncio.gather(*(describe(link) for _ in range(5)))
    assert (len({info.pid for info in told}), boxes.running) == (1, 1)


async def test_a_lost_box_is_told_and_replaced(link, folder):
    first = link.instance
    await RemoteWorkspace.over(link).files.write("kept", b"1")
    await kill(link)
    assert not link.is_running
    assert not (folder.boxes / "c").exists()
    assert await RemoteWorkspace.over(link).files.read("kept") == b"1"
    assert link.instance != first


async def test_variables_for_commands_reach_commands_and_do_not_change_how_a_box_starts(folder):
    given = '{"GREETING": "hello", "PYTHONHOME": "/nowhere"}'
    inherited = load(environ={**ENVIRONMENT, "AGENT_SERVER_COMMAND_ENV": given}).box_environment
    async with opened(folder, box_environment=inherited) as boxes:
        result = await RemoteWorkspace.over(boxes.link("c")).execute("env")
    assert {"GREETING=hello", "PYTHONHOME=/nowhere"} < set(result.stdout.splitlines())
    assert "COMMAND_ENV" not in result.stdout


async def test_where_all_files_are_one_clients_the_workspace_is_only_where_things_start(folder, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"1")
    async with opened(folder, files_root="/") as boxes:
        workspace = RemoteWorkspace.over(boxes.link("c"))
        info = await workspace.describe()
        assert (info.root, info.working_dir) == ("/", str(folder.workspace("c")))
        assert await workspace.files.read(str(tmp_path / "elsewhere")) == b"1"
        assert (await workspace.execute("pwd")).stdout == f"{folder.workspace('c')}\n"


async def test_a_call_under_way_has_an_unknown_outcome_when_its_box_is_lost(link):
    result = await RemoteWorkspace.over(link).execute("kill -9 $PPID; sleep 600")
    assert (result.status, result.exit_code) == ("unknown", None)


async def test_a_broken_connection_to_a_box_that_lives_is_made_again(link):
    first = await link.linked()
    await first.peer.close()
    with pytest.raises(ConnectionLost):
        await first.peer.call(Describe())
    second = await link.linked()
    assert second.peer is not first.peer
    assert second.instance == first.instance == link.instance


async def test_a_box_that_is_let_go_of_comes_back(link, folder):
    await RemoteWorkspace.over(link).shell().run("cd /; x=1")
    assert not await link.idle()
    await link.release()
    assert not link.is_running
    answer = await RemoteWorkspace.over(link).shell().run("echo $x$PWD")
    assert answer.output.text.strip() == str(folder.workspace("c"))


async def test_the_next_box_waits_until_the_former_has_ended(link):
    first = await describe(link)
    releasing = asyncio.create_task(link.release())
    await asyncio.sleep(0)
    then = await asyncio.gather(*(describe(link) for _ in range(3)), return_exceptions=True)
    await releasing
    assert gone(first.pid)
    assert {type(info) for info in then} <= {type(first), OutcomeUnknown}
    assert (await describe(link)).pid != first.pid


async def test_a_closed_link_starts_nothing(link):
    await link.close()
    with pytest.raises(WorkspaceUnavailable):
        await link.linked()


async def test_why_a_box_does_not_start_is_told_to_all_who_wait(link, folder):
    folder.workspace("c").rmdir()
    results = await asyncio.gather(link.linked(), link.linked(), return_exceptions=True)
    assert [type(result) for result in results] == [PathNotFound] * 2
    folder.workspace("c").mkdir()
    assert (await describe(link)).root == str(folder.workspace("c"))


async def test_giving_up_waiting_does_not_stop_the_start_for_others(link):
    first, second = (asyncio.create_task(link.linked()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).instance == link.instance


async def test_a_box_that_nobody_uses_is_ended_when_no_call_runs_in_it_any_more(link, folder):
    begun, go = (folder.workspace("c") / name for name in ("begun", "go"))
    os.mkfifo(begun)
    os.mkfifo(go)
    there = RemoteWorkspace.over(link)
    running = asyncio.ensure_future(there.execute("echo >begun; read x <go; echo $x"))
    await asyncio.to_thread(begun.read_text)
    info = await describe(link)
    await link.retire(0)
    assert link.is_running
    assert list(await link.operations()) == list(info.operations) != []
    await asyncio.to_thread(go.write_text, "over\n")
    assert (await running).stdout == "over\n"
    await ended(info.pid)
    assert not link.is_running
    await describe(link)
    await link.retire(0)
    assert not link.is_running


async def test_a_box_that_is_used_meanwhile_is_not_retired(link):
    info = await describe(link)
    retiring = asyncio.create_task(link.retire(0))
    await asyncio.sleep(0)
    assert await describe(link) == info
    await retiring
    assert (await describe(link)).pid == info.pid


# --- after a restart ---


async def abandoned(folder, **options):
    """A box that a killed server left, in which a program waits for input."""
    box = BoxProcess(
        folder.workspace("c"),
        folder.boxes / "c",
        spool=folder.output / "c",
        environment=ENVIRONMENT,
        **options,
    )
    await box.start()
    async with RemoteWorkspace(box.url, box.token) as there:
        await there.start(["cat"], pty=True)
    box.let_go()
    return box


async def test_a_box_of_the_server_before_is_found_with_what_runs_in_it(folder):
    box = await abandoned(folder)
    async with opened(folder) as boxes:
        link = boxes.link("c")
        assert (link.is_running, link.survived, link.instance) == (True, True, box.instance)
        there = RemoteWorkspace.over(link)
        process = there.process((await there.processes())[0].id)
        await process.write(b"hello\n")
        assert b"hello" in await anext(process.output())
    assert gone(box.pid)


async def test_a_terminal_goes_on_through_several_servers(folder):
    async with opened(folder, boxes_on_stop="keep") as boxes:
        there = RemoteWorkspace.over(boxes.link("c"))
        process = await there.start(["bash", "--norc"], pty=True)
        await process.write(b"x=kept\n")
    async with opened(folder, boxes_on_stop="keep") as boxes:
        assert boxes.link("c").survived
    async with opened(folder) as boxes:
        there = RemoteWorkspace.over(boxes.link("c"))
        process = there.process(process.id)
        await process.resize(rows=7, cols=70)
        await process.write(b"echo $x $(stty size); exit 5\n")
        said = b"".join([data async for data in process.output()])
        assert b"kept 7 70" in said
        assert (await process.wait()).exit_code == 5


async def test_boxes_that_run_nothing_are_ended_although_boxes_are_kept(folder):
    async with opened(folder, boxes_on_stop="keep") as boxes:
        info = await describe(boxes.link("c"))
    assert gone(info.pid)
    assert list(folder.boxes.iterdir()) == []


async def test_a_box_that_owes_a_result_is_kept(folder):
    async with opened(folder, boxes_on_stop="keep") as boxes:
        info = await describe(boxes.link("c"))
        boxes.link("c").owing = True
    assert not gone(info.pid)
    async with opened(folder) as boxes:
        assert (await describe(boxes.link("c"))).pid == info.pid


async def test_what_a_dead_box_left_is_removed_at_the_start(folder):
    box = await abandoned(folder)
    os.kill(box.pid, signal.SIGKILL)
    (folder.output / "older").mkdir()
    async with opened(folder) as boxes:
        assert boxes.running == 0
        assert not boxes.link("c").survived
    assert list(folder.boxes.iterdir()) == []
    assert list(folder.output.iterdir()) == []


async def test_a_found_box_that_does_not_answer_is_ended(folder):
    box = await abandoned(folder)
    os.kill(box.pid, signal.SIGSTOP)
    async with opened(folder, patience=0.5) as boxes:
        assert not boxes.link("c").is_running
    assert gone(box.pid)


async def test_a_found_box_to_which_nobody_comes_back_is_ended(folder):
    box = await abandoned(folder)
    async with opened(folder, box_linger_seconds=0.0) as boxes:
        await ended(box.pid)
        assert boxes.running == 0


# --- starts that hang and ends that fail ---


class Stubborn:
    """A box that never comes to be, or cannot be ended."""

    def __init__(self, *, ends: bool) -> None:
        self.starting, self.ends, self.over = asyncio.Event(), ends, False

    def __call__(self, instance: str):
        self.instance, self.ended = instance, asyncio.get_running_loop().create_future()
        return self

    def follow(self, listener) -> None: ...

    async def start(self) -> None:
        self.starting.set()
        await asyncio.Event().wait()

    async def end(self) -> None:
        self.over = True
        if not self.ends:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    cause = ""


def stubborn(folder, *, ends: bool = True) -> tuple[BoxLink, Stubborn]:
    box = Stubborn(ends=ends)
    return BoxLink(box, lambda change, words: None, BoxName(folder.names / "c")), box


async def test_a_box_that_starts_for_ever_holds_up_no_end(folder):
    link, box = stubborn(folder)
    waiting = asyncio.ensure_future(link.linked())
    await box.starting.wait()
    async with asyncio.timeout(GUARD):
        await link.close()
        with pytest.raises(WorkspaceUnavailable, match="closed"):
            await waiting
    assert box.over


async def test_a_box_that_cannot_be_ended_is_one_error_and_the_next_call_starts_another(folder):
    link, box = stubborn(folder, ends=False)
    waiting = asyncio.ensure_future(link.linked())
    await box.starting.wait()
    async with asyncio.timeout(GUARD):
        await link.release()
        with pytest.raises(WorkspaceUnavailable, match="Read-only file system; call again"):
            await waiting
        box.starting.clear()
        again = asyncio.ensure_future(link.linked())
        await box.starting.wait()
        await link.close()
    assert isinstance((await asyncio.gather(again, return_exceptions=True))[0], WorkspaceUnavailable)


class HangsUp:
    """A box that welcomes whoever comes, and then hangs up."""

    instance, token, cause, url = "box", "", "", ""

    def __init__(self) -> None:
        self.ended, self.came = asyncio.get_running_loop().create_future(), 0

    def __call__(self, instance: str):
        return self

    def follow(self, listener) -> None: ...

    async def start(self) -> None: ...

    async def serve(self, pipe) -> None:
        self.came += 1
        welcomed = asyncio.Event()

        async def initialize(params, call):
            welcomed.set()
            return Initialized(
                protocol_version=PROTOCOL_VERSION,
                server=params.client,
                limits=Limits(),
                connection_id="",
                heartbeat_s=20.0,
            )

        async with Peer(pipe, {Initialize: initialize}, opener=False):
            await welcomed.wait()

    def kill(self) -> None:
        if not self.ended.done():
            self.ended.set_result(-9)

    async def end(self) -> None:
        self.kill()

    def last_words(self) -> str:
        return ""


async def test_a_box_that_hangs_up_whenever_somebody_comes_is_killed(folder, tmp_path):
    box = HangsUp()
    box.url = f"unix://{tmp_path / 'box.sock'}"
    link = BoxLink(box, lambda change, words: None, BoxName(folder.names / "c"))
    async with asyncio.timeout(GUARD), serve_unix(str(tmp_path / "box.sock"), box.serve):
        waiting = asyncio.ensure_future(link.linked())
        assert await box.ended == -9
        await link.close()
        await asyncio.gather(waiting, return_exceptions=True)
    assert box.came == 10


async def test_a_box_that_cannot_be_made_is_one_error_for_each_who_asks(folder):
    def make(instance):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    link = BoxLink(make, lambda change, words: None, BoxName(folder.names / "c"))
    for _ in range(2):
        async with asyncio.timeout(GUARD):
            with pytest.raises(WorkspaceUnavailable, match="Input/output error"):
                await link.linked()


# --- boxes that answer nothing ---


async def test_a_call_with_a_limit_is_told_when_its_box_was_stopped_and_goes_on_when_that_goes_on(folder):
    async with opened(folder, patience=0.3) as boxes:
        link = boxes.link("c")
        there, pid = RemoteWorkspace.over(link), (await describe(link)).pid
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(GUARD):
            for asked in (there.execute("sleep 600", timeout=0.1), there.shell().run("true", timeout=0.1)):
                with pytest.raises(WorkspaceUnavailable, match="the box does not answer"):
                    await asked
        os.kill(pid, signal.SIGCONT)
        assert (await there.execute("echo on")).stdout == "on\n"
        assert (await describe(link)).pid == pid


# --- names that calls are written down with ---


async def test_a_name_is_kept_for_the_next_server_until_something_may_begin(folder):
    async with opened(folder) as boxes:
        name = boxes.link("c").named()
    async with opened(folder) as boxes:
        link = boxes.link("c")
        assert (link.instance, link.untouched) == (name, True)
        assert (await link.linked()).instance == name
        assert not link.untouched
        assert list(folder.names.iterdir()) == []
    async with opened(folder) as boxes:
        assert boxes.link("c").instance != name


async def test_what_is_written_down_for_a_box_that_is_ended_is_done_in_the_next_one(folder):
    async with opened(folder) as boxes:
        link = boxes.link("c")
        name = (await link.linked()).instance
        link.awaited = True
    async with opened(folder) as boxes:
        assert (boxes.link("c").instance, boxes.link("c").untouched) == (name, True)
        await boxes.forget("c")
    assert list(folder.names.iterdir()) == []


async def test_a_name_is_not_kept_where_a_call_has_begun(folder):
    async with opened(folder) as boxes:
        link = boxes.link("c")
        name = (await link.linked()).instance
        link.awaited = link.owing = True
    async with opened(folder) as boxes:
        assert boxes.link("c").instance != name


async def test_a_box_whose_processes_have_ended_is_kept_with_what_they_said(folder):
    async with opened(folder, boxes_on_stop="keep") as boxes:
        there = RemoteWorkspace.over(boxes.link("c"))
        process = await there.start("echo said; exit 3")
        assert (await process.wait()).exit_code == 3
    async with opened(folder) as boxes:
        process = RemoteWorkspace.over(boxes.link("c")).process(process.id)
        assert (await process.wait()).exit_code == 3
        assert b"".join([data async for data in process.output()]) == b"said\n"


async def test_a_start_that_takes_long_is_told_and_its_end_as_well():
    said, told = [], asyncio.Event()

    def tell(event):
        said.append((event.what, bool(event.reason)))
        told.set()

    with told_if_long(tell, 0):
        await told.wait()
        assert said == [("box", True)]
    assert said == [("box", True), ("box", False)]
    with told_if_long(tell):
        pass
    assert len(said) == 2


async def test_a_box_that_starts_is_told_in_the_state_at_once(folder):
    async with opened(folder) as boxes:
        link = boxes.link("c")
        place = BoxPlace(link, asyncio.Event())
        conversation = LocalConversation(None, RemoteWorkspace.over(link), place=place)
        async with conversation:
            starting = asyncio.create_task(link.linked())
            await asyncio.wait([starting], timeout=0)
            state = await conversation.state()
            assert ([wait.what for wait in state.waits], state.waiting_for) == (
                ["box"],
                state.waits[0].reason,
            )
            await starting
            assert (await conversation.state()).waits == ()


async def test_who_waits_for_a_turn_hears_that_its_box_takes_long():
    waits = Waits()
    waits.add(Waiting(what="box", reason="its box, which is being started"))
    assert [wait.what for wait in waits] == ["box"]
    waits.add(Waiting(what="box"))
    assert list(waits) == []


# --- copies of its files ---


class Freezes(BoxProcess):
    """A box whose process can be stopped, as a container can."""

    frozen = False

    async def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.frozen = True

    async def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self.frozen = False


async def test_a_box_keeps_still_until_the_end_of_each_of_two_copies(folder):
    box = Freezes(folder.workspace("c"), folder.boxes / "c", environment=ENVIRONMENT)
    link = BoxLink(lambda instance: box, lambda change, words: None, BoxName(folder.names / "c"))
    begun, ends = [asyncio.Event() for _ in range(2)], [asyncio.Event() for _ in range(2)]

    async def copy(nth: int) -> bool:
        async with link.still():
            begun[nth].set()
            await ends[nth].wait()
            return box.frozen

    async with asyncio.timeout(GUARD):
        await link.linked()
        copies = [asyncio.create_task(copy(nth)) for nth in range(2)]
        for nth in range(2):
            await begun[nth].wait()
            ends[nth].set()
            assert await copies[nth]
        assert not box.frozen
        await link.close()
