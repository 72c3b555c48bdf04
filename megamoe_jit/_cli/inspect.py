"""`megamoe-jit inspect`: a look into a compiled kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._cache_options import cache_dir_option, complete_kernel
from megamoe_jit._cli._io import copy_out, emit, json_option, say, show, table
from megamoe_jit._cli._names import looks_like_key, parse_spec
from megamoe_jit._text import human_bytes

if TYPE_CHECKING:
    from megamoe_jit._cache.metadata import Metadata
    from megamoe_jit._diagnose.inspect import Resources, View

__all__ = ["inspect"]

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


def _resources_text(facts: Resources) -> str:
    def figure(value: object, unit: str = "") -> str:
        return "-" if value is None else f"{value}{unit}"

    rows = [
        ("kernel", facts.kernel),
        ("key", facts.key),
        ("architecture", f"{facts.arch}, NVRTC {figure(facts.nvrtc)}"),
        ("threads", f"{facts.max_threads} of a block"),
        ("registers", f"{facts.registers} a thread, {facts.block_registers} of {facts.register_file} a block"),
        ("spills", figure(facts.spill_bytes, " B")),
        ("stack", figure(facts.stack_bytes, " B a thread")),
        (
            "shared memory",
            f"{figure(facts.dynamic_shared_bytes, ' B')} dynamic, {figure(facts.static_shared_bytes, ' B')} static, "
            f"of {facts.shared_limit_bytes} B",
        ),
        ("parameters", figure(facts.param_bytes, " B")),
        ("code", "-" if facts.code_bytes is None else human_bytes(facts.code_bytes)),
        ("file", human_bytes(facts.cubin_bytes)),
        ("advisories", " ".join(facts.advisories or ()) or "none"),
        ("options", " ".join(facts.options or ()) or "-"),
        ("compiled in", ", ".join(f"{k} {v / 1e3:.2f} s" for k, v in (facts.compile_ms or {}).items()) or "-"),
    ]
    return "\n".join(table(("", ""), rows, left=(0, 1)).splitlines()[1:])


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
    facts = _inspect.resources(key, cubin, meta)
    text: str | None = None
    tool: str | None = None
    if view == "ptx":
        text = _inspect.ptx(cubin)
    elif view == "sass":
        text, tool = _inspect.sass(cubin)
    elif view == "source":
        text = source
    if as_json:
        emit(_inspect.Inspection(view, facts, text, tool))
    elif text is None:
        show(_resources_text(facts))
    else:
        copy_out(text.rstrip("\n"), nl=True)
