"""The tools that act on a workspace, by its contract only, so that they work here and there.

terminal:     a persistent bash
screen:       terminal output as plain text
file_editor:  look at files and change them, and undo that
"""
