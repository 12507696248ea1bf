"""What docs/operations.md says of proxies, keys and metrics is so."""

import os
import re
import shutil
import signal
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest

from agent_sdk import Agent, Conversation, RemoteWorkspace
from agent_sdk.remote.connection import connect
from agent_sdk.testing import ScriptedLLM, call, say
from agent_server.config.options import load
from agent_server.metrics import Metrics
from tests.conftest import remains

PAGE = (Path(__file__).parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")


def block(language):
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


@pytest.fixture
def certificate(tmp_path):
    made = [tmp_path / "ca.pem", tmp_path / "ca.key"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.fixture
def proxied(running_server, tmp_path, unused_tcp_port, certificate):
    """The server behind nginx, as the page says it: an https URL and what trusts its certificate."""
    if shutil.which("nginx") is None and not os.environ.get("CHAOS_REQUIRED"):
        pytest.skip("needs nginx")
    site = block("nginx")
    for written, here in {
        "listen 443": f"listen 127.0.0.1:{unused_tcp_port}",
        "/etc/ssl/agents.example.pem": str(certificate[0]),
        "/etc/ssl/agents.example.key": str(certificate[1]),
        "http://127.0.0.1:8000": running_server.url,
    }.items():
        assert written in site
        site = site.replace(written, here)
    places = "\n".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = tmp_path / "nginx.conf"
    file.write_text(
        f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nmaster_process off;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{places}\n{site}\n}}\n"
    )
    # It goes into the background once it listens.
    subprocess.run(["nginx", "-c", str(file), "-e", f"{tmp_path}/error.log"], check=True, capture_output=True)
    pid = int((tmp_path / "pid").read_text())
    ended = os.pidfd_open(pid)
    try:
        yield f"https://localhost:{unused_tcp_port}", ssl.create_default_context(cafile=certificate[0])
    finally:
        os.kill(pid, signal.SIGTERM)
        os.close(ended)


async def test_everything_works_through_the_proxy_that_the_page_sets_up(running_server, proxied, tmp_path):
    url, trust = proxied
    (tmp_path / "file").write_bytes(os.urandom(3 << 20))
    async with RemoteWorkspace(url, running_server.api_key, ssl=trust) as workspace:
        sent = await workspace.upload(tmp_path / "file", "file")
        assert await workspace.download("file", tmp_path / "back") == sent
        agent = Agent(llm=ScriptedLLM([call("terminal", command="echo hi"), say("Done.")]))
        conversation = Conversation(agent, workspace)
        await conversation.send_message("Go.")
        assert (await conversation.run()).status == "finished"
        headers = {"Authorization": f"Bearer {running_server.api_key}", "Accept": "text/event-stream"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.get(f"{url}/v1/conversations/{conversation.id}/events", ssl=trust) as events,
        ):
            seen = []
            async for line in events.content:  # events come at once: the stream ends with the conversation
                seen.append(line)
                if b"turn_ended" in line:
                    await conversation.delete()
            assert any(b"turn_ended" in line for line in seen)


async def test_a_connection_with_tls_that_was_closed_has_no_socket_any_more(running_server, proxied):
    url, trust = proxied
    before = remains()
    for _ in range(60):
        async with connect(url, running_server.api_key, ssl=trust):
            pass
        assert remains() <= before


def test_the_options_on_the_page_are_accepted(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text(block("toml"))
    config = load(file, environ={})
    assert (config.allow_hosts, config.trusted_proxies) == (("agents.example",), ("127.0.0.1",))


def test_the_page_names_every_metric():
    kinds = re.findall(rb"^# HELP (\S+) ", Metrics().page(), re.MULTILINE)
    made = {name.decode() for name in kinds if not name.endswith(b"_created")}
    assert set(re.findall(r"^\| `(agent_server_\w+)` ", PAGE, re.MULTILINE)) == made
