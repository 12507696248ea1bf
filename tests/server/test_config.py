from pathlib import Path

import pytest

from agent_server.config.options import ServerConfig, load, settings
from agent_server.config.sources import StartRefused

KEY = "k" * 40


def loaded(tmp_path: Path, text: str, *, mode: int = 0o600, **kwargs) -> ServerConfig:
    file = tmp_path / "config.toml"
    file.write_text(text)
    file.chmod(mode)
    return load(file, **{"environ": {"HOME": "/home/someone"}, **kwargs})


def refusal(tmp_path: Path, text: str, **kwargs) -> str:
    with pytest.raises(StartRefused) as refused:
        loaded(tmp_path, text, **kwargs)
    assert refused.value.exit_code == 2
    return str(refused.value).removeprefix(f"{tmp_path}/")


def test_without_any_source_the_defaults_hold():
    config = load(environ={})
    assert (config.host, config.port, config.api_key, config.drain_seconds) == ("127.0.0.1", 8000, None, 20.0)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path):
    text = '[server]\nport = 1\nlog_level = "error"\ndrain_seconds = 3\n'
    environ = {"AGENT_SERVER_PORT": "2", "AGENT_SERVER_LOG_LEVEL": "debug"}
    config = loaded(tmp_path, text, environ=environ, overrides={"port": 3, "host": None})
    assert (config.port, config.log_level, config.drain_seconds) == (3, "debug", 3.0)


def test_an_empty_variable_does_not_count(tmp_path):
    assert loaded(tmp_path, "[server]\nport = 81\n", environ={"AGENT_SERVER_PORT": ""}).port == 81


def test_lists_in_the_environment_are_separated_by_commas():
    config = load(environ={"AGENT_SERVER_ALLOW_HOSTS": "a.example, b.example,"})
    assert config.allow_hosts == ("a.example", "b.example")


def test_the_environment_may_name_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("[server]\nport = 99\n")
    assert load(environ={"AGENT_SERVER_CONFIG": str(tmp_path / "c.toml")}).port == 99


def test_limits_have_a_table_of_their_own(tmp_path):
    config = loaded(tmp_path, "[limits]\ncalls = 3\n", environ={"AGENT_SERVER_LIMITS_JSON_DEPTH": "32"})
    assert (config.limits.calls, config.limits.json_depth) == (3, 32)


@pytest.mark.parametrize("service", ["", "API_", "DATA_", "LIMITS_", "X_Y_2_"])
def test_variables_that_engines_make_for_services_are_not_options(service):
    """Kubernetes tells every pod about each service of its namespace, whatever its name begins with."""
    made = {
        "PORT": "tcp://10.0.0.1:8000",
        "PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PORT_8000_TCP_ADDR": "10.0.0.1",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_53_UDP": "udp://10.0.0.1:53",
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "ENV_PATH": "/bin",
    }
    environ = {f"AGENT_SERVER_{service}{name}": value for name, value in made.items()}
    config = load(environ={**environ, "AGENT_SERVER_URL": "http://elsewhere"})
    assert (config.port, config.unknown) == (8000, ())


def test_an_unknown_variable_is_told_and_stops_nothing():
    config = load(environ={"AGENT_SERVER_HOTS": "x", "AGENT_SERVER_LIMITS_CALL": "1", "AGENT_SERVER_Q": KEY})
    assert config.unknown == (
        "AGENT_SERVER_HOTS is no option; did you mean host?",
        "AGENT_SERVER_LIMITS_CALL is no option; did you mean calls?",
        "AGENT_SERVER_Q is no option",
    )


def test_the_data_folder_is_that_of_the_user_unless_given(tmp_path):
    assert load(environ={"XDG_DATA_HOME": "/x"}).data == "/x/agent-server"
    assert load(environ={}, overrides={"data": str(tmp_path)}).data == str(tmp_path)


def test_boxes_inherit_no_secret_of_the_server():
    environ = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "AGENT_SERVER_API_KEY": KEY,
        "LLM_API_KEY": "x",
        "AWS_SECRET": "y",
    }
    assert load(environ=environ).box_environment == {"PATH": "/bin", "LC_ALL": "C"}


def test_variables_for_commands_come_from_a_table_or_as_json(tmp_path):
    file = loaded(tmp_path, '[server.command_env]\nGREETING = "hello"\n')
    environment = load(environ={"AGENT_SERVER_COMMAND_ENV": '{"GREETING": "hello"}'})
    assert file.command_env == environment.command_env == {"GREETING": "hello"}
    assert file.box_environment["AGENT_SERVER_COMMAND_ENV"] == '{"GREETING":"hello"}'


def test_the_key_is_in_no_representation():
    assert KEY not in repr(load(environ={"AGENT_SERVER_API_KEY": KEY}))


WRONG = {
    "unknown key": ("[server]\nprot = 1\n", "config.toml:2:1: server.prot is no option; did you mean port?"),
    "out of range": (
        "# first\n[server]\n\nport = 99999\n",
        "config.toml:4:1: server.port must be 1..65535, or 0 for a free one (got 99999)",
    ),
    "text for a number": (
        '[server]\nport = "80"\n',
        "config.toml:2:1: server.port must be 1..65535, or 0 for a free one (got 80)",
    ),
    "bool as text": (
        "[server]\nport = true\n",
        "config.toml:2:1: server.port must be 1..65535, or 0 for a free one (got true)",
    ),
    "word not in the list": (
        '[server]\nlog_format = "xml"\n',
        "config.toml:2:1: server.log_format must be auto or json or console (got xml)",
    ),
    "number for a list": (
        "[server]\nallow_hosts = 5\n",
        "config.toml:2:1: server.allow_hosts must be a list of texts (got 5)",
    ),
    "unknown limit": (
        "[limits]\ncall = 5\n",
        "config.toml:2:1: limits.call is no option; did you mean calls?",
    ),
    "limit out of range": (
        "[limits]\nframe_bytes = 1\n",
        "config.toml:2:1: limits.frame_bytes must be 65536..16777216 (got 1)",
    ),
    "no table": ("port = 80\n", "config.toml:1:1: port belongs below a line with [server]"),
    "unknown table": (
        "[sever]\nport = 80\n",
        "config.toml:1:2: sever is no table; there are server, limits and runtime_api; did you mean server?",
    ),
    "duplicate key": ("[server]\nport = 1\nport = 2\n", "config.toml:3:9: Cannot overwrite a value"),
    "no TOML": ("[server\n", "config.toml:1:8: Expected ']' at the end of a table declaration"),
    "half a line": (
        "[server]\n  port =",
        "config.toml:2:9: Invalid value",
    ),
    "a key behind spaces": (
        "[server]\n  prot = 1\n",
        "config.toml:2:3: server.prot is no option; did you mean port?",
    ),
    "two keys": (
        f'[server]\napi_key = "{KEY}"\napi_key_file = "f"\n',
        "api_key and api_key_file are both set; set one of them",
    ),
    "two kinds of files": (
        '[server]\nfiles_root = "/"\nisolation = "bwrap"\n',
        "files_root and isolation bwrap are both set; bwrap shows commands their workspace alone",
    ),
    "inner option": (
        "[server]\nbox_environment = {}\n",
        "config.toml:2:1: server.box_environment is no option",
    ),
}


@pytest.mark.parametrize(("text", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_place_and_remedy(tmp_path, text, sentence):
    assert refusal(tmp_path, text) == sentence


def test_a_byte_order_mark_is_fine(tmp_path):
    assert loaded(tmp_path, "\ufeff[server]\nport = 7\n").port == 7


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("[server]\napi_key = 123456\n", "config.toml:2:1: server.api_key must be a text"),
        ("[server]\nsecrets_key = 123456\n", "config.toml:2:1: server.secrets_key must be a list of texts"),
        ("[server.command_env]\nTOKEN = 123456\n", "config.toml:1:2: server.command_env must be a table"),
        (
            "[runtime_api.tenants.a]\nkey = 123456\n",
            "config.toml:2:1: runtime_api.tenants.a.key must be a text",
        ),
        ('[runtime_api.tenants.a]\nkey = "123456"\n', "runtime_api.tenants.a.key must be at least 16"),
        ("[runtime_api.tenants]\na = 123456\n", "config.toml:2:1: a tenant is a table"),
    ],
)
def test_a_wrong_secret_is_not_repeated(tmp_path, text, start):
    sentence = refusal(tmp_path, text)
    assert sentence.startswith(start)
    assert "123456" not in sentence


def test_every_option_is_listed_with_its_source_and_no_secret(tmp_path):
    text = f"""
[server]
port = 7
api_key = "{KEY}"
[server.command_env]
TOKEN = "{KEY}"
[runtime_api.tenants.a]
key = "{KEY}"
"""
    environ = {"AGENT_SERVER_LIMITS_CALLS": "3", "AGENT_SERVER_SECRETS_KEY": KEY}
    found = {
        setting.option: (setting.value, setting.source)
        for setting in settings(loaded(tmp_path, text, environ=environ, overrides={"host": "::1"}))
    }
    assert KEY not in str(found)
    assert {option for option, (_, source) in found.items() if source == "default"} > {"server.log_level"}
    assert [found[option] for option in ("server.port", "server.host", "limits.calls")] == [
        (7, f"{tmp_path}/config.toml:3:1"),
        ("::1", "--host"),
        (3, "AGENT_SERVER_LIMITS_CALLS"),
    ]
    secret = ("server.api_key", "server.secrets_key", "server.command_env", "runtime_api.tenants.a.key")
    assert {found[option][0] for option in secret} == {"[secret]"}


def test_a_short_key_is_refused(tmp_path):
    assert "at least 16" in refusal(tmp_path, '[server]\napi_key = "secret"\n')


def test_a_file_with_a_key_must_not_be_readable_by_everybody(tmp_path):
    text = f'[server]\napi_key = "{KEY}"\n'
    assert "chmod 600" in refusal(tmp_path, text, mode=0o644)
    assert "its group can read it; run: chmod 600" in refusal(tmp_path, text, mode=0o640)
    assert loaded(tmp_path, text, mode=0o600).api_key == KEY


def test_a_readable_file_without_a_key_is_fine(tmp_path):
    assert loaded(tmp_path, "[server]\nport = 5\n", mode=0o644).port == 5


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("AGENT_SERVER_PORT=x", "AGENT_SERVER_PORT must be 1..65535, or 0 for a free one (got x)"),
        ("AGENT_SERVER_LIMITS_CALLS=0", "AGENT_SERVER_LIMITS_CALLS must be 1..10000 (got 0)"),
        ("AGENT_SERVER_COMMAND_ENV={A", "AGENT_SERVER_COMMAND_ENV must be a table of names and texts"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(variable, sentence):
    with pytest.raises(StartRefused) as refused:
        load(environ=dict([variable.split("=")]))
    assert str(refused.value) == sentence


def test_a_wrong_argument_is_refused_as_it_was_typed():
    with pytest.raises(StartRefused, match=r"^--drain-seconds must be 0\.\.600 seconds \(got -1\)$"):
        load(environ={}, overrides={"drain_seconds": -1})


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    with pytest.raises(StartRefused, match="cannot be read: "):
        load(tmp_path / name, environ={})


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StartRefused, match="is not UTF-8 text"):
        load(tmp_path / "c.toml", environ={})


def test_the_runtime_api_has_a_table_and_its_tenants_have_one_each(tmp_path):
    text = f"""
[server]
runtime_api = "process"
[runtime_api]
images = ["a:*"]
unit_cpus = 2
[runtime_api.tenants.alice]
key = "{KEY}"
sandboxes = 3
"""
    config = loaded(tmp_path, text, environ={"AGENT_SERVER_RUNTIME_API_SANDBOXES": "5"})
    assert (config.runtime_api, config.runtimes.images, config.runtimes.unit_cpus) == (
        "process",
        ("a:*",),
        2.0,
    )
    assert config.runtimes.sandboxes == 5
    alice = config.runtimes.tenants["alice"]
    assert (alice.key, alice.sandboxes, alice.cpus) == (KEY, 3, None)
    assert KEY not in repr(config.runtimes)


WRONG_TENANTS = {
    "no key": (
        "[runtime_api.tenants.alice]\ncpus = 1\n",
        "config.toml:1:2: runtime_api.tenants.alice needs a key or a key_file",
    ),
    "short key": (
        '[runtime_api.tenants.alice]\nkey = "short"\n',
        "runtime_api.tenants.alice.key must be at least 16 printable ASCII characters without spaces",
    ),
    "unknown option": (
        f'[runtime_api.tenants.alice]\nkey = "{KEY}"\ncpu = 1\n',
        "config.toml:3:1: runtime_api.tenants.alice.cpu is no option; did you mean cpus?",
    ),
    "wrong quota": (
        f'[runtime_api.tenants.alice]\nkey = "{KEY}"\nsandboxes = 0\n',
        "config.toml:3:1: runtime_api.tenants.alice.sandboxes must be 1..100000 (got 0)",
    ),
    "no table": (
        "[runtime_api]\ntenants = 3\n",
        "config.toml:2:1: a tenant is a table: [runtime_api.tenants.NAME]",
    ),
    "unknown kind": (
        '[server]\nruntime_api = "kubernetes"\n',
        "config.toml:2:1: server.runtime_api must be off or process or docker (got kubernetes)",
    ),
}


@pytest.mark.parametrize(("text", "sentence"), WRONG_TENANTS.values(), ids=WRONG_TENANTS)
def test_a_wrong_tenant_is_told_with_its_place(tmp_path, text, sentence):
    assert refusal(tmp_path, text) == sentence


def test_a_tenants_key_that_everybody_can_read_is_refused(tmp_path):
    text = f'[runtime_api.tenants.alice]\nkey = "{KEY}"\n'
    assert "holds the key of a tenant and everybody can read it" in refusal(tmp_path, text, mode=0o644)


def test_a_key_may_have_a_line_end_behind_it(tmp_path):
    given = {
        "AGENT_SERVER_API_KEY": "0123456789abcdef\r\n",
        "AGENT_SERVER_METRICS_KEY": " fedcba9876543210\n",
    }
    config = load(environ=given)
    assert (config.api_key, config.metrics_key) == ("0123456789abcdef", "fedcba9876543210")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"API_KEY": "0123456789abcdef", "API_KEYS_FILE": "/keys"}, "api_key and api_keys_file are both set"),
        ({"API_KEY_FILE": "/key", "API_KEYS_FILE": "/keys"}, "api_key_file and api_keys_file are both set"),
        ({"METRICS_KEY": "short"}, "metrics_key must be at least 16 printable ASCII characters"),
        ({"API_KEY": "0123456789abcdef", "METRICS_KEY": "0123456789abcdef"}, "are the same"),
        ({"TRUSTED_PROXIES": "10.0.0.0/8,proxy"}, "trusted_proxies: 'proxy' does not appear"),
    ],
)
def test_keys_and_proxies_that_contradict_each_other_or_are_none_are_refused(given, sentence):
    with pytest.raises(StartRefused, match=sentence):
        load(environ={f"AGENT_SERVER_{name}": value for name, value in given.items()})
