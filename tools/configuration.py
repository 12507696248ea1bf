"""docs/configuration.md: every option of the server, printed from the one table of options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from agent_server.config.options import FLAGS, TABLES, TENANT, RuntimeConfig, ServerConfig, TenantConfig
from agent_server.config.sources import PREFIX, wanted
from tools.docstrings import field_docs
from tools.markdown import table

RULES = """\
Later sources win over earlier ones: defaults, a TOML file, the environment, the command line. The file is the one of
`--config`, or of `AGENT_SERVER_CONFIG`. `agent-server config` shows every option, its value and where it was set;
`agent-server doctor` tries what they name. An unknown option in a file is refused, an unknown variable told in the log.

In the environment a list is written with commas (`a.example,b.example`), a table as a JSON object, and a variable that
is set to nothing does not count. A file that holds a key must be readable by its owner alone.
"""

INTRODUCTIONS = {
    "server": "Times are seconds, sizes bytes, unless an option says otherwise.",
    "limits": "What one connection may do; each end of a connection publishes its own in `initialize`.",
    "runtime_api": "Looked at where `runtime_api` in `[server]` is not `off`; see [runtime_api.md](runtime_api.md).",
}


def configuration() -> str:
    """Return the page."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield "# Configuration\n"
    yield "Printed by `make docs` from the table of options; do not edit.\n"
    yield RULES
    described: dict[str, Any] = {
        "server": ServerConfig(),
        "limits": ServerConfig().limits,
        "runtime_api": RuntimeConfig(),
    }
    for name, options in TABLES.items():
        yield f"## `[{name}]`\n"
        yield f"{INTRODUCTIONS[name]}\n"
        prefix = PREFIX if name == "server" else f"{PREFIX}{name.upper()}_"
        docs = field_docs(type(described[name]))
        yield from table(
            "option | variable | flag | values | default | ",
            *(
                (
                    f"`{option}`",
                    f"`{prefix}{option.upper()}`",
                    f"`--{option}`" if name == "server" and option in FLAGS else "",
                    wanted(kind),
                    _shown(getattr(described[name], option)),
                    docs[option],
                )
                for option, kind in options.items()
            ),
        )
    yield "## `[runtime_api.tenants.NAME]`\n"
    yield "One table for each tenant, in a file alone; what it leaves out is what `[runtime_api]` says.\n"
    docs = field_docs(TenantConfig)
    yield from table(
        "option | values | ", *((f"`{name}`", wanted(kind), docs[name]) for name, kind in TENANT.items())
    )


def _shown(default: Any) -> str:
    return "" if default in (None, "", (), {}) else f"`{msgspec.json.encode(default, enc_hook=str).decode()}`"
