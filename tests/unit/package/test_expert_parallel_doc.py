"""The figures and the program in docs/expert-parallel.md."""

import ast
import json
import re
from pathlib import Path

import megamoe_jit
from megamoe_jit._device.layout import buffer_layout
from megamoe_jit.heuristics.presets import preset

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "expert-parallel.md").read_text(encoding="utf-8")


def test_memory_is_what_the_layout_says():
    rows = re.findall(r"^\| (\S+) \| (\d+) \|((?: [\d.]+ \+ [\d.]+ \|){4})$", TEXT, re.MULTILINE)
    assert len(rows) == 5
    for name, tokens, cells in rows:
        for ranks, cell in zip((1, 2, 4, 8), cells.strip("| ").split(" | "), strict=True):
            layout = buffer_layout(preset(name).shape, int(tokens), ranks)
            parts = (layout.symmetric_bytes, layout.local_bytes)
            assert cell == " + ".join(f"{size / 2**30:.2f}" for size in parts), (name, tokens, ranks)


def test_the_program_uses_what_there_is():
    program = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    names = {
        n.attr
        for n in ast.walk(ast.parse(program))
        if isinstance(n, ast.Attribute) and n.value.__dict__.get("id") == "mm"
    }
    assert len(names) == 5
    assert all(hasattr(megamoe_jit, name) for name in names)


def test_what_a_call_moves_is_what_its_formulas_say():
    shape, tokens = preset("v4-flash").shape, 512
    local = shape.experts // 8
    assert (local, shape.hidden) == (32, 4096)
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|((?: [\d.]+ \|){4})$", TEXT, re.MULTILINE)
    assert len(rows) == 8
    for formula, cells in rows:
        expression = formula.replace("local experts", "local")
        for ranks, cell in zip((1, 2, 4, 8), cells.strip("| ").split(" | "), strict=True):
            names = {"R": ranks, "hidden": shape.hidden, "local": local}
            names["pairs"] = tokens * shape.topk * (ranks - 1) / ranks
            value = 0 if ranks == 1 else eval(expression, {"__builtins__": {}}, names)
            assert cell == (f"{value / 1e6:.1f}" if "." in cell else f"{value:.0f}"), (formula, ranks)


def test_what_verify_said_is_in_its_document():
    date, ranks, scenarios, passed, run = re.search(
        r"H200, ([\d-]+):\n\n- `verify --ranks (\d)`: all (\d+) scenarios with both variants, (\d+) of (\d+) passed",
        TEXT,
    ).groups()
    path = ROOT / "benchmarks" / "results" / f"{date}-h200-{ranks}ranks-verify.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["scenarios"], found["run"], found["not_run"]) == (int(scenarios), int(run), 0)
    assert sum(outcome["passed"] for outcome in found["outcomes"]) == int(passed)
