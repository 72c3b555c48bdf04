"""README must be true where a program can tell."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import megamoe_jit
from megamoe_jit._cli import cli
from megamoe_jit._settings.variables import VARIABLES
from megamoe_jit.heuristics.presets import preset_names

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    README,
    *((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "benchmarks/README.md")),
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code_of(text: str) -> list[str]:
    """Inline code and the lines of shell blocks, without comments."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [part.split("  #")[0].split("    #")[0].strip() for part in inline + lines]


def test_variables():
    rows = re.findall(r"^\| `(MEGAMOE_JIT_\w+)` \| (.+?) \| (.+?) \| (.+) \|$", README, re.MULTILINE)
    table = [(name, kind.replace("\\|", "|"), default, meaning) for name, kind, default, meaning in rows]
    assert table == [(v.name, v.type, v.default, v.meaning) for v in VARIABLES]


def test_no_other_variable_is_named():
    known = {variable.name for variable in VARIABLES}
    for text in DOCUMENTS:
        assert set(re.findall(r"MEGAMOE_JIT_\w*\w", text)) <= known


def test_python_examples_are_short_and_use_what_exists():
    examples = blocks("python")
    assert examples
    assert "from megamoe_jit import MegaMoE" in examples[0]
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 15
        tree = ast.parse(example)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "megamoe_jit":
                assert {alias.name for alias in node.names} <= set(megamoe_jit.__all__)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mm":
                assert node.attr in megamoe_jit.__all__


def test_python_examples_call_with_arguments_that_fit():
    fits = 0
    for example in blocks("python"):
        for node in ast.walk(ast.parse(example)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name not in megamoe_jit.__all__:
                continue
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(getattr(megamoe_jit, name)).bind(*node.args, **keywords)
            fits += 1
    assert fits >= 5


def commands() -> list[str]:
    found = [code for text in DOCUMENTS for code in code_of(text) if code.startswith("megamoe-jit ")]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_command_lines_parse(line: str):
    """Every command exists and takes these options; nothing is run."""
    command: click.Command = cli
    words = shlex.split(line)[1:]
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    with command.make_context(command.name, words):
        pass


def test_every_command_is_in_the_readme():
    named = {tuple(re.findall(r"^megamoe-jit ((?:[a-z-]+ ?)+)", code)[0].split()) for code in commands()}
    for name, command in cli.commands.items():
        for leaf in [(name, sub) for sub in command.commands] if isinstance(command, click.Group) else [(name,)]:
            assert any(words[: len(leaf)] == leaf for words in named)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    for text in DOCUMENTS:
        for code in code_of(text):
            words = code.split()
            if words[:1] == ["make"]:
                assert {word for word in words[1:2] if "=" not in word} <= targets, code


def test_shapes_named():
    sentence = README.split("Known by name: ")[1].split("(")[0]
    named = re.split(r",\s+|\s+and\s+", sentence.strip())
    assert named == list(preset_names())


def test_links_lead_somewhere():
    for name, text in (
        ("README.md", README),
        ("benchmarks/README.md", DOCUMENTS[2]),
        ("CONTRIBUTING.md", DOCUMENTS[1]),
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
