"""Scripts: what a model without a model is told to say."""

import msgspec

from agent_sdk.protocol.specs import AgentSpec, Call, Calls, Fail, Hang, Model, Say
from agent_sdk.testing import ScriptedLLM, call, calls, fail, hang, say


def test_a_script_is_a_list_of_steps():
    script = ScriptedLLM([call("terminal", command="ls"), say("Done.")])
    assert script.steps == (Call("terminal", {"command": "ls"}), Say("Done."))


def test_the_words_make_the_steps_of_the_protocol():
    assert call("t", saying="Look", tool="x") == Call("t", {"tool": "x"}, "Look")
    assert calls(call("a"), call("b"), saying="Both") == Calls((Call("a"), Call("b")), "Both")
    assert fail("model_refused", "no") == Fail("model_refused", "no")
    assert hang(5) == Hang(5)


def test_a_script_is_data_that_survives_the_wire():
    script = ScriptedLLM([calls(call("a", x=[1])), fail(), hang(), say("é")], repeat=True)
    spec = AgentSpec(llm=script)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=AgentSpec) == spec
    assert msgspec.json.decode(msgspec.json.encode(script), type=Model) == script
