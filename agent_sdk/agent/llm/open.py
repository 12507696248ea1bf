"""From data to a way to reach a model; the one place that knows all kinds of them."""

from __future__ import annotations

from agent_sdk.agent.llm.client import ProviderClient
from agent_sdk.agent.llm.contract import ModelClient
from agent_sdk.agent.llm.scripted import ScriptedClient
from agent_sdk.protocol.specs import Model, ScriptedLLM


def open_model(spec: Model) -> ModelClient:
    """Return a client for this model; nothing is connected yet. Close it when done.

    Raises:
        InvalidParams: the provider is unknown and no base_url is given, or the key, the address or
            a scripted step cannot be used.
    """
    return ScriptedClient(spec) if isinstance(spec, ScriptedLLM) else ProviderClient(spec)
