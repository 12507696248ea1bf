"""The tools every agent can have. Each acts on the Workspace contract only, so it works here and there.

registry:     name to tool; think, a place to reason; finish, the end of a turn; task_tracker, a list of tasks
terminal:     a persistent bash
screen:       terminal output as plain text
file_editor:  look at files and change them, and undo that
"""
