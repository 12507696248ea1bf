"""What every backend promises of the machines it runs, whatever they are: servers, and boxes."""

import asyncio
from contextlib import aclosing

import aiohttp
import pytest
from msgspec.structs import replace

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import InvalidParams, NotFound, WorkspaceUnavailable
from agent_sdk.protocol.methods.workspace import Claim
from agent_sdk.remote.connection import connect
from tests.server.wire import GUARD
from workspaces.backend.contract import KEY_NAME, SERVER_PORT, Machine, Storage
from workspaces.box.folder import READY_LINE, BoxFolder
from workspaces.server import Server


async def key_fits(server):
    """Whether this server takes the key of its machine."""
    async with RemoteWorkspace(server.url, server.api_key) as workspace:
        return (await workspace.execute("true")).exit_code == 0


async def told(events, *states):
    """Wait until a machine is in each of these states, one after the other; returns the last that was told."""
    async with asyncio.timeout(GUARD):
        for state in states:
            async for found in events:
                if found.state == state:
                    break
    return found


class MachineContract:
    """Run against every backend and every profile; the fixtures say which, and whose machines are."""

    @pytest.fixture
    async def backend(self):
        """The backend, entered."""
        raise NotImplementedError

    @pytest.fixture
    def again(self):
        """The same backend as another process would have it: a function that returns a context manager."""
        raise NotImplementedError

    @pytest.fixture
    def labels(self):
        """Of the machines of this test, and of no others."""
        raise NotImplementedError

    @pytest.fixture
    async def described(self, labels):
        """A machine that nobody has made."""
        raise NotImplementedError

    @pytest.fixture
    async def machine(self, backend, described):
        yield described
        await backend.stop(described.name)

    @pytest.fixture
    async def running(self, backend, machine):
        """What runs in it, when it can be used: it has an `id`."""
        raise NotImplementedError

    async def works(self, running):
        """Whether it can be used."""
        raise NotImplementedError

    # --- made ---

    async def test_a_machine_is_there_once_it_is_made_and_runs_once_it_is_started(
        self, backend, machine, labels
    ):
        assert await backend.list(labels) == []
        id = await backend.create(machine)
        (found,) = await backend.list(labels)
        assert (found.id, found.name, found.state) == (id, machine.name, "created")
        assert found.labels.items() >= labels.items()
        await backend.start(id)
        (found,) = await backend.list(labels)
        assert found.state == "running"

    async def test_making_it_twice_is_making_it_once(self, backend, again, machine, running):
        async with again() as other:
            assert await other.create(machine) == running.id
            await other.start(running.id)
        assert await self.works(running)

    async def test_a_name_that_is_somebody_elses_is_not_taken(self, backend, machine, labels):
        id = await backend.create(machine)
        others = dict.fromkeys(labels, "somebody else")
        with pytest.raises(InvalidParams, match=f"^name: .*{machine.name} of somebody else"):
            await backend.create(replace(machine, labels=others))
        assert [found.id for found in await backend.list(labels)] == [id]

    async def test_it_is_found_by_its_name(self, again, machine, running):
        async with again() as other:
            facts = await other.inspect(machine.name)
            assert (facts.id, facts.name, facts.state) == (running.id, machine.name, "running")
            assert facts.image == machine.image

    async def test_it_is_what_was_described(self, backend, machine, running):
        assert await backend.differences(running.id, machine) == []

    async def test_a_start_that_is_cancelled_can_be_repeated(self, backend, machine):
        id = await backend.create(machine)
        starting = asyncio.create_task(backend.start(id))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await backend.start(id)
        assert (await backend.inspect(id)).state == "running"

    # --- its life ---

    async def test_its_end_is_told_to_whoever_waits_and_to_whoever_asks_later(self, backend, running):
        assert await self.works(running)
        waiting = asyncio.create_task(backend.wait(running.id))
        await asyncio.sleep(0)
        await backend.stop(running.id, keep_data=True)
        for ending in (await waiting, await backend.wait(running.id)):
            assert ending.cause in ("killed", "exit", "engine")
            assert ending.reason

    async def test_cancelling_a_wait_ends_the_waiting_only(self, backend, running):
        waiting = asyncio.create_task(backend.wait(running.id))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await backend.inspect(running.id)).state == "running"

    async def test_a_backend_that_is_let_go_of_leaves_it_running(self, again, machine):
        async with again() as first:
            await first.start(await first.create(machine))
        async with again() as second:
            assert (await second.inspect(machine.name)).state == "running"

    async def test_what_it_uses_is_told_as_far_as_somebody_knows(self, backend, running):
        usage = await backend.usage(running.id)
        assert usage.memory is None or usage.memory > 0

    # --- what is told of it ---

    async def test_whoever_is_told_of_changes_is_told_of_all_there_are_first(self, backend, labels, running):
        async with aclosing(backend.events(labels)) as events:
            found = await told(events, "running")
        assert (found.id, found.labels.items() >= labels.items()) == (running.id, True)

    async def test_every_change_of_its_state_is_told(self, backend, labels, machine):
        async with aclosing(backend.events(labels)) as events:
            first = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            id = await backend.create(machine)
            found = await first
            if found.state != "running":
                await backend.start(id)
                found = await told(events, "running")
            await backend.pause(id)
            await told(events, "paused" if "freeze" in backend.can else "ended")
            await backend.resume(id)
            await told(events, "running")
            await backend.stop(id)
            found = await told(events, "ended")
        assert (found.id, found.name) == (id, machine.name)

    async def test_nothing_is_told_of_others_machines(self, backend, labels, machine, running):
        async with aclosing(backend.events(dict.fromkeys(labels, new_id()))) as events:
            waiting = asyncio.ensure_future(anext(events))
            async with aclosing(backend.events(labels)) as mine:
                await told(mine, "running")
                await backend.stop(running.id, keep_data=True)
                await told(mine, "ended")
            assert not waiting.done()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    # --- its end ---

    async def test_nothing_is_left_of_what_was_stopped_and_stopping_it_again_is_fine(
        self, backend, machine, running, labels
    ):
        await backend.stop(running.id)
        assert await backend.list(labels) == []
        await backend.stop(running.id)
        await backend.stop(machine.name)
        with pytest.raises(NotFound):
            await backend.inspect(machine.name)

    @pytest.mark.parametrize("call", ["start", "resume", "inspect", "usage"])
    async def test_what_was_never_made_is_not_found(self, backend, call):
        with pytest.raises(NotFound):
            await getattr(backend, call)(f"agent-test-{new_id()}")

    @pytest.mark.parametrize("call", ["stop", "pause", "logs"])
    async def test_ending_what_was_never_made_is_fine(self, backend, call):
        assert not await getattr(backend, call)(f"agent-test-{new_id()}")

    async def test_the_end_of_what_was_never_made_is_told_at_once(self, backend):
        ending = await backend.wait(f"agent-test-{new_id()}")
        assert (ending.cause, ending.exit_code) == ("engine", None)

    # --- whose it is ---

    async def test_others_machines_are_not_listed(self, backend, machine, running, labels):
        name = next(iter(labels))
        assert await backend.list({name: new_id()}) == []
        assert machine.name in [found.name for found in await backend.list({name: None})]


class ServerContract(MachineContract):
    """Machines with an agent server."""

    @pytest.fixture
    def image(self):
        return "agent-server:latest"

    @pytest.fixture
    async def described(self, labels, image):
        return Machine(
            name=f"agent-test-{new_id()}",
            labels=labels,
            image=image,
            secret_env={KEY_NAME: new_id()},
            storage=Storage("/data"),
        )

    @pytest.fixture
    async def running(self, backend, machine):
        """A server that accepts connections."""
        server = Server(backend, machine)
        await server.start(GUARD)
        yield server
        await server.let_go()

    async def works(self, running):
        return await key_fits(running)

    async def test_it_is_found_with_all_that_is_needed_to_use_it(self, again, running):
        async with again() as other:
            assert (await other.inspect(running.machine.name)).env[KEY_NAME] == running.api_key
            assert await other.endpoint(running.machine.name, SERVER_PORT) == running.url

    async def test_a_server_whose_start_is_cancelled_does_not_run_and_may_be_started_again(
        self, backend, machine
    ):
        def on_progress(phase, done, total):
            if (phase, done) == ("ready", 0):
                starting.cancel()

        starting = asyncio.create_task(Server(backend, machine, on_progress=on_progress).start(GUARD))
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert (await backend.inspect(machine.name)).state == "ended"
        server = Server(backend, machine)
        await server.start(GUARD)
        assert await key_fits(server)
        await server.let_go()

    async def test_a_server_that_runs_already_goes_on_when_it_is_started_again_in_vain(
        self, backend, running
    ):
        def on_progress(phase, done, total):
            if (phase, done) == ("ready", 0):
                starting.cancel()

        again = Server(backend, running.machine, on_progress=on_progress)
        starting = asyncio.create_task(again.start(GUARD))
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert (await backend.inspect(running.machine.name)).state == "running"
        assert await key_fits(running)

    @pytest.mark.parametrize("fields", [{"name": "a b"}, {"memory": 1}, {"cpus": 0}, {"pids": 1}])
    def test_a_machine_that_makes_no_sense_cannot_be_described(self, labels, fields):
        with pytest.raises(InvalidParams, match=f"^{next(iter(fields))}: "):
            Machine(**{"name": "fine", "labels": labels, **fields})

    async def test_only_what_runs_has_an_endpoint(self, backend, machine, running):
        async with aiohttp.ClientSession() as http, http.get(f"{running.url}/health") as answer:
            assert answer.status == 200
        await backend.stop(running.id, keep_data=True)
        with pytest.raises(WorkspaceUnavailable):
            await backend.endpoint(running.id, SERVER_PORT)

    async def test_what_is_paused_goes_on_and_so_does_what_is_paused_already(self, backend, running):
        await backend.pause(running.id)
        await backend.pause(running.id)
        state = (await backend.inspect(running.id)).state
        assert state == ("paused" if "freeze" in backend.can else "ended")
        await backend.resume(running.id)
        await backend.resume(running.id)
        assert (await backend.inspect(running.id)).state == "running"

    async def test_what_it_has_stored_outlives_a_pause_and_an_end(self, backend, running, machine):
        async with RemoteWorkspace(running.url, running.api_key) as workspace:
            await workspace.execute("echo kept > file")
            conversation = workspace.conversation
        await backend.pause(running.id)
        await running.start(GUARD)
        await backend.stop(running.id, grace=5, keep_data=True)
        await running.start(GUARD)
        async with RemoteWorkspace(running.url, running.api_key, conversation=conversation) as workspace:
            assert (await workspace.execute("cat file")).stdout == "kept\n"

    async def test_its_last_words_are_told_with_its_end(self, backend, running):
        assert await key_fits(running)  # by then it has written its first lines
        await backend.stop(running.id, keep_data=True)
        assert "server_started" in (await backend.wait(running.id)).words

    async def test_its_last_lines_can_be_read_and_no_more_than_are_wanted(self, backend, running):
        assert "server_started" in await backend.logs(running.id)
        assert len((await backend.logs(running.id, 1)).splitlines()) == 1


class RunningBox:
    """A box that was claimed."""

    def __init__(self, id, folder):
        self.id = id
        self.url = f"unix://{folder.run / 'box.sock'}"
        self.token = new_id()


class BoxContract(MachineContract):
    """Machines with a box, whose socket is in a folder of this machine."""

    @pytest.fixture
    def folder(self, tmp_path):
        """Of the box."""
        folder = BoxFolder(tmp_path / "box")
        folder.make()
        return folder

    @pytest.fixture
    async def running(self, backend, machine, folder):
        """A box that was claimed."""
        id = await backend.create(machine)
        async with folder.ready() as said, asyncio.timeout(GUARD):
            await backend.start(id)
            assert await said == READY_LINE
        box = RunningBox(id, folder)
        async with connect(box.url) as connection:
            claim = Claim(op_id=new_id(), instance=new_id(), token=box.token, env={"PATH": "/bin:/usr/bin"})
            await connection.peer.call(claim)
        return box

    async def works(self, running):
        async with RemoteWorkspace(running.url, running.token) as workspace:
            return (await workspace.execute("true")).exit_code == 0

    async def test_only_what_was_given_a_port_has_an_endpoint(self, backend, running):
        with pytest.raises(WorkspaceUnavailable):
            await backend.endpoint(running.id, SERVER_PORT)
