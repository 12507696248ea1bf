"""Importing the SDK loads nothing that is not needed."""

import subprocess
import sys

import pytest

import agent_sdk
from workspaces.box.runtime import _NOT_OF_THE_LIBRARY

HEAVY = {"aiohttp", "apsw", "structlog", "tenacity", "aiodocker", "rich", "prometheus_client"}


def loaded(statement):
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_sdk_loads_no_third_party_package():
    assert not loaded("import agent_sdk") & (HEAVY | {"msgspec", "anyio", "asyncio"})


def test_importing_every_public_name_loads_no_heavy_package():
    assert not loaded(f"from agent_sdk import {', '.join(agent_sdk.__all__)}") & HEAVY


def test_a_box_needs_no_http_library_no_database_and_no_openssl_to_start():
    assert not loaded("import agent_sdk.box.process") & (HEAVY | {"anyio", "hashlib"})
    run = [sys.executable, "-X", "importtime", "-m", "agent_sdk.box", "--help"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    assert "asyncio" in said
    assert "_ssl" not in said


def test_a_box_takes_nothing_along_that_its_runtime_has_not():
    code = (
        "import sys, agent_sdk.box; print(*[name for name in sys.modules if name.startswith('agent_sdk.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [
        name for name in done.stdout.split() if name.startswith(("agent_sdk.agent", "agent_sdk.remote"))
    ] == []
    assert (loaded("import agent_sdk.box.process") - loaded("pass")) & _NOT_OF_THE_LIBRARY == set()


def test_a_client_can_be_imported_where_only_linux_is_missing():
    code = (
        "import sys, os, fcntl; del os.O_PATH, os.O_TMPFILE, os.pidfd_open, fcntl.F_SETPIPE_SZ; "
        "sys.modules.update(fcntl=None, termios=None, resource=None); "
        "import agent_sdk.remote.workspace, agent_sdk.remote.conversation"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_workspace_in_a_container_loads_no_heavy_package_before_it_is_entered():
    assert not loaded("from workspaces import DockerWorkspace; DockerWorkspace()") & HEAVY
    assert not loaded("import workspaces.backend.docker.reaper") & (HEAVY | {"msgspec", "anyio", "asyncio"})


@pytest.mark.parametrize("name", agent_sdk.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(agent_sdk, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Conversatoin"):
        agent_sdk.Conversatoin  # noqa: B018


def test_tool_is_the_decorator_and_not_a_module():
    from agent_sdk import definition  # noqa: F401, PLC0415  loads the contract of tools

    assert callable(agent_sdk.tool)
