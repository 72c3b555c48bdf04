"""A program for DeepGEMM's SM90 mega MoE runs unchanged on one GPU when `deep_gemm` is this package."""

from __future__ import annotations

from tests.upstream_run import run_program


def test_it_runs_unchanged_on_one_rank():
    ((code, output),) = run_program(1)
    assert code == 0, output
    assert "rank 0 of 1: right" in output
