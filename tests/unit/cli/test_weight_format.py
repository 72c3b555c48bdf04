"""`--weight-format`, and kernels by name: every command about kernels takes a format, and lists what there are."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._cli._names import parse_spec
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import FORMATS, MXFP4, Variant
from megamoe_jit.heuristics import preset
from megamoe_jit.heuristics.select import all_variants, choose
from tests.commandline import checked

LAYER = ["--hidden", "256", "--intermediate", "128", "--experts", "8", "--topk", "2"]
COMMANDS = ("warmup", "explain", "plan", "verify", "bench")


def run(*words: str, code: int = 0) -> dict:
    done = CliRunner().invoke(cli, [*words, "--json"])
    assert done.exit_code == code, done.output
    return checked(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_the_formats(command: str):
    option = next(each for each in cli.commands[command].params if each.name == "weights")
    assert tuple(option.type.choices) == tuple(FORMATS)


def test_a_call_with_packed_weights_is_explained(tmp_path):
    found = run("explain", *LAYER, "--tokens", "1,3000", "--weight-format", "mxfp4", "--cache-dir", str(tmp_path))
    for call in found["calls"]:
        assert call["weights"] == "mxfp4"
        assert "_mxfp4" in call["kernel"]
        assert Variant(call["variant"]) in Variant.reading(MXFP4)
    plain = run("explain", *LAYER, "--tokens", "1", "--cache-dir", str(tmp_path))
    assert plain["calls"][0]["weights"] == "fp8"


def test_packed_weights_take_half_the_memory():
    packed, plain = (
        run("plan", *LAYER, "--tokens", "64", "--weight-format", name)["plans"][0] for name in ("mxfp4", "fp8")
    )
    assert packed["weights"] == "mxfp4"
    codes = 8 * 3 * 256 * 128
    assert packed["weight_bytes"] - plain["weight_bytes"] == codes * 4.25 / 8 - codes
    for kernel in packed["kernels"]:
        assert kernel["variant"] in ("decode", "wide"), "what so small a buffer prepares"
        assert "exponents" in [part["name"] for part in kernel["shared"]]
        assert sum(part["bytes"] for part in kernel["shared"]) == kernel["shared_bytes"]


@pytest.mark.parametrize(("variant", "expands"), [("auto", True), ("prefill", True), ("unpack", False)])
def test_a_plan_has_the_memory_that_packed_weights_are_expanded_in(variant: str, expands: bool):
    """A codes' byte for each weight, and a counter for each 256 of the columns of either matrix."""
    words = "plan", *LAYER, "--tokens", "4096", "--weight-format", "mxfp4", "--variant", variant
    found = run(*words)["plans"][0]
    assert found["expanded_bytes"] == (8 * 3 * 256 * 128 + 8 * (1 + 1) * 4 if expands else 0)
    assert ("expanded" in CliRunner().invoke(cli, words).output) is expands
    few = run("plan", *LAYER, "--tokens", "64", "--weight-format", "mxfp4")["plans"][0]
    assert few["expanded_bytes"] == 0, "none of the calls that fit takes a kernel that expands"
    assert run("plan", *LAYER, "--tokens", "4096")["plans"][0]["expanded_bytes"] == 0


@pytest.mark.parametrize("command", ["plan", "explain", "warmup"])
@pytest.mark.parametrize("name", ["mxfp4", "fp8e5m2"])
def test_several_nodes_take_every_format(command: str, name: str):
    """What a call takes is planned, explained and compiled, and nothing of another format."""
    words = ["--dry-run"] if command == "warmup" else ["--tokens", "64"]
    done = CliRunner().invoke(cli, [command, *LAYER, *words, "--weight-format", name, "--nodes", "2", "--json"])
    assert done.exit_code == 0, done.stderr
    kernels = re.findall(r"megamoe_(?!stage|nodes)\w+", done.stdout)  # those of any layer are of any format
    assert kernels
    assert all(f"_{name}_" in kernel for kernel in kernels)


def test_a_warmup_of_packed_weights_has_their_kernels_alone(tmp_path):
    found = run("warmup", *LAYER, "--weight-format", "mxfp4", "--dry-run", "--cache-dir", str(tmp_path))
    names = [kernel["kernel"] for kernel in found["kernels"] if "stage" not in kernel["kernel"]]
    assert names
    assert all("_mxfp4_" in name for name in names)
    refused = CliRunner().invoke(cli, ["warmup", *LAYER, "--weight-format", "mxfp4", "--variant", "pingpong"])
    assert refused.exit_code == 2
    assert "variant = 'pingpong' is not supported" in refused.stderr


def test_a_kernel_is_named_with_its_format():
    variant = Variant.reading(MXFP4)[0]
    spec = parse_spec(f"v4-flash/{variant.value}/mxfp4/r8/raw")
    assert (spec.weights, spec.ranks, spec.shape) == (MXFP4, 8, preset("v4-flash").shape)
    assert parse_spec(spec.kernel_name) == spec
    words = spec.command.split()
    assert words[words.index("--weight-format") + 1] == "mxfp4"
    with pytest.raises(ConfigError, match="'mxfp4' in .* is not understood; allowed: .*, each once"):
        parse_spec(f"v4-flash/{variant.value}/mxfp4/mxfp4")
    json.dumps(spec.to_json())
    assert type(spec).from_json(spec.to_json()) == spec


@pytest.mark.parametrize("stored", FORMATS.values(), ids=str)
def test_what_is_chosen_multiplies_the_weights(stored):
    shape = preset("v4-pro").shape
    if not Variant.reading(stored):
        with pytest.raises(ConfigError, match=f"no variant multiplies weights in {stored.name} yet; allowed: fp8"):
            choose(shape, 1, weights=stored)
        return
    for tokens in (0, 1, 8, 64, 300, 4096, 32768):
        for threshold in (None, 0, 100):
            choice = choose(shape, tokens, weights=stored, cooperative_threshold=threshold, gpu="NVIDIA H200")
            assert choice.variant in Variant.reading(stored)
            assert choice.variant in all_variants(shape, stored, most=tokens)
