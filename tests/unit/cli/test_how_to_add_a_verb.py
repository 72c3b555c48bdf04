"""`docs/how-to/add-a-verb.md`, followed in a copy of the checkout: it works, and what is left out is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest

from tests.copies import python
from tests.stubs import REPO

PAGE = (REPO / "docs/how-to/add-a-verb.md").read_text(encoding="utf-8")
VERBS = "test_cli.py::test_verbs"
SCHEMAS = "test_cli_schemas.py::test_every_command_has_a_schema_and_every_schema_a_command"
ROWS = "test_readme.py::test_every_command_is_in_the_readme"
#: Of the example alone, where there is one for each command.
ITS_OWN = (
    "test_cli.py::test_the_help_lists_every_command_with_its_own_words",
    "test_cli.py::test_every_command_has_help_and_json[exists]",
    "test_cli_schemas.py::test_schemas_are_valid_and_name_what_they_describe[exists]",
    "test_cli_schemas.py::test_schemas_are_what_the_classes_of_documents_say",
    "test_readme.py::test_command_lines_parse[megamoe-jit exists FILE]",
)


def steps() -> list[tuple[str, str]]:
    """The file that each numbered heading names, and the code below it."""
    found = re.findall(r"^## \d\. .*?$(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^## \d\. (.*)$", PAGE, re.MULTILINE)
    blocks = [re.search(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1] for text in found]
    return list(zip(headings, blocks, strict=True))


COMMAND, SUMMARY, SCHEMA, TEST, ROW = steps()


def path_in(heading: str) -> str:
    return re.findall(r"`([\w/]+\.\w+)`", heading)[-1]


def file_of(root: Path, name: str) -> Path:
    """The file of tests with this name, whichever folder it is in."""
    (found,) = (root / "tests").rglob(name)
    return found


def insert(file: Path, before: str, line: str) -> None:
    """Put a line before the first that begins with `before`."""
    text = file.read_text(encoding="utf-8")
    at = re.search(rf"^{re.escape(before)}", text, re.MULTILINE).start()
    file.write_text(text[:at] + line + text[at:], encoding="utf-8")


def follow(root: Path, *forgotten: str) -> None:
    """Do what the page says, but for some steps."""
    (root / path_in(COMMAND[0])).write_text(COMMAND[1], encoding="utf-8")
    if "SUMMARIES" not in forgotten:
        insert(root / path_in(SUMMARY[0]), '    "shapes":', SUMMARY[1])
    if "schema" not in forgotten:
        assert SCHEMA[1] == "make schemas\n"
        done = python(root, "-m", "tests.schemas")
        assert done.returncode == 0, done.stderr
    names = file_of(root, "test_cli.py")
    insert(file_of(root, "test_cli_schemas.py"), '    "warmup":', TEST[1])
    names.write_text(names.read_text().replace("    look = (", '    look = ("exists", '), encoding="utf-8")
    if "README" not in forgotten:
        insert(root / path_in(ROW[0]), "| `megamoe-jit doctor` |", ROW[1])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the files that have to do with the command line."""
    root, left_out = tmp_path / "copy", shutil.ignore_patterns("results")
    for name in ("megamoe_jit", "kernels_src", "heuristics", "tests", "benchmarks"):
        shutil.copytree(REPO / name, root / name, symlinks=True, ignore=left_out)
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, root / name)
    return root


def failing(root: Path, *tests: str) -> set[str]:
    """Those of the tests that fail in the copy."""
    chosen = []
    for test in tests:
        file, _, name = test.partition("::")
        chosen.append(f"{file_of(root, file)}::{name}")
    done = python(root, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *chosen)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return set(re.findall(r"^FAILED \S+/(test_\S+)", done.stdout, re.MULTILINE))


def test_whoever_follows_the_page_has_a_verb(copied: Path):
    follow(copied)
    assert failing(copied, VERBS, SCHEMAS, ROWS, *ITS_OWN) == set()
    there, absent = (python(copied, "-m", "megamoe_jit", "exists", name, "--json") for name in ("README.md", "none"))
    assert (there.returncode, absent.returncode) == (0, 1)
    document = json.loads(there.stdout)
    schema = json.loads((copied / path_in(SCHEMA[0])).read_text())
    jsonschema.validate(document, schema)
    assert schema["required"] == list(document) == ["schema_version", "kind", "file", "exists"]
    assert schema["properties"]["file"] == {"description": "as it was given", "type": "string"}
    assert (document["exists"], json.loads(absent.stdout)["exists"]) == (True, False)


@pytest.mark.parametrize(
    ("forgotten", "told"), [(("SUMMARIES",), {VERBS, SCHEMAS}), (("schema", "README"), {SCHEMAS, ROWS})]
)
def test_what_is_forgotten_is_told(copied: Path, forgotten: tuple[str, ...], told: set[str]):
    follow(copied, *forgotten)
    assert failing(copied, VERBS, SCHEMAS, ROWS) == told


def test_the_page_names_tests_that_are_there():
    named = {f"{file}::{name}" for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)}
    assert {VERBS, SCHEMAS, ROWS} <= named
    for test in named:
        file, name = test.split("::")
        assert f"\ndef {name}(" in file_of(REPO, file).read_text(encoding="utf-8"), test


def test_the_files_that_the_page_names_are_there():
    named = set(re.findall(r"`((?:megamoe_jit|tests|docs)/[\w/-]+\.\w+)`", PAGE))
    assert {path for path in named if not (REPO / path).exists()} == {path_in(COMMAND[0]), path_in(SCHEMA[0])}
