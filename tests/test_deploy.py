"""The examples in deploy/ name options, commands and users that exist."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from agent_server.cli.main import parse
from agent_server.config.options import load

DEPLOY = Path(__file__).parent.parent / "deploy"
COMPOSE = (DEPLOY / "docker-compose.yml").read_text()
START = (DEPLOY / "image" / "start").read_text()


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read(DEPLOY / "agent-server.service")
    return parser


def accepted(environment):
    """What the server makes of it; raises for a name or value that it does not know."""
    config = load(environ=environment)
    assert config.unknown == ()
    return config


def compose_environment():
    given = dict(re.findall(r"^      (AGENT_SERVER_\w+): (.+)$", COMPOSE, re.MULTILINE))
    return {name: "0123456789abcdef" if "?" in value else value.strip('"') for name, value in given.items()}


def test_the_options_of_the_compose_file_are_accepted():
    given = compose_environment()
    assert (
        len(given) == COMPOSE.count("AGENT_SERVER_") - 2
    )  # the key is named in a comment and as a value, too
    config = accepted(given)
    assert config.api_key == "0123456789abcdef"
    assert config.sandbox_networks == ("none",)


def test_an_option_that_does_not_exist_would_be_found():
    with pytest.raises(AssertionError, match="AGENT_SERVER_NONESUCH"):
        accepted({"AGENT_SERVER_NONESUCH": "1"})


def test_the_compose_file_gives_what_the_image_needs_and_no_more():
    """The image drops to these capabilities itself."""
    (line,) = re.findall(r"cap_add: \[(.*)\]", COMPOSE)
    (kept,) = set(re.findall(r"--bounding-set=-all,(\S+)", START))
    assert {f"+{name.lower()}" for name in line.split(", ")} == set(kept.split(","))
    assert "cap_drop: [ALL]" in COMPOSE
    assert '"no-new-privileges:true"' in COMPOSE
    ports = re.findall(r'^ +- "(.*):\d+:\d+"', COMPOSE, re.MULTILINE)
    assert ports == ["127.0.0.1"]


def test_the_service_starts_what_the_command_line_understands():
    program, *words = shlex.split(unit()["Service"]["ExecStart"])
    assert Path(program).name == "agent-server"
    assert parse(words).command == "serve"


def test_the_options_of_the_service_are_accepted():
    given = dict(word.split("=", 1) for word in shlex.split(unit()["Service"]["Environment"]))
    config = accepted(given)
    assert (config.data, config.isolation, config.box_user) == ("/var/lib/agent-server", "user", 10001)


def test_the_service_ends_its_server_alone_and_gives_it_time():
    service = unit()["Service"]
    assert service["KillMode"] == "process"
    assert float(service["TimeoutStopSec"]) > accepted({}).drain_seconds
    assert service["AmbientCapabilities"] == service["CapabilityBoundingSet"]
    (kept,) = set(re.findall(r"--bounding-set=-all,(\S+)", START))
    assert {
        f"+{name.removeprefix('CAP_').lower()}" for name in service["AmbientCapabilities"].split()
    } == set(kept.split(","))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_knows_every_word_of_the_service(tmp_path):
    text = (DEPLOY / "agent-server.service").read_text()
    file = tmp_path / "agent-server.service"
    file.write_text(text.replace("/opt/agent-server/bin/agent-server", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
