"""The reference is printed from the classes, so it cannot be wrong; it can be stale."""

import json
from pathlib import Path

import pytest

from agent_sdk.protocol import events
from agent_sdk.protocol.document import documents, main
from agent_sdk.protocol.errors import table
from agent_sdk.protocol.methods import NOTICES, all_methods
from agent_sdk.protocol.openrpc import openrpc, structs_in

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reference():
    return documents()["protocol.md"]


def test_the_documents_in_the_repository_are_current():
    assert main(["--check", str(DOCS)]) == 0


def test_a_stale_document_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    (tmp_path / "protocol.md").write_text("old")
    assert main(["--check", str(tmp_path)]) == 1
    assert "protocol.md is stale" in capsys.readouterr().err


def test_the_program_needs_one_folder(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*all_methods(), *(notice.method for notice in NOTICES), *events.kinds()])
def test_everything_that_crosses_the_wire_is_described(name, reference):
    assert f"### `{name}`" in reference


def test_every_error_is_listed_with_its_code(reference):
    assert all(f"| {cls.code} | `{cls.kind}` |" in reference for cls in table())


def test_no_link_leads_nowhere(reference):
    headings = {line.lstrip("# ").lower() for line in reference.splitlines() if line.startswith("#")}
    linked = {part.split(")")[0] for part in reference.split("](#")[1:]}
    assert linked <= headings


def test_every_reference_in_the_openrpc_document_is_kept():
    text = json.dumps(openrpc())
    schemas = openrpc()["components"]["schemas"]
    assert {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]} <= set(schemas)


def test_the_openrpc_document_has_what_its_format_wants():
    document = openrpc()
    assert set(document) >= {"openrpc", "info", "methods", "components"}
    for method in document["methods"]:
        assert {"name", "params", "result"} <= set(method)
        assert all({"name", "schema"} <= set(param) for param in method["params"])
    assert {method["name"] for method in document["methods"]} == set(all_methods())


def test_no_two_classes_share_a_name():
    used = structs_in([*all_methods().values(), *NOTICES, *events.kinds().values()])
    assert len({cls.__name__ for cls in used}) == len(used)
