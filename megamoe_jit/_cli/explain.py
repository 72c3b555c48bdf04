"""`megamoe-jit explain`: which kernel a call takes, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._cache_options import cache_dir_option
from megamoe_jit._cli._io import emit, json_option, show
from megamoe_jit._cli._nodes import lines_between, nodes_options
from megamoe_jit._cli._options import (
    gpu_option,
    numerics_options,
    per_shape,
    ranks_option,
    shape_options,
    sms_option,
    tokens_option,
    variant_option,
    weight_format_option,
)
from megamoe_jit._documents import content
from megamoe_jit._text import counted

if TYPE_CHECKING:
    from megamoe_jit._diagnose.explain import Call
    from megamoe_jit._spec import MoEShape


def _text(call: Call, gpu: str) -> str:
    parameters = ", ".join(f"{key} {value}" for key, value in content(call.parameters).items())
    cached = "cached" if call.cached else "not cached"
    between = lines_between(call.between) if call.between is not None else []
    lines = [
        f"{call.name}, {counted(call.tokens, 'token')}, {counted(call.ranks, 'rank')}: {call.variant}",
        f"  kernel      {call.kernel}",
        f"  key         {call.key} ({cached})" if call.key else f"  key         none: {call.problem}",
        f"  parameters  {parameters}",
        f"  GPU         {gpu}",
        *(f"  {'nodes' if i == 0 else '':10}  {line}" for i, line in enumerate(between)),
        *(f"  {'reasons' if i == 0 else '':10}  {reason}" for i, reason in enumerate(call.reasons)),
    ]
    return "\n".join(lines)


@click.command()
@shape_options
@tokens_option("Tokens of one rank in a call.")
@ranks_option
@variant_option("The variant argument of the call.  [default: the setting MEGAMOE_JIT_VARIANT]", None)
@weight_format_option("The format of the weights of the call.")
@nodes_options
@numerics_options
@sms_option
@gpu_option
@cache_dir_option
@json_option
def explain(
    shapes: dict[str, MoEShape],
    tokens: tuple[int, ...],
    gpu: str | None,
    as_json: bool,
    **call: Any,
) -> None:
    """Show which kernel a call takes, with which parameters, why, and whether it is cached; needs no GPU."""
    from megamoe_jit._compile.render import kernels_dir
    from megamoe_jit._diagnose.explain import Explain, gpu_asked_for
    from megamoe_jit._diagnose.explain import explain as explain_call

    kernels_dir()  # what is wrong with it, or with a setting, has nothing to do with a shape
    found = gpu_asked_for(gpu)
    options = {"gpu": found.gpu, **call}
    calls = per_shape(
        shapes, lambda name, shape: [explain_call(shape, count, name=name, **options) for count in tokens]
    )
    if as_json:
        emit(Explain(found.gpu, found.measured, tuple(calls)))
    else:
        where = f"{found.gpu or 'none'}, {'measured' if found.measured else 'nothing measured'}"
        show("\n\n".join(_text(call, where) for call in calls))
