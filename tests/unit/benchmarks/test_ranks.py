"""benchmarks/ranks.py and beside.py: what several ranks add to one, also beside the code of another checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ranks
from benchmarks.beside import PACKAGE, module, put_beside
from megamoe_jit._spec import FP8, MoEShape


def test_a_checkout_beside_this_one_is_a_package_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = tmp_path / "older" / PACKAGE
    package.mkdir(parents=True)
    (package / "part.py").write_text("import megamoe_jit\nname = 'megamoe_jit::op'\n")
    (package / "__init__.py").write_text("from megamoe_jit import part\nold = True\n")
    (tmp_path / "older" / "kernels").mkdir()
    (tmp_path / "older" / "kernels" / "a.cuh").write_text("// megamoe_jit\n")
    (package / "kernels").symlink_to("../kernels")
    put_beside(tmp_path / "older", "megamoe_jit_beside_test", tmp_path / "copies")
    its = module("megamoe_jit_beside_test")
    assert its.old
    assert not hasattr(module(PACKAGE), "old")
    assert module("megamoe_jit_beside_test", "part").name == "megamoe_jit_beside_test::op"
    copy = tmp_path / "copies" / "megamoe_jit_beside_test" / "kernels"
    assert not copy.is_symlink()
    assert (copy / "a.cuh").read_text() == "// megamoe_jit\n", "kernels stay as they are"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_rows_are_dealt_so_that_each_expert_has_as_many(count: int, first: int):
    local, slots = 5, 4
    routes = [torch.rand(40, local).topk(slots).indices for _ in range(count)]
    ids = [ranks.dealt(routes, local, rank, first) for rank in range(count)]
    for rank, mine in enumerate(ids):
        assert (mine.sort(dim=1).values.diff(dim=1) > 0).all(), "different experts in each row"
        to = (mine // local).unique().tolist()
        assert to == [r for r in range(count) if first == 0 or r != rank]
    rows = torch.cat(ids).flatten().bincount(minlength=count * local).reshape(count, local)
    assert torch.equal(rows, torch.stack([route.flatten().bincount(minlength=local) for route in routes]))


def part(one: float, half: float, everything: float, uniform: float, rows: list[int], **more: Any) -> dict[str, Any]:
    """What a rank measured, with a package before that took twice as long."""
    medians = {f"{PACKAGE} {mode}": us for mode, us in zip(ranks.MODES, (one, half, everything, uniform), strict=True)}
    medians |= {name.replace(PACKAGE, "before"): 2 * us for name, us in medians.items()}
    return {"medians": medians, "correct": True, "same_bits": True, "diff": 0.0, "expert_rows": rows, **more}


def test_a_row_has_the_largest_figures_and_the_experts_that_any_rank_reads():
    own = MoEShape(128, 128, 4, 3)
    world = SimpleNamespace(ranks=2, device=torch.device("cpu"))
    layer: Any = SimpleNamespace(name="small", shape=MoEShape(128, 128, 8, 3), own_shape=own, format=FP8, world=world)
    parts = [
        part(100.0, 104.0, 112.0, 106.0, [1, 0, 0, 0, 0, 0, 0, 2]),
        part(101.0, 103.0, 110.0, 105.0, [0, 0, 0, 5, 1, 1, 0, 0], same_bits=False),
    ]
    row = ranks._row(layer, 16, (PACKAGE, "before"), parts)
    assert [row[f"{mode}_us"] for mode in ranks.MODES] == [101.0, 104.0, 112.0, 106.0]
    assert row["before"] == {
        "one_us": 202.0,
        "half_us": 208.0,
        "all_us": 224.0,
        "uniform_us": 212.0,
        "same_bits": False,
    }
    read = 3 * FP8.expert_code_bytes(128, 128)  # experts 4, 5 and 7: the tokens of both ranks count
    assert row["weights_tb_s"] == pytest.approx(read * 1e-6 / 106.0)
    assert (row["experts"], row["ranks"], row["correct"]) == (4, 2, True)
    text = ranks.line_of(row)
    assert [word in text for word in ("+3.0", "OTHER BITS", "WRONG")] == [True, True, False]
    alone = ranks._row(layer, 16, (PACKAGE,), [{**parts[0], "correct": False}, parts[1]])
    assert alone["before"] is None
    assert ranks.line_of(alone).endswith("WRONG")
