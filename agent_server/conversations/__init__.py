"""All conversations of a server: made, loaded, listed, left and removed.

Knows logs and boxes; nothing of connections.

registry:  all conversations of a server
loaded:    a conversation in memory, and its tools in the processes of clients
retention: which conversations go by themselves
workspace: which workspace a conversation may have, and what is noted of both
"""
