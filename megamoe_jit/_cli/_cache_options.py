"""Where cached kernels are, and which are meant: the cache directory, completion of kernels and keys.

Every command of `cache` imports this, so it imports no more than they need.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megamoe_jit._text import one_line

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def _keys_beginning(incomplete: str, read_only_too: bool) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from megamoe_jit._cli._keys import all_caches

    log = logging.getLogger("megamoe_jit")
    before, log.disabled = log.disabled, True  # a shell waits for this: no answer is better than a warning
    try:
        caches = all_caches() if read_only_too else all_caches()[:1]
        names = {info.key[:12]: one_line(info.entry) for each in caches for info in each.entries()}
        return [CompletionItem(key, help=name) for key, name in names.items() if key.startswith(incomplete[:12])]
    except Exception:  # nor a traceback
        return []
    finally:
        log.disabled = before


def complete_key(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of cached kernels, those of the read-only caches too, with the kernels' names."""
    return _keys_beginning(incomplete, read_only_too=True)


def complete_own_key(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of the user's cache, which can be removed, with the kernels' names."""
    return _keys_beginning(incomplete, read_only_too=False)


def complete_kernel(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Kernels by shape and variant, and keys."""
    from click.shell_completion import CompletionItem

    from megamoe_jit._spec.formats import FORMATS, FP8
    from megamoe_jit._spec.variants import Variant
    from megamoe_jit.heuristics.presets import preset_names

    readers = {stored: Variant.reading(stored) for stored in FORMATS.values()}
    kinds = [v.value + ("" if stored is FP8 else f"/{stored.name}") for stored in readers for v in readers[stored]]
    names = [f"{name}/{kind}" for name in preset_names() for kind in kinds]
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [*found, *complete_key(context, parameter, incomplete)]


def _override_cache_dir(context: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is not None and not context.resilient_parsing:
        if not path:  # an unset variable of a script, not the working directory
            raise click.BadParameter("'' is no directory.")
        from megamoe_jit._settings.settings import override

        context.with_resource(override(cache_dir=Path(path).absolute()))


cache_dir_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False),
    expose_value=False,
    is_eager=True,
    callback=_override_cache_dir,
    help="The cache directory, instead of MEGAMOE_JIT_CACHE_DIR.",
)
