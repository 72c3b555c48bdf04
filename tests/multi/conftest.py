"""How many ranks the multi-GPU tests use, and why they are skipped where there are fewer than two GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_WANTED = int(os.environ.pop("MEGAMOE_JIT_TEST_RANKS", "8"))  # before anything warns of an unknown setting
_HERE = Path(__file__).parent


def _ranks() -> int:
    import torch

    return min(torch.cuda.device_count() if torch.cuda.is_available() else 0, _WANTED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if _HERE in item.path.parents]
    if not mine:
        return
    try:
        found = _ranks()
        reason = f"needs 2 or more Hopper GPUs: {found} to be used here" if found < 2 else ""
        if not reason:
            import torch

            wrong = [i for i in range(found) if torch.cuda.get_device_capability(i) != (9, 0)]
            reason = f"needs Hopper GPUs (SM90): GPU {wrong[0]} is another one" if wrong else ""
    except ImportError:
        reason = "needs 2 or more Hopper GPUs, and PyTorch, which is not installed"
    for item in mine:
        item.add_marker(pytest.mark.timeout(1200))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ranks() -> int:
    """How many ranks take part."""
    return _ranks()
