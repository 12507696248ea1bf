"""The same without async: the names are the same, the calls block."""

import os
import tempfile

from agent_sdk.sync import Agent, Conversation
from agent_sdk.testing import ScriptedLLM, call, say
from workspaces.sync import RemoteWorkspace

agent = Agent(llm=ScriptedLLM([call("terminal", command="sort -o names.txt names.txt"), say("Sorted.")]))
folder = tempfile.TemporaryDirectory()
local_path = os.path.join(folder.name, "names.txt")
with open(local_path, "w") as names:
    names.write("Grace\nAda\n")

with RemoteWorkspace(os.environ["AGENT_SERVER_URL"], os.environ["AGENT_SERVER_API_KEY"]) as workspace:
    workspace.file_upload(local_path, "names.txt")
    conversation = Conversation(agent=agent, workspace=workspace, callbacks=[print])
    conversation.send_message("Sort names.txt.")
    conversation.run()
    workspace.file_download("names.txt", local_path)
    print(workspace.execute_command("cat names.txt").stdout, end="")

with open(local_path) as names:
    assert names.read() == "Ada\nGrace\n"
folder.cleanup()
