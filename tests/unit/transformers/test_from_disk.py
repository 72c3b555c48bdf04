"""A published checkpoint to logits: FP8 and MXFP4 experts through transformers and through `load_experts`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import megamoe_jit.transformers  # noqa: F401  registers
from megamoe_jit.checkpoints import load_experts
from megamoe_jit.reference import calc_diff
from megamoe_jit.transformers.adapter import ATTRIBUTE
from tests.unit.transformers.models import experts_of, make, tokens
from tests.unit.transformers.on_disk import experts_like, publish, values_of

pytestmark = pytest.mark.filterwarnings("ignore:experts_implementation=.megamoe. on a CPU")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers dequantises where it sees no GPU; here it keeps what is in the files."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("Qwen3MoeConfig", {}),
        ("Qwen3MoeConfig", {"scales": "BF16"}),
        ("DeepseekV4Config", {}),
        ("DeepseekV4Config", {"kind": "mxfp4"}),
    ],
    ids=lambda value: str(value),
)
def test_quantised_experts_from_files(tmp_path: Path, as_on_a_gpu: None, name: str, how: dict):
    import transformers

    source = experts_like(name, **how)
    folder = publish(tmp_path, name, source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="megamoe", dtype=torch.float32
    )
    plain = make(name)  # the same seed, and so the same of everything but experts
    for layer, (module, other) in enumerate(zip(experts_of(model), experts_of(plain), strict=True)):
        assert module.gate_up_proj.dtype is (torch.int8 if source.kind == "mxfp4" else torch.float8_e4m3fn)
        gate_up, down = values_of(source, layer)
        other.gate_up_proj.data.copy_(gate_up)
        other.down_proj.data.copy_(down)
        w13, w2 = load_experts(folder, layer, device="cpu")
        for ours, theirs in ((w13, module.gate_up_proj), (w2, module.down_proj)):
            assert torch.equal(ours[0].view(torch.uint8), theirs.data.view(torch.uint8))
        assert torch.equal(w13[1].float(), module.gate_up_proj_scale_inv.float())
    plain.set_experts_implementation("eager")
    x, ids = torch.randn(5, 128), torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]])
    with torch.no_grad():
        for module, other in zip(experts_of(model), experts_of(plain), strict=True):
            ours, theirs = (each(x, ids, torch.rand(5, 2, generator=seed())) for each in (module, other))
            assert calc_diff(ours.float(), theirs.float()) < 5e-3
    assert calc_diff(logits(model).float(), logits(plain).float()) < 0.1  # roundings send tokens elsewhere
    assert all(hasattr(module, ATTRIBUTE) for module in experts_of(model))
