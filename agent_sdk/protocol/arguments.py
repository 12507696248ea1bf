"""What verbs take: types of arguments with their limits, the same here and there."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from agent_sdk.protocol.checks import OsText

Path = OsText
Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9_.-]+(?!\n)$",
        description="1 to 64 letters, digits, '_', '.' and '-'",
    ),
]
OpId = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        max_length=36,
        description="a UUID as lower-case text, like str(uuid.uuid4())",
    ),
]
Limit = Annotated[float, Meta(ge=0.001, le=86_400, description="0.001..86400 seconds")]
Heartbeat = Annotated[float, Meta(ge=0.01, le=3600, description="0.01..3600 seconds")]
Patience = Annotated[float, Meta(ge=0, le=1e9, description="0 or more seconds")]
"""How long somebody waits."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1, description="a number of bytes from 0 to 2**63-1")]
Seq = Annotated[int, Meta(ge=0, le=2**53, description="the seq of an event, 0 or more")]
Page = Annotated[int, Meta(ge=1, le=1000, description="1..1000")]
Cells = Annotated[int, Meta(ge=1, le=65535, description="1..65535")]
Mode = Annotated[int, Meta(ge=0, le=0o777, description="0..0o777")]
Depth = Annotated[int, Meta(ge=1, le=64, description="1..64")]
Until = Annotated[bytes, Meta(min_length=1, max_length=1024, description="1..1024 bytes")]
Secrets = dict[OsText, OsText]
Title = Annotated[str, Meta(max_length=1024, description="text of at most 1024 characters")]
Tags = Annotated[dict[str, str], Meta(max_length=64, description="a dict of at most 64 texts to texts")]
Reason = Annotated[str, Meta(max_length=1024, description="text of at most 1024 characters")]
Comment = Annotated[str, Meta(max_length=8192, description="text of at most 8192 characters")]
Iterations = Annotated[int, Meta(ge=1, le=1_000_000, description="1..1000000")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Label = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=512,
        pattern=r"^[!-~]+(?!\n)$",
        description="1 to 512 printable ASCII characters without spaces",
    ),
]
HeaderName = Annotated[
    str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+(?!\n)$", description="names and values of HTTP headers")
]
Header = Annotated[
    str, Meta(pattern=r"^[\t -~\x80-\xff]*(?!\n)$", description="names and values of HTTP headers")
]
ApiKey = Annotated[
    str, Meta(pattern=r"^\s*[!-~]*\s*$", description="printable ASCII characters without spaces")
]
ToolName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}(?!\n)$",
        description="1 to 64 letters, digits, _ and -, no digit first",
    ),
]
Platform = Annotated[
    str, Meta(pattern=r"^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9]+)?(?!\n)$", description="text like linux/amd64")
]
Gpus = Annotated[
    str,
    Meta(
        pattern=r"^(all|[0-9]{1,3}|[A-Za-z0-9][A-Za-z0-9-]{0,63}(,[A-Za-z0-9][A-Za-z0-9-]{0,63}){0,31})(?!\n)$",
        description="`all`, a number, or ids separated by commas",
    ),
]
User = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[A-Za-z0-9_.-]{1,31})?(?!\n)$",
        max_length=64,
        description="a name or a number, like root",
    ),
]
Variable = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,255}(?!\n)$", description="names of variables")
]
Mount = Annotated[
    str, Meta(pattern=r"^/[^:\x00]*:/[^:\x00]+(:(ro|rw))?(?!\n)$", description="/host/path:/path/in/it[:ro]")
]
Folder = Annotated[str, Meta(pattern=r"^/[^:\x00]+$", description="absolute paths like /data")]
