"""`megamoe-jit inspect`: a look into a compiled kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._cache_options import cache_dir_option, complete_kernel
from megamoe_jit._cli._io import cell, copy_out, emit, facts, json_option, say, show
from megamoe_jit._cli._names import looks_like_key, parse_spec
from megamoe_jit._text import human_bytes

if TYPE_CHECKING:
    from megamoe_jit._cache.metadata import Metadata
    from megamoe_jit._diagnose.inspect import Resources, View

_VIEWS = ("resources", "ptx", "sass", "source")


def _view_options(command: Any) -> Any:
    meanings = (
        "Registers, memory, code size, how it was compiled.  [default]",
        "PTX, from the kernel itself.",
        "Machine code with source lines; needs nvdisasm or cuobjdump.",
        "CUDA source, as the compiler got it.",
    )
    for view, meaning in reversed(list(zip(_VIEWS, meanings, strict=True))):
        command = click.option(f"--{view}", "views", flag_value=view, multiple=True, help=meaning)(command)
    return command


def _load(kernel: str) -> tuple[str, bytes, str, Metadata]:
    """Key, cubin, source and metadata; a SPEC that is not cached is compiled."""
    from megamoe_jit._cli._keys import load_entry

    if looks_like_key(kernel):
        cubin, source, meta = load_entry(kernel)
        return str(meta["key"]), cubin, source, meta
    from megamoe_jit._compile.render import render
    from megamoe_jit._jit.runtime import warmup

    spec = parse_spec(kernel)
    (result,) = warmup([spec])  # in a thread: an interrupt is answered while NVRTC is at work
    if result.kernel is None:
        raise result.error or RuntimeError(f"{spec.kernel_name} came to nothing")
    found = result.kernel
    if found.origin == "compiled":
        say(f"{spec.kernel_name} was not cached: compiled in {found.seconds:.2f} s")
    return found.key, found.cubin, render(spec).text, found.meta


def _resources_text(found: Resources) -> str:
    rows = [
        ("kernel", found.kernel),
        ("key", found.key),
        ("architecture", f"{found.arch}, NVRTC {cell(found.nvrtc)}"),
        ("threads", f"{found.max_threads} of a block"),
        ("registers", f"{found.registers} a thread, {found.block_registers} of {found.register_file} a block"),
        ("spills", cell(found.spill_bytes, unit=" B")),
        ("stack", cell(found.stack_bytes, unit=" B a thread")),
        (
            "shared memory",
            f"{cell(found.dynamic_shared_bytes, unit=' B')} dynamic, "
            f"{cell(found.static_shared_bytes, unit=' B')} static, of {found.shared_limit_bytes} B",
        ),
        ("parameters", cell(found.param_bytes, unit=" B")),
        ("code", "-" if found.code_bytes is None else human_bytes(found.code_bytes)),
        ("file", human_bytes(found.cubin_bytes)),
        ("advisories", " ".join(found.advisories or ()) or "none"),
        ("options", " ".join(found.options or ()) or "-"),
        ("compiled in", ", ".join(f"{k} {v / 1e3:.2f} s" for k, v in (found.compile_ms or {}).items()) or "-"),
    ]
    return facts(rows)


@click.command()
@click.argument("kernel", metavar="KEY|SPEC", shell_complete=complete_kernel)
@_view_options
@cache_dir_option
@json_option
def inspect(kernel: str, views: tuple[View, ...], as_json: bool) -> None:
    """Show a compiled kernel from the inside; needs no GPU.

    KEY is the beginning of a key that `cache ls` lists.  SPEC is SHAPE/VARIANT (v4-flash/pingpong) and what differs:
    /rN for N ranks, /mxfp4 for packed weights, /exact for fast_math=False, /f32out for an output in float32, /raw for a
    kernel that stages its inputs; or a kernel's name.  It is compiled if it is not cached.
    """
    from megamoe_jit._diagnose import inspect as _inspect

    if len(set(views)) > 1:
        raise click.UsageError(f"--{views[0]} and --{views[1]} exclude each other.")
    view: View = views[0] if views else "resources"
    key, cubin, source, meta = _load(kernel)
    found = _inspect.resources(key, cubin, meta)
    text: str | None = None
    tool: str | None = None
    if view == "ptx":
        text = _inspect.ptx(cubin)
    elif view == "sass":
        text, tool = _inspect.sass(cubin)
    elif view == "source":
        text = source
    if as_json:
        emit(_inspect.Inspection(view, found, text, tool))
    elif text is None:
        show(_resources_text(found))
    else:
        copy_out(text.rstrip("\n"), nl=True)
