"""A program for DeepGEMM's SM90 mega MoE runs unchanged on two GPUs when `deep_gemm` is this package."""

from __future__ import annotations

from tests.upstream_run import run_program


def test_it_runs_unchanged_on_two_ranks():
    for rank, (code, output) in enumerate(run_program(2)):
        assert code == 0, output
        assert f"rank {rank} of 2: right" in output
