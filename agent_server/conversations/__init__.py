"""All conversations of a server: made, loaded, listed, left and removed.

Knows logs and boxes; nothing of connections.

registry:     all conversations of a server
loaded:       a conversation in memory
client_tools: tools in the client's process
retention:    which conversations go by themselves
note:         what is kept of all conversations in memory
"""
