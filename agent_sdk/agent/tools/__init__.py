"""The tools every agent can have. Each acts on the Workspace contract only, so it works here and there.

registry: name to tool
think:    a place to reason
finish:   the end of a turn
"""
