"""A rank of two whose model has its experts on both, on a CPU."""

from __future__ import annotations

import os
import warnings

import torch

from megamoe_jit._check.spawn import World


def on_rank(world: World) -> list[float]:
    """How many experts the rank has, and how far its logits are from those of a model that has all of them."""
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(world.rank), LOCAL_RANK=str(world.rank), WORLD_SIZE=str(world.ranks))
    from torch.distributed.device_mesh import init_device_mesh

    import megamoe_jit.transformers  # noqa: F401
    from megamoe_jit.reference import calc_diff
    from tests.unit.transformers.models import experts_of, make, tokens

    mesh = init_device_mesh("cpu", (world.ranks,), mesh_dim_names=("tp",))
    whole, shared = make("Qwen3MoeConfig", "megamoe"), make("Qwen3MoeConfig", "megamoe")
    for module in experts_of(shared):
        split(module, mesh)
    with torch.no_grad():
        ours, theirs = (model(tokens(), use_cache=False).logits for model in (shared, whole))
    return [experts_of(shared)[0].gate_up_proj.shape[0], calc_diff(ours, theirs)]


def split(module, mesh) -> None:
    """Give a module one half of its experts and the hooks of transformers' expert parallelism."""
    rank, size = mesh.get_local_rank(), mesh.size()
    local = module.num_experts // size
    for name in ("gate_up_proj", "down_proj"):
        part = getattr(module, name).data[rank * local : (rank + 1) * local].clone()
        setattr(module, name, torch.nn.Parameter(part, requires_grad=False))
    module.num_experts = local
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:  # in 5.17 the router's outputs are changed, and the experts' summed up
        split_by_router(module, mesh, local)
        return
    module._is_expert_parallel = True
    implementation = EPImplementationInterface()["auto"](module, mesh, mesh)
    module.forward = lambda *inputs: implementation(*inputs)


def split_by_router(module, mesh, local: int) -> None:
    """As 5.17 does it."""
    from transformers.distributed.tensor_parallel import EpRouterParallel

    plain = module.forward

    def forward(x, ids, weights):
        router = type("Router", (), {"num_experts": local * mesh.size()})()
        _, weights, ids = EpRouterParallel().transform_output_post_forward(router, (None, weights, ids), mesh)
        y = plain(x, ids, weights)
        torch.distributed.all_reduce(y, group=mesh.get_group())
        return y

    module.forward = forward
