"""The parts of vLLM's plug-in by themselves; in vLLM's own sources they are run by `make test-engines`."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.weights import is_transformed
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines import aside
from megamoe_jit.engines.across import _buffers
from megamoe_jit.engines.vllm import eplb, experts, method, quantization
from tests.engines.standins import batch, expected, kernels_by_reference, packed_experts
from tests.engines.standins import experts as plain_experts

SHAPE = MoEShape(256, 128, 4, 2)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def buffers(monkeypatch):
    _buffers.clear()
    yield kernels_by_reference(monkeypatch)
    _buffers.clear()


def layer(l1, l2, scale: str):
    made = torch.nn.Module()
    for matrix, (codes, scales) in (("w13", l1), ("w2", l2)):
        made.register_parameter(f"{matrix}_weight", torch.nn.Parameter(codes.clone(), requires_grad=False))
        made.register_parameter(f"{matrix}_{scale}", torch.nn.Parameter(scales.clone(), requires_grad=False))
    made.expert_map = None
    return made


def unmarked(tensor):
    """Another tensor with the same memory, of which nothing is known."""
    return torch.from_numpy(tensor.view(torch.uint8).numpy()).view(tensor.dtype)


def config(ranks=1, rank=0):
    parallel = SimpleNamespace(use_all2all_kernels=ranks > 1, ep_size=ranks, ep_rank=rank)
    return SimpleNamespace(
        hidden_dim=256, intermediate_size_per_partition=128, experts_per_token=2, num_experts=4 * ranks,
        max_num_tokens=100, moe_parallel_config=parallel,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_is_taken_over_once_and_runs(buffers, packed):
    l1, l2 = packed_experts(SHAPE) if packed else plain_experts(SHAPE)
    given = (tuple(each.view(torch.uint8) for each in pair) for pair in (l1, l2)) if packed else (l1, l2)
    made = layer(*given, "weight_scale" if packed else "weight_scale_inv")
    weights, names = experts._take(made)
    assert experts._take(made) == (weights, names)
    assert [len(each) for each in names] == ([3, 3] if packed else [2, 2])
    run = experts._runner_of(config(), made, weights)
    held = [tuple(made._parameters[name] for name in each) for each in names]
    of = batch(5, SHAPE)
    assert torch.equal(run(*held, of.x, of.ids, of.weights, 0.7), expected(of, l1, l2, 0.7))
    assert buffers[0].formats == ["mxfp4" if packed else "fp8"]


def test_experts_of_other_ranks_add_nothing():
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    ids = torch.tensor([[0, 2], [3, -1]])
    assert experts._on_this_rank(ids, expert_map).tolist() == [[-1, 0], [1, -1]]
    assert experts._on_this_rank(ids, None) is ids


def test_the_group_is_asked_for_all_ranks_experts(buffers, monkeypatch):
    group = SimpleNamespace(size=lambda: 2)
    module = ModuleType("vllm.distributed.parallel_state")
    module.get_ep_group = lambda: SimpleNamespace(device_group=group)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", ModuleType("vllm.distributed"))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    made = layer(*plain_experts(SHAPE), "weight_scale_inv")
    weights, _ = experts._take(made)
    experts._runner_of(config(ranks=2), made, weights)
    assert (buffers[0].group, buffers[0].shape.experts, buffers[0].num_max_tokens_per_rank) == (group, 8, 128)


@pytest.mark.parametrize(("found", "rank"), [([0, 1, -1, -1], 0), ([-1, -1, 0, 1], 1)])
@pytest.mark.parametrize("robin", [False, True])
def test_experts_lie_rank_by_rank(found, rank, robin):
    parallel = SimpleNamespace(ep_size=2, ep_rank=rank)
    expert_map = torch.tensor([0, -1, 1, -1] if robin else found)
    if robin:
        with pytest.raises(ConfigError, match="placement-strategy linear"):
            experts._require_in_order(expert_map, parallel)
    else:
        experts._require_in_order(expert_map, parallel)
    experts._require_in_order(None, parallel)


def test_which_quantisation_a_checkpoint_gets():
    v4 = SimpleNamespace(model_type="deepseek_v41")
    assert quantization._chosen(FP8, None) == "megamoe_jit"
    assert quantization._chosen({**FP8, "quant_method": "deepseek_v4_fp8"}, v4) == "megamoe_jit_deepseek_v4"
    for other in ({**FP8, "weight_block_size": None}, {"quant_method": "awq"}, {}):
        with pytest.raises(ConfigError, match="allowed: 'fp8' with"):
            quantization._chosen(other, None)


@pytest.mark.parametrize("name", quantization.NAMES)
def test_a_configuration_is_sent_to_another_process(monkeypatch, name):
    """vLLM has it in its own, which is pickled for processes that are spawned."""
    module, whole = quantization._WHOLE[name]
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        path = ".".join(parts[:number])
        monkeypatch.setitem(sys.modules, path, ModuleType(path))

    def from_config(cls, config):
        made = cls()
        made.blocks = config["weight_block_size"]
        return made

    base = type(whole, (), {"from_config": classmethod(from_config), "get_quant_method": lambda *_: None})
    setattr(sys.modules[module], whole, base)
    quantization._config_class.cache_clear()
    try:
        config = quantization._config_class(module, whole).from_config(FP8)
        sent = pickle.loads(pickle.dumps(config))
        assert (type(sent), sent.blocks) == (type(config), [128, 128])
        assert isinstance(sent, base)
    finally:
        quantization._config_class.cache_clear()
    assert not hasattr(quantization, "MegaMoeOther")


def test_a_draft_has_the_quantisation_of_its_target():
    mtp, blocks = SimpleNamespace(model_type="deepseek_mtp"), {**FP8, "weight_block_size": [32, 32]}
    assert quantization._chosen(FP8, mtp) == "megamoe_jit"
    for checkpoint in (FP8, blocks):
        assert quantization._chosen(checkpoint, mtp, "megamoe_jit_deepseek_v4") == "megamoe_jit_deepseek_v4"
    with pytest.raises(ConfigError, match="allowed: 'fp8' with"):
        quantization._chosen(blocks, mtp)


def test_copies_of_weights_are_known_to_be_in_the_kernels_order():
    """Wherever they lie: those of the next call may lie where those of the last one lay."""
    made = layer(*plain_experts(SHAPE), "weight_scale_inv")
    experts._take(made)
    parts = experts._PARTS[0]
    first = [tuple(made._parameters[f"{name}_{part}"].data.clone() for part in parts) for name in ("w13", "w2")]
    again = [tuple(unmarked(each) for each in matrix) for matrix in first]
    seen = experts.SeenTensors(())
    for copies in (first, again):
        assert not is_transformed(*copies)
        seen = experts._recognised(seen, *copies)
        assert is_transformed(*copies)
    assert experts._recognised(seen, *again) is seen
    assert [each.data_ptr() for each in again[0]] == [each.data_ptr() for each in first[0]]


def test_plain_weights_are_not_written_over_others():
    class Layer(torch.nn.Module):
        def weight_loader(self, param, value, *, how):
            param.data.fill_(value)
            return self, how

    made, param = Layer(), torch.nn.Parameter(torch.zeros(1))
    options = method._careful(made, {"weight_loader": made.weight_loader, "other": 1})
    assert options["other"] == 1
    assert options["weight_loader"](param, 3.0, how="so") == (made, "so")
    setattr(param, method._ORDERED, True)
    with pytest.raises(ConfigError, match="Next: reload_weights"):
        options["weight_loader"](param, 4.0, how="so")
    assert param.item() == 3.0
    for others in ({}, {"weight_loader": len}):
        assert method._careful(made, others) == others


@pytest.mark.parametrize(("chosen", "asked"), [("megamoe_jit", "deep_gemm_mega_moe"), ("fp8", "auto"), (None, "auto")])
@pytest.mark.parametrize("imported", [False, True])
def test_eplb_leaves_nccl_room(monkeypatch, chosen, asked, imported):
    seen, names = [], ("vllm", "vllm.config", "vllm.distributed", "vllm.distributed.eplb", eplb._UTILS)
    for name in (*names, *([eplb._WORKER] if imported else [])):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    if not imported:
        monkeypatch.delitem(sys.modules, eplb._WORKER, raising=False)
    utils = sys.modules[eplb._UTILS]
    utils.override_envs_for_eplb = lambda parallel, backend: seen.append((parallel, backend))
    if imported:
        sys.modules[eplb._WORKER].override_envs_for_eplb = utils.override_envs_for_eplb
    model = None if chosen is None else SimpleNamespace(model_config=SimpleNamespace(quantization=chosen))
    sys.modules["vllm.config"].get_current_vllm_config_or_none = lambda: model
    eplb.leave_room(quantization.NAMES)
    eplb.leave_room(quantization.NAMES)  # in a process that loads plug-ins twice
    caller = sys.modules[eplb._WORKER] if imported else utils
    caller.override_envs_for_eplb("parallel", moe_backend="auto")
    assert seen == [("parallel", asked)]


def test_eplb_of_others_goes_on_where_vllm_cannot_be_asked(monkeypatch, caplog):
    seen, names = [], ("vllm", "vllm.config", "vllm.distributed", "vllm.distributed.eplb", eplb._UTILS)
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, eplb._WORKER, raising=False)
    utils = sys.modules[eplb._UTILS]
    utils.override_envs_for_eplb = lambda parallel, backend: seen.append((parallel, backend))
    eplb.leave_room(quantization.NAMES)
    aside._warned.clear()
    for _ in range(2):
        utils.override_envs_for_eplb("parallel", "auto")
    assert seen == [("parallel", "auto")] * 2
    assert [record.message for record in caplog.records if "NCCL_MAX_CTAS" in record.message] == [
        "megamoe-jit leaves NCCL_MAX_CTAS to vLLM, whose settings cannot be asked: "
        "AttributeError: module 'vllm.config' has no attribute 'get_current_vllm_config_or_none'"
    ]
