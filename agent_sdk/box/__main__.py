"""`python -m agent_sdk.box` runs a box."""

import sys

from agent_sdk.box.process import main

if __name__ == "__main__":
    sys.exit(main())
