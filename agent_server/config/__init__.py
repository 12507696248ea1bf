"""What an operator may set: options, where they come from, and what they must be.

The only room that reads the environment; knows nothing of what is configured.

options:     every option
sources:     where options are set
runtime_api: the options of the Runtime API
hosts:       the rules of Host, Origin and proxies
"""
