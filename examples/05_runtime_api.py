"""An agent at work. One line, the workspace, decides where: here, or on somebody else's machine."""

import asyncio
import os

import workspaces
from agent_sdk import Agent, Conversation, Event
from agent_sdk.testing import ScriptedLLM, call, say

llm = ScriptedLLM(
    [
        call("file_editor", command="create", path="hello.py", file_text="print('Hello from', 6 * 7)\n"),
        call("terminal", command="python3 hello.py | tee said.txt"),
        say("The program says hello."),
    ]
)
agent = Agent(llm=llm)


def on_event(event: Event) -> None:
    print(event.seq, type(event).__name__)


async def main() -> None:
    env = os.environ
    async with workspaces.APIRemoteWorkspace(env["API_URL"], env["API_KEY"], env["API_IMAGE"]) as workspace:
        conversation = Conversation(agent=agent, workspace=workspace, callbacks=[on_event])
        await conversation.send_message("Write a program that says hello, and run it.")
        outcome = await conversation.run()
        print(outcome.status, outcome.final_text)
        print((await workspace.execute("cat said.txt")).stdout, end="")


asyncio.run(main())
