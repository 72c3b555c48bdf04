"""The backend in FlashInfer's own mega layer."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import quantize_activations
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines import aside
from megamoe_jit.engines.flashinfer import KERNEL_NAME, MegaMoeConfig, register, seams
from megamoe_jit.engines.seams import misfits
from tests.engines.sources import RealSources
from tests.engines.standins import batch, expected, experts, kernels_by_reference

SHAPE = MoEShape(256, 128, 4, 2)
_EP = "flashinfer.moe_ep"
REAL = tuple(
    f"{_EP}.{name}"
    for name in ("config", "core.kernel.base", "core.kernel.registry", "core.kernel.workspace_pool", "modes.config")
    + ("modes.mega_layer", "tensors", "weights")
)


def module(name: str) -> Any:
    return importlib.import_module(f"{_EP}.{name}")


@pytest.fixture(scope="module", params=seams.TESTED)
def release(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / f"flashinfer-python-{request.param}"


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch):
    return kernels_by_reference(monkeypatch)


@pytest.fixture
def world(release, buffers):
    with RealSources(release, "flashinfer", REAL):
        aside._warned.clear()
        group = SimpleNamespace(size=lambda: 1)
        utils = module("core.bootstrap_utils")
        utils.bootstrap_comm_group, utils.bootstrap_ep_rank_world = lambda _: group, lambda b: (b.rank, b.world_size)
        register()
        yield release


def layer(l1, l2, ranks=1, **options):
    fleet = module("config").FleetParams(num_experts=4 * ranks, max_tokens_per_rank=100, token_hidden_size=256)
    bootstrap = module("config").BootstrapConfig(world_size=ranks, rank=0, auto_bootstrap=False)
    pack = module("weights").MoEWeightPack(l1[0], l2[0], l1[1], l2[1])
    config = module("modes.config").MegaConfig(megakernel=MegaMoeConfig(128, 2, 1.0), **options)
    return module("modes.mega_layer").MoEEpMegaLayer(bootstrap, fleet, pack, config)


def tensors(of, **more):
    return module("tensors").MoEEpTensors(of.x, of.ids, of.weights, **more)


def test_everything_that_is_relied_upon_is_there(release):
    assert misfits(seams.SEAMS, release / "flashinfer") == []


def test_the_layer_equals_the_reference(world, buffers):
    l1, l2 = experts(SHAPE)
    made = layer(l1, l2)
    for tokens in (1, 7, 0):
        of = batch(tokens, SHAPE)
        assert torch.equal(made(tensors(of)), expected(of, l1, l2, 1.0))
    assert (buffers[0].prepared, len(buffers)) == (1, 1)


def test_weights_that_it_quantises(world):
    l1, l2 = experts(SHAPE)
    values = torch.randn(4, 256, 256), torch.randn(4, 256, 128)
    made = layer((values[0], None), (values[1], None))
    assert made(tensors(batch(3, SHAPE))).shape == (3, 256)


def test_activations_in_fp8_and_an_output_of_the_callers(world):
    l1, l2 = experts(SHAPE)
    made = layer(l1, l2, quantize_input=False)
    of = batch(5, SHAPE)
    codes, scales = quantize_activations(of.x)
    place = torch.full((8, 256), 7.0, dtype=torch.bfloat16)
    given = module("tensors").MoEEpTensors(codes, of.ids, of.weights, scales=scales, output=place)
    made(given)
    assert torch.equal(place[:5], expected(of, l1, l2, 1.0))
    assert (place[5:] == 7).all()


def test_layers_share_a_workspace_until_the_last_is_destroyed(world, buffers):
    first, second = layer(*experts(SHAPE)), layer(*experts(SHAPE, 1))
    for each in (first, second):
        each(tensors(batch(3, SHAPE)))
    assert len(buffers) == 1
    first.destroy()
    assert not buffers[0].destroyed
    second.destroy()
    assert buffers[0].destroyed


def test_experts_that_ranks_cannot_share_evenly_are_refused(world):
    bootstrap, fleet = SimpleNamespace(world_size=3), SimpleNamespace(num_experts=4, token_hidden_size=256)
    kernel = module("core.kernel.registry").create_mega_kernel(MegaMoeConfig(128, 2))
    assert kernel.kernel_name() == KERNEL_NAME
    with pytest.raises(ConfigError, match="as many on each of the 3 ranks"):
        kernel.validate_init(bootstrap, fleet)
