"""Where the keys come from that seal secrets, and what is refused."""

from __future__ import annotations

import pytest

from agent_server.config.options import load
from agent_server.config.sources import StartRefused
from agent_server.keys import obtain_sealer

NEW, OLD = "new-key-0123456789abcdef", "old-key-0123456789abcdef"


def sealer(tmp_path, **options):
    found, _ = obtain_sealer(load(overrides={"data": str(tmp_path), **options}, environ={}))
    return found


def test_without_a_key_nothing_is_sealed(tmp_path):
    assert sealer(tmp_path) is None


def test_keys_come_from_the_environment_the_first_seals_and_all_unseal(tmp_path):
    environ = {"AGENT_SERVER_DATA": str(tmp_path), "AGENT_SERVER_SECRETS_KEY": f"{NEW},{OLD}"}
    found, hidden = obtain_sealer(load(environ=environ))
    assert hidden == [NEW, OLD]
    before = sealer(tmp_path, secrets_key=[OLD]).seal(b"secret", "c")
    assert found.unseal(before, "c") == b"secret"
    with pytest.raises(ValueError, match="was not given"):
        sealer(tmp_path, secrets_key=[OLD]).unseal(found.seal(b"secret", "c"), "c")


def test_keys_come_from_a_file_one_per_line(tmp_path):
    (tmp_path / "keys").write_text(f"{NEW}\n\n{OLD}\n")
    found = sealer(tmp_path, secrets_key_file=str(tmp_path / "keys"))
    assert found.unseal(sealer(tmp_path, secrets_key=[OLD]).seal(b"x", "c"), "c") == b"x"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"short\n", "at least 16 characters"), (b"\n", "holds no secrets_key"), (b"\xff\xfe", "is not text")],
)
def test_a_file_without_good_keys_is_refused_with_a_sentence_that_shows_none(tmp_path, content, sentence):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(StartRefused, match=sentence) as refused:
        sealer(tmp_path, secrets_key_file=str(tmp_path / "keys"))
    assert "short" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StartRefused, match="the secrets_key cannot be read: No such file"):
        sealer(tmp_path, secrets_key_file=str(tmp_path / "none"))


def test_key_and_file_exclude_each_other(tmp_path):
    with pytest.raises(StartRefused, match="secrets_key and secrets_key_file are both set"):
        sealer(tmp_path, secrets_key=[NEW], secrets_key_file=str(tmp_path / "keys"))
