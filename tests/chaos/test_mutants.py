"""Each broken build makes some fault test fail, or nothing proves that those tests can."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.broken import MUTANTS


def test_every_mutant_is_hunted_by_a_test():
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert [name for name in MUTANTS if not any(f'"{name}"' in text for text in tests)] == []
