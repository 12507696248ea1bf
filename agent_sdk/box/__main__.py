"""`python -m agent_sdk.box` runs a box."""

import sys

if __name__ == "__main__":
    # asyncio does without ssl; a box speaks to one Unix socket, and OpenSSL would cost it 1.3 MB.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    from agent_sdk.box.process import main

    sys.exit(main())
