"""`explain --gpu` and `plan --gpu`: whose measurements count, and what the documents say of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._device import driver as _driver
from megamoe_jit._device.driver import Gpu, Machine
from megamoe_jit._errors import ConfigError
from megamoe_jit._settings.settings import override
from megamoe_jit.heuristics import select
from megamoe_jit.heuristics import tables as tables_module
from megamoe_jit.heuristics.tables import find_gpu, short_name
from tests.commandline import SIZES, checked, run

RULES = [
    {"tokens": 0, "variant": "cooperative", "lag": 1.0, "rows_per_item": 4},
    {"tokens": 200, "variant": "pingpong", "lag": 4.0, "rows_per_item": 2},
]
SHAPE = {"hidden": 256, "intermediate": 128, "experts": 4, "topk": 1}


def data(device: str) -> dict:
    """A table of the other choices than those that are made where nothing was measured."""
    return {
        "schema_version": 1,
        "kind": "heuristics",
        "devices": [device],
        "measured": {"device": device, "date": "2026-01-02T03:04:05+00:00", "commit": "abc"},
        "shapes": [{"name": "x", **SHAPE, "rules": RULES}],
    }


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two GPUs were measured; their tables are files of a folder."""
    for name, device in (("h100", "NVIDIA H100 80GB HBM3"), ("h200", "NVIDIA H200")):
        (tmp_path / f"{name}.json").write_text(json.dumps(data(device)))
    real = tables_module.tables
    for module in (tables_module, select):
        monkeypatch.setattr(module, "tables", lambda: real(tmp_path))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    """Gives this machine GPUs of these names; none at first."""

    def have(*names: str) -> None:
        cards = tuple(Gpu(index, name, "9.0", 132, 1, True) for index, name in enumerate(names))
        monkeypatch.setattr(_driver, "gpus", lambda: Machine("13.0", None, cards))

    have()
    return have


def call(command: str, *words: str, text: bool = False):
    result = CliRunner().invoke(cli, [command, *SIZES, *words, *([] if text else ["--json"])])
    assert result.exit_code == 0, result.output
    return result.stdout if text else checked(result.stdout)


@pytest.mark.parametrize("name", ["NVIDIA H200", "nvidia h200", "H200", "h200"])
def test_a_gpu_is_named_in_full_or_in_short(name: str):
    assert find_gpu(name) == "NVIDIA H200"
    doc = call("explain", "--tokens", "8,300", "--gpu", name)
    assert (doc["gpu"], doc["measured"]) == ("NVIDIA H200", True)
    few, many = doc["calls"]
    assert (few["variant"], many["variant"]) == ("cooperative", "pingpong")
    assert (few["parameters"]["lag_tiles"], few["parameters"]["rows_per_item"]) == (132, 4)
    assert "within 1 % of the best up to 199 tokens per rank, measured on NVIDIA H200 (2026-01-02)" in few["reasons"][0]
    doc = call("plan", "--tokens", "8,300", "--gpu", name)
    assert (doc["gpu"], doc["measured"]) == ("NVIDIA H200", True)
    assert [each["full_call"] for each in doc["plans"]] == ["cooperative", "pingpong"]


def test_names_that_are_alike_and_names_of_nothing(monkeypatch: pytest.MonkeyPatch):
    assert find_gpu("h100") == find_gpu("NVIDIA H100 80GB HBM3") == "NVIDIA H100 80GB HBM3"
    assert short_name("NVIDIA H100 PCIe") == "h100-pcie"
    for name in ("NVIDIA H100 PCIe", "h20", "H2000", ""):
        with pytest.raises(ConfigError, match=f"'{name}'; allowed: h100, h200, none"):
            find_gpu(name)
    monkeypatch.setattr(tables_module, "tables", lambda: ())
    with pytest.raises(ConfigError, match="allowed: none$"):
        find_gpu("h200")
    found = CliRunner().invoke(cli, ["explain", *SIZES, "--tokens", "8", "--gpu", "h200"])
    assert (found.exit_code, found.stdout) == (2, "")


@pytest.mark.parametrize("command", ["explain", "plan"])
def test_by_default_the_first_gpu_of_this_machine_counts(command: str, machine):
    def seen(*words: str) -> tuple:
        doc = call(command, "--tokens", "8", *words)
        (one,) = doc["calls" if command == "explain" else "plans"]
        return doc["gpu"], doc["measured"], one["variant" if command == "explain" else "full_call"]

    assert seen() == (None, False, "pingpong")
    machine("NVIDIA H200", "NVIDIA H20")
    assert seen() == ("NVIDIA H200", True, "cooperative")
    assert seen("--gpu", "None") == (None, False, "pingpong")
    assert seen("--gpu", "h100") == ("NVIDIA H100 80GB HBM3", True, "cooperative")
    with override(cooperative_threshold=256):
        assert seen() == ("NVIDIA H200", True, "pingpong")
    machine("NVIDIA H20")
    assert seen() == ("NVIDIA H20", False, "pingpong")


def test_the_text_names_the_gpu_and_what_it_takes(machine):
    machine("NVIDIA H20")
    assert "  GPU         NVIDIA H20, nothing measured\n" in call("explain", "--tokens", "8", text=True)
    assert "  GPU         NVIDIA H200, measured\n" in call("explain", "--tokens", "8", "--gpu", "h200", text=True)
    assert "  GPU         none, nothing measured\n" in call("explain", "--tokens", "8", "--gpu", "none", text=True)
    assert "a call that fills it takes cooperative" in call("plan", "--tokens", "8", "--gpu", "h200", text=True)


def test_a_forced_variant_and_all_kernels_stay(machine):
    machine("NVIDIA H200")
    assert call("explain", "--tokens", "8", "--variant", "pingpong")["calls"][0]["variant"] == "pingpong"
    (found,) = call("plan", "--tokens", "8")["plans"]
    assert [kernel["variant"] for kernel in found["kernels"]] == ["pingpong", "cooperative"]
    with override(variant="pingpong"):
        assert call("plan", "--tokens", "8")["plans"][0]["full_call"] == "pingpong"


def test_torch_is_not_asked():
    code = (
        "import sys\nfrom megamoe_jit._cli import main\nsys.argv = ['megamoe-jit', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    for command in ("explain", "plan"):
        subprocess.run([sys.executable, "-c", code, command, *SIZES, "--tokens", "8"], check=True, capture_output=True)
    assert checked(run("plan", *SIZES, "--tokens", "8", "--gpu", "none", "--json").stdout)["gpu"] is None
