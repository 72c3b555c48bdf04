"""`megamoe-jit demo`: the shortest way to see the thing work, with or without a Hopper GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._bench.documents import Row
from megamoe_jit._cli._io import ExitCode, emit, end, json_option, say, show, table
from megamoe_jit._cli._kernels import compile_kernels, kernel_specs, kernel_table
from megamoe_jit._documents import Document
from megamoe_jit._errors import UnsupportedDeviceError
from megamoe_jit._jit.documents import Kernel

if TYPE_CHECKING:
    import torch

    from megamoe_jit._check.scenarios import Inputs
    from megamoe_jit._spec import MoEShape

COMPILED = "v4-flash"  #: compiled where there is no GPU
LAYER = "qwen3-30b-a3b"  #: run where there is one: 0.6 GB of weights
TOKENS = (16, 256, 2048)
EXACT_LIMIT = 1e-6  #: both sides are FP32 and differ in the order of sums alone
FP8_LIMIT = 2e-3  #: what rounding the intermediate to FP8 and each slot to bf16 may cost


@dataclass(frozen=True, slots=True)
class Check:
    """A figure that must stay within its limit."""

    what: str
    diff: float
    limit: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Demo(Document):
    """What the demonstration found.

    Attributes:
        device: the GPU; null without one
        rows: calls on the GPU
        checks: of the reference, without a GPU
    """

    KIND = "demo"

    passed: bool
    device: str | None
    kernels: tuple[Kernel, ...]
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]


@click.command()
@json_option
def demo(as_json: bool) -> None:
    """Run a small layer and check it; without a Hopper GPU compile the kernels and check the reference."""
    from megamoe_jit._bench import measure as _bench
    from megamoe_jit._compile.render import kernels_dir
    from megamoe_jit._jit.runtime import sealed

    kernels_dir()  # one that is wrong is no failure of each kernel
    try:
        _bench.require_hopper()
    except UnsupportedDeviceError:
        kernels = "must be cached, for compiling is forbidden" if sealed() else "are compiled all the same"
        say(f"No Hopper GPU here.  The kernels {kernels}, and the reference runs on the CPU.")
        doc = _without_gpu(as_json)
    else:
        doc = _on_gpu(as_json)
    if as_json:
        emit(doc)
    end(ExitCode.OK if doc.passed else ExitCode.FAILED)


def _compile(shape: MoEShape, name: str, force: bool, as_json: bool) -> tuple[tuple[Kernel, ...], bool]:
    from megamoe_jit._jit.runtime import sealed

    doing = "Looking in the caches for" if sealed() else "Compiling"
    say(f"\n{doing} the kernels of {name} for sm_90a{'' if sealed() else ' with NVRTC'} ...")
    specs = kernel_specs({name: shape}, inputs="staged")
    results = compile_kernels(specs, None, force and not sealed(), as_json=as_json)
    kernels = tuple(map(Kernel.of, results))
    if not as_json:
        show(kernel_table(kernels))
    for result in results:
        if result.error:
            say(f"\n{result.spec.kernel_name}: {result.error}")
    return kernels, not any(r.error for r in results)


def _on_gpu(as_json: bool) -> Demo:
    import torch

    from megamoe_jit._bench import measure as _bench
    from megamoe_jit.heuristics.presets import preset

    name = torch.cuda.get_device_name()
    say(f"{name} found.")
    known = preset(LAYER)
    kernels, compiled = _compile(known.shape, LAYER, False, as_json)
    rows: list[Row] = []
    if compiled:
        say(f"\nOne layer of {LAYER} with random weights: run, compared with the FP32 reference, timed ...")
        rows = _bench.measure(_bench.cases([known], TOKENS), ("auto",))
    if rows and not as_json:
        cells = [
            (r.tokens, r.kernel, f"{r.median_us:.1f}", f"{r.tflops:.0f}", f"{r.diff:.1e}", "yes" if r.correct else "NO")
            for r in rows
        ]
        show(table(("TOKENS", "KERNEL", "MEDIAN us", "TFLOPS", "DIFF", "CORRECT"), cells, left=(1,)))
    passed = compiled and all(row.correct for row in rows)
    say("\nThe kernel agrees with the reference." if passed else "\nFAILED: see above.")
    return Demo(passed, name, kernels, tuple(rows), ())


def _without_gpu(as_json: bool) -> Demo:
    from megamoe_jit.heuristics.presets import preset

    kernels, compiled = _compile(preset(COMPILED).shape, COMPILED, True, as_json)
    say("\nRunning the FP32 reference on the CPU, and the same layer as plain matrix products ...")
    checks = _reference_checks()
    if not as_json:
        cells = [(c.what, f"{c.diff:.1e}", f"{c.limit:.0e}", "yes" if c.passed else "NO") for c in checks]
        show(table(("CHECK", "DIFF", "LIMIT", "HOLDS"), cells))
    passed = compiled and all(check.passed for check in checks)
    if passed:
        say("\nAll fine here.  On a machine with an H100 or H200 the same command runs the kernel.")
    else:
        say("\nFAILED: see above.")
    return Demo(passed, None, kernels, (), checks)


def _reference_checks() -> tuple[Check, ...]:
    """Hold the reference against a layer written down without it."""
    import torch

    from megamoe_jit._check.scenarios import Scenario, make_inputs
    from megamoe_jit._spec import MoEShape
    from megamoe_jit.reference import calc_diff, moe_reference

    shape = MoEShape(hidden=512, intermediate=256, experts=8, topk=2)
    case = Scenario("demo", shape, tokens=48, capacity=48, masked_ratio=0.2)
    inputs = make_inputs(case, "cpu")
    plain = _plain_layer(inputs, case.clamp)

    def reference(requantize: bool) -> torch.Tensor:
        options: dict[str, Any] = {"activation_clamp": case.clamp, "out_dtype": torch.float32}
        return moe_reference(*inputs.operands, requantize=requantize, **options)

    found = (
        ("reference without rounding = plain layer", calc_diff(reference(False), plain), EXACT_LIMIT),
        ("reference with the kernel's FP8 rounding = plain layer", calc_diff(reference(True), plain), FP8_LIMIT),
    )
    return tuple(Check(what, diff, limit, diff <= limit) for what, diff, limit in found)


def _plain_layer(inputs: Inputs, clamp: float | None) -> torch.Tensor:
    """The layer as its formula says, token by token, on dequantised weights; float32 `[T, H]`."""
    import torch

    from megamoe_jit._layer.quantize import dequantize_activations, dequantize_weights

    x = dequantize_activations(inputs.x_q, inputs.x_sf)
    w13, w2 = dequantize_weights(*inputs.l1), dequantize_weights(*inputs.l2)
    y = torch.zeros_like(x)
    for token, (experts, weights) in enumerate(zip(inputs.topk_idx.tolist(), inputs.topk_weights, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert < 0:
                continue
            gate, up = (w13[expert] @ x[token]).chunk(2)
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            y[token] += weight * (w2[expert] @ (gate * gate.sigmoid() * up))
    return y
