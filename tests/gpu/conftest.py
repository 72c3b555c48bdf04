"""What the GPU tests share; `tests/conftest.py` skips all of them where no Hopper GPU is, and says why."""

from __future__ import annotations

import pytest
import torch

from megamoe_jit._check.verify import WeightCache


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The Hopper GPU, with its index."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def weights() -> WeightCache:
    """Keeps the weights of the last shape; tests are ordered so that equal shapes follow each other."""
    return WeightCache()
