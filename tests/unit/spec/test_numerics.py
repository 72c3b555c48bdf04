"""Numeric options as one value: names, flags and words of a kernel follow from it."""

from __future__ import annotations

import ast
import copy
import pickle
from dataclasses import fields, replace

import pytest

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.numerics import Numerics, numerics_of
from tests.stubs import REPO

SHAPE = MoEShape(256, 128, 8, 2)
EACH = (Numerics(), Numerics(fast_math=False))


@pytest.mark.parametrize("numerics", EACH)
def test_a_kernel_is_found_by_its_name_and_by_its_document(numerics):
    for timeline in (False, True):
        spec = KernelSpec(SHAPE, Variant.PINGPONG, 2, timeline=timeline, numerics=numerics)
        assert KernelSpec.of_kernel_name(spec.kernel_name) == KernelSpec.from_json(spec.to_json()) == spec
        assert spec.fast_math is numerics.fast_math


def test_a_spec_takes_the_option_of_a_call_or_the_whole_value():
    exact = KernelSpec(SHAPE, Variant.PINGPONG, 1, False)
    assert exact == KernelSpec(SHAPE, Variant.PINGPONG, fast_math=False)
    assert exact == KernelSpec(SHAPE, Variant.PINGPONG, numerics=Numerics(fast_math=False))
    assert exact != KernelSpec(SHAPE, Variant.PINGPONG)
    with pytest.raises(ConfigError, match="numerics = True is not supported; allowed: a Numerics"):
        KernelSpec(SHAPE, Variant.PINGPONG, numerics=True)


@pytest.mark.parametrize(
    "name",
    [
        "megamoe_pingpong_h256_i128_e8_k2_r1",
        "megamoe_pingpong_h256_i128_e8_k2_r1_fast_exact",
        "megamoe_pingpong_h256_i128_e8_k2_r1_timeline_fast",
        "megamoe_pingpong_h256_i128_e8_k2_r1_quick",
        "pingpong_h256_i128_e8_k2_r1_fast",
    ],
)
def test_what_is_almost_a_name_is_none(name):
    assert KernelSpec.of_kernel_name(name) is None


def test_the_command_line_says_what_is_not_the_default():
    assert [value.flags() for value in EACH] == [[], ["--no-fast-math"]]
    assert "exact" in Numerics.changes()
    assert Numerics.named(["exact"]) == EACH[1]
    with pytest.raises(ConfigError, match="'quick' is no numeric option; allowed: exact, fast(,|$)"):
        Numerics.named(["quick"])


def test_options_behind_the_first_are_named_where_a_value_is_made():
    """A new field may stand before them; and whoever hands on the values of a call does not say how many these are."""
    for path in sorted((REPO / "megamoe_jit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Numerics":
                assert len(node.args) <= 1, f"{path}:{node.lineno}"
            if isinstance(node, ast.arg) and node.arg == "numeric" and node.annotation is not None:
                assert ast.unparse(node.annotation) in ("tuple[bool, ...]", "Any"), f"{path}:{node.lineno}"


def test_every_option_has_words_of_its_own():
    words = [word for option in fields(Numerics) for word in option.metadata["words"] if word]
    assert len(set(words)) == len(words)
    assert not set(words) & {"timeline", *Variant}


@pytest.mark.parametrize("value", [1, None, "fast", [], {}])
def test_a_call_with_no_bool_gets_no_value(value):
    numerics_of(True)  # which equals 1
    with pytest.raises((ConfigError, TypeError)):
        numerics_of(value)
    with pytest.raises(ConfigError, match="fast_math = .* is not supported; allowed: True or False"):
        Numerics(value)


def test_a_value_is_made_once():
    assert numerics_of(False) is Numerics(False) is EACH[1] is not EACH[0]
    assert replace(EACH[0], fast_math=False) is EACH[1]
    for copied in (copy.copy(EACH[1]), copy.deepcopy(EACH[1]), pickle.loads(pickle.dumps(EACH[1]))):
        assert copied is EACH[1]


def test_looking_it_up_runs_no_python():
    assert Numerics.__hash__ is object.__hash__
    assert Numerics.__eq__ is object.__eq__
