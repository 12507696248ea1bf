"""Reaching models: messages in, one Completion out.

scripted:         a model without a model
client:           from an LLM or a ScriptedLLM to a client; a model of a provider: one request, one answer
provider:         the providers, their addresses and what sets them apart
openai:           asking in OpenAI's chat completions; openai_answer reads what comes back
anthropic:        asking in Anthropic's messages API; anthropic_answer reads what comes back
history:          what was said before, made acceptable to a provider
answer:           an answer being put together, with its limits
lenient:          JSON that is damaged a little
sse:              server-sent events out of bytes
transport:        HTTP over aiohttp
failure:          what went wrong, as one of our errors
"""
