"""`experts_implementation="megamoe"` on the GPU: logits, generation with a static cache, one graph, moved weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import megamoe_jit.transformers as plugin
from megamoe_jit.reference import calc_diff
from tests.unit.transformers.models import MODELS, experts_of, make, tokens
from tests.unit.transformers.on_disk import experts_like, publish


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens().to(model.device), use_cache=False).logits.float()


def on_gpu(name: str, device: torch.device):
    return make(name, "megamoe", torch.bfloat16).to(device)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_eager(name: str, device: torch.device):
    model = on_gpu(name, device)
    ours = logits(model)
    assert torch.equal(logits(model), ours)
    model.set_experts_implementation("eager")
    assert calc_diff(ours, logits(model)) < 5e-3


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantised_experts_are_transformed_where_they_are_and_come_back(tmp_path: Path, device, kind: str):
    import transformers

    folder = publish(tmp_path, "DeepseekV4Config", experts_like("DeepseekV4Config", kind=kind))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, experts_implementation="megamoe", dtype=torch.float32, device_map={"": device})
    before = {name: value.view(torch.uint8).cpu().clone() for name, value in model.state_dict().items() if value.ndim}
    peak = torch.cuda.memory_allocated()
    found = logits(model)
    assert {module.gate_up_proj.device.type for module in experts_of(model)} == {"meta"}
    assert torch.cuda.memory_allocated() - peak < 64 << 20, "a workspace, and no second copy of weights"
    after = {name: value.view(torch.uint8).cpu() for name, value in model.state_dict().items() if value.ndim}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), found)


def test_generation_with_a_static_cache_is_compiled_without_breaks(device: torch.device):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model, prompt = on_gpu("Qwen3MoeConfig", device), tokens(4).to(device)
    how = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(prompt, **how, disable_compile=True)
    counters.clear()
    assert torch.equal(model.generate(prompt, **how), plain)
    assert (sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]) == (0, 1)


def test_a_prepared_model_is_one_graph(device: torch.device):
    torch._dynamo.reset()
    model = on_gpu("Qwen3MoeConfig", device)
    eager = logits(model)
    plugin.release(model)
    assert plugin.prepare(model) == 2
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    outputs = [logits(compiled) for _ in range(3)]
    assert torch.equal(outputs[1], outputs[2])
    assert calc_diff(outputs[2], eager) < 1e-3
