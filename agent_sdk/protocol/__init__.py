"""What is true without a network; stdlib and msgspec only.

codec:    JSON-RPC without I/O, and what of it is refused
frame:    binary frames, and the credit of byte streams
methods:  one class per call: name, params, result; what calls leave out
results:  what calls return
events:   the tagged union of events
specs:    plain data that describes agents, models, sandboxes
checks:   what verbs take, each type with its limit; what people write in Python, held to its types
errors:   the exception tree, which is the error table; text of others where people read it
"""
