"""`megamoe-jit render`: the source of a kernel, as the compiler gets it."""

from __future__ import annotations

from dataclasses import dataclass

import click

from megamoe_jit._cli._cache_options import complete_kernel
from megamoe_jit._cli._io import copy_out, emit, json_option
from megamoe_jit._cli._names import parse_spec
from megamoe_jit._documents import Document, SpecData


@dataclass(frozen=True, slots=True)
class Rendered(Document):
    """The source of a kernel.

    Attributes:
        kernel: its symbol
        files: that the source is made of
    """

    KIND = "render"

    kernel: str
    spec: SpecData
    files: tuple[str, ...]
    source: str


@click.command()
@click.argument("spec", shell_complete=complete_kernel)
@json_option
def render(spec: str, as_json: bool) -> None:
    """Print the CUDA source of a kernel, all files in one; needs neither GPU nor compiler.

    SPEC is SHAPE/VARIANT (v4-flash/pingpong) and what differs: /rN for N ranks, /mxfp4 for packed weights, /exact for
    fast_math=False, /f32out for an output in float32, /raw for a kernel that stages its inputs (v4-pro/wide/mxfp4/r8);
    or a kernel's name as the listings show it.
    """
    from megamoe_jit._compile.render import render as render_source

    kernel = parse_spec(spec, keys=False)
    source = render_source(kernel)
    if as_json:
        emit(Rendered(kernel.kernel_name, kernel.to_json(), tuple(source.files), source.text))
    else:
        copy_out(source.text)
