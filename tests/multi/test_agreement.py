"""Whatever goes wrong on one rank before a launch raises on every rank and hangs none."""

import os
import shutil

import pytest

from megamoe_jit._compile.render import kernels_dir
from tests.multi import checks_agreement
from tests.multi.harness import run_checks, warm
from tests.multi.worker import shape_for


@pytest.fixture(scope="module", autouse=True)
def kernels(ranks):
    warm([shape_for(ranks, *checks_agreement.SIZES)], ranks)


@pytest.fixture(scope="module")
def together(ranks):
    return run_checks("tests.multi.checks_agreement", checks_agreement.TOGETHER, ranks, collective_s=15, timeout_s=200)


@pytest.mark.parametrize("name", checks_agreement.TOGETHER)
def test_ranks_that_disagree(together, name):
    assert together[name] == ""


def environments(case, ranks, folder):
    """Variables of each rank: what is special about the last one, or about all."""
    sources = folder / "kernels_src"
    shutil.copytree(kernels_dir(), sources)
    room = sources / "roles/combine.cuh"
    special = {"MEGAMOE_JIT_KERNELS_SRC": str(sources)}
    if case == "no sources":
        room.unlink()
    elif case == "no compiler":
        special = {"MEGAMOE_JIT_DISABLE_JIT": "1", "MEGAMOE_JIT_CACHE_DIR": str(folder / "empty")}
    elif case == "other kernels":
        special = {"MEGAMOE_JIT_PTXAS_OPTIONS": "--warn-on-spills"}
    else:
        room.write_text(
            room.read_text().replace("namespace megamoe {", "namespace megamoe {\nthis does not compile;", 1)
        )
    concerned = range(ranks) if case == "compile error" else (ranks - 1,)
    return dict.fromkeys(concerned, special)


@pytest.mark.parametrize("case", checks_agreement.ALONE)
def test_ranks_with_other_kernels(case, ranks, tmp_path):
    variables = environments(case, ranks, tmp_path)
    results = run_checks(
        "tests.multi.checks_agreement", [case], ranks, environment=variables, collective_s=30, timeout_s=200
    )
    assert results[case] == ""


def test_ranks_that_see_one_gpu_each(ranks):
    """As Ray starts them; to torch all of these are one GPU."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or range(ranks)
    own = {rank: {"CUDA_VISIBLE_DEVICES": str(gpus[rank])} for rank in range(ranks)}
    name = checks_agreement.APART
    results = run_checks("tests.multi.checks_agreement", [name], ranks, environment=own, collective_s=30, timeout_s=200)
    assert results[name] == ""
