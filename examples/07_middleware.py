"""A feature of one's own: an agent may make only so many tool calls. A server has to have it installed."""

import asyncio
import os

import workspaces
from agent_sdk import Agent, Conversation, Middleware, ModelCall, Stop, TurnContext, events
from agent_sdk.testing import ScriptedLLM, call


class CallLimit(Middleware, frozen=True):
    calls: int = 10

    def reduce(self, state: int | None, event: events.Event) -> int:
        return (state or 0) + isinstance(event, events.ToolReturned)  # from the log, so that no crash matters

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        if turn.state >= self.calls:
            raise Stop(f"the agent has made {turn.state} tool calls, which is its limit")
        return request


llm = ScriptedLLM([call("terminal", command="date")], repeat=True)
agent = Agent(llm=llm, middleware=[CallLimit(calls=3)])


async def main() -> None:
    env, there = os.environ, "AGENT_SERVER_URL" in os.environ
    here = workspaces.LocalWorkspace(env.get("EXAMPLE_DIR", "."))
    remote = (
        workspaces.RemoteWorkspace(env["AGENT_SERVER_URL"], env["AGENT_SERVER_API_KEY"]) if there else here
    )
    async with remote as workspace:
        conversation = Conversation(agent, workspace)
        await conversation.send_message("Tell me the time, again and again.")
        print(await conversation.run())


if __name__ == "__main__":
    asyncio.run(main())
