"""`megamoe-jit cache prune`, `rm` and `clear`: what goes, asked before and told after."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._cache_options import cache_dir_option, complete_own_key
from megamoe_jit._cli._io import ExitCode, confirm, emit, end, json_option, say, show
from megamoe_jit._cli._keys import own_cache, place, whole_keys
from megamoe_jit._text import counted, human_bytes, one_line

if TYPE_CHECKING:
    from megamoe_jit._cache.cache import KernelCache

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask; needed where nobody can answer.")


def _size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    from megamoe_jit._settings.variables import parse_size

    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not {error}") from None


def _age(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is not a time such as 12h, 30d or 8w")
    return float(match[1]) * _UNITS[match[2]]


@click.command("prune")
@click.option("--max-bytes", callback=_size, metavar="SIZE", help="Size to come down to, such as 500M or 2GiB.")
@click.option("--older-than", callback=_age, metavar="TIME", help="Remove what was not used for 12h, 30d, 8w, ...")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@yes_option
@cache_dir_option
@json_option
def prune_command(max_bytes: int | None, older_than: float | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove what was not used for long, the least recently used first.

    Without a limit: down to MEGAMOE_JIT_CACHE_MAX_BYTES.  Kernels used in the last ten minutes stay; damaged kernels
    that were put aside go.
    """
    from megamoe_jit._cache.documents import CachePrune
    from megamoe_jit._cache.evict import GRACE_S, to_remove
    from megamoe_jit._cache.trees import tree_bytes
    from megamoe_jit._compile.toolchain import current_builder

    user = own_cache()
    limit = user.max_bytes if max_bytes is None and older_than is None else max_bytes
    entries, current = user.entries(), current_builder()
    doomed, wanted = (
        to_remove(entries, max_bytes=limit, older_than_s=older_than, current=current, grace_s=grace)
        for grace in (GRACE_S, 0)
    )
    recent = len({info.key for info in wanted} - {info.key for info in doomed})
    aside = user.quarantined()
    size = sum(info.disk_bytes for info in doomed) + sum(map(tree_bytes, aside))
    what = f"{counted(len(doomed), 'kernel')} and {len(aside)} put aside, {human_bytes(size)}, from {user.root}"
    removed, kept, freed = [info.key for info in doomed], list[str](), size
    if doomed or aside:
        if doomed and not as_json:
            show(
                "\n".join(f"{info.key[:12]}  {one_line(info.entry)}  {human_bytes(info.disk_bytes)}" for info in doomed)
            )
        if not dry_run:
            confirm(f"Remove {what}?", yes)
            report = user.prune(max_bytes=limit, older_than_s=older_than)
            removed, kept, freed = list(report.removed), list(report.kept), report.bytes
    else:
        what = f"nothing to remove in {place(user)}"
    if as_json:
        emit(CachePrune(str(user.root), dry_run, tuple(removed), tuple(kept), freed, recent))
    if not (doomed or aside):
        say(what)
    elif dry_run:
        say(f"would remove {what}")
    else:
        gone = len(aside) - len(user.quarantined())
        also = f" and {gone} put aside" if gone else ""
        say(f"removed {counted(len(removed), 'kernel')}{also}, {human_bytes(freed)}, from {user.root}")
    _say_kept(user, kept)
    if recent:
        say(f"{counted(recent, 'kernel')} more would go, but for having been used in the last ten minutes")
    left = not dry_run and _aside(user)
    end(ExitCode.OK if set(removed) >= {info.key for info in doomed} and not left else ExitCode.FAILED)


def _aside(cache: KernelCache) -> int:
    """How many damaged kernels are still put aside, after saying so."""
    left = len(cache.quarantined())
    if left:
        say(f"{left} put aside in {cache.path / 'quarantine'} could not be removed")
    return left


def _say_kept(cache: KernelCache, keys: Iterable[str]) -> None:
    """Say which kernels were not removed; a warning has said why."""
    for key in keys:
        path = cache.entry_path(key)
        say(f"{path} could not be removed" if os.path.lexists(path) else f"{path} was gone already")


@click.command("rm")
@click.argument("keys", metavar="KEY|SPEC...", nargs=-1, required=True, shell_complete=complete_own_key)
@cache_dir_option
@json_option
def rm_command(keys: tuple[str, ...], as_json: bool) -> None:
    """Remove kernels, by KEY or SPEC as for `info`.

    Nothing is removed if one of them is not there, or if the cache has a SPEC several times: then a KEY says which.
    """
    from megamoe_jit._cache.documents import CacheRemoval

    user = own_cache()
    wanted = whole_keys(keys)
    report = user.remove(wanted)
    if as_json:
        emit(CacheRemoval(str(user.root), report.removed, report.bytes))
    else:
        for key in report.removed:
            show(key)
    _say_kept(user, (key for key in wanted if key not in report.removed))
    say(f"removed {counted(len(report.removed), 'kernel')}, {human_bytes(report.bytes)}, from {user.root}")
    end(ExitCode.OK if len(report.removed) == len(wanted) else ExitCode.FAILED)


@click.command("clear")
@yes_option
@cache_dir_option
@json_option
def clear_command(yes: bool, as_json: bool) -> None:
    """Remove every kernel from the cache, damaged ones too."""
    from megamoe_jit._cache.documents import CacheClear, Statistics

    user = own_cache()
    before = Statistics.of(user)
    size = human_bytes(before.bytes + before.quarantined_bytes)
    aside = f" and {before.quarantined} put aside" if before.quarantined else ""
    if user.keys() or before.quarantined:
        confirm(f"Remove all of {user.root}: {counted(before.entries, 'kernel')}{aside}, {size}?", yes)
    report = user.clear()
    if as_json:
        emit(CacheClear(str(user.root), report.removed, report.bytes))
    left = user.keys()
    _say_kept(user, left)
    say(f"removed {counted(len(report.removed), 'kernel')}, {human_bytes(report.bytes)}, from {user.root}")
    end(ExitCode.FAILED if _aside(user) or left else ExitCode.OK)
