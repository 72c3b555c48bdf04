"""A model in vLLM whose experts run as this layer, and a sentence of it.

Run:   python examples/engines/vllm_generate.py MODEL --gpus 8
Seen:  the text that the model goes on with, and exit code 0. `MEGAMOE_JIT_LOG_LEVEL=info` shows the kernels meanwhile.
Needs: vLLM, Hopper GPUs that hold the model, and one with experts in FP8 with blocks of 128 x 128, or DeepSeek V4;
       without vLLM one sentence, and exit code 3. Where the plug-in does not fit, `megamoe-jit doctor --engine vllm`
       says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

PROMPT = "A mixture of experts is"


def generate(model: str, gpus: int) -> str:
    """What the model says."""
    import vllm

    parallel = {"tensor_parallel_size": gpus, "enable_expert_parallel": gpus > 1}
    engine = vllm.LLM(model=model, quantization="megamoe_jit", **parallel)
    (done,) = engine.generate([PROMPT], vllm.SamplingParams(max_tokens=32, temperature=0))
    return done.outputs[0].text


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 3 without vLLM."""
    parser = argparse.ArgumentParser(description="A model in vLLM whose experts run as one kernel.")
    parser.add_argument("model", help="a name on the Hub, or a folder")
    parser.add_argument("--gpus", type=int, default=1, help="that share the model")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("vllm") is None:
        print("vllm_generate.py: there is no vLLM; next: pip install '.[cu13,vllm]'", file=sys.stderr)
        return 3
    print(PROMPT + generate(given.model, given.gpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
