"""Every preset, and sizes that are odd on purpose, through the real compiler: nothing spilled, nothing serialised."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from dataclasses import replace

import pytest

from megamoe_jit._compile.cubin import read_cubin
from megamoe_jit._compile.render import VIRTUAL_ROOT, kernels_dir
from megamoe_jit._device.params import NodesParams, Params, StageParams
from megamoe_jit._errors import CompileError
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FORMATS, FP8, FP8_E5M2, MXFP4, KernelSpec, MoEShape, Variant
from megamoe_jit._spec.any_layer import Pass, PassSpec, StageFormat, StageSpec
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit.heuristics import preset, preset_names
from tests.compile.chosen import ALWAYS, often, pairs, usual
from tests.compile.kernels import compiled

#: The variants that read the weights of a format, by its name.
READING = {weights.name: Variant.reading(weights) for weights in FORMATS.values()}

#: hidden, intermediate, experts, top-k, ranks: every odd value at least once, each with every variant.  Over two ranks,
#: the layer for which the compiler was seen to read a register too early (test_hazards.py).
ODD = (
    (128, 128, 1, 1, 1),
    (1408, 128, 8, 4, 1),
    (2304, 768, 512, 12, 2),
    (1408, 768, 1024, 32, 1),
    (256, 1408, 33, 3, 1),
)


def preset_specs() -> dict[str, KernelSpec]:
    """Each preset as one GPU's slice of it, and whole over its ranks."""
    specs = {}
    for name in preset_names():
        entry = preset(name)
        shape = entry.shape
        for label, experts, ranks in (("slice", entry.local_experts, 1), ("whole", shape.experts, entry.ranks)):
            for variant in READING[FP8.name]:
                spec = KernelSpec(MoEShape(shape.hidden, shape.intermediate, experts, shape.topk), variant, ranks)
                specs[f"{name}-{label}-{variant.value}"] = spec
    return {name: spec for i, (name, spec) in enumerate(specs.items()) if spec not in list(specs.values())[:i]}


def other_specs() -> dict[str, KernelSpec]:
    """Exact math, output in float32, odd sizes."""
    flash = preset("v4-flash")
    slice_ = MoEShape(flash.shape.hidden, flash.shape.intermediate, flash.local_experts, flash.shape.topk)
    specs = {}
    for variant in READING[FP8.name]:
        specs[f"exact-{variant.value}"] = KernelSpec(slice_, variant, fast_math=False)
        specs[f"float32-{variant.value}"] = KernelSpec(slice_, variant, numerics=Numerics(float32_out=True))
        for hidden, intermediate, experts, topk, ranks in ODD:
            name = f"odd-h{hidden}-i{intermediate}-e{experts}-k{topk}-{variant.value}"
            specs[name] = KernelSpec(MoEShape(hidden, intermediate, experts, topk), variant, ranks)
    return specs


def raw_specs() -> dict[str, KernelSpec]:
    """Kernels that stage their inputs: two presets over their ranks, and odd sizes."""
    others = {name: spec for name, spec in {**preset_specs(), **other_specs()}.items() if name.startswith("odd")}
    whole = {n: spec for n, spec in preset_specs().items() if n.startswith(("v4-flash-whole", "v4-pro-whole"))}
    return {f"raw-{name}": replace(spec, inputs=Inputs.RAW) for name, spec in {**whole, **others}.items()}


def shared_specs() -> dict[str, KernelSpec]:
    """With shared experts, as two models have them over their ranks, and as many as there can be."""
    shapes = {
        f"{e.name}-shared": (replace(e.shape, shared=1), e.ranks) for e in map(preset, ("v4-flash", "deepseek-v3"))
    }
    shapes["odd-shared"] = MoEShape(1408, 768, 1000, 8, 24), 1
    kinds = itertools.product(shapes.items(), READING[FP8.name], Inputs)
    return {f"{n}-{v.value}-{i.value}": KernelSpec(shape, v, ranks, inputs=i) for (n, (shape, ranks)), v, i in kinds}


def packed_specs() -> dict[str, KernelSpec]:
    """With weights of four bits: each preset over its ranks and as a slice, exact math, odd sizes, raw inputs."""
    raw = {name: spec for name, spec in raw_specs().items() if name.startswith("raw-v4")}
    others = {**preset_specs(), **other_specs(), **raw}
    named = {name.removesuffix(f"-{spec.variant.value}"): spec for name, spec in others.items()}
    return {
        f"mxfp4-{name}-{variant.value}": replace_weights(spec, variant)
        for name, spec in named.items()
        for variant in READING[MXFP4.name]
    }


def two_rank_specs() -> dict[str, KernelSpec]:
    """Each preset with packed weights over two ranks: these need fewer GPUs than its FP8 weights."""
    return {
        f"mxfp4-{name}-two-{variant.value}": KernelSpec(preset(name).shape, variant, 2, weights=MXFP4)
        for name, variant in itertools.product(preset_names(), READING[MXFP4.name])
    }


def long_specs() -> dict[str, KernelSpec]:
    """Rows of other ranks, long ones and one with a remainder, where a block has helpers and so few registers."""
    helped = [variant for variant in READING[MXFP4.name] if variant.helpers]
    sizes = itertools.product((6912, 8192), helped)
    return {f"long-h{h}-{v.value}": KernelSpec(MoEShape(h, 1024, 32, 6), v, 2, weights=MXFP4) for h, v in sizes}


def replace_weights(spec: KernelSpec, variant: Variant) -> KernelSpec:
    """The same with packed weights."""
    return KernelSpec(spec.shape, variant, spec.ranks, numerics=spec.numerics, weights=MXFP4, inputs=spec.inputs)


def e5m2_specs() -> dict[str, KernelSpec]:
    """With weights of the other eight-bit code."""
    shape = MoEShape(2304, 1408, 8, 12)
    return {f"e5m2-{v.value}": KernelSpec(shape, v, weights=FP8_E5M2) for v in READING[FP8_E5M2.name]}


SPECS = {
    **preset_specs(),
    **other_specs(),
    **raw_specs(),
    **shared_specs(),
    **packed_specs(),
    **two_rank_specs(),
    **long_specs(),
    **e5m2_specs(),
}
OFTEN = often(SPECS)


def test_the_list_is_complete():
    kernels = {
        (s.shape.hidden, s.shape.intermediate, s.shape.experts, s.shape.topk, s.variant, s.ranks)
        for s in SPECS.values()
    }
    for name in preset_names():
        entry, shape = preset(name), preset(name).shape
        for variant in {*READING[FP8.name], *READING[MXFP4.name]}:
            assert (shape.hidden, shape.intermediate, entry.local_experts, shape.topk, variant, 1) in kernels
            assert (shape.hidden, shape.intermediate, shape.experts, shape.topk, variant, entry.ranks) in kernels
    for position, values in enumerate(((128, 1408, 2304), (128, 768, 1408), (1, 8, 512, 1024), (1, 4, 12, 32))):
        assert set(values) <= {sizes[position] for sizes in kernels if sizes[-1] in (1, 2)}
    assert {1, 2, 8} <= {sizes[-1] for sizes in kernels}


def test_every_pair_that_is_usual_is_compiled_at_every_run():
    """A few kernels have them all, the presets' with what `auto` takes for each among them."""
    everything, few = usual(SPECS), {name: SPECS[name] for name in OFTEN}
    found = set().union(*map(pairs, few.values()))
    assert set().union(*map(pairs, everything.values())) <= found
    layers = {(e.shape.hidden, e.shape.intermediate, e.shape.topk) for e in map(preset, preset_names())}
    for layer, variant in itertools.product(layers, ALWAYS):
        assert (("layer", layer), ("variant", (variant, FP8.name))) in found
    for variant in READING[MXFP4.name]:
        assert (("ranks", 2), ("variant", (variant, MXFP4.name))) in found
    variants = {pair for name, reading in READING.items() for pair in itertools.product(reading, [name])}
    assert variants == {(spec.variant, spec.weights.name) for spec in few.values()}


@pytest.mark.parametrize("form", list(StageFormat))
def test_kernels_that_stage_are_small(form: StageFormat):
    """Six blocks of 256 threads fit an SM if a thread has 40 registers, four if it has 64."""
    meta = compiled(StageSpec(form)).meta
    assert (meta["spill_bytes"], meta["stack_bytes"], meta["advisories"]) == (0, 0, [])
    assert meta["registers"] <= (64 if form is StageFormat.F32 else 40)
    assert meta["param_bytes"] == ctypes.sizeof(StageParams)


@pytest.mark.parametrize("step", list(Pass))
def test_passes_between_nodes_are_small(step: Pass):
    """Six blocks of 256 threads fit an SM."""
    meta = compiled(PassSpec(step)).meta
    assert (meta["spill_bytes"], meta["stack_bytes"], meta["advisories"]) == (0, 0, [])
    assert meta["registers"] <= 40
    assert meta["param_bytes"] == ctypes.sizeof(NodesParams)


@pytest.mark.parametrize("name", OFTEN)
def test_compiles_without_loss(name):
    spec = SPECS[name]
    kernel = compiled(spec)
    meta = kernel.meta
    assert (meta["spill_bytes"], meta["stack_bytes"]) == (0, 0)
    assert (meta["advisories"], meta["diagnostics"]) == ([], 0)
    registers = {384: 168, 512: 128}[spec.threads]  # of 65536, over the threads; setmaxnreg moves them between warps
    assert meta["registers"] == registers
    assert meta["dynamic_shared_bytes"] == spec.shared_bytes <= 232448
    info = read_cubin(kernel.cubin)
    assert [entry.name for entry in info.entries] == [spec.kernel_name]
    (entry,) = info.entries
    assert (entry.registers, entry.stack_bytes, entry.static_shared_bytes) == (registers, 0, 0)
    assert entry.max_threads == spec.threads
    assert meta["param_bytes"] == entry.param_bytes == ctypes.sizeof(Params)


@pytest.fixture
def own_sources(tmp_path):
    """A copy of the rooms that a test may spoil."""
    folder = tmp_path / "src"
    shutil.copytree(kernels_dir(), folder)
    with override(kernels_src=folder, cache_dir=tmp_path / "cache", dump_dir=tmp_path / "dump"):
        yield folder


@pytest.mark.parametrize("room", ["base/constants.cuh", "sched/order.cuh", "roles/math.cuh"])
def test_a_mistake_names_room_and_line(own_sources, room):
    path = own_sources / room
    lines = path.read_text().splitlines()
    lines.append("constexpr unsigned broken_on_purpose = no_such_thing;")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CompileError) as caught:
        get_kernel(KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG))
    message = str(caught.value)
    assert f"{VIRTUAL_ROOT}/{room}({len(lines)}): error" in message
    assert "no_such_thing" in message
    assert "| constexpr unsigned broken_on_purpose" in message


def test_a_wrong_sum_of_shared_memory_is_refused(own_sources):
    """The entry asserts that Python and the kernel agree."""
    path = own_sources / "kernels" / "entry.cuh.j2"
    path.write_text(path.read_text().replace("{{ shared_bytes }}", "{{ shared_bytes + 16 }}"))
    with pytest.raises(CompileError, match=r"entry\.cuh\.j2\(\d+\): error: .*disagree"):
        get_kernel(KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG))
