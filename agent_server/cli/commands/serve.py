"""agent-server serve: run the server until TERM or Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from agent_server.config.options import load
from agent_server.serve import Ready, serve


async def main(given: argparse.Namespace) -> int:
    """Run it; when it accepts connections, standard output tells where it is. The log goes to standard error."""
    overrides = {"host": given.host, "port": given.port, "data": given.data}
    config = load(Path(given.config) if given.config else None, overrides=overrides)

    def announce(ready: Ready) -> None:
        if given.json:
            sys.stdout.write(msgspec.json.encode(ready).decode() + "\n")
        else:
            key = ready.api_key_file or "the configuration"
            sys.stdout.write(f"The agent server is ready at {ready.url}\nIts API key is in {key}\n")
        sys.stdout.flush()

    await serve(config, on_ready=announce)
    return 0
