"""Presets: in order, compilable, and equal to what transformers says of each model."""

import re
from pathlib import Path

import pytest

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FP8
from megamoe_jit.checkpoints.config import sizes_of
from megamoe_jit.heuristics import parse_shapes, preset, preset_names

SIZES = "hidden = 256\nintermediate = 128\nexperts = 8\ntopk = 2\n"

ISSUED = {
    "v4-flash": (4096, 2048, 256, 6),
    "v4-pro": (7168, 3072, 384, 6),
    "v4.1-flash": (5120, 2304, 384, 6),
    "mimo-v2.5": (4096, 2048, 256, 8),
    "mimo-v2.5-pro": (6144, 2048, 384, 8),
    "deepseek-v3": (7168, 2048, 256, 8),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "glm-4-moe": (4096, 1408, 128, 8),
    "minimax-m2": (3072, 1536, 256, 8),
    "longcat": (6144, 2048, 512, 12),
    "kimi-linear": (2304, 1024, 256, 8),
}


def test_names_and_sizes():
    assert {name: preset(name).shape for name in preset_names()} == {
        name: MoEShape(*sizes) for name, sizes in ISSUED.items()
    }


@pytest.mark.parametrize("name", list(ISSUED))
def test_preset_equals_the_configuration_class(name):
    transformers = pytest.importorskip("transformers")
    entry = preset(name)
    assert entry.config is not None
    if not hasattr(transformers, entry.config):
        pytest.skip(f"transformers {transformers.__version__} has no {entry.config}")
    for size, default in sizes_of(getattr(transformers, entry.config)().to_dict()).items():
        equal = getattr(entry.shape, size) == default
        assert equal == (size not in entry.differs), f"{size}: {default} in {entry.config}"


@pytest.mark.parametrize("name", list(ISSUED))
@pytest.mark.parametrize("variant", Variant.reading(FP8))
def test_every_preset_can_be_specified_for_its_ranks(name, variant):
    entry = preset(name)
    spec = KernelSpec(entry.shape, variant, ranks=entry.ranks)
    assert spec.local_experts == entry.local_experts
    assert spec.local_experts * entry.ranks == entry.shape.experts
    assert spec.stages >= 3
    assert entry.source


SHARED = ("n_shared_experts", "num_shared_experts")  # of the same width as the others, in all these models


@pytest.mark.parametrize("name", list(ISSUED))
def test_shared_experts_are_those_of_the_configuration_class(name):
    transformers = pytest.importorskip("transformers")
    entry = preset(name)
    if not hasattr(transformers, entry.config):
        pytest.skip(f"transformers {transformers.__version__} has no {entry.config}")
    config = getattr(transformers, entry.config)()
    assert entry.shared == next((n for a in SHARED if (n := getattr(config, a, None))), 0)
    assert entry.shape.shared == 0, "they are compiled where they are asked for"


def test_parse_names_in_order_and_once():
    shapes = parse_shapes(" v4-pro, v4-flash,v4-pro ")
    assert [p.name for p in shapes] == ["v4-pro", "v4-flash"]
    assert [p.name for p in parse_shapes("all")] == list(preset_names())


def test_the_file_in_the_documentation_is_one(tmp_path):
    text = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    (mine,) = parse_shapes(str(path))
    assert (mine.ranks, mine.differs) == (8, ("...",))


def test_parse_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "[tiny]\nhidden = 256\nintermediate = 128\nexperts = 8\ntopk = 2\n"
        "[wide]\nhidden = 512\nintermediate = 128\nexperts = 16\ntopk = 2\nranks = 4\nsource = 'here'\n"
    )
    tiny, wide, flash = parse_shapes(f"{path},v4-flash")
    assert (tiny.name, tiny.shape, tiny.ranks, tiny.source) == ("tiny", MoEShape(256, 128, 8, 2), 1, "mine.toml")
    assert (wide.ranks, wide.local_experts, wide.source) == (4, 4, "here")
    assert flash == preset("v4-flash")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nhidden = 256\n", r"\[a\] has no intermediate; needed: hidden, intermediate"),
        ("[a]\nhidden = '256'\n", r"\[a\] hidden = '256'"),
        ("[a]\nhidden = 256\nwidth = 1\n", "unknown key 'width'"),
        ("[a]\nhidden = 2880\nintermediate = 2880\nexperts = 128\ntopk = 4\n", "hidden = 2880"),
        ("[a]\nhidden = 256\nintermediate = 128\nexperts = 9\ntopk = 2\nranks = 2\n", "a divisor of 9 experts"),
        ("[a]\nhidden = 256\nintermediate = 128\nexperts = 9\ntopk = 2\nranks = '2'\n", "ranks = '2'"),
        ("a = 1\n", "a = 1"),
        (f"[a]\n{SIZES}ranks = '2'\n", "ranks = '2'; allowed: an integer$"),
        (f"[a]\n{SIZES}shared = true\n", "shared = True; allowed: an integer$"),
        (f"[a]\n{SIZES}shared = 31\n", r"\[a\] shared = 31 is not supported; allowed: 0 to 30"),
        (f"[a]\n{SIZES}note = 1\n", "note = 1; allowed: a string$"),
        (f"[a]\n{SIZES}differs = 'hidden'\n", "differs = 'hidden'; allowed: a list of strings$"),
        (f"[a]\n{SIZES}differs = [1]\n", r"differs = \[1\]; allowed: a list of strings$"),
        ("", "names no shape"),
        ("[a\n", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_shapes(str(path))


def test_unknown_names_are_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match="unknown shape 'v4-flsh'; did you mean 'v4-flash'"):
        parse_shapes("v4-flsh")
    with pytest.raises(ConfigError, match="no shape in ' , '"):
        parse_shapes(" , ")
    with pytest.raises(ConfigError, match=r"cannot read shapes from .*missing\.toml"):
        parse_shapes(str(tmp_path / "missing.toml"))
