"""`megamoe-jit cache`: what is compiled already, and where."""

from __future__ import annotations

from typing import Any

import click

from megamoe_jit._cli._io import document, emit_json, human_bytes, json_option, say, table

__all__ = ["cache"]


@click.group()
def cache() -> None:
    """The compiled kernels on disk."""


@cache.command("path")
@json_option
def path(as_json: bool) -> None:
    """Print the cache directory."""
    from megamoe_jit._settings import get_settings

    root = get_settings().cache_dir
    if as_json:
        emit_json(document("cache-path", path=str(root), exists=root.is_dir()))
    else:
        click.echo(root)


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    def figure(name: str) -> str:
        value = entry.get(name)
        return "-" if value is None else str(value)

    return (
        entry["key"][:12],
        figure("entry"),
        str(entry.get("nvrtc", {}).get("version", "-")),
        figure("registers"),
        figure("spill_bytes"),
        human_bytes(entry["disk_bytes"]),
        figure("created_at"),
    )


@cache.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the compiled kernels, oldest first."""
    from megamoe_jit._cache import KernelCache
    from megamoe_jit._settings import get_settings

    root = get_settings().cache_dir
    entries = KernelCache(root).entries()
    total = sum(entry["disk_bytes"] for entry in entries)
    if as_json:
        emit_json(document("cache-ls", path=str(root), disk_bytes=total, entries=entries))
        return
    if entries:
        headers = ("KEY", "KERNEL", "NVRTC", "REGISTERS", "SPILL B", "SIZE", "CREATED")
        click.echo(table(headers, [_cells(entry) for entry in entries], left=(0, 1, 2)))
    say(f"{len(entries)} kernels, {human_bytes(total)}, in {root}")
