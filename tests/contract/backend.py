"""What every backend promises of the machines it runs, whatever they are."""

import asyncio

import aiohttp
import pytest
from msgspec.structs import replace

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import InvalidParams, NotFound, WorkspaceUnavailable
from tests.server.wire import GUARD
from workspaces.backend.contract import KEY_NAME, SERVER_PORT, Machine, Storage
from workspaces.server import Server


async def key_fits(server):
    """Whether this server takes the key of its machine."""
    async with RemoteWorkspace(server.url, server.api_key) as workspace:
        return (await workspace.execute("true")).exit_code == 0


class BackendContract:
    """Run against every backend; the fixtures say which, and whose machines are."""

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
    def image(self):
        return "agent-server:latest"

    @pytest.fixture
    async def machine(self, backend, labels, image):
        machine = Machine(
            name=f"agent-test-{new_id()}",
            labels=labels,
            image=image,
            secret_env={KEY_NAME: new_id()},
            storage=Storage("/data"),
        )
        yield machine
        await backend.stop(machine.name)

    @pytest.fixture
    async def running(self, backend, machine):
        """A server that accepts connections."""
        server = Server(backend, machine)
        await server.start(GUARD)
        yield server
        await server.let_go()

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

    async def test_making_it_twice_is_making_it_once(self, backend, again, running):
        async with again() as other:
            assert await other.create(running.machine) == running.id
            await other.start(running.id)
        assert await key_fits(running)

    async def test_a_name_that_is_somebody_elses_is_not_taken(self, backend, machine, labels):
        id = await backend.create(machine)
        others = dict.fromkeys(labels, "somebody else")
        with pytest.raises(InvalidParams, match=f"^name: .*{machine.name} of somebody else"):
            await backend.create(replace(machine, labels=others))
        assert [found.id for found in await backend.list(labels)] == [id]

    async def test_it_is_found_by_its_name_with_all_that_is_needed_to_use_it(self, again, running):
        async with again() as other:
            facts = await other.inspect(running.machine.name)
            assert (facts.id, facts.name, facts.state) == (running.id, running.machine.name, "running")
            assert facts.image == running.machine.image
            assert facts.env[KEY_NAME] == running.api_key
            assert await other.endpoint(running.machine.name, SERVER_PORT) == running.url

    async def test_a_start_that_is_cancelled_can_be_repeated(self, backend, machine):
        id = await backend.create(machine)
        starting = asyncio.create_task(backend.start(id))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        server = Server(backend, machine)
        await server.start(GUARD)
        assert await key_fits(server)
        await server.let_go()

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

    # --- its life ---

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

    async def test_its_end_is_told_to_whoever_waits_and_to_whoever_asks_later(self, backend, running):
        assert await key_fits(running)  # by then it has written its first lines
        waiting = asyncio.create_task(backend.wait(running.id))
        await asyncio.sleep(0)
        await backend.stop(running.id, keep_data=True)
        for ending in (await waiting, await backend.wait(running.id)):
            assert ending.cause in ("killed", "exit", "engine")
            assert ending.reason
            assert "server_started" in ending.words

    async def test_cancelling_a_wait_ends_the_waiting_only(self, backend, running):
        waiting = asyncio.create_task(backend.wait(running.id))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await backend.inspect(running.id)).state == "running"

    async def test_its_last_lines_can_be_read_and_no_more_than_are_wanted(self, backend, running):
        assert "server_started" in await backend.logs(running.id)
        assert len((await backend.logs(running.id, 1)).splitlines()) == 1

    async def test_a_backend_that_is_let_go_of_leaves_it_running(self, again, machine):
        async with again() as first:
            server = Server(first, machine)
            await server.start(GUARD)
            await server.let_go()
        async with again() as second:
            assert (await second.inspect(machine.name)).state == "running"

    # --- its end ---

    async def test_nothing_is_left_of_what_was_stopped_and_stopping_it_again_is_fine(
        self, backend, running, labels
    ):
        await backend.stop(running.id)
        assert await backend.list(labels) == []
        await backend.stop(running.id)
        await backend.stop(running.machine.name)
        with pytest.raises(NotFound):
            await backend.inspect(running.machine.name)

    @pytest.mark.parametrize("call", ["start", "resume", "inspect"])
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

    async def test_others_machines_are_not_listed(self, backend, running, labels):
        name = next(iter(labels))
        assert await backend.list({name: new_id()}) == []
        assert running.machine.name in [found.name for found in await backend.list({name: None})]
