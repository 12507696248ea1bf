"""Secrets at rest: sealed with one key, readable with it alone, bound to what they are about."""

import pytest

from agent_sdk.conversation.store import Cipher

OLD, NEW = "an old key of many characters", "a new key of many characters"


def test_what_was_sealed_is_unsealed_with_the_same_key_and_subject():
    sealed = Cipher([NEW]).seal(b"secret", "conversation-1")
    assert b"secret" not in sealed
    assert Cipher([NEW]).unseal(sealed, "conversation-1") == b"secret"


def test_sealing_twice_shows_nobody_that_it_was_the_same():
    sealer = Cipher([NEW])
    assert sealer.seal(b"secret", "c") != sealer.seal(b"secret", "c")


def test_an_old_key_unseals_and_the_first_key_seals():
    sealed = Cipher([OLD]).seal(b"secret", "c")
    both = Cipher([NEW, OLD])
    assert both.unseal(sealed, "c") == b"secret"
    assert Cipher([NEW]).unseal(both.seal(b"secret", "c"), "c") == b"secret"


def test_another_key_is_named_as_the_reason():
    with pytest.raises(ValueError, match="a key that this program was not given"):
        Cipher([NEW]).unseal(Cipher([OLD]).seal(b"secret", "c"), "c")


def test_what_is_about_something_else_is_refused():
    with pytest.raises(ValueError, match="about something else"):
        Cipher([NEW]).unseal(Cipher([NEW]).seal(b"secret", "c"), "d")


def test_every_changed_or_missing_byte_is_noticed():
    sealer = Cipher([NEW])
    sealed = sealer.seal(b"secret", "c")
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        for broken in (bytes(changed), sealed[:place]):
            with pytest.raises(ValueError, match="sealed"):
                sealer.unseal(broken, "c")


@pytest.mark.parametrize("keys", [[], ["short"], [NEW, "x" * 15]])
def test_no_key_or_a_short_one_is_refused(keys):
    with pytest.raises(ValueError, match="at least"):
        Cipher(keys)
