"""Errors keep their class across the wire."""

import pytest

from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ErrorObject,
    InternalError,
    NotFound,
    Overloaded,
    PathNotFound,
    Unauthorized,
    WorkspaceLost,
    from_wire,
    table,
    to_wire,
)


def test_every_error_is_the_same_class_on_the_other_side():
    for cls in table():
        arrived = from_wire(to_wire(cls("why", limit=7)))
        assert type(arrived) is cls
        assert (str(arrived), arrived.details) == ("why", {"limit": 7}), cls
        assert to_wire(cls("why")).data["retryable"] == cls.retryable, cls


def test_errors_are_builtin_exceptions_where_one_fits():
    assert isinstance(from_wire(to_wire(PathNotFound("x"))), FileNotFoundError)
    assert isinstance(from_wire(to_wire(Unauthorized("x"))), PermissionError)


def test_a_kind_of_a_newer_version_becomes_the_class_of_its_code():
    assert type(from_wire(ErrorObject(-32004, "gone", {"kind": "planet_not_found"}))) is NotFound
    assert type(from_wire(ErrorObject(-31999, "?", {}))) is InternalError


def test_a_kind_with_the_code_of_another_class_is_not_believed():
    assert type(from_wire(ErrorObject(-32004, "?", {"kind": "unauthorized"}))) is NotFound


@pytest.mark.parametrize("kind", [None, 1, [], {"a": 1}, "__init__", "agent_server_error", "connection_lost"])
def test_a_kind_is_looked_up_in_the_table_and_nowhere_else(kind):
    assert type(from_wire(ErrorObject(-32001, "?", {"kind": kind}))) is Overloaded


def test_a_bug_keeps_its_text_at_home():
    error = to_wire(ZeroDivisionError("secret"))
    assert (error.code, "secret" in error.message) == (-32603, False)


def test_a_lost_connection_behind_the_server_is_a_lost_workspace():
    assert type(from_wire(to_wire(ConnectionLost("the box is gone")))) is WorkspaceLost


def test_a_kind_is_the_name_as_it_is_read():
    kinds = {cls.__name__: cls.kind for cls in table()}
    assert kinds["NotARegularFile"] == "not_a_regular_file"
    assert kinds["IsADirectory"] == "is_a_directory"
    assert kinds["OpMismatch"] == "op_mismatch"


def test_a_class_needs_a_code_and_a_name_of_its_own():
    with pytest.raises(TypeError, match="already belongs"):
        type("Another", (AgentServerError,), {}, code=-32001)
    with pytest.raises(TypeError, match="already belongs"):
        type("Overloaded", (AgentServerError,), {})


def test_how_long_to_wait_is_told_in_milliseconds():
    assert from_wire(to_wire(Overloaded("later", retry_after_ms=250))).retry_after_ms == 250
    assert Overloaded("later").retry_after_ms is None
