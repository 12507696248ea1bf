"""What the `docker` command keeps for its user: keys of registries, and which engine is the current one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent_sdk.workspace.environment import from_caller

FOLDER = "DOCKER_CONFIG"
HELPER_SECONDS = 20.0
HUB, HUB_ADDRESS = "docker.io", "https://index.docker.io/v1/"
HUB_NAMES = (HUB, "index.docker.io", "registry-1.docker.io")
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_HELPER = re.compile("[A-Za-z0-9_-]+")
_BY_TOKEN = "<token>"
"""The name of a user that says that the secret is an identity token."""


def key_for(image: str, usual: str) -> str:
    """Return the key of an image's registry as engines take it; empty when there is none. Blocks.

    A credential helper that is configured is asked, for at most 20 s.

    Args:
        image: its name; one without a host is of the usual registry.
        usual: the address of that, as the engine names it.
    """
    first = image.partition("/")[0]
    is_host = "/" in image and (first == "localhost" or "." in first or ":" in first)
    registry = usual if not is_host else HUB_ADDRESS if first in HUB_NAMES else first
    with suppress(*_UNREADABLE):
        config = json.loads((_folder() / "config.json").read_bytes())
        found = _from_helper(config, registry) or _from_file(config, registry)
        if found:
            return base64.urlsafe_b64encode(
                json.dumps({**found, "serveraddress": registry}).encode()
            ).decode()
    return ""


def context_host() -> str | None:
    """Return the address of the current context in the folder that DOCKER_CONFIG names. Blocks.

    None: it names none, or its context is the default one; then others know better.
    """
    if not from_caller([FOLDER]).get(FOLDER):
        return None
    with suppress(*_UNREADABLE):
        named = from_caller(["DOCKER_CONTEXT"]).get("DOCKER_CONTEXT")
        name = named or json.loads((_folder() / "config.json").read_bytes()).get("currentContext")
        if name and name != "default":
            place = _folder() / "contexts/meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
            return str(json.loads(place.read_bytes())["Endpoints"]["docker"]["Host"])
    return None


def _folder() -> Path:
    given = from_caller([FOLDER]).get(FOLDER)
    return Path(given) if given else Path.home() / ".docker"


def _from_file(config: Any, registry: str) -> dict[str, str]:
    auths = config.get("auths") or {}
    # What somebody has logged in to as https://host/v1/ is the registry of that host.
    entry: Any = next((auths[each] for each in auths if each == registry), None) or next(
        (auths[each] for each in auths if _host(each) == _host(registry)), {}
    )
    if entry.get("identitytoken"):
        return {"identitytoken": str(entry["identitytoken"])}
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        return {"username": user, "password": password.rstrip("\0")}
    if entry.get("username") and entry.get("password"):
        return {"username": str(entry["username"]), "password": str(entry["password"])}
    return {}


def _from_helper(config: Any, registry: str) -> dict[str, str]:
    """Ask the helper of this registry, or the one for all of them."""
    helpers = config.get("credHelpers") or {}
    own = next((helpers[each] for each in helpers if _host(each) == _host(registry)), None)
    name = own or config.get("credsStore") or ""
    program = shutil.which(f"docker-credential-{name}") if _HELPER.fullmatch(name) else None
    if program is None:
        return {}
    with suppress(subprocess.SubprocessError, *_UNREADABLE):
        asked = subprocess.run(
            [program, "get"], input=registry.encode(), capture_output=True, timeout=HELPER_SECONDS, check=True
        )
        said = json.loads(asked.stdout)
        if said["Username"] == _BY_TOKEN:
            return {"identitytoken": str(said["Secret"])}
        return {"username": str(said["Username"]), "password": str(said["Secret"])}
    return {}


def _host(address: str) -> str:
    host = address.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return HUB if host in HUB_NAMES else host
