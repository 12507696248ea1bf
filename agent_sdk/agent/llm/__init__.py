"""Reaching models: messages in, one Completion out.

contract: what the loop asks of any model
open:     from an LLM or a ScriptedLLM to a client
scripted: a model without a model
retry:    asking again after failures
"""
