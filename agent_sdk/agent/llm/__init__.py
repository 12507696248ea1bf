"""Reaching models: messages in, one Completion out.

client:           from an LLM to a provider, one request, one answer; from a ScriptedLLM to what plays it
provider:         the providers, their addresses, what sets them apart and what they accept
openai:           OpenAI's chat completions: asking, and reading what comes back
anthropic:        Anthropic's messages API: the same
answer:           an answer being put together, with its limits: what both dialects have in common
decoding:         server-sent events out of bytes, and JSON that is damaged a little
transport:        HTTP over aiohttp
failure:          what went wrong, as one of our errors
"""
