"""The layer inside models of transformers, called as they are, beside the experts that transformers has.

    python -m benchmarks.in_transformers [--model qwen3-30b-a3b] [--batch 16] [--prefill] [--output models.json]

Four layers of a model in their real sizes with random weights, eager, no graphs, nothing compiled.  In turns:

    megamoe     this package, as `import megamoe_jit.transformers` enters it
    grouped_mm  its default: sorted tokens, torch's grouped products in bf16
    eager       its loop over the experts

The others' weights are those of megamoe, dequantised.  A decode step is one token of every sequence after a prompt; a
prefill one sequence at once.  Needs a Hopper GPU and transformers; `--layers` where its memory does not hold four.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import megamoe_jit as mm
from benchmarks.frame import hopper, keep, parser, say
from megamoe_jit._bench.conditions import environment
from megamoe_jit.heuristics.presets import preset
from megamoe_jit.reference import calc_diff

LAYERS = 4
IMPLEMENTATIONS = ("megamoe", "grouped_mm", "eager")
BATCHES, PROMPT, STEPS = (1, 16, 64), 32, 8  #: of decoding: sequences, their tokens before, tokens that are timed
PREFILL = 2048
ROUNDS, SKIPPED = 5, 1
MOST_DIFF = 2e-3  #: of what experts give on the same inputs: activations in FP8, once before and once between products

#: By preset: the class of the configuration, and what it needs to have experts in every layer.  Sizes that are not
#: named are the defaults of the class, which are those of the model.
MODELS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        lambda layers: {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True},
    ),
    "glm-4-moe": ("Glm4MoeConfig", lambda layers: {"first_k_dense_replace": 0}),
    "v4-flash": ("DeepseekV4Config", lambda layers: {"mlp_layer_types": ["moe"] * layers}),
    "deepseek-v3": ("DeepseekV3Config", lambda layers: {"first_k_dense_replace": 0}),
}


def _experts(model: torch.nn.Module) -> list[Any]:
    found: list[Any] = [
        each for each in model.modules() if hasattr(each, "gate_up_proj") and hasattr(each, "down_proj")
    ]
    return [each for each in found if each.gate_up_proj.ndim == 3]


def adopt(model: torch.nn.Module) -> int:
    """Round the weights of every experts module to those that FP8 has, so that all implementations have the same.

    Args:
        model: of transformers; its experts hold ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``.

    Returns:
        How many modules there are.
    """
    found = _experts(model)
    for module in found:
        projections: Any = (module.gate_up_proj, module.down_proj)
        for projection in projections:
            for expert in projection.data:
                expert.copy_(mm.dequantize_weights(*mm.quantize_weights(expert)))
    return len(found)


def make_model(name: str, device: torch.device, layers: int = LAYERS, **sizes: Any) -> Any:
    """A causal model with random weights in bf16; `sizes` of its configuration other than those of the real one."""
    import transformers

    library: Any = transformers
    kind, more = MODELS[name]
    shape = preset(name).shape
    real = {
        "num_hidden_layers": layers,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_experts": shape.experts,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.topk,
        **more(layers),
    }
    config_class = getattr(library, kind)
    known = inspect.signature(config_class).parameters
    config = config_class(**{name: value for name, value in {**real, **sizes}.items() if name in known})
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
    _forward(model, prompt, use_cache=False)  # layers are made at the first call after a change
    return 1e3 * _seconds(lambda: _forward(model, prompt, use_cache=False))


def _in_turns(model: Any, tokens: int, work: Callable[[], float]) -> dict[str, float]:
    """Median times of all, and tokens per second at them."""
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for turn in range(SKIPPED + ROUNDS):
        for name in IMPLEMENTATIONS:
            _choose(model, name)
            took = work()
            if turn >= SKIPPED:
                times[name].append(took)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rounded = {f"{name}_ms": round(median, 3) for name, median in medians.items()}
    return rounded | {f"{name}_tokens_per_s": round(1e3 * tokens / median, 1) for name, median in medians.items()}


@torch.no_grad()
def differences(model: Any, tokens: int) -> dict[str, dict[str, float]]:
    """How far some tokens' results are from those of grouped_mm: 0 where they are equal.

    Returns:
        ``logits_diff`` of whole models: a router whose scores are close, as those of random weights are, sends tokens
        elsewhere for a rounding before it.  ``experts_diff`` of experts alone, all on the same inputs: the worst layer.
    """
    prompt = torch.randint(model.config.vocab_size, (tokens, PROMPT), dtype=torch.int64, device=model.device)
    calls: list[tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]] = []
    hooks = [each.register_forward_hook(lambda *call: calls.append(call)) for each in _experts(model)]
    _choose(model, "grouped_mm")
    wanted = _forward(model, prompt, use_cache=False).float()
    for hook in hooks:
        hook.remove()
    logits, experts = {}, {}
    for name in IMPLEMENTATIONS:
        if name != "grouped_mm":
            _choose(model, name)
            found = _forward(model, prompt, use_cache=False).float()
            logits[name] = round(float(calc_diff(found, wanted)), 6)
            layers = [float(calc_diff(module(*inputs).float(), output.float())) for module, inputs, output in calls]
            experts[name] = round(max(layers), 6)
    return {"logits_diff": logits, "experts_diff": experts}


@torch.no_grad()
def measure(model: Any, batches: Sequence[int], prefill: bool) -> Iterator[dict[str, Any]]:
    """The rows, of decoding in such batches and perhaps of a prefill; times are medians in milliseconds."""
    for batch in batches:
        times = _in_turns(model, batch, lambda: decode_ms(model, batch))  # noqa: B023
        yield {"step": "decode", "tokens": batch, **times}
    if prefill:
        yield {"step": "prefill", "tokens": PREFILL, **_in_turns(model, PREFILL, lambda: prefill_ms(model, PREFILL))}


def _line(row: Mapping[str, Any]) -> str:
    times = "".join(f"{row[f'{name}_ms']:12.2f}{row[f'{name}_tokens_per_s']:10.0f}" for name in IMPLEMENTATIONS)
    return f"{row['step']:10}{row['tokens']:7}{times}{row['grouped_mm_ms'] / row['megamoe_ms']:18.2f}"


def _of_model(name: str, layers: int, batches: Sequence[int], prefill: bool, device: torch.device) -> dict[str, Any]:
    """Measure a model and print; what is known of it then."""
    import transformers

    import megamoe_jit.transformers as plugin

    plugin.options.max_tokens = max(PREFILL, PROMPT * max(BATCHES))
    model = make_model(name, device, layers)
    count = adopt(model)
    diffs = differences(model, max(BATCHES))
    names = "".join(f"{each:>12}  tokens/s" for each in IMPLEMENTATIONS)
    say(f"{count} layers of {name}, transformers {transformers.__version__}, {diffs}")
    say(f"{'ms':10}{'tokens':>7}{names}{'times grouped_mm':>18}")
    rows = []
    for row in measure(model, batches, prefill):
        rows.append(row)
        say(_line(row))
    return {"model": name, "layers": count, **diffs, "rows": rows}


def main() -> int:
    """Measure and print; 1 if experts give something else than grouped_mm's, 3 without a Hopper GPU or transformers."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", action="append", choices=tuple(MODELS), help="this one; all by default")
    arguments.add_argument("--layers", type=int, default=LAYERS, help="of a model")
    arguments.add_argument("--batch", action="append", type=int, choices=BATCHES, help="decode these alone")
    arguments.add_argument(
        "--prefill", action="store_true", help="with --batch: time a prefill too; alone: nothing else"
    )
    arguments.add_argument("--output", type=Path, help="write the rows as JSON")
    options = arguments.parse_args()
    if importlib.util.find_spec("transformers") is None:
        arguments.exit(3, "Error: no transformers here; run, in the checkout: pip install '.[transformers]'\n")
    device = hopper(arguments)
    import transformers

    batches = options.batch or (() if options.prefill else BATCHES)
    prefill = options.prefill or not options.batch
    found = []
    for name in options.model or MODELS:
        found.append(_of_model(name, options.layers, batches, prefill, device))
        torch.cuda.empty_cache()
    conditions = {**environment(), "transformers": transformers.__version__}
    keep("in_transformers", options.output, conditions, schema_version=2, models=found)
    return int(not all(each["experts_diff"]["megamoe"] <= MOST_DIFF for each in found))


if __name__ == "__main__":
    raise SystemExit(main())
