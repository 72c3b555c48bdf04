"""What a user types for shapes and kernels, and what is said when it is not understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._errors import ConfigError
from megamoe_jit.heuristics import parse_shapes, preset

SMALL = "hidden = 256\nintermediate = 128\nexperts = 8\ntopk = 2\n"
LARGE = "hidden = 512\nintermediate = 128\nexperts = 8\ntopk = 2\n"


def invoke(*words: str):
    return CliRunner().invoke(cli, list(words))


def write(path: Path, **shapes: str) -> Path:
    path.write_text("".join(f"['{name}']\n{sizes}" for name, sizes in shapes.items()))
    return path


@pytest.mark.parametrize("command", ["warmup --dry-run", "explain --tokens 4", "plan --tokens 4"])
def test_two_shapes_of_one_name_are_refused(tmp_path: Path, command: str):
    one, two = write(tmp_path / "d1.toml", a=SMALL), write(tmp_path / "d2.toml", a=LARGE)
    result = invoke(*command.split(), "--shapes", f"{one},{two}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "shape 'a' is given twice with other sizes" in result.stderr
    assert f"256/128/8/2 in {one}, 512/128/8/2 in {two}" in result.stderr


@pytest.mark.parametrize("first", ["v4-flash", "all"])
def test_a_file_must_not_redefine_a_known_shape(tmp_path: Path, first: str):
    mine = write(tmp_path / "g.toml", **{"v4-flash": LARGE})
    with pytest.raises(ConfigError, match=rf"'v4-flash' is given twice .*`shapes ls`, 512/128/8/2 in {mine}"):
        parse_shapes(f"{first},{mine}")
    assert [p.shape.hidden for p in parse_shapes(str(mine))] == [512], "alone it may"


def test_equal_shapes_of_one_name_count_once(tmp_path: Path):
    one, two = write(tmp_path / "d1.toml", a=SMALL), write(tmp_path / "d2.toml", a=SMALL, b=SMALL)
    assert [p.name for p in parse_shapes(f"{one},{two},{one}")] == ["a", "b"]
    more = write(tmp_path / "d3.toml", a=f"{SMALL}ranks = 2\n")
    with pytest.raises(ConfigError, match="256/128/8/2 on 2 ranks"):
        parse_shapes(f"{one},{more}")


@pytest.mark.parametrize("text", ["shapes.toml/pingpong", "/tmp/x/shapes.toml/pingpong", "shapes.toml"])
@pytest.mark.parametrize("command", ["inspect", "render"])
def test_a_file_is_no_spec(command: str, text: str):
    said = invoke(command, text).stderr
    assert said.startswith(f"Error: {text!r} names a .toml file, which only --shapes takes; allowed: SHAPE/VARIANT")
    assert ("beginning of a key" in said) == (command == "inspect")


def test_shapes_of_a_spec():
    for text in ("v4-flsh/pingpong", "/tmp/x/pingpong"):
        said = invoke("inspect", text).stderr
        assert "unknown shape" in said
        assert ".toml" not in said
    assert "a .toml file, or a model's folder" in invoke("plan", "--shapes", "v4-flsh", "--tokens", "4").stderr
    with pytest.raises(ConfigError, match=r"longcat[^.]*$"):
        preset("v4-flsh")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("v4-flsh", "v4-flash"),
        ("V4-Pro", "v4-pro"),
        ("DeepSeek-V4-Flash", "v4-flash"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("GLM-4.5-Air", "glm-4-moe"),
        ("Kimi-Linear-48B-A3B-Instruct", "kimi-linear"),
    ],
)
def test_a_model_is_known_by_the_name_that_it_has_elsewhere(typed: str, meant: str):
    with pytest.raises(ConfigError, match=f"unknown shape '{typed}'; did you mean '{meant}'[?] allowed: v4-flash"):
        preset(typed)


def test_what_a_spec_may_be_is_a_sentence():
    assert "(v4-flash/pingpong, v4-pro/cooperative/r8), or a kernel's name as" in invoke("render", "v4-flash").stderr
    both = invoke("inspect", "v4-flash").stderr
    assert "/r8), a kernel's name as `warmup` and `cache ls` show it, or the beginning of a key" in both


@pytest.mark.parametrize("verb", ["render", "inspect"])
def test_the_help_says_what_a_spec_may_end_with(verb: str):
    said = invoke(verb, "--help").stdout
    assert all(f"/{word}" in said for word in ("rN", "mxfp4", "exact", "f32out", "raw"))


def test_missing_size_is_missing(tmp_path: Path):
    mine = write(tmp_path / "mine.toml", a=SMALL.replace("topk = 2\n", ""))
    with pytest.raises(ConfigError, match=re.escape("mine.toml: [a] has no topk; needed: hidden, intermediate, ")):
        parse_shapes(str(mine))


def test_plan_says_that_capacity_is_rounded_up():
    assert "up to 128 tokens (16 rounded up to a multiple of 128), 1 rank, " in invoke(
        "plan", "--shapes", "v4-flash", "--tokens", "16"
    ).stdout.replace("\n", " ")
    assert "up to 256 tokens, 1 rank, " in invoke("plan", "--shapes", "v4-flash", "--tokens", "256").stdout
    assert "multiple of 128" in invoke("plan", "--help").stdout.replace("\n", " ").replace("  ", "")


def test_columns_of_shapes_are_explained():
    assert "RANKS is" in invoke("shapes", "ls", "--help").stdout
