"""The one table of scenarios that tests, ``megamoe-jit verify`` and the benchmark run, and their inputs.

Names up to the first dot are families.  ``L1`` to ``L5`` are the cases of DeepGEMM's SM90 test (pull requests
360 and 383) under their own names, at one rank.  Inputs depend on the scenario's name and a seed alone (and
on the device's generator); weights on shape and seed, so that scenarios of one shape can share them.
"""

from __future__ import annotations

import fnmatch
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from megamoe_jit._check.weights import Weights, generator, made, make_weights
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.quantize import quantize_activations
from megamoe_jit._spec import DEFAULT_NUMERICS, FP8, MXFP4, MoEShape, Numerics, Variant, WeightFormat
from megamoe_jit._spec.variants import AUTO
from megamoe_jit.reference import with_shared_experts

__all__ = ["SCENARIOS", "Inputs", "Scenario", "Weights", "get", "make_inputs", "make_weights", "select"]

#: rows of the experts of route "counts": around one tile and several, of every variant, and the columns of a main loop
TILE_EDGES = (1, 32, 33, 63, 64, 65, 80, 81, 96, 97, 127, 128, 129, 192, 193, 0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One call of the layer.

    `route` says who goes where: ``topk`` (of normal scores, which are the weights too, negative ones
    included), ``lognormal``, ``powerlaw:A``, ``balanced``, ``hot`` (every token has expert 0 first),
    ``single`` (every slot goes to the last expert), ``duplicate`` (the first two slots of a token name one
    expert), ``counts`` (`TILE_EDGES` rows per expert).

    `data` says what the activations are: ``normal``, ``outliers`` (1 % of the channels are 6 to 12 times
    larger on half of the tokens), ``zero_rows`` (every third), ``saturating`` (every code is +-448, rows
    scaled up to 1e4), ``ladder`` (rows from 1e-12 to 1e-9 and from 1e-6 to 1e4), ``nan_row`` (one NaN in
    row 5, an infinity in row 6).
    """

    name: str
    shape: MoEShape
    tokens: int
    capacity: int
    clamp: float | None = 10.0
    numerics: Numerics = DEFAULT_NUMERICS
    masked_ratio: float = 0.0
    masked_weight: float = 0.0  #: router weight of masked slots; must not matter
    route: str = "topk"
    data: str = "normal"
    slow: bool = False
    weights: str = FP8.name  #: the format that they are stored in

    @property
    def fast_math(self) -> bool:
        """Of the numeric options."""
        return self.numerics.fast_math

    @property
    def options(self) -> dict[str, Any]:
        """Arguments by name of a call."""
        return {"activation_clamp": self.clamp, **self.numerics.changed()}

    @property
    def family(self) -> str:
        """Name up to the first dot."""
        return self.name.partition(".")[0]

    def runs(self, variants: Iterable[str]) -> tuple[str, ...]:
        """Those of some variants, ``auto`` among them, that multiply its weights."""
        readers = Variant.reading(WeightFormat.parse(self.weights))
        return tuple(variant for variant in variants if variant == AUTO or variant in readers)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything one call reads."""

    x: torch.Tensor  #: bfloat16 [T, H], before quantisation
    x_q: torch.Tensor  #: float8_e4m3fn [T, H]
    x_sf: torch.Tensor  #: float32 [T, H / 128]
    topk_idx: torch.Tensor  #: int64 [T, K]
    topk_weights: torch.Tensor  #: float32 [T, K]
    l1: WeightTensors
    l2: WeightTensors
    shared: int = 0  #: of the experts, the last ones

    @property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights as the reference needs them, with the slots of shared experts."""
        if not self.shared:
            return self.topk_idx, self.topk_weights
        return with_shared_experts(self.topk_idx, self.topk_weights, self.l1[0].shape[0] - self.shared, self.shared)

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the reference takes, in its order."""
        return self.x_q, self.x_sf, *self.slots, self.l1, self.l2

    def stage(self, buffer: Any) -> None:
        """Copy what the kernel reads into the first rows of a buffer, as a caller does before each call."""
        tokens = self.x_q.shape[0]
        buffer.x[:tokens].copy_(self.x_q)
        buffer.x_sf[:tokens].copy_(self.x_sf)
        buffer.topk_idx[:tokens].copy_(self.topk_idx)
        buffer.topk_weights[:tokens].copy_(self.topk_weights)


def _case(name: str, tokens: int, sizes: tuple[int, ...], capacity: int | None = None, **more: Any) -> Scenario:
    """A scenario of these sizes.

    Args:
        name, tokens: fields of it.
        sizes: hidden, intermediate, experts, top-k, and shared experts if there are some.
        capacity: of the buffer; None for as many as tokens.
        more: other fields, and numeric options.
    """
    numerics = Numerics(**{option.name: more.pop(option.name) for option in fields(Numerics) if option.name in more})
    room = max(tokens, 1) if capacity is None else capacity
    return Scenario(name, MoEShape(*sizes), tokens, room, numerics=numerics, **more)


def _peer() -> Iterator[Scenario]:
    yield _case("L1.smoke", 64, (512, 512, 8, 2))
    for label, t in (("small", 64), ("midA", 256), ("midB", 512), ("large", 2048)):
        yield _case(f"L2.heur.{label}.t{t}", t, (1024, 1024, 8, 2))
    for t in (16, 64, 260, 1024):
        yield _case(f"L2.profile_topk8.t{t}", t, (512, 2048, 32, 8))
    yield _case("L2.generic_topk6.t512", 512, (512, 2048, 32, 6))
    for hidden in (512, 2048):
        for ih in (512, 2048):
            for k in (1, 2, 4):
                yield _case(f"L3.h{hidden}_ih{ih}_k{k}", 128, (hidden, ih, 8, k))
    yield _case("L3.h200_flash_m128", 128, (4096, 2048, 32, 6))
    yield _case("L3.h200_pro_m128", 128, (7168, 3072, 48, 6))
    yield _case("L3.h200_pro_m256", 256, (7168, 3072, 48, 6))
    yield _case("L3.h200_range_alt_compact_load24", 72, (4096, 2048, 24, 8))
    yield _case("L3.h200_range_alt_wide_load32", 128, (7168, 3072, 32, 8))
    edge = (512, 512, 8, 2)
    for ratio in (0.0, 0.3, 0.7):
        yield _case(f"L4.mask{ratio:.1f}", 128, edge, masked_ratio=ratio)
    yield _case("L4.mask_all", 128, edge, masked_ratio=1.0)
    for clamp in (1.0, 10.0, math.inf):
        yield _case(f"L4.clamp{clamp}", 128, edge, clamp=_finite(clamp))
    for fast in (True, False):
        yield _case(f"L4.fm{int(fast)}", 128, edge, fast_math=fast)
    yield _case("L4.tokens0", 0, edge, capacity=128)
    yield _case("L4.tokens_max", 128, edge)
    rng = random.Random(0xC0FFEE)
    for i in range(24):
        hidden = rng.choice([512, 1024, 2048])
        ih = rng.choice([512, 1024, 2048])
        k = rng.choice([1, 2, 4])
        tokens = rng.choice([32, 64, 128, 256, 512])
        masked = rng.choice([0.0, 0.0, 0.3, 0.5])
        clamp = rng.choice([1.0, 10.0, math.inf])
        fast = rng.choice([True, False])
        yield _case(
            f"L5.rand{i:03d}", tokens, (hidden, ih, 8, k), masked_ratio=masked, clamp=_finite(clamp), fast_math=fast
        )


def _finite(clamp: float) -> float | None:
    return clamp if math.isfinite(clamp) else None


def _own() -> Iterator[Scenario]:
    for t in (255, 256, 257):
        yield _case(f"threshold.t{t}", t, (1024, 768, 16, 4), capacity=320)
    for t, sizes in (
        (64, (128, 128, 8, 2)),
        (50, (256, 128, 1, 1)),
        (96, (640, 384, 33, 3)),
        (130, (1408, 768, 16, 1)),
        (100, (2304, 1408, 64, 12)),
        (200, (1408, 1408, 128, 8)),
        (90, (2304, 768, 512, 12)),
        (300, (768, 2304, 8, 6)),
        (40, (512, 256, 64, 32)),
        (257, (128, 256, 1024, 2)),
    ):
        yield _case(f"shape.h{sizes[0]}_i{sizes[1]}_e{sizes[2]}_k{sizes[3]}", t, sizes)
    for t in (0, 1, 2, 7, 37, 131, 251):
        yield _case(f"tokens.t{t}_of_256", t, (768, 512, 16, 4), capacity=256)
    yield _case("tokens.t1_of_1", 1, (768, 512, 16, 4))
    yield _case("tokens.t3000", 3000, (768, 512, 16, 4))
    base = (1024, 768, 16, 4)
    for t in (96, 600):
        for route in ("lognormal", "powerlaw:0.6", "powerlaw:1.2", "balanced", "hot", "single", "duplicate"):
            yield _case(f"route.{route.replace(':', '')}.t{t}", t, base, route=route)
        yield _case(f"mask.half.t{t}", t, base, masked_ratio=0.5)
        yield _case(f"mask.all.t{t}", t, base, masked_ratio=1.0)
        yield _case(f"mask.weight_nan.t{t}", t, base, masked_ratio=0.4, masked_weight=math.nan)
        for data in ("outliers", "zero_rows", "saturating", "ladder", "nan_row"):
            yield _case(f"data.{data}.t{t}", t, base, data=data)
        yield _case(f"data.saturating_noclamp.t{t}", t, base, data="saturating", clamp=None)
        yield _case(f"data.nan_row_noclamp.t{t}", t, base, data="nan_row", clamp=None, fast_math=False)
    yield _case("route.tile_edges", sum(TILE_EDGES), (512, 512, len(TILE_EDGES), 1), route="counts")
    yield _case("route.hot_topk1.t1000", 1000, (1024, 768, 16, 1), route="hot")
    yield _case("padding.t37_of_300", 37, base, capacity=300)
    yield _case("padding.t260_of_300", 260, base, capacity=300)
    yield _case("padding.masked.t260_of_300", 260, base, capacity=300, masked_ratio=0.3)
    shared: tuple[tuple[int, tuple[int, ...]], ...] = (
        (0, (512, 256, 8, 2, 1)),
        (1, (768, 512, 16, 4, 1)),
        (130, (1408, 768, 16, 1, 1)),
        (96, (256, 128, 8, 2, 3)),
        (300, (640, 384, 8, 8, 24)),
        (3000, (768, 512, 16, 4, 1)),
    )
    for t, layer in shared:
        yield _case(f"shared.k{layer[3]}_s{layer[4]}.t{t}", t, layer, route="duplicate" if t == 96 else "topk")
    for t in (37, 260):
        yield _case(f"shared.masked.t{t}_of_300", t, (768, 512, 16, 4, 1), capacity=300, masked_ratio=0.5)
    yield _case("shared.mask_all.t96", 96, (768, 512, 16, 4, 1), masked_ratio=1.0)
    for t, layer in ((1, (512, 256, 8, 2)), (7, base), (64, (1408, 768, 16, 1)), (100, (2304, 1408, 64, 12))):
        yield _case(f"mxfp4.h{layer[0]}_i{layer[1]}.t{t}", t, layer, weights=MXFP4.name)
    for t, layer in ((130, (768, 2304, 8, 6)), (300, (5120, 2304, 8, 6)), (600, base), (3000, (768, 512, 16, 4))):
        yield _case(f"mxfp4.h{layer[0]}_i{layer[1]}.t{t}", t, layer, weights=MXFP4.name)
    yield _case("mxfp4.shared.t37_of_300", 37, (768, 512, 16, 4, 1), capacity=300, weights=MXFP4.name)
    yield _case("mxfp4.masked.t96", 96, base, masked_ratio=0.5, weights=MXFP4.name)
    yield _case("prod.flash.t1", 1, (4096, 2048, 32, 6))
    yield _case("prod.flash.t1024", 1024, (4096, 2048, 32, 6))
    yield _case("prod.flash.t8192", 8192, (4096, 2048, 32, 6), slow=True)
    yield _case("prod.pro.t2048", 2048, (7168, 3072, 48, 6), slow=True)
    yield _case("prod.long.t32768", 32768, (7168, 256, 8, 8), slow=True)  # offsets past 2^31, pools that wrap


SCENARIOS: tuple[Scenario, ...] = (*_peer(), *_own())


def get(name: str) -> Scenario:
    """The scenario called `name`; raises `ConfigError`."""
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    raise ConfigError(f"unknown scenario {name!r}; allowed: the {len(SCENARIOS)} names of the table")


def select(pattern: str = "*", *, slow: bool = False, weights: str | None = None) -> tuple[Scenario, ...]:
    """Scenarios in table order.

    Args:
        pattern: Comma-separated names, globs, or beginnings of names up to a dot (``L4``, ``route.hot``).
        slow: Take slow ones as well; one that is named in full is always taken.
        weights: The format of all their weights, instead of their own.

    Raises:
        ConfigError: A part of the pattern fits no scenario, or there is no such format.
    """
    parts = [part.strip() for part in pattern.split(",") if part.strip()] or ["*"]

    def fits(scenario: Scenario, part: str) -> bool:
        return fnmatch.fnmatchcase(scenario.name, part) or fnmatch.fnmatchcase(scenario.name, part + ".*")

    for part in parts:
        if not any(fits(scenario, part) for scenario in SCENARIOS):
            families = ", ".join(dict.fromkeys(scenario.family for scenario in SCENARIOS))
            raise ConfigError(f"no scenario fits {part!r}; allowed: names, globs or families ({families})")
    chosen = [s for s in SCENARIOS if any(fits(s, part) for part in parts) and (slow or not s.slow or s.name in parts)]
    return tuple(chosen if weights is None else (replace(s, weights=WeightFormat.parse(weights).name) for s in chosen))


def _activations(s: Scenario, gen: torch.Generator) -> torch.Tensor:
    t, hidden = s.tokens, s.shape.hidden
    floats, integers = made(gen)
    x = torch.randn(t, hidden, generator=gen, **floats)
    row = torch.arange(t, **integers)
    if s.data == "outliers":
        channel = torch.rand(hidden, generator=gen, **floats) < 0.01
        factor = 6 + 6 * torch.rand(hidden, generator=gen, **floats)
        x = torch.where((row % 2 == 0)[:, None] & channel, x * factor, x)
    elif s.data == "zero_rows":
        x[::3] = 0
    elif s.data == "saturating":
        x = torch.sign(x) * torch.logspace(0, 4, max(t, 1), **floats)[:t, None]
    elif s.data == "ladder":
        exponent = torch.linspace(-12, 4, max(t, 1), **floats)[:t, None]
        # between 1e-9 and 1e-6 the intermediate is a handful of subnormal codes: one rounding decides a row
        exponent = torch.where((exponent > -9) & (exponent < -6), exponent - 3, exponent)
        x *= torch.pow(10.0, exponent)
    elif s.data == "nan_row":
        x[5, 3] = math.nan
        x[6, 130] = math.inf
    elif s.data != "normal":
        raise ConfigError(f"unknown data {s.data!r} in scenario {s.name}")
    return x.to(torch.bfloat16)


def _skewed(s: Scenario, gen: torch.Generator) -> torch.Tensor:
    """Distinct experts per token, drawn by an unequal popularity; int64 ``[T, K]``."""
    t, e, k = s.tokens, s.shape.experts, s.shape.topk
    floats, integers = made(gen)
    if s.route == "lognormal":
        logits = torch.randn(e, generator=gen, **floats)
    else:
        rank = torch.randperm(e, generator=gen, **integers) + 1
        logits = -float(s.route.partition(":")[2]) * rank.float().log()
    uniform = torch.rand(t, e, generator=gen, **floats).clamp(1e-6, 1 - 1e-6)
    return (logits - (-uniform.log()).log()).topk(k, dim=-1).indices  # Gumbel: draws without replacement


def _route(s: Scenario, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    t, e, k = s.tokens, s.shape.experts, s.shape.topk
    floats, integers = made(gen)
    weights, idx = torch.randn(t, e, generator=gen, **floats).topk(k, dim=-1, sorted=False)
    if s.route != "topk":
        weights = torch.rand(t, k, generator=gen, **floats) + 0.1
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if s.route == "lognormal" or s.route.startswith("powerlaw:"):
        idx = _skewed(s, gen)
    elif s.route == "balanced":
        idx = torch.arange(t * k, **integers).view(t, k) % e
    elif s.route == "hot":
        others = torch.rand(t, e - 1, generator=gen, **floats).topk(k, dim=-1).indices + 1
        idx = torch.cat((torch.zeros_like(idx[:, :1]), others[:, : k - 1]), dim=-1)
    elif s.route == "single":
        idx = torch.full_like(idx, e - 1)
    elif s.route == "duplicate":
        idx[:, 1] = idx[:, 0]
    elif s.route == "counts":
        ends = torch.tensor(TILE_EDGES, **integers)
        experts = torch.arange(e, **integers).repeat_interleave(ends)
        idx = experts[torch.randperm(t, generator=gen, **integers)].view(t, k)
    elif s.route != "topk":
        raise ConfigError(f"unknown route {s.route!r} in scenario {s.name}")
    masked = torch.rand(t, k, generator=gen, **floats) < s.masked_ratio
    return idx.masked_fill(masked, -1), weights.masked_fill(masked, s.masked_weight).float()


def make_inputs(
    scenario: Scenario, device: torch.device | str, seed: int = 0, weights: Weights | None = None
) -> Inputs:
    """Draw the inputs of one scenario on `device`; `weights` of its shape spare drawing those."""
    gen = generator(device, "inputs", scenario.name, seed)
    x = _activations(scenario, gen)
    x_q, x_sf = quantize_activations(x)
    topk_idx, topk_weights = _route(scenario, gen)
    weights = weights or make_weights(scenario.shape, device, seed, WeightFormat.parse(scenario.weights))
    return Inputs(x, x_q, x_sf, topk_idx, topk_weights, weights.l1, weights.l2, scenario.shape.shared)
