"""agent-server serve: run the server until TERM or Ctrl-C."""

from __future__ import annotations

import argparse
import sys

import msgspec

from agent_server.config.options import load_given
from agent_server.serve import Ready, serve


async def main(given: argparse.Namespace) -> int:
    """Run it; when it accepts connections, standard output tells where it is. The log goes to standard error."""
    config = load_given(given)

    def announce(ready: Ready) -> None:
        if given.json:
            sys.stdout.write(msgspec.json.encode(ready).decode() + "\n")
        else:
            key = ready.api_key_file or "the configuration"
            sys.stdout.write(f"The agent server is ready at {ready.url}\nIts API key is in {key}\n")
        sys.stdout.flush()

    await serve(config, on_ready=announce)
    return 0
