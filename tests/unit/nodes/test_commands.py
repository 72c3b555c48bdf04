"""Several nodes on the command line, and the model that `plan` and `explain` tell of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import megamoe_jit as mm
from megamoe_jit._bench import measure_nodes as _measure_nodes
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._cli.app import cli
from megamoe_jit._device import driver as _driver
from megamoe_jit._diagnose.between import Ways, between
from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes.experts import CallOptions
from megamoe_jit._nodes.model import ONE_HOST, cost, rows_per_token
from megamoe_jit._spec import MXFP4, MoEShape
from tests.commandline import checked

PRO = MoEShape(7168, 3072, 384, 6)
ROW = {
    "shape": "v4-flash", "tokens": 64, "weights": "fp8", "nodes": 2, "ranks_per_node": 1, "exchange": "gather",
    "partial": "bf16", "chunks": 1, "whole_us": 300.0, "kernel_us": 200.0, "exchange_us": 90.0, "rest_us": 10.0,
    "modelled_us": 310.0, "sent_bytes": 800000, "diff": 1e-6, "correct": True, "baseline": None,
    "baseline_us": None, "baseline_speedup": None,
}  # fmt: skip


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == code, done.output
    return done.stdout if code != 2 else done.output


@pytest.mark.parametrize(
    ("nodes", "tokens", "kernel", "total"), [(2, 64, 384, 515), (2, 512, 466, 815), (2, 4096, 3699, 4460)]
)
def test_the_model_gives_what_the_page_says(nodes: int, tokens: int, kernel: float, total: float):
    found = cost(PRO, nodes, 8, tokens)
    assert found.kernel_us == pytest.approx(kernel, rel=0.01)
    assert found.total_us == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("verb", [("explain", "--tokens", "64"), ("plan", "--tokens", "64"), ("warmup", "--dry-run")])
def test_packed_weights_can_be_on_several_nodes(verb: tuple[str, ...]):
    words = (*verb, "--shapes", "v4-flash", "--ranks", "8", "--weight-format", "mxfp4", "--nodes", "2")
    assert "mxfp4" in run(*words)
    halved = cost(PRO, 2, 8, 16, weights=MXFP4).kernel_us / cost(PRO, 2, 8, 16).kernel_us
    assert halved == pytest.approx(17 / 32, rel=0.01), "few tokens read weights and do little else"


def test_rows_on_the_wire_are_those_of_the_combinatorics():
    assert [rows_per_token("gather", nodes, PRO) for nodes in (2, 4, 8)] == [1, 3, 7]
    assert [round(rows_per_token("exact", nodes, PRO), 2) for nodes in (2, 4, 8)] == [0.98, 2.47, 3.88]


def test_the_rule():
    """Gather where its bytes cost less than the host's wait, and in a graph; chunks where they save time.

    Over a network from some 500 rows of an expert on; over NVLink, and elsewhere into more, where a launch has no room.
    """
    assert [cost(PRO, nodes, 8, 512).exchange for nodes in (1, 2, 4, 8)] == ["none", "gather", "gather", "exact"]
    assert cost(PRO, 8, 8, 4).exchange == "gather"
    assert cost(PRO, 8, 8, 4096, capturing=True).exchange == "gather"
    assert "host cannot wait" in cost(PRO, 8, 8, 4096, capturing=True).reasons[0]
    assert cost(PRO, 8, 8, 4096, exchange="gather").reasons[0] == "gather: as asked"
    assert [cost(PRO, 2, 8, tokens).chunks for tokens in (64, 1024, 2048, 4096, 8192)] == [1, 1, 2, 3, 4]
    assert cost(PRO, 2, 8, 4096).total_us == min(
        cost(PRO, 2, 8, 4096, chunks=chunks).total_us for chunks in range(1, 5)
    )
    two_cards = MoEShape(7168, 3072, 96, 6)
    assert {cost(two_cards, 2, 1, tokens, network=ONE_HOST).chunks for tokens in (64, 1024, 8192)} == {1}
    assert [cost(PRO, 2, 8, 32768, network=ONE_HOST).chunks, cost(PRO, 16, 8, 32768).chunks] == [4, 16]


def test_explain_and_plan_tell_how_rows_travel():
    what = ("--shapes", "v4-pro", "--ranks", "8", "--nodes", "2", "--gpu", "none", "--tokens")
    text = run("explain", *what, "512")
    assert "2 nodes: gather, bf16 back, 1 chunk, launches of 1024 rows" in text
    assert "modelled, not measured: 815 us" in text
    doc = checked(run("explain", *what, "512", "--json"))
    (call,) = doc["calls"]
    assert call["between"]["reasons"][0].startswith("gather: modelled 815 us by gather (1.00 rows a token")
    assert call["shape"]["experts"] == 192
    text = run("plan", *what, "4096", "--partial", "fp32")
    assert "4096 tokens of each rank, a buffer of 2048 rows for each chunk under way" in text
    assert "f32out" in text
    (plan,) = checked(run("plan", *what, "4096", "--chunks", "1", "--json"))["plans"]
    assert (plan["capacity"], plan["between"]["chunks"]) == (8192, 1)
    assert "between" not in checked(run("plan", "--shapes", "v4-pro", "--tokens", "64", "--json"))["plans"][0]


def test_the_variant_is_that_of_the_tokens_not_of_the_rows():
    """200 tokens on two nodes are 400 rows, half of whose slots are for others."""
    what = ("--shapes", "v4-pro", "--ranks", "8", "--gpu", "none", "--tokens", "200", "--json")
    assert checked(run("explain", *what, "--nodes", "2"))["calls"][0]["variant"] == "pingpong"


def test_warmup_compiles_for_a_node():
    what = ("warmup", "--shapes", "v4-flash", "--ranks", "8", "--dry-run", "--json", "--inputs", "staged", "--variant")
    kernels = checked(run(*what, "pingpong", "--nodes", "2", "--float32-out"))["kernels"]
    assert [kernel["kernel"] for kernel in kernels] == [
        "megamoe_pingpong_h4096_i2048_e128_k6_r8_fast_f32out",
        *(f"megamoe_nodes_{step}" for step in ("route", "pack", "unpack", "sum_bf16", "sum_fp32")),
    ]
    done = CliRunner().invoke(cli, [*what, "pingpong", "--nodes", "3"])
    assert (
        done.exit_code,
        "v4-flash: 256 experts on 3 nodes of 8 ranks; allowed: a multiple of 24" in done.output,
    ) == (2, True)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="384 experts on 5 nodes of 8 ranks; allowed: a multiple of 40"):
        between(PRO, 64, 8, Ways(5))
    with pytest.raises(ConfigError, match=r"32768 tokens on 4 nodes in 1 chunk are 131072 rows of a launch; allowed"):
        between(PRO, 32768, 8, Ways(4, chunks=1))


def test_bench_prints_parts_and_a_document(monkeypatch: pytest.MonkeyPatch, tmp_path):
    asked = []

    def found(*given, **more):
        asked.append((given[1:], more["baseline"], more["weights"]))
        more["progress"](ROW)
        return {"environment": {"device": "X"}, "rows": [ROW]}

    monkeypatch.setattr(_measure_nodes, "run", found)
    monkeypatch.setattr(_driver, "refuse_without_gpu", lambda: None)
    words = ("bench", "--shapes", "v4-flash", "--tokens", "64", "--nodes", "2", "--ranks", "1")
    text = run(*words, "--exchange", "gather", "--chunks", "1", "--no-baseline")
    assert asked == [(((64,), 2, 1, {"exchange": "gather", "partial": "bf16", "chunks": 1}), False, "fp8")]
    assert "2 x 1  gather, bf16" in text
    doc = checked(run(*words, "--json", "--output", str(tmp_path / "rows.json")))
    assert doc["nodes"] == [ROW]
    assert asked[-1][0][-1]["chunks"] == "auto"
    monkeypatch.setitem(ROW, "weights", "mxfp4")
    assert "v4-flash mxfp4" in run(*words, "--weight-format", "mxfp4")
    assert asked[-1][1:] == (True, "mxfp4")
    run(*words, "--output", str(tmp_path / "rows.csv"))
    assert "exchange_us" in (tmp_path / "rows.csv").read_text()
    monkeypatch.setattr(
        _measure_nodes, "run", lambda *_, **__: {"environment": {}, "rows": [{**ROW, "correct": False}]}
    )
    assert "WRONG" in run(*words, code=1)
    monkeypatch.setattr(_measure_nodes, "run", lambda *_, **__: None)
    assert run(*words, "--json") == "", "another rank of torchrun reports"
    assert "--variant is not for --nodes" in run(*words, "--variant", "auto", code=2)


@pytest.mark.parametrize("chunks", [1, 2])
def test_what_is_timed_is_the_call_that_is_held_against_the_reference(monkeypatch, chunks: int):
    """Its clamp, and in the launch alone its variant and weights too."""
    called, launched = [], []
    monkeypatch.setattr(mm, "fp8_mega_moe_multinode", lambda *_, activation_clamp: called.append(activation_clamp))
    case = Scenario("small", MoEShape(256, 128, 8, 2), 4, 4)
    experts = SimpleNamespace(
        variant_for=lambda rows, options: f"that of {rows} rows of {options.weights.name}",
        compute=lambda arrived, partial, l1, l2, options: launched.append(options),
    )
    lane = SimpleNamespace(experts=experts, partial=torch.empty(8, 256))
    buffer = SimpleNamespace(
        check=lambda: None, chunks=chunks, choices=SimpleNamespace(pick=lambda *_: SimpleNamespace(capturable=False)),
        dispatch=lambda tokens: SimpleNamespace(lane=lane, arrived=SimpleNamespace(rows=2 * tokens)),
    )  # fmt: skip
    layer = SimpleNamespace(l1=(), l2=(), topology=SimpleNamespace(nodes=2), format=MXFP4)
    inputs = SimpleNamespace(stage=lambda _: None)
    parts = _measure_nodes._calls(layer, buffer, inputs, torch.empty(4, 256), case.clamp)
    assert called == [case.clamp] == [10.0]
    assert set(parts) == ({"whole", "kernel", "exchange"} if chunks == 1 else {"whole"})
    assert launched == [CallOptions(10.0, variant="that of 4 rows of mxfp4", weights=MXFP4)] * (chunks == 1)
