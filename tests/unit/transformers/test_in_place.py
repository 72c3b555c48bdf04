"""What becomes of a module's weights on a GPU, with stand-ins for it: brought into the kernel's order where they are,
not to be mistaken meanwhile, and the same as before when they come back."""

from __future__ import annotations

import copy
import os

import pytest
import torch

pytest.importorskip("transformers")

import megamoe_jit as mm
import megamoe_jit.transformers as plugin
from megamoe_jit.transformers import adapter as _adapter
from megamoe_jit.transformers.adapter import ATTRIBUTE, options, release_module
from tests.unit.layer.test_calls import Cuda
from tests.unit.transformers.models import config
from tests.unit.transformers.on_disk import experts_like

CPU = torch.device("cpu")
NAMES = ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Layers are made as on a GPU."""
    monkeypatch.setattr(_adapter, "_on_cpu", lambda module, topk: _adapter._on_gpu(module, topk, CPU))
    return Cuda(monkeypatch)


def module(kind: str, scales: str = "F32"):
    """An experts module of transformers with weights in FP8 or MXFP4."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    source = experts_like("DeepseekV4Config", kind=kind)
    made_class = use_experts_implementation(
        type("Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    settings = config("DeepseekV4Config")
    settings._experts_implementation = "megamoe"
    how = {"block_size": (128, 128), "scale_fmt": "ue8m0" if scales == "F8_E8M0" else "float"}
    try:
        made = made_class(settings, **how, expert_dtype="fp4" if kind == "mxfp4" else "fp8")
    except TypeError:  # 5.17 reads it from the configuration
        settings.expert_dtype = "fp4" if kind == "mxfp4" else "fp8"
        made = made_class(settings, **how)
    for expert in range(source.experts):
        base = f"{source.prefix}layers.0.ffn.experts.{expert}."
        for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            for suffix, word in (("", "weight"), ("_scale_inv", "scale")):
                data = b"".join(source.tensors[f"{base}{part}.{word}"].data for part in parts)
                held = getattr(made, name + suffix).data[expert]
                read = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if suffix:
                    read = read.view(torch.float8_e8m0fnu).to(held.dtype)
                held.copy_(read.view(held.dtype).view(held.shape))
    return made


def bits(made) -> dict[str, bytes]:
    return {name: getattr(made, name).data.view(torch.uint8).numpy().tobytes() for name in NAMES}


CASES = [("fp8", "F32"), ("fp8", "F8_E8M0"), ("mxfp4", "F8_E8M0"), ("mxfp4", "F32")]


@pytest.mark.parametrize(("kind", "scales"), CASES)
def test_weights_are_transformed_where_they_are_and_come_back(cuda: Cuda, kind: str, scales: str):
    made = module(kind, scales)
    before, given = bits(made), {name: getattr(made, name) for name in NAMES}
    address = made.gate_up_proj.data_ptr()
    layer = _adapter.adapter_of(made, 2, CPU).layer
    in_place = (kind, scales) != ("mxfp4", "F32")  # exponents are made of these
    assert (layer.l1[0].data_ptr() == address) == in_place
    assert layer.weight_format == kind
    assert layer.clamp == 0.1
    hidden = set(NAMES) if kind == "mxfp4" and in_place else {"gate_up_proj", "down_proj"} if in_place else set()
    assert {name for name in NAMES if getattr(made, name).device.type == "meta"} == hidden
    wanted = mm.inverse_transform_weights_for_mega_moe_sm90(layer.l1, layer.l2)
    assert wanted[0][0].view(torch.uint8).numpy().tobytes() == before["gate_up_proj"]
    assert release_module(made)
    assert bits(made) == before
    assert all(getattr(made, name) is given[name] for name in NAMES)
    assert not release_module(made)


@pytest.mark.parametrize(("kind", "scales"), CASES)
def test_whoever_wants_the_weights_gets_them(cuda: Cuda, kind: str, scales: str):
    made = module(kind, scales)
    before = bits(made)
    _adapter.adapter_of(made, 2, CPU)
    assert {name: each.view(torch.uint8).numpy().tobytes() for name, each in made.state_dict().items()} == before
    beside = (kind, scales) == ("mxfp4", "F32")  # the layer has weights of its own, which nobody waits for
    assert hasattr(made, ATTRIBUTE) == beside
    _adapter.adapter_of(made, 2, CPU)
    made.config._experts_implementation = "grouped_mm"
    x, ids = torch.zeros(1, 128), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(Exception, match="kernel"):  # theirs is fetched by transformers; nothing is, here
        made(x, ids, torch.ones(1, 2))
    assert bits(made) == before


def test_weights_that_are_loaded_are_plain(cuda: Cuda):
    made, other = module("fp8"), module("fp8")
    other.gate_up_proj.data.view(torch.uint8).bitwise_xor_(128)
    _adapter.adapter_of(made, 2, CPU)
    made.load_state_dict(other.state_dict())
    assert bits(made) == bits(other)
    assert not mm.is_transformed(
        *((getattr(made, name).data, getattr(made, f"{name}_scale_inv").data) for name in NAMES[::2])
    )


@pytest.mark.parametrize(("kind", "scales"), CASES)
def test_a_copy_has_weights_of_its_own(cuda: Cuda, kind: str, scales: str):
    made = module(kind, scales)
    before = bits(made)
    _adapter.adapter_of(made, 2, CPU)
    copied = copy.deepcopy(made)
    layers = [getattr(each, ATTRIBUTE).layer for each in (made, copied)]
    assert layers[0].l1[0].data_ptr() != layers[1].l1[0].data_ptr()
    assert layers[0].buffer is layers[1].buffer
    release_module(copied)
    assert bits(copied) == before
    release_module(made)
    assert bits(made) == before


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_parameter_that_somebody_puts_in_place_of_one_is_the_layers_from_then_on(cuda: Cuda, kind: str):
    made, other = module(kind, "F8_E8M0"), module(kind, "F8_E8M0")
    other.gate_up_proj.data.view(torch.uint8).bitwise_xor_(128)
    before, wanted = bits(made), bits(other)["gate_up_proj"]
    first = _adapter.adapter_of(made, 2, CPU)
    assert _adapter.adapter_of(made, 2, CPU) is first
    made.gate_up_proj = torch.nn.Parameter(other.gate_up_proj.data, requires_grad=False)
    layer = _adapter.adapter_of(made, 2, CPU).layer
    codes = mm.inverse_transform_weights_for_mega_moe_sm90(layer.l1, layer.l2)[0][0]
    assert codes.view(torch.uint8).numpy().tobytes() == wanted
    release_module(made)
    assert bits(made) == {**before, "gate_up_proj": wanted}


def test_layers_share_a_workspace_of_the_size_that_was_set(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(options, "max_tokens", 300)
    first, second = (_adapter.adapter_of(module("fp8"), 2, CPU).layer for _ in range(2))
    assert first.buffer is second.buffer
    assert first.buffer.num_max_tokens_per_rank == 384
    assert plugin.options is options


def test_more_slots_make_another_layer_of_the_same_weights(cuda: Cuda):
    made = module("fp8")
    before = bits(made)
    assert _adapter.adapter_of(made, 2, CPU).topk == 2
    again = _adapter.adapter_of(made, 4, CPU)
    assert (again.topk, again.layer.buffer.num_topk) == (4, 4)
    release_module(made)
    assert bits(made) == before


def test_a_forked_child_has_a_lock_of_its_own_and_takes_it_twice_as_its_parent_does():
    """Whoever makes a layer holds it, and takes it once more to give back the weights of the layer before."""
    with _adapter._lock:
        number = os.fork()
        if number == 0:
            os._exit(0 if all(_adapter._lock.acquire(timeout=5) for _ in range(2)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0


def test_a_module_that_is_refused_keeps_its_weights(cuda: Cuda):
    made = module("fp8")
    before = bits(made)
    made.block_size = (64, 64)
    with pytest.raises(mm.ConfigError, match=r"block_size \(64, 64\)"):
        _adapter.adapter_of(made, 2, CPU)
    made.block_size, made.activation_scheme = (128, 128), "static"
    with pytest.raises(mm.ConfigError, match="static scales"):
        _adapter.adapter_of(made, 2, CPU)
    made.activation_scheme = "dynamic"
    cuda.out_of_memory = True
    with pytest.raises(mm.ConfigError, match="memory"):
        _adapter.adapter_of(made, 2, CPU)
    assert bits(made) == before


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_weights_that_cannot_come_back_now_are_not_lost(cuda: Cuda, kind: str):
    made = module(kind, "F8_E8M0")
    before = bits(made)
    _adapter.adapter_of(made, 2, CPU)
    cuda.capturing = True
    with pytest.raises(mm.CaptureError, match="another order while a CUDA graph is being captured"):
        release_module(made)
    cuda.capturing = False
    assert release_module(made)
    assert bits(made) == before
