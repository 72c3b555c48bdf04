"""A model in SGLang whose experts run as this layer, and a sentence of it.

Run:   python examples/engines/sglang_generate.py MODEL --gpus 8
Seen:  the text that the model goes on with, and exit code 0. `MEGAMOE_JIT_LOG_LEVEL=info` shows the kernels meanwhile.
Needs: SGLang, Hopper GPUs that hold the model, and one with experts in FP8 with blocks of 128 x 128, or DeepSeek V4;
       without SGLang one sentence, and exit code 3. Where the plug-in does not fit,
       `megamoe-jit doctor --engine sglang` says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

PROMPT = "A mixture of experts is"


def generate(model: str, gpus: int, alone: bool) -> str:
    """What the model says."""
    import sglang

    opening = {"moe_runner_backend": "megamoe_jit"} if alone else {"moe_a2a_backend": "megamoe", "ep_size": gpus}
    engine = sglang.Engine(model_path=model, tp_size=gpus, **opening)
    try:
        return engine.generate(PROMPT, {"max_new_tokens": 32, "temperature": 0})["text"]
    finally:
        engine.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 3 without SGLang."""
    parser = argparse.ArgumentParser(description="A model in SGLang whose experts run as one kernel.")
    parser.add_argument("model", help="a name on the Hub, or a folder")
    parser.add_argument("--gpus", type=int, default=1, help="that share the model")
    parser.add_argument("--no-all-to-all", action="store_true", help="SGLang brings tokens to experts, not the kernel")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("sglang") is None:
        print("sglang_generate.py: there is no SGLang; next: pip install '.[cu13,sglang]'", file=sys.stderr)
        return 3
    print(PROMPT + generate(given.model, given.gpus, given.no_all_to_all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
