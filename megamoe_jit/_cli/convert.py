"""`megamoe-jit convert`: a model with its experts in another format."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe_jit._cli._io import NamedPath, emit, json_option, must_be_writable, say, show
from megamoe_jit._text import human_bytes

_FORMATS = ("fp8", "mxfp4", "megamoe")


@click.command()
@click.argument("source", type=NamedPath(path_type=Path))
@click.argument("target", type=NamedPath(file_okay=False, path_type=Path))
@click.option("--format", "weight_format", type=click.Choice(_FORMATS), required=True, help="Of the experts.")
@click.option("--device", default="cpu", show_default=True, help="Where weights are quantised.")
@click.option("--scheme", help="How tensors are named, where the names do not tell.")
@click.option("--lossy", is_flag=True, help="Also quantise again what has to lose something by it.")
@json_option
def convert(
    source: Path, target: Path, weight_format: str, device: str, scheme: str | None, lossy: bool, as_json: bool
) -> None:
    """Write a model's safetensors files with its experts in another format; goes on where it was ended; needs no GPU.

    fp8 and mxfp4 keep the names that models have; megamoe is the kernel's own order, which loads without any work.
    """
    must_be_writable(target, "TARGET", in_new_folders=True)
    from megamoe_jit.checkpoints import convert as run

    done = run(
        source,
        target,
        weight_format,
        device=device,
        scheme=scheme,
        lossy=lossy,
        report=lambda name, became: say(f"{became} {name}"),
    )
    if as_json:
        emit(done)
    else:
        size = sum(file.bytes for file in done.files)
        show(f"{done.target}: {len(done.files)} files, {human_bytes(size)}, experts in {done.format}")
