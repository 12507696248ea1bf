"""The references are printed from the code, so they cannot be wrong; they can be stale."""

import json
import re

import pytest

import agent_sdk
import workspaces
from agent_sdk.conversation.contract import Conversation
from agent_sdk.protocol import events
from agent_sdk.protocol.errors import table
from agent_sdk.protocol.methods import NOTICES, all_methods
from agent_server.cli.main import parse
from agent_server.config.options import FLAGS, TABLES, TENANT
from tools.documents import DOCUMENTS, ROOT, main
from tools.openrpc import openrpc, structs_in


@pytest.fixture(scope="module")
def reference():
    return DOCUMENTS["docs/protocol.md"]()


def test_the_documents_in_the_repository_are_current():
    assert main(["--check"]) == 0


def test_a_stale_document_is_shown_by_how_it_differs(tmp_path, capsys):
    assert main([], tmp_path) == 0
    (tmp_path / "docs/protocol.md").write_text("old\n")
    assert main(["--check"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "docs/protocol.md is stale" in said
    assert "-old\n" in said


def test_no_argument_is_needed_and_only_one_is_understood(capsys):
    assert main(["docs"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("page", [name for name in DOCUMENTS if name.endswith(".md")])
def test_links_between_the_pages_lead_to_headings(page):
    pages = {name: make() for name, make in DOCUMENTS.items() if name.endswith(".md")}
    for target, anchor in re.findall(r"\]\(([a-z_]*\.md)?#([a-z_]+)\)", pages[page]):
        text = pages.get(f"docs/{target}", pages[page]) if target else pages[page]
        headings = {
            line.strip("# `[]").lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"
        }
        assert anchor in headings


def test_everything_public_of_the_sdk_is_described():
    text = DOCUMENTS["docs/sdk.md"]()
    names = {*agent_sdk.__all__, *workspaces.__all__} - {"__version__", "errors", "events", "Event", "Delta"}
    assert all(f"### {name}\n" in text for name in names)
    verbs = [name for name in vars(Conversation) if not name.startswith("_")]
    assert all(f"#### conversation.{verb}\n" in text for verb in verbs)


def test_the_generators_are_in_no_package():
    packages = ("agent_sdk", "workspaces", "agent_server")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    assert not [
        file for file in files if re.search(r"^(from|import) tools\b", file.read_text(), re.MULTILINE)
    ]


def test_every_option_is_described_with_its_variable():
    text = DOCUMENTS["docs/configuration.md"]()
    for name, options in TABLES.items():
        for option in options:
            variable = f"AGENT_SERVER_{option}" if name == "server" else f"AGENT_SERVER_{name}_{option}"
            assert f"| `{option}` | `{variable.upper()}` |" in text
    assert all(f"| `{option}` |" in text for option in TENANT)


@pytest.mark.parametrize("command", ["serve", "config", "doctor"])
def test_a_flag_that_is_described_can_be_typed(command):
    words = [word for flag in FLAGS for word in (f"--{flag}", "1")]
    given = parse([command, *words])
    assert [str(getattr(given, flag)) for flag in FLAGS] == ["1"] * len(FLAGS)


def test_everything_that_crosses_the_wire_is_described(reference):
    names = [*all_methods(), *(notice.method for notice in NOTICES), *events.kinds()]
    assert [name for name in names if f"### `{name}`" not in reference] == []


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
