"""The figures and the programs in docs/multi-node.md."""

import ast
import json
import re

import pytest

import megamoe_jit
from megamoe_jit._nodes.model import cost
from megamoe_jit.heuristics.presets import preset
from tests.stubs import REPO

TEXT = (REPO / "docs" / "multi-node.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_model_says():
    rows = re.findall(r"^\| (v4-\w+) \| (\d) \| (\d+) \| (.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 18
    for name, nodes, tokens, cells in rows:
        it = cost(preset(name).shape.routed, int(nodes), 8, int(tokens))
        times = (f"{time:.0f}" for time in (it.kernel_us, it.exchange_us, it.total_us))
        expected = (it.exchange, str(it.chunks), f"{it.sent_bytes / 1e6:.1f}", *times)
        assert tuple(cells.split(" | ")) == expected, (name, nodes, tokens)


@pytest.mark.parametrize(("name", "table"), re.findall(r"<!-- measured: (\S+) -->\n((?:\|.*\n)+)", TEXT))
def test_what_was_measured_is_what_the_results_say(name: str, table: str):
    found = json.loads((REPO / name).read_text(encoding="utf-8"))["nodes"]
    assert all(row["correct"] for row in found)
    expected = []
    for row in found:
        times = (row[f"{part}_us"] for part in ("whole", "kernel", "exchange", "rest", "baseline"))
        cells = ("-" if time is None else f"{time:.0f}" for time in times)
        speedup = "-" if row["baseline_speedup"] is None else f"{row['baseline_speedup']:.2f}"
        shape = row["shape"] + {"fp8": "", "mxfp4": ", MXFP4"}[row["weights"]]
        way = f"{row['exchange']}, {row['chunks']}"
        expected.append(f"| {' | '.join((shape, str(row['tokens']), way, *cells, speedup))} |")
    assert table.splitlines()[2:] == expected


def test_each_table_has_its_results():
    results = {file.name for file in (REPO / "benchmarks" / "results").glob("*-2nodes-*.json")}
    assert {name.rpartition("/")[2] for name in re.findall(r"<!-- measured: (\S+) -->", TEXT)} == results


def test_the_programs_use_what_there_is():
    programs = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    used = set()
    for program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mm":
                used.add(node.attr)
    assert used >= {"NodeTopology", "MegaMoE", "get_multinode_buffer_for_mega_moe", "fp8_mega_moe_multinode"}
    assert all(hasattr(megamoe_jit, name) for name in used)
