"""What all tests share: a kernel cache of their own, and GPU tests that run only where a Hopper GPU is."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

_PREFIX = "MEGAMOE_JIT_"
_KEPT = (_PREFIX + "NVRTC",)  #: without it there may be no compiler
_GPU_TESTS = Path(__file__).parent / "gpu"
_cache_dir: str | None = None

with contextlib.suppress(ImportError):  # the GPU tests do without hypothesis
    import hypothesis

    # a busy machine must not fail a test
    hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail at once unless PyTorch can use a Hopper GPU")
    if not pluginmanager.hasplugin("timeout"):  # a cluster node may lack pytest-timeout; the ini file names its option
        parser.addini("timeout", "seconds a test may take (pytest-timeout is not installed)")


def _missing_gpu() -> str | None:
    """Why the GPU tests cannot run here; None if they can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"{name} has compute capability {capability[0]}.{capability[1]}"
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests a cache of their own, shared by the workers of a run, before anything reads settings."""
    global _cache_dir
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which may not be installed")
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--require-gpu"):
        reason = _missing_gpu()
        if reason is not None:
            pytest.exit(f"these tests need a Hopper GPU (SM90): {reason}", returncode=3)
    for name in [name for name in os.environ if name.startswith(_PREFIX) and name not in _KEPT]:
        del os.environ[name]  # settings of the user must not change what is tested
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are as many as the cores already
    _cache_dir = tempfile.mkdtemp(prefix="megamoe-jit-tests-")
    os.environ[_PREFIX + "CACHE_DIR"] = _cache_dir
    os.environ[_PREFIX + "CONFIG"] = os.devnull  # nor may the user's settings file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """With `-n auto`: one more than cores, as some tests wait, for a deadline or for what they have started."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: see `tests/scheduling.py`."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.scheduling import Scheduling

    return Scheduling(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cache_dir is not None:
        shutil.rmtree(_cache_dir, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if _GPU_TESTS in item.path.parents]
    if not gpu_items:
        return
    reason = _missing_gpu()
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU (SM90): {reason}"))
