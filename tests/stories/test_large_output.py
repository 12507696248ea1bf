"""Large output and large results: counted exactly, never dropped silently, and never in the way."""

import asyncio

from agent_sdk import Agent, Conversation, RemoteWorkspace, tool
from agent_sdk.protocol.events import ToolReturned
from agent_sdk.testing import ScriptedLLM, call, say
from bench.measure import forget_peak, peak_mib, rss_mib

FLOOD = 300 << 20
# 4 MiB wait for the disk, and once more on their way to it; the rest is what the allocator keeps.
ALLOWED_MIB = 32


async def test_a_flood_is_counted_exactly_and_the_connection_stays_responsive(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        box = (await workspace.describe()).pid
        await workspace.execute("yes | head -c 100M")
        forget_peak(box)
        before = rss_mib(box)
        flood = asyncio.create_task(workspace.execute(f"yes | head -c {FLOOD}"))
        answered = 0
        while not flood.done():
            await workspace.describe()
            answered += 1
        result = await flood
        assert (result.exit_code, result.out.size, result.truncated) == (0, FLOOD, True)
        assert result.out.head == b"y\n" * (64 << 9)
        assert result.out.tail == b"y\n" * (1 << 19)
        assert answered > 10
        assert peak_mib(box) - before <= ALLOWED_MIB


async def test_a_20_mib_tool_result_reaches_a_remote_callback_whole(running_server):
    size = 20 << 20

    @tool
    async def big_answer() -> str:
        """Return much."""
        return "x" * size

    agent = Agent(llm=ScriptedLLM([call("big_answer"), say("That was much.")]), tools=[big_answer])
    seen = []
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(agent, workspace, callbacks=[seen.append])
        await conversation.send_message("go")
        assert (await conversation.run()).final_text == "That was much."
        (returned,) = [event for event in seen if isinstance(event, ToolReturned)]
        logged = [event async for event in conversation.events()]
    assert returned.bytes_cut == 0
    assert returned.text == "x" * size
    assert logged == seen
