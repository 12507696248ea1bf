"""What is true without a network; stdlib and msgspec only.

codec:    JSON-RPC without I/O
frame:    binary frames
strictness: nesting and repeated keys, which JSON parsers let pass
window:   credit arithmetic of byte streams
methods:  one class per call: name, params, result
results:  what calls return
events:   the tagged union of events
specs:    plain data that describes agents, models, sandboxes
arguments: what verbs take, each type with its limit
checks:   what people write in Python, held to its types
defaults: what calls leave out
errors:   the exception tree, which is the error table
visible:  text of others where people read it
"""
