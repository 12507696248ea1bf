"""The way to the boxes of a server: started, found again, and each call carried out once.

Knows boxes and the log of calls; nothing of conversations and connections.

registry:      all boxes of a server: their starts, ends and survival
link:          the way to a box
name:          what a box is called, and promised
watch:         whether a box answers at all, and what happens to it
forwarding:    calls forwarded to a box, once each
forwarded_call: one of them, with its bytes
"""
