"""A box that is alone in a container, without the container: claimed before it is used, with a report of itself."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from agent_sdk.box.process import STRANGERS
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import OpMismatch, StateConflict, Unauthorized
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize
from agent_sdk.protocol.methods.workspace import Claim, Describe, Execute, FilesList
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.unix import connect_unix
from agent_sdk.workspace.limits import present_profile
from tests.server.wire import GUARD


@pytest.fixture
async def connect(tmp_path):
    """Start an unclaimed box and return how one connects to it."""
    (tmp_path / "root").mkdir()
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/ready")
    reading = os.open(tmp_path / "run/ready", os.O_RDONLY | os.O_NONBLOCK)
    options = ["--folder", str(tmp_path / "run"), "--root", str(tmp_path / "root"), "--linger", "60"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent_sdk.box", "--unclaimed", "--seccomp", *options),
        *("--ready", str(tmp_path / "run/ready")),
        stdout=asyncio.subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "TESTS_RUN": os.environ["TESTS_RUN"]},
    )
    said = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(
        reading, lambda: said.done() or said.set_result(os.read(reading, 100))
    )
    try:
        async with asyncio.timeout(GUARD):
            assert await said == b"ready\n"
        yield lambda: connected(str(tmp_path / "run/box.sock"))
    finally:
        asyncio.get_running_loop().remove_reader(reading)
        os.close(reading)
        process.terminate()
        assert await process.wait() == 0


@asynccontextmanager
async def connected(path):
    async with Peer(await connect_unix(path), opener=True) as peer:
        yield peer


async def name_of(peer):
    params = Initialize(protocol_version=1, client=ClientInfo(name="test", version="1"), limits=Limits())
    return (await peer.call(params)).connection_id


async def ran(peer, text):
    return (await peer.call(Execute(op_id=new_id(), shell=text))).stdout_text


async def test_nothing_runs_in_a_box_before_it_is_claimed(connect):
    async with connect() as peer:
        assert (await peer.call(Describe())).running == 0
        for call in (Execute(op_id=new_id(), shell="true"), FilesList()):
            with pytest.raises(StateConflict, match="not claimed"):
                await peer.call(call)


async def test_a_claim_gives_a_box_its_name_and_its_commands_their_variables(connect):
    instance = new_id()
    async with connect() as early, connect() as peer:
        info = await peer.call(Claim(op_id=new_id(), instance=instance, env={"GIVEN": "x y"}))
        assert info.operations == ()
        assert await ran(peer, "echo $GIVEN") == "x y\n"
        assert await ran(early, "echo $GIVEN") == "x y\n"
        assert await name_of(peer) == instance


async def test_a_claim_may_be_repeated_by_whoever_made_it_and_by_nobody_else(connect):
    claim = Claim(op_id=new_id(), instance=new_id(), env={"A": "1"})
    async with connect() as peer:
        await peer.call(claim)
    async with connect() as peer:
        await peer.call(claim)
        await peer.call(Claim(op_id=new_id(), instance=claim.instance, env={"A": "1"}))
        for other in (new_id(), claim.instance):
            with pytest.raises(StateConflict, match="claimed already"):
                await peer.call(Claim(op_id=new_id(), instance=other, env={"A": "2"}))
        with pytest.raises(OpMismatch):
            await peer.call(Claim(op_id=claim.op_id, instance=new_id()))
        assert await ran(peer, "echo $A") == "1\n"
        assert await name_of(peer) == claim.instance


async def test_a_box_reports_what_is_in_force_for_its_commands(connect):
    async with connect() as peer:
        profile = (await peer.call(Claim(op_id=new_id(), instance=new_id()))).profile
        assert (profile.no_new_privileges, profile.seccomp) == (True, 2)
        assert await ran(peer, "id -u") == f"{profile.uid}\n"
        assert await ran(peer, "ulimit -Hn") == f"{profile.open_files}\n"
        status = await ran(peer, "grep -E 'CapEff|CapBnd|Seccomp_filters' /proc/self/status")
        shown = [line.split()[1] for line in status.splitlines()]
        assert shown == [profile.capabilities, profile.capabilities_bound, str(profile.seccomp_filters)]
        assert await ran(peer, "unshare -n true || echo refused") == "refused\n"


def test_a_profile_names_the_mounts_and_the_network_of_this_machine():
    profile = present_profile()
    assert {"/", "/proc"} <= {mount.target for mount in profile.mounts}
    assert "lo" in profile.interfaces
    assert profile.kernel.startswith("Linux version ")


async def test_whoever_does_not_show_the_token_is_served_nothing_and_is_no_company(connect):
    async with connect() as keeper, connect() as early:
        await keeper.call(Claim(op_id=new_id(), instance=new_id(), token="a token"))
        async with connect() as stranger:
            for call in (Describe(), Execute(op_id=new_id(), shell="true"), hello("guessed"), hello(None)):
                for peer in (stranger, early):
                    with pytest.raises(Unauthorized, match="nobody else"):
                        await peer.call(call)
        async with connect() as other:
            await other.call(hello("a token"))
            assert await ran(other, "echo $((6 * 7))") == "42\n"
        assert await ran(keeper, "echo still") == "still\n"


async def test_of_too_many_strangers_the_oldest_gives_way_to_who_comes_with_the_token(connect):
    async with connect() as keeper, AsyncExitStack() as stack:
        await keeper.call(Claim(op_id=new_id(), instance=new_id(), token="a token"))
        crowd = [await stack.enter_async_context(connect()) for _ in range(STRANGERS + 5)]
        async with asyncio.timeout(GUARD), connect() as other:
            await other.call(hello("a token"))
            for stranger in crowd[:5]:
                await stranger.wait_closed()
            assert await ran(other, "echo $((6 * 7))") == "42\n"
        assert [stranger.lost for stranger in crowd[10:]] == [None] * (STRANGERS - 5)


def hello(token):
    client = ClientInfo(name="test", version="1")
    return Initialize(protocol_version=1, client=client, limits=Limits(), auth=token)
