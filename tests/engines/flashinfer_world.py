"""FlashInfer's own mega layer on any machine: the modules that the backend meets are real, the rest stands in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamoe_jit.engines import aside
from megamoe_jit.engines.flashinfer import MegaMoeConfig, register
from tests.engines.sources import RealSources

__all__ = ["FlashinferWorld", "flashinfer_world"]

_EP = "flashinfer.moe_ep"
REAL = tuple(
    f"{_EP}.{name}"
    for name in ("config", "core.kernel.base", "core.kernel.registry", "core.kernel.workspace_pool", "modes.config")
    + ("modes.mega_layer", "tensors", "weights")
)


class FlashinferWorld:
    """One rank of a FlashInfer whose group is what a test says."""

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{_EP}.{name}")

    def layer(
        self,
        shape: Any,
        l1: Any,
        l2: Any,
        clamp: float,
        *,
        ranks: int = 1,
        rank: int = 0,
        tokens: int = 100,
        **options: Any,
    ) -> Any:
        """A real `MoEEpMegaLayer`; the sizes of `shape` and the weights are those of one rank."""
        experts = shape.experts * ranks
        fleet = self.module("config").FleetParams(
            num_experts=experts, max_tokens_per_rank=tokens, token_hidden_size=shape.hidden
        )
        bootstrap = self.module("config").BootstrapConfig(world_size=ranks, rank=rank, auto_bootstrap=False)
        pack = self.module("weights").MoEWeightPack(l1[0], l2[0], l1[1], l2[1])
        kernel = MegaMoeConfig(shape.intermediate, shape.topk, clamp)
        config = self.module("modes.config").MegaConfig(megakernel=kernel, **options)
        return self.module("modes.mega_layer").MoEEpMegaLayer(bootstrap, fleet, pack, config)

    def tensors(self, of: Any, **more: Any) -> Any:
        """A batch as its layers take it."""
        return self.module("tensors").MoEEpTensors(of.x, of.ids, of.weights, **more)


@contextmanager
def flashinfer_world(root: Path, group: Any) -> Iterator[FlashinferWorld]:
    """FlashInfer from the folder that has its package, with a process group, for as long as this is entered."""
    with RealSources(root, "flashinfer", REAL):
        aside._warned.clear()
        world = FlashinferWorld()
        utils = world.module("core.bootstrap_utils")
        utils.bootstrap_comm_group, utils.bootstrap_ep_rank_world = lambda _: group, lambda b: (b.rank, b.world_size)
        register()
        yield world
