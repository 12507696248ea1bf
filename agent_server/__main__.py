"""`python -m agent_server` is `agent-server`."""

import sys

from agent_server.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
