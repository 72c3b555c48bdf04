"""The passes over rows between nodes: the bits that their definition by torch has, for all sizes."""

import pytest
import torch

from megamoe_jit._nodes.exchange import Rows
from megamoe_jit._nodes.pass_kernels import pass_kernels
from megamoe_jit._nodes.passes import TorchPasses

EXPERTS = 5  #: of a node
#: nodes, tokens, topk, hidden
SIZES = [(2, 1, 1, 128), (2, 1024, 6, 512), (3, 1025, 3, 384), (4, 0, 2, 256), (8, 37, 8, 4096), (2, 5000, 6, 7168)]


def rows_of(tokens: int, topk: int, hidden: int, nodes: int, gen: torch.Generator) -> Rows:
    """Of random bits, behind a row that is not theirs; ids are of experts and of none."""
    bits = lambda *sizes: torch.randint(-(2**31), 2**31 - 1, sizes, generator=gen, device="cuda", dtype=torch.int32)  # noqa: E731
    ids = torch.randint(-1, EXPERTS * nodes + 1, (tokens + 1, topk), generator=gen, device="cuda")
    ids[::7, 0] = -(2**62)
    scales, weights = bits(tokens + 1, hidden // 128), bits(tokens + 1, topk)
    whole = bits(tokens + 1, hidden // 4).view(torch.float8_e4m3fn), scales.view(torch.float32), ids
    return Rows(*whole, weights.view(torch.float32))[1:]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("nodes", "tokens", "topk", "hidden"), SIZES)
def test_rows_are_packed_and_unpacked_as_defined(nodes, tokens, topk, hidden):
    gen = torch.Generator(device="cuda").manual_seed(tokens)
    rows, kernels, defined = (
        rows_of(tokens, topk, hidden, nodes, gen),
        pass_kernels(torch.device("cuda", 0)),
        TorchPasses(),
    )
    routes, right = (it.route(rows.topk_idx, nodes, EXPERTS) for it in (kernels, defined))
    assert same(routes.places, right.places)
    assert same(routes.counts, right.counts)
    packed, expected = kernels.pack(rows, routes), defined.pack(rows, right)
    count = len(expected)
    assert same(packed[:count], expected)
    made = [Rows(*(torch.full_like(t[:1], 1).repeat(count + 1, 1) for t in rows.tensors)) for _ in range(2)]
    for it, into in zip((kernels, defined), made, strict=True):
        it.unpack(expected, into[:count], EXPERTS)
    for mine, theirs in zip(made[0].tensors, made[1].tensors, strict=True):
        assert same(mine, theirs), "and nothing behind them"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("nodes", "tokens", "topk", "hidden"), SIZES)
def test_nodes_are_summed_as_defined(nodes, tokens, topk, hidden, dtype):
    """Where rows came for some tokens, and where as many came of each node."""
    gen = torch.Generator(device="cuda").manual_seed(tokens)
    kernels, defined = pass_kernels(torch.device("cuda", 0)), TorchPasses()
    routes = defined.route(rows_of(tokens, topk, hidden, nodes, gen).topk_idx, nodes, EXPERTS)
    for count, given in ((int(routes.counts.sum()), routes), (nodes * (tokens + 3), None)):
        back = torch.randn(count, hidden, generator=gen, device="cuda").to(dtype)
        back[::5].neg_().mul_(0)  # zeros of both signs
        y, right = (torch.full((tokens, hidden), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        kernels.sum_nodes(back, y, nodes, given)
        defined.sum_nodes(back, right, nodes, given)
        assert same(y, right)
