"""What an operator may set: options, where they come from, and what they must be.

The only room that reads the environment; knows nothing of what is configured.

options: every option
sources: where options are set, and what their values may be
"""
