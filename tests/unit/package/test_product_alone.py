"""The package needs nothing of the repository around it: no tests, no benchmarks, no git."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe_jit._version import __version__

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megamoe_jit"
AROUND = {"tests", "benchmarks", "docs"}
#: With what is carried along, as a wheel has it.
FILES = sorted(
    Path(folder, name)
    for folder, _, names in os.walk(PACKAGE, followlinks=True)
    for name in names
    if "__pycache__" not in folder
)
MODULES = [path for path in FILES if path.suffix == ".py"]


def test_no_file_names_the_folders_around_the_package():
    named = re.compile(r"\b(tests|benchmarks)/|\.git\b")
    found = {str(path.relative_to(ROOT)): named.findall(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}
    assert len(MODULES) > 90


def test_no_module_imports_from_them_or_looks_outside():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]  # a path that is put together of names, a module that is imported by name
            for name in names:
                assert name.split(".")[0] not in AROUND, f"{path}, line {node.lineno}: {name}"


#: Watches what is opened, imported and started, and drives the package on stand-ins for the GPU.
DRIVEN = """
import importlib, json, pkgutil, sys
seen = []
def watch(event, arguments):
    if event in ("open", "import", "subprocess.Popen", "os.listdir", "os.scandir"):
        seen.append((event, str(arguments[0])))
    if event == "subprocess.Popen":
        seen.append((event, " ".join(map(str, arguments[1]))))
sys.addaudithook(watch)

import megamoe_jit
names = [m.name for m in pkgutil.walk_packages(megamoe_jit.__path__, "megamoe_jit.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)

from click.testing import CliRunner
from megamoe_jit._bench import clock, conditions, measure
from megamoe_jit._cli import cli

def run(*words):
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    return done.stdout

sizes, times, unfused = (4096, 2048, 32, 6, 64), (150.0,) * 5, (None, None, None)
row = measure.Row("v4-flash", *sizes, "auto", "pingpong", "fp8", *times, 0.0, 0.0, True, 1.0, 1.0, *unfused)
measure.require_hopper = lambda: "cpu"
measure.measure = lambda *_, **__: [row]
clock.anchors = lambda: {"dense_fp8_8192_tflops": 1400.0, "read_4gib_tb_s": 4.4}
import torch
from types import SimpleNamespace
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda _: SimpleNamespace(
    name="NVIDIA H200", multi_processor_count=132, total_memory=1, uuid="GPU-0")
bench = ("bench", "--shapes", "v4-flash", "--tokens", "64", "--variant", "auto")
print(json.dumps({
    "modules": {name: sys.modules[name].__file__ for name in names},
    "help": run("bench", "--help"),
    "table": run(*bench),
    "doc": json.loads(run(*bench, "--json", *sys.argv[1:])),
    "explain": run("explain", "--shapes", "v4-flash", "--ranks", "8", "--tokens", "64", "--gpu", "h200"),
    "seen": seen,
}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a copy of the package does in a folder that has nothing else."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, site / "megamoe_jit", ignore=shutil.ignore_patterns("__pycache__"))
    plot = ("--plot", str(site / "plots")) if importlib.util.find_spec("matplotlib") else ()
    done = subprocess.run(
        [sys.executable, "-c", DRIVEN, *plot],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "site": str(site)}


def test_every_module_is_the_copys_own(alone: dict):
    assert len(alone["modules"]) > 90
    assert {name: file for name, file in alone["modules"].items() if not file.startswith(alone["site"])} == {}


def test_nothing_of_the_repository_is_touched(alone: dict):
    # Where the checkout is installed as editable, the interpreter looks for modules along its folder, and torch for
    # libraries of NVIDIA's wheels in folders below it that are not there; that is not ours.
    def along_the_path(event: str, name: str) -> bool:
        return event in ("os.listdir", "os.scandir") and (name == str(ROOT) or not Path(name).exists())

    touched = [what for what in alone["seen"] if not along_the_path(*what[:2])]
    assert [what for what in touched if what[1].startswith(str(ROOT) + os.sep) and ".venv" not in what[1]] == []
    assert [name for event, name in touched if event == "import" and name.split(".")[0] in AROUND] == []
    assert [name for event, name in touched if event == "subprocess.Popen" and name.split()[0].endswith("git")] == []


def test_bench_gives_times_and_the_limit(alone: dict):
    assert "Time the layer on this GPU" in alone["help"]
    assert "% OF LIMIT" in alone["table"]
    assert "card before: dense FP8 8192^3 1400 TFLOPS" in alone["table"]
    for word in ("KNOWN", "NORMALISED", "must", "aim"):
        assert word not in alone["table"]
    doc = alone["doc"]
    (row,) = doc["rows"]
    assert (row["bound"], round(row["limit_us"])) == ("weights", 181)
    assert row["limit_share"] == pytest.approx(row["limit_us"] / 150)
    assert (row["best_known_us"], row["normalised_us"], doc["summary"]) == (None, None, [])
    assert doc["environment"]["commit"] == f"v{__version__}"
    assert "cooperative: within 1 % of the best from 16 tokens per rank on, measured on NVIDIA H200" in alone["explain"]


def test_plots_are_drawn(alone: dict):
    pytest.importorskip("matplotlib")
    assert {path.name for path in Path(alone["site"], "plots").iterdir()} == {"time.svg", "limit.svg"}
