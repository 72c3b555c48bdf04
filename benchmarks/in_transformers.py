"""The layer inside a model of transformers, called as it is, beside the experts that transformers has.

    python -m benchmarks.in_transformers [--output in-transformers.json]

Four layers of Qwen3-30B-A3B in their real sizes with random weights, eager, no graphs, nothing compiled.  In turns:

    megamoe     this package, registered as an experts implementation of transformers
    grouped_mm  its default: sorted tokens, torch's grouped products in bf16
    eager       its loop over the experts

The others' weights are those of megamoe, dequantised.  A decode step is one token of every sequence after a prompt; a
prefill one sequence at once.  Needs a Hopper GPU and transformers.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import megamoe_jit as mm
from benchmarks.checkout import commit
from benchmarks.frame import hopper, parser, say
from megamoe_jit._bench.conditions import environment, write
from megamoe_jit.heuristics.presets import preset
from megamoe_jit.reference import calc_diff

__all__ = ["IMPLEMENTATIONS", "adopt", "make_model", "measure", "megamoe_experts"]

MODEL, LAYERS = "qwen3-30b-a3b", 4
IMPLEMENTATIONS = ("megamoe", "grouped_mm", "eager")
BATCHES, PROMPT, STEPS = (1, 16, 64), 32, 8  #: of decoding: sequences, their tokens before, tokens that are timed
PREFILL = 2048
ROUNDS, SKIPPED = 7, 1
MOST_DIFF = 0.02  #: of logits: FP8 activations, and tokens that the next router sends elsewhere for them


def megamoe_experts(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward pass of an experts module that `adopt` has seen, as transformers' interface wants it."""
    return experts.megamoe(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


def adopt(model: torch.nn.Module, topk: int, max_tokens: int, make: Callable[..., Any] = mm.MegaMoE) -> int:
    """Give every experts module of a model a layer of ours, and the others its weights; how many there are.

    Args:
        model: of transformers; its experts hold ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``.
        topk: experts of a token.
        max_tokens: of a launch.
        make: what makes a layer of the quantised pairs, as `MegaMoE` does.
    """
    found = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")]
    found = [module for module in found if module.gate_up_proj.ndim == 3]
    for module in found:
        projections: Any = (module.gate_up_proj, module.down_proj)
        pairs = [mm.quantize_weights(projection.data) for projection in projections]
        for projection, pair in zip(projections, pairs, strict=True):
            projection.data.copy_(mm.dequantize_weights(*pair))
        module.megamoe = make(*pairs, topk=topk, max_tokens=max_tokens)
    return len(found)


def make_model(device: torch.device, **sizes: int) -> Any:
    """A causal model with random weights in bf16; `sizes` of its configuration other than those of the real one."""
    import transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    library: Any = transformers
    shape = preset(MODEL).shape
    real = {
        "num_hidden_layers": LAYERS,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.topk,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    config = library.Qwen3MoeConfig(**{**real, **sizes}, norm_topk_prob=True)
    ALL_EXPERTS_FUNCTIONS.register("megamoe", megamoe_experts)
    torch.manual_seed(21)
    with device:
        model = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval()


def _choose(model: Any, implementation: str) -> None:
    model.config._experts_implementation = implementation  # what its experts ask at every call


def _cache_name(model: Any) -> str:
    """Releases of transformers differ in it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _forward(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    """Logits of each sequence's last token, ``[B, vocabulary]``."""
    return model(input_ids=tokens, logits_to_keep=1, **more).logits[:, -1]  # type: ignore[no-any-return]


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def decode_ms(model: Any, batch: int) -> float:
    """Milliseconds of a decode step, the mean of some in a row."""
    from transformers import DynamicCache

    kept = {_cache_name(model): DynamicCache(config=model.config), "use_cache": True}
    device, vocabulary = model.device, model.config.vocab_size
    prompt = torch.randint(vocabulary, (batch, PROMPT), dtype=torch.int64, device=device)
    steps = torch.randint(vocabulary, (STEPS, batch, 1), dtype=torch.int64, device=device)
    _forward(model, prompt, **kept)
    return 1e3 / STEPS * _seconds(lambda: [_forward(model, step, **kept) for step in steps])


def prefill_ms(model: Any, tokens: int) -> float:
    """Milliseconds of one sequence at once."""
    prompt = torch.randint(model.config.vocab_size, (1, tokens), dtype=torch.int64, device=model.device)
    return 1e3 * _seconds(lambda: _forward(model, prompt, use_cache=False))


def _in_turns(model: Any, work: Callable[[], float]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for turn in range(SKIPPED + ROUNDS):
        for name in IMPLEMENTATIONS:
            _choose(model, name)
            took = work()
            if turn >= SKIPPED:
                times[name].append(took)
    return {f"{name}_ms": round(statistics.median(found), 3) for name, found in times.items()}


@torch.no_grad()
def differences(model: Any, tokens: int) -> dict[str, float]:
    """How far the logits of some tokens are from those of grouped_mm: 0 where they are equal."""
    prompt = torch.randint(model.config.vocab_size, (tokens, PROMPT), dtype=torch.int64, device=model.device)
    logits = {}
    for name in IMPLEMENTATIONS:
        _choose(model, name)
        logits[name] = _forward(model, prompt, use_cache=False).float()
    return {name: round(float(calc_diff(logits[name], logits["grouped_mm"])), 6) for name in ("megamoe", "eager")}


@torch.no_grad()
def measure(model: Any) -> Iterator[dict[str, Any]]:
    """The rows; times are medians in milliseconds."""
    for batch in BATCHES:
        yield {"step": "decode", "tokens": batch, **_in_turns(model, lambda: decode_ms(model, batch))}  # noqa: B023
    yield {"step": "prefill", "tokens": PREFILL, **_in_turns(model, lambda: prefill_ms(model, PREFILL))}


def _line(row: Mapping[str, Any]) -> str:
    times = "".join(f"{row[f'{name}_ms']:12.2f}" for name in IMPLEMENTATIONS)
    return f"{row['step']:10}{row['tokens']:7}{times}{row['grouped_mm_ms'] / row['megamoe_ms']:18.2f}"


def main() -> int:
    """Measure and print; 1 if the logits are far from grouped_mm's, 3 without a Hopper GPU or transformers."""
    arguments = parser(__doc__)
    arguments.add_argument("--output", type=Path, help="write the rows as JSON")
    options = arguments.parse_args()
    if importlib.util.find_spec("transformers") is None:
        arguments.exit(3, "Error: no transformers here; run: pip install 'transformers>=5.17,<6'\n")
    device = hopper(arguments)
    import transformers

    model = make_model(device)
    layers = adopt(model, preset(MODEL).shape.topk, max(PREFILL, PROMPT * max(BATCHES)))
    diffs = differences(model, max(BATCHES))
    names = "".join(f"{name:>12}" for name in IMPLEMENTATIONS)
    say(f"{layers} layers of {MODEL}, transformers {transformers.__version__}, logits differ by {diffs}")
    say(f"{'ms':10}{'tokens':>7}{names}{'times grouped_mm':>18}")
    rows = []
    for row in measure(model):
        rows.append(row)
        say(_line(row))
    if options.output:
        conditions = {**environment(commit()), "transformers": transformers.__version__}
        head = {"schema_version": 1, "kind": "in_transformers", "environment": conditions, "model": MODEL}
        write({**head, "layers": layers, "logits_diff": diffs, "rows": rows}, options.output)
    return int(not diffs["megamoe"] <= MOST_DIFF)


if __name__ == "__main__":
    raise SystemExit(main())
