"""`megamoe-jit cache`: what is compiled already, where, and how to look after it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import (
    ExitCode,
    confirm,
    document,
    emit_json,
    end,
    human_bytes,
    json_option,
    kernel_count,
    say,
    table,
)
from megamoe_jit._cli._keys import (
    all_caches,
    entry_document,
    entry_info,
    find_entries,
    fit_note,
    others,
    own_cache,
    place,
    whole_keys,
)
from megamoe_jit._cli._options import cache_dir_option, complete_kernel, complete_own_key, looks_like_key
from megamoe_jit._cli._packs import export_command, import_command

if TYPE_CHECKING:
    from megamoe_jit._cache import CacheStats, EntryInfo, KernelCache

__all__ = ["cache"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask; needed where nobody can answer.")


@click.group()
def cache() -> None:
    """The compiled kernels on disk."""


@cache.command("path")
@cache_dir_option
@json_option
def path(as_json: bool) -> None:
    """Print the cache directory."""
    from megamoe_jit._settings import get_settings

    root = get_settings().cache_dir
    if as_json:
        emit_json(document("cache-path", path=str(root), exists=os.path.isdir(root)))
    else:
        click.echo(root)


def _cells(info: EntryInfo) -> tuple[str, ...]:
    def figure(name: str) -> str:
        value = info.meta.get(name)
        return "-" if value is None else str(value)

    return (
        info.key[:12],
        info.entry or "-",
        info.compiler or "-",
        figure("registers"),
        figure("spill_bytes"),
        human_bytes(info.disk_bytes),
        info.created_at or "-",
    )


@cache.command("ls")
@cache_dir_option
@json_option
def ls(as_json: bool) -> None:
    """List the compiled kernels, oldest first; those of the read-only caches too, which are marked."""
    listed = [(each, each.entries()) for each in all_caches()]
    sizes = [sum(info.disk_bytes for info in entries) for _, entries in listed]
    found = [(info, each.read_only) for each, entries in listed for info in entries]
    found.sort(key=lambda row: (row[0].created_at, row[0].key))
    if as_json:
        rows = [{**entry_document(info), "read_only": read_only} for info, read_only in found]
        emit_json(document("cache-ls", path=str(listed[0][0].root), disk_bytes=sizes[0], entries=rows))
        return
    if found:
        marked = len(listed) > 1
        headers = ("KEY", "KERNEL", "NVRTC", "REGISTERS", "SPILL B", "SIZE", "CREATED", "CACHE")
        cells = [(*_cells(info), "read-only" if read_only else "own") for info, read_only in found]
        columns = len(headers) if marked else len(headers) - 1
        click.echo(table(headers[:columns], [row[:columns] for row in cells], left=(0, 1, 2, 7)))
    for (each, entries), size in zip(listed, sizes, strict=True):
        say(f"{kernel_count(len(entries))}, {human_bytes(size)}, in {place(each)}")


@cache.command("info")
@click.argument("key", metavar="KEY|SPEC", shell_complete=complete_kernel)
@cache_dir_option
@json_option
def info(key: str, as_json: bool) -> None:
    """Show all that is known of one kernel.

    KEY may be cut short while it is unique; SPEC is SHAPE/VARIANT, as for `inspect`, or a kernel's name.  Of several
    entries of a SPEC the one that calls load is shown, and the others are named.
    """
    found = find_entries(key)
    doc = entry_document(entry_info(found[0]))
    if as_json:
        emit_json(document("cache-info", entry=doc, others=[each.key for each in others(found)]))
    else:
        click.echo(_fields(doc))
    note = "" if looks_like_key(key) else fit_note(found)
    if note:
        say(note)


def _fields(doc: dict[str, Any]) -> str:
    """One line per value, what matters most first."""
    first = ("key", "entry", "path", "disk_bytes", "created_at", "used_at")
    rows: list[tuple[str, object]] = []

    def add(name: str, value: object) -> None:
        if isinstance(value, dict):
            for inner, part in value.items():
                add(f"{name}.{inner}", part)
        elif name == "files" and isinstance(value, list):
            rows.append((name, f"{len(value)}, from {value[0]}" if value else "-"))
        elif isinstance(value, list):
            rows.append((name, " ".join(map(str, value)) or "-"))
        else:
            rows.append((name, "-" if value is None else value))

    for name in (*first, *(name for name in doc if name not in first)):
        if name in doc:
            add(name, doc[name])
    return "\n".join(table(("", ""), rows, left=(0, 1)).splitlines()[1:])


def _stats_document(stats: CacheStats, read_only: bool) -> dict[str, Any]:
    from datetime import UTC, datetime

    def date(seconds: float | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    return {
        "path": str(stats.root),
        "read_only": read_only,
        "entries": stats.entries,
        "bytes": stats.bytes,
        "limit_bytes": stats.limit_bytes,
        "quarantined": stats.quarantined,
        "quarantined_bytes": stats.quarantined_bytes,
        "oldest_use": date(stats.oldest_use),
        "newest_use": date(stats.newest_use),
    }


@cache.command("stats")
@cache_dir_option
@json_option
def stats(as_json: bool) -> None:
    """Show size, limit and last use; of the read-only caches too."""
    found = all_caches()
    caches = [_stats_document(each.stats(), each.read_only) for each in found]
    if as_json:
        emit_json(document("cache-stats", caches=caches))
        return
    blocks = []
    for each, where in zip(caches, map(place, found), strict=True):
        limit = "" if each["limit_bytes"] is None else f" of {human_bytes(each['limit_bytes'])}"
        rows = [
            ("directory", where),
            ("kernels", each["entries"]),
            ("size", human_bytes(each["bytes"]) + limit),
            ("quarantined", f"{each['quarantined']}, {human_bytes(each['quarantined_bytes'])}"),
            ("last used", each["newest_use"] or "-"),
            ("longest unused", each["oldest_use"] or "-"),
        ]
        blocks.append("\n".join(table(("", ""), rows, left=(0, 1)).splitlines()[1:]))
    click.echo("\n\n".join(blocks))


@cache.command("verify")
@click.option("--fix", is_flag=True, help="Put damaged kernels aside and correct permissions.")
@cache_dir_option
@json_option
def verify(fix: bool, as_json: bool) -> None:
    """Check every kernel, those of the read-only caches too.

    Sizes, digests, architecture, owners and permissions.

    Exit code 0 if all is well or was mended, 4 if a kernel is damaged, 1 if something else is wrong.
    """
    caches = all_caches()
    checked = sum(len(each.keys()) for each in caches)
    found = [(each, problem) for each in caches for problem in each.verify(fix=fix and not each.read_only)]
    left = [problem for _, problem in found if not problem.fixed]
    rows = [
        {"key": p.key or None, "path": str(p.path), "message": p.message, "fixed": p.fixed, "cache": str(each.root)}
        for each, p in found
    ]
    if as_json:
        emit_json(document("cache-verify", entries=checked, problems=rows, unfixed=len(left)))
    else:
        for row in rows:
            word = "mended" if row["fixed"] else "DAMAGED" if row["key"] else "WRONG"
            click.echo(f"{word}  {row['path']}: {row['message']}")
    problems = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    verdict = f"{problems}, {len(found) - len(left)} mended" if found else "all is well"
    say(f"{kernel_count(checked)} checked in {', '.join(map(place, caches))}: {verdict}")
    if not fix and any(not each.read_only for each, _ in found):
        say("`megamoe-jit cache verify --fix` corrects permissions and puts damaged kernels aside for a recompile")
    damaged = any(problem.key for problem in left)
    end(ExitCode.CORRUPTION if damaged else ExitCode.FAILED if left else ExitCode.OK)


def _size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    from megamoe_jit._settings import VARIABLES

    if text is None:
        return None
    parse = next(variable.parse for variable in VARIABLES if variable.field == "cache_max_bytes")
    try:
        return int(parse(text))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not {error}") from None


def _age(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is not a time such as 12h, 30d or 8w")
    return float(match[1]) * _UNITS[match[2]]


@cache.command("prune")
@click.option("--max-bytes", callback=_size, metavar="SIZE", help="Size to come down to, such as 500M or 2GiB.")
@click.option("--older-than", callback=_age, metavar="TIME", help="Remove what was not used for 12h, 30d, 8w, ...")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@yes_option
@cache_dir_option
@json_option
def prune(max_bytes: int | None, older_than: float | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove what was not used for long, the least recently used first.

    Without a limit: down to MEGAMOE_JIT_CACHE_MAX_BYTES.  Kernels used in the last ten minutes stay; damaged kernels
    that were put aside go.
    """
    from megamoe_jit import _evict

    user = own_cache()
    limit = user.max_bytes if max_bytes is None and older_than is None else max_bytes
    entries, current = user.entries(), _evict.current_builder()
    doomed, wanted = (
        _evict.plan(entries, max_bytes=limit, older_than_s=older_than, current=current, grace_s=grace)
        for grace in (_evict.GRACE_S, 0)
    )
    recent = len({info.key for info in wanted} - {info.key for info in doomed})
    aside = user.stats()
    size = sum(info.disk_bytes for info in doomed) + aside.quarantined_bytes
    what = f"{kernel_count(len(doomed))} and {aside.quarantined} put aside, {human_bytes(size)}, from {user.root}"
    removed, freed = [info.key for info in doomed], size
    if doomed or aside.quarantined:
        if doomed and not as_json:
            click.echo("\n".join(f"{info.key[:12]}  {info.entry}  {human_bytes(info.disk_bytes)}" for info in doomed))
        if not dry_run:
            confirm(f"Remove {what}?", yes)
            report = user.prune(max_bytes=limit, older_than_s=older_than)
            removed, freed = list(report.removed), report.bytes
    else:
        what = f"nothing to remove in {place(user)}"
    if as_json:
        done = {"removed": removed, "bytes": freed, "kept_recent": recent}
        emit_json(document("cache-prune", path=str(user.root), dry_run=dry_run, **done))
    if not (doomed or aside.quarantined):
        say(what)
    elif dry_run:
        say(f"would remove {what}")
    else:
        say(f"removed {kernel_count(len(removed))}, {human_bytes(freed)}, from {user.root}")
    if recent:
        say(f"{kernel_count(recent)} more would go, but for having been used in the last ten minutes")
    left = not dry_run and user.stats().quarantined
    end(ExitCode.OK if set(removed) >= {info.key for info in doomed} and not left else ExitCode.FAILED)


def _say_kept(cache: KernelCache, keys: Iterable[str]) -> None:
    """Say which kernels were not removed; a warning has said why."""
    for key in keys:
        path = cache.entry_path(key)
        say(f"{path} could not be removed" if os.path.lexists(path) else f"{path} was gone already")


@cache.command("rm")
@click.argument("keys", metavar="KEY|SPEC...", nargs=-1, required=True, shell_complete=complete_own_key)
@cache_dir_option
@json_option
def rm(keys: tuple[str, ...], as_json: bool) -> None:
    """Remove kernels, by KEY or SPEC as for `info`.

    Nothing is removed if one of them is not there, or if the cache has a SPEC several times: then a KEY says which.
    """
    user = own_cache()
    wanted = whole_keys(keys)
    report = user.remove(wanted)
    if as_json:
        emit_json(document("cache-rm", path=str(user.root), removed=list(report.removed), bytes=report.bytes))
    else:
        for key in report.removed:
            click.echo(key)
    _say_kept(user, (key for key in wanted if key not in report.removed))
    say(f"removed {kernel_count(len(report.removed))}, {human_bytes(report.bytes)}, from {user.root}")
    end(ExitCode.OK if len(report.removed) == len(wanted) else ExitCode.FAILED)


@cache.command("clear")
@yes_option
@cache_dir_option
@json_option
def clear(yes: bool, as_json: bool) -> None:
    """Remove every kernel from the cache, damaged ones too."""
    user = own_cache()
    before = user.stats()
    size = human_bytes(before.bytes + before.quarantined_bytes)
    aside = f" and {before.quarantined} put aside" if before.quarantined else ""
    if user.keys() or before.quarantined:
        confirm(f"Remove all of {user.root}: {kernel_count(before.entries)}{aside}, {size}?", yes)
    report = user.clear()
    if as_json:
        emit_json(document("cache-clear", path=str(user.root), removed=list(report.removed), bytes=report.bytes))
    left = user.keys()
    _say_kept(user, left)
    say(f"removed {kernel_count(len(report.removed))}, {human_bytes(report.bytes)}, from {user.root}")
    end(ExitCode.FAILED if left or user.stats().quarantined else ExitCode.OK)


cache.add_command(export_command)
cache.add_command(import_command)
