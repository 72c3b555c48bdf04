"""A model of transformers that generates text with this layer in place of its experts, beside its own eager loop.

Run:   python examples/in_transformers.py
       python examples/in_transformers.py --device cpu      (by the reference: slow, and right)
Seen:  the tokens that a small random Qwen3-MoE generates, how far its logits are from those of the eager loop (below
       1e-2: experts become FP8), and exit code 0.
Needs: transformers 5.17 or newer, and a Hopper GPU (H100, H200). Without the GPU, unless --device cpu is given: one
       sentence that says what is missing, and exit code 3.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megamoe_jit import UnsupportedDeviceError
from megamoe_jit.reference import calc_diff


def run(device: str | None) -> float:
    """Generate some tokens; how far logits are from those of the eager loop."""
    if device is None and not torch.cuda.is_available():
        raise UnsupportedDeviceError("no CUDA device here, and these kernels need a Hopper GPU; or --device cpu")
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import megamoe_jit.transformers  # noqa: F401  this line is all: transformers knows "megamoe" now

    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 128, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="megamoe", dtype=torch.bfloat16)
    model = model.to(device or "cuda").eval()  # of a real one: from_pretrained(..., experts_implementation="megamoe")
    prompt = torch.randint(256, (1, 8), device=model.device)
    print("tokens", model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 8:].tolist())
    with torch.no_grad():
        ours = model(prompt).logits
        model.set_experts_implementation("eager")
        diff = calc_diff(ours.float(), model(prompt).logits.float())
    print(f"logits are {diff:.1e} from those of the eager loop")
    return diff


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if logits are far away, 3 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description="A model of transformers with this layer in place of its experts.")
    parser.add_argument("--device", help="where; e.g. cuda:1, or cpu for the reference")
    try:
        return int(not run(parser.parse_args(arguments).device) < 1e-2)
    except UnsupportedDeviceError as error:
        print(f"in_transformers.py: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
