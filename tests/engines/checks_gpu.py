"""What ranks with GPUs check about plug-ins: an engine's own code around its experts, and the real kernels in them.

Every rank draws all experts from one seed and compares its tokens with the reference over all of them; or, where the
engine itself sums over ranks, its part with the reference over its part.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import judge
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.flashinfer import seams as flashinfer
from megamoe_jit.engines.sglang import seams as sglang
from megamoe_jit.engines.vllm import seams as vllm
from tests.engines.conftest import releases
from tests.engines.flashinfer_world import flashinfer_world
from tests.engines.sglang_world import SglangWorld, sglang_world
from tests.engines.standins import Batch, batch, expected, experts, packed_experts
from tests.engines.vllm_world import VllmWorld, vllm_world

__all__ = ["CHECKS"]

EXPERTS, HIDDEN, INTERMEDIATE, TOPK = 8, 512, 256, 4  #: of a rank
LOCAL = MoEShape(HIDDEN, INTERMEDIATE, EXPERTS, TOPK)
CAPACITY, TOKENS = 256, (1, 5, 200)
CLAMP = 10.0
FP8_CHECKPOINT = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

Pairs = tuple[WeightTensors, WeightTensors]
Forward = Callable[[Batch], torch.Tensor]


@dataclass
class Place:
    """A rank, and the experts of all ranks in a format."""

    world: World
    packed: bool

    @property
    def whole(self) -> MoEShape:
        return MoEShape(HIDDEN, INTERMEDIATE, EXPERTS * self.world.ranks, TOPK)

    def drawn(self, shape: MoEShape, seed: int = 0) -> Pairs:
        draw = packed_experts if self.packed else experts
        return draw(shape, seed, str(self.world.device))

    def own(self, pairs: Pairs) -> Pairs:
        """This rank's part of all experts."""
        mine = slice(self.world.rank * EXPERTS, (self.world.rank + 1) * EXPERTS)
        l1, l2 = (tuple(each[mine].contiguous() for each in pair) for pair in pairs)
        return l1, l2

    def columns(self, pairs: Pairs) -> Pairs:
        """This rank's columns of experts that are as many times as wide as there are ranks."""
        ranks, rank = self.world.ranks, self.world.rank

        def part(each: torch.Tensor) -> torch.Tensor:
            """Of the columns of gate and up, or of rows that are summed over; as bytes, which torch copies anywhere."""
            raw = each.view(torch.uint8) if each.itemsize == 1 else each
            return raw.chunk(ranks, 2)[rank].contiguous().view(each.dtype)

        l1 = tuple(part(each.unflatten(1, (2, -1))).flatten(1, 2) for each in pairs[0])
        return l1, tuple(map(part, pairs[1]))

    def batch(self, tokens: int, seed: int, shape: MoEShape | None = None) -> Batch:
        return batch(tokens, shape or self.whole, seed, str(self.world.device))

    def on_disk(self, pairs: Pairs) -> Pairs:
        """As checkpoints have them."""
        if not self.packed:
            return pairs
        l1, l2 = ((codes.view(torch.int8), exponents) for codes, exponents in pairs)
        return l1, l2


def wrong(found: torch.Tensor, wanted: torch.Tensor, what: str) -> list[str]:
    verdict = judge(found, wanted)
    return [] if verdict.passed else [f"{what}: {verdict.reason}"]


def called_and_captured(forward: Forward, of: Callable[[int], Batch], wanted: Forward) -> list[str]:
    """What is wrong with some batches, called; then with one in a graph, whose replay gets another batch."""
    problems = []
    for tokens in TOKENS:
        given = of(tokens)
        problems += wrong(forward(given), wanted(given), f"{tokens} tokens")
    given, other = of(TOKENS[1]), of(TOKENS[1] + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(given)
    for step, source in enumerate((given, other)):
        for mine, new in zip(vars(given).values(), vars(source).values(), strict=True):
            mine.copy_(new[: TOKENS[1]])
        y.fill_(float("nan"))
        graph.replay()
        problems += wrong(y, wanted(given), f"replay {step}")
    return problems


@contextmanager
def _sglang(place: Place, version: str, **started: str) -> Iterator[SglangWorld]:
    with sglang_world(releases() / f"sglang-{version}", str(place.world.device)) as world:
        world.group = dist.group.WORLD
        world.parallel.moe_ep_group.device_group = world.group
        world.start(**started)
        capacity = world.module("environ").envs.SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK
        with capacity.override(CAPACITY):
            yield world


def sglang_across(version: str, packed: bool, world: World) -> str:
    """`--moe-a2a-backend megamoe`: over all ranks; then weights that are updated under a graph, and idle ranks."""
    place = Place(world, packed)
    with _sglang(place, version, a2a="megamoe") as engine:
        engine.parallel.moe_ep_size, engine.parallel.moe_ep_rank = world.ranks, world.rank
        layer, pairs = engine.layer(LOCAL, fp4=packed), place.drawn(place.whole)
        engine.load(layer, *place.on_disk(place.own(pairs)))
        run = engine.module("layers.moe.mega_moe").run_mega_routed_experts

        def forward(of: Batch) -> torch.Tensor:
            names = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": TOPK}
            return run(layer, of.x, of.ids, of.weights, num_tokens=len(of.x), activation_clamp=CLAMP, **names)

        def draw(tokens: int) -> Batch:
            return place.batch(tokens, 64 * tokens + world.rank)

        problems = called_and_captured(forward, draw, lambda of: expected(of, *pairs, CLAMP))
        new = place.drawn(place.whole, seed=1)
        engine.load(layer, *place.on_disk(place.own(new)))
        given = draw(world.rank)  # none on the first rank
        problems += wrong(forward(given), expected(given, *new, CLAMP), "after an update")
    return "; ".join(problems)


def sglang_without(version: str, packed: bool, columns: bool, world: World) -> str:
    """`--moe-runner-backend megamoe_jit`: a rank's experts, or its columns of each, which SGLang sums up."""
    place = Place(world, packed)
    with _sglang(place, version, runner="megamoe_jit") as engine:
        sizes = ("moe_tp_size", "moe_tp_rank") if columns else ("moe_ep_size", "moe_ep_rank")
        for name, value in zip(sizes, (world.ranks, world.rank), strict=True):
            setattr(engine.parallel, name, value)
        layer = engine.layer(LOCAL, fp4=packed, swiglu_limit=CLAMP)
        shape = MoEShape(HIDDEN, INTERMEDIATE * world.ranks, EXPERTS, TOPK) if columns else place.whole
        pairs = place.drawn(shape)
        mine = place.columns(pairs) if columns else place.own(pairs)
        engine.load(layer, *place.on_disk(pairs if columns else mine))
        standard = engine.module("layers.moe.topk").StandardTopKOutput

        def forward(of: Batch) -> torch.Tensor:
            dispatched = layer.dispatcher.dispatch(of.x, standard(of.weights, of.ids.clamp(min=0), None))
            return layer.dispatcher.combine(layer.run_moe_core(dispatched))

        def wanted(of: Batch) -> torch.Tensor:
            ids = of.ids.clamp(min=0)
            first = 0 if columns else world.rank * EXPERTS
            here = torch.where((ids >= first) & (ids < first + EXPERTS), ids - first, -1)
            return expected(Batch(of.x, here, of.weights), *mine, CLAMP)

        return "; ".join(called_and_captured(forward, lambda tokens: place.batch(tokens, tokens, shape), wanted))


@contextmanager
def _vllm(place: Place, version: str) -> Iterator[VllmWorld]:
    with vllm_world(releases() / f"vllm-{version}", str(place.world.device)) as world:
        world.group = dist.group.WORLD
        world.start()
        yield world


def vllm_layer(version: str, packed: bool, parallel: str, world: World) -> str:
    """`--quantization megamoe_jit` under data and expert, expert alone, or tensor parallelism."""
    place, columns, across = Place(world, packed), parallel == "tp", parallel == "dp+ep"
    with _vllm(place, version) as engine:
        quantization = engine.chosen("megamoe_jit", FP8_CHECKPOINT, "deepseek_v4" if packed else None)
        how = {"ranks": world.ranks, "rank": world.rank, "ep": not columns, "dp": world.ranks if across else 1}
        moe = engine.moe_config(LOCAL, swiglu_limit=CLAMP, tokens=CAPACITY, **how)
        layer = engine.layer(quantization, moe, swiglu_limit=CLAMP)
        shape = MoEShape(HIDDEN, INTERMEDIATE * world.ranks, EXPERTS, TOPK) if columns else place.whole
        pairs = place.drawn(shape)
        mine = place.columns(pairs) if columns else place.own(pairs)
        engine.load(layer, *place.on_disk(pairs if columns else mine))

        def forward(of: Batch) -> torch.Tensor:
            return layer.forward_modular(of.x, of.weights, of.ids)

        def wanted(of: Batch) -> torch.Tensor:
            if across:
                return expected(of, *pairs, CLAMP)
            first = 0 if columns else world.rank * EXPERTS
            here = torch.where((of.ids >= first) & (of.ids < first + EXPERTS), of.ids - first, -1)
            return expected(Batch(of.x, here, of.weights), *mine, CLAMP)

        def draw(tokens: int) -> Batch:
            return place.batch(tokens, 64 * tokens + (world.rank if across else 0), shape)

        return "; ".join(called_and_captured(forward, draw, wanted))


def flashinfer_layer(version: str, world: World) -> str:
    """FlashInfer's mega layer with this backend, over all ranks."""
    place = Place(world, False)
    with flashinfer_world(releases() / f"flashinfer-python-{version}", dist.group.WORLD) as engine:
        pairs = place.drawn(place.whole)
        layer = engine.layer(LOCAL, *place.own(pairs), CLAMP, ranks=world.ranks, rank=world.rank, tokens=CAPACITY)

        def draw(tokens: int) -> Batch:
            return place.batch(tokens, 64 * tokens + world.rank)

        problems = called_and_captured(
            lambda of: layer(engine.tensors(of)), draw, lambda of: expected(of, *pairs, CLAMP)
        )
        layer.destroy()
        return "; ".join(problems)


def told(check: Callable[..., str], *args: object) -> Callable[[World], str]:
    """A check of a rank that says what it raised, so that the others are run all the same."""

    def run(world: World) -> str:
        try:
            return check(*args, world)
        except Exception:
            return traceback.format_exc()

    return run


CHECKS: dict[str, Callable[[World], str]] = {}  #: by name
for _packed, _format in ((False, "fp8"), (True, "mxfp4")):
    for _version in reversed(sglang.TESTED):
        _name = f"sglang {_version} {_format}"
        CHECKS[f"{_name} megamoe"] = told(sglang_across, _version, _packed)
        CHECKS[f"{_name} runner ep"] = told(sglang_without, _version, _packed, False)
        CHECKS[f"{_name} runner tp"] = told(sglang_without, _version, _packed, True)
    for _version in reversed(vllm.TESTED):
        for _parallel in ("dp+ep", "ep", "tp"):
            CHECKS[f"vllm {_version} {_format} {_parallel}"] = told(vllm_layer, _version, _packed, _parallel)
for _version in flashinfer.TESTED:
    CHECKS[f"flashinfer {_version} fp8"] = told(flashinfer_layer, _version)
