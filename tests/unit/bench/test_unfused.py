"""The unfused layer between real processes on the CPU, and the rows made of what ranks measured."""

from __future__ import annotations

import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megamoe_jit._bench import measure_ranks as _bench_ranks
from megamoe_jit._bench import on_ranks
from megamoe_jit._bench.contenders import METHODS, FlashInfer, Unfused
from megamoe_jit._bench.grouped_gemm import BlockwiseEach, DeepGemmGrouped, Dequantised, GroupedRowwise, probe
from megamoe_jit._bench.rows import rows_of
from megamoe_jit._bench.unfused import Baseline, Task
from megamoe_jit._bench.unfused_run import unusable
from megamoe_jit._check.scenarios import Scenario, Weights, make_inputs, make_weights
from megamoe_jit._check.spawn import World, describe, run_ranks
from megamoe_jit._check.verify import judge
from megamoe_jit._documents import content
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import dequantize_activations, dequantize_weights
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, moe_reference
from tests.ranks import forked

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def on_rank(world: World) -> list[float]:
    """`calc_diff` of the unfused layer to the reference, for some routes."""
    shape, diffs = MoEShape(256, 384, 6, 3), []
    weights = make_weights(shape, "cpu")
    local = shape.experts // world.ranks
    mine = slice(world.rank * local, (world.rank + 1) * local)
    own = [(codes[mine], scales[mine]) for codes, scales in (weights.l1, weights.l2)]
    for route, tokens in (("topk", 20), ("hot", 33 + world.rank), ("single", 7)):
        inputs = make_inputs(Scenario("b", shape, tokens, tokens, route=route), "cpu", world.rank, weights)
        layer = Baseline(
            Dequantised, Task(inputs, Weights(*own), shape.experts, 10.0, dist.group.WORLD), compiled=False
        )
        expected = moe_reference(*inputs.operands, activation_clamp=10.0)
        for _ in range(2):  # nothing is left over from the call before
            diffs.append(calc_diff(layer(), expected))
    return diffs


def test_the_unfused_layer_gives_the_same_answer():
    with forked():
        ends = run_ranks("tests.unit.bench.test_unfused:on_rank", 3, device="cpu", timeout_s=120)
    assert all(end.ok for end in ends), describe(ends)
    for end in ends:
        assert max(end.result) < Dequantised.bound


def test_one_rank_needs_no_process_group():
    shape, weights = MoEShape(256, 384, 8, 3), make_weights(MoEShape(256, 384, 8, 3), "cpu")
    inputs = make_inputs(Scenario("b", shape, 20, 20), "cpu", 0, weights)
    layer = Baseline(Dequantised, Task(inputs, weights, 8, 10.0), compiled=False)
    expected = moe_reference(*inputs.operands, activation_clamp=10.0)
    assert calc_diff(layer(), expected) < Dequantised.bound


class DeepGemm:
    """Stands in for DeepGEMM: rows of one expert in blocks of 128, `owners` names the expert of each."""

    @staticmethod
    def m_grouped_fp8_gemm_nt_contiguous(a, b, out, owners):
        assert owners.dtype == torch.int32
        assert owners.view(-1, 128).eq(owners.view(-1, 128)[:, :1]).all()
        x, weights = dequantize_activations(*a), dequantize_weights(*b)
        out.copy_(torch.einsum("mk,mnk->mn", x, weights[owners.long()]))


def test_deep_gemm_is_taken_only_if_it_is_there_and_right(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    assert "deep_gemm" in probe(DeepGemmGrouped, cpu)
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGemm)
    assert probe(DeepGemmGrouped, cpu) == ""
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace())
    assert "AttributeError" in probe(DeepGemmGrouped, cpu)


def test_the_last_resort_is_only_for_where_nothing_else_works(monkeypatch):
    reasons = unusable(torch.device("cpu"))
    assert reasons[Dequantised.name] == "" or any(not reasons[m.name] for m in METHODS[:-1])
    monkeypatch.setattr(FlashInfer, "why_not", lambda *_: "")
    monkeypatch.setattr(Unfused, "why_not", lambda *_: "")
    assert set(unusable(torch.device("cpu")).values()) == {"", "not wanted: another method works"}
    monkeypatch.setattr(FlashInfer, "why_not", lambda *_: "no")
    monkeypatch.setattr(Unfused, "why_not", lambda self, *_: "no" if self.gemm is not Dequantised else "")
    assert unusable(torch.device("cpu"))[Dequantised.name] == ""


def test_methods_that_do_not_work_here_say_why():
    cpu = torch.device("cpu")
    assert probe(Dequantised, cpu) == ""

    class Wrong(Dequantised):
        def __call__(self, codes, scales):
            return super().__call__(codes, scales) * 1.5

    assert "wrong results" in probe(Wrong, cpu)

    class Missing(Dequantised):
        def __call__(self, codes, scales):
            raise NotImplementedError("not on this machine\nmore")

    assert probe(Missing, cpu) == "NotImplementedError: not on this machine"


@pytest.mark.parametrize("method", [GroupedRowwise, BlockwiseEach])
def test_quantised_rows_come_back(method):
    x = torch.randn(5, 256)
    codes, scales = method.quantise(x)
    wide = scales.repeat_interleave(256 // scales.shape[1], dim=1)
    assert calc_diff(codes.float() * wide, x) < 1e-3


def test_block_scales_lie_as_cublas_wants_them(monkeypatch):
    """1 x 128 scales of an expert's rows column by column, 128 x 128 scales in rows of a multiple of four."""
    seen = []

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, out):
        seen.append((scale_a.stride(), scale_b.t().stride(), scale_a.shape))
        wide = scale_a.repeat_interleave(128, 1), scale_b.t().repeat_interleave(128, 0).repeat_interleave(128, 1)
        out.copy_((a.float() * wide[0]) @ (b.t().float() * wide[1]).t())

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    assert probe(BlockwiseEach, torch.device("cpu")) == ""
    assert seen == [((1, 32), (4, 1), (32, 4)), ((1, 48), (4, 1), (48, 4))]
    weights = torch.zeros(2, 128, 640, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.ones(2, 1, 5)
    assert BlockwiseEach(weights, (16, 16)).scales.stride() == (8, 8, 1)


CASE = Scenario("v4-flash", MoEShape(4096, 2048, 64, 6), 64, 64)


def merge(parts: list[dict]) -> dict[str, list[dict]]:
    """As rank 0 reports it."""
    rows, others = rows_of(CASE, {"auto": "pingpong"}, parts)
    return {"rows": [content(row) for row in rows], "baselines": [asdict(each) for each in others]}


def part(scale: float, wrong: bool = False, rows: list[int] | None = None) -> dict:
    verdict = judge(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.bfloat16))
    passed = {"diff": 1e-5 * scale, "worst_row_diff": 2e-5, "passed": not wrong, "reason": verdict.reason}
    facts = {"graph": True, "compiled": True, "reason": "", "diff": 1e-4}
    return {
        "times": {
            "auto": [10 * scale, 11 * scale, 30 * scale],
            "auto staged": [14 * scale],
            "one auto": [9.0, 10.0, 11.0],
            f"baseline {METHODS[0].name}": [50 * scale, 52 * scale, 53 * scale],
            f"baseline {METHODS[1].name}": [20.0, 21.0, 22.0],
        },
        "verdicts": {"auto": [passed, passed]},
        "sustained": {"auto": 12.0 * scale},
        "expert_rows": rows or [1] * 30 + [0] * 2 + [3] * 30 + [0] * 2,
        "baselines": {
            METHODS[0].name: facts,
            METHODS[1].name: {**facts, "diff": 0.5},
            METHODS[2].name: {**facts, "diff": None, "reason": "no"},
        },
    }


def test_rows_hold_the_largest_figures_over_ranks():
    merged = merge([part(1), part(2)])
    (row,) = merged["rows"]
    assert (row["experts"], row["ranks"], row["kernel"]) == (32, 2, "pingpong")
    assert (row["median_us"], row["rank_medians_us"]) == (22, [11, 22])
    assert (row["min_us"], row["max_us"], row["sustained_us"]) == (20, 60, 24)
    assert (row["one_rank_us"], row["vs_one_rank"], row["staged_us"]) == (10, 2.2, 28)
    assert (row["diff"], row["correct"]) == (2e-5, True)
    assert row["tflops"] == pytest.approx(6 * 64 * 6 * 4096 * 2048 * 1e-6 / 22)
    assert row["weights_tb_s"] == pytest.approx(3 * 30 * 4096 * 2048 * 1e-6 / 22)


def test_the_weights_that_a_rank_reads_are_those_that_the_tokens_of_any_rank_need():
    """At few tokens most experts have rows of one rank alone."""
    first, second = [0] * 64, [0] * 64
    for expert in (0, 1, 2, 40):
        first[expert] = 1
    for expert in (2, 3, 4, 5, 41, 42):
        second[expert] = 2
    (row,) = merge([part(1, rows=first), part(2, rows=second)])["rows"]
    assert row["weights_tb_s"] == pytest.approx(3 * 6 * 4096 * 2048 * 1e-6 / 22), "six of rank 0, three of rank 1"


def test_the_fastest_unfused_method_counts_if_its_answer_is_right():
    merged = merge([part(1), part(2, wrong=True)])
    (row,) = merged["rows"]
    assert not row["correct"]
    assert (row["baseline"], row["baseline_us"]) == (METHODS[0].name, 104)
    assert row["baseline_speedup"] == pytest.approx(104 / 22)
    assert [(b["correct"], b["median_us"]) for b in merged["baselines"]] == [(True, 104), (False, 21), (False, None)]
    alone = [{**part(1), "baselines": {}}] * 2
    merged = merge(alone)
    assert merged["baselines"] == []
    assert merged["rows"][0]["baseline_us"] is None


def test_a_document_has_the_slowest_card_and_the_known_figures(monkeypatch):
    def collect(target, ranks, arguments, on_report):
        assert (target, ranks) == ("megamoe_jit._bench.measure_ranks:measure_on_rank", 2)
        assert arguments["shapes"] == [["v4-flash", 4096, 2048, 32, 6]]
        merged = merge([part(1), part(2)])
        for row in merged["rows"]:
            on_report(0, row)
        end = {"environment": {"device": "NVIDIA H200"}, "baselines": merged["baselines"], "baselines_not_timed": {}}
        return [{**end, "anchors": [{"read_4gib_tb_s": 4.0 + i}] * 2} for i in (0, 1)]

    monkeypatch.setattr(on_ranks, "collect", collect)
    monkeypatch.setattr(_bench_ranks.torch.cuda, "is_available", lambda: True)
    shape = MoEShape(4096, 2048, 256, 6)
    preset = SimpleNamespace(name="v4-flash", shape=shape, local_experts=32)
    seen = []
    doc = _bench_ranks.run([preset], [64], ["auto"], 2, progress=seen.append)
    assert doc["anchors"] == [{"read_4gib_tb_s": 4.0}] * 2
    assert doc["environment"]["ranks"] == 2
    assert doc["rows"][0]["ranks"] == 2
    assert (len(seen), len(doc["baselines"])) == (1, 3)
    monkeypatch.setattr(on_ranks, "collect", lambda *_, **__: None)
    assert _bench_ranks.run([preset], [64], ["auto"], 2) is None
    with pytest.raises(ConfigError, match="2 to 8"):
        _bench_ranks.run([preset], [64], ["auto"], 1)
