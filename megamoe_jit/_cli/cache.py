"""`megamoe-jit cache`: what is compiled already, where, and how to look after it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._cache_options import cache_dir_option, complete_kernel
from megamoe_jit._cli._io import (
    ExitCode,
    FullSummaries,
    cell,
    copy_out,
    emit,
    end,
    facts,
    json_option,
    say,
    show,
    table,
)
from megamoe_jit._cli._keys import all_caches, entry_info, find_entries, fit_note, others, place, say_damaged
from megamoe_jit._cli._names import looks_like_key
from megamoe_jit._cli._packs import export_command, import_command
from megamoe_jit._cli._removal import clear_command, prune_command, rm_command
from megamoe_jit._documents import plain
from megamoe_jit._text import counted, human_bytes

if TYPE_CHECKING:
    from megamoe_jit._cache.documents import Entry, Statistics
    from megamoe_jit._cache.entry import EntryInfo


@click.group(cls=FullSummaries)
def cache() -> None:
    """The compiled kernels on disk."""


@cache.command("path")
@cache_dir_option
@json_option
def path(as_json: bool) -> None:
    """Print the cache directory."""
    from megamoe_jit._settings.settings import get_settings

    root = get_settings().cache_dir
    if as_json:
        from megamoe_jit._cache.documents import CachePath

        emit(CachePath(str(root), os.path.isdir(root)))
    else:
        copy_out(str(root), nl=True)


def _cells(info: EntryInfo) -> tuple[str, ...]:
    return (
        info.key[:12],
        info.entry or "-",
        info.compiler or "-",
        cell(info.meta.get("registers")),
        cell(info.meta.get("spill_bytes")),
        human_bytes(info.disk_bytes),
        info.created_at or "-",
    )


@cache.command("ls")
@cache_dir_option
@json_option
def ls(as_json: bool) -> None:
    """List the compiled kernels, oldest first; those of the read-only caches too, which are marked."""
    listed = [(each, *each.survey()) for each in all_caches()]
    sizes = [sum(info.disk_bytes for info in entries) for _, entries, _ in listed]
    found = [(info, each.read_only) for each, entries, _ in listed for info in entries]
    found.sort(key=lambda row: (row[0].created_at, row[0].key))
    if as_json:
        from megamoe_jit._cache.documents import CacheListing, Entry, ListedEntry

        rows = tuple(ListedEntry(**Entry.known(info), read_only=read_only) for info, read_only in found)
        damaged = sum(count for _, _, count in listed)
        emit(CacheListing(str(listed[0][0].root), sizes[0], damaged, rows))
    elif found:
        marked = len(listed) > 1
        headers = ("KEY", "KERNEL", "NVRTC", "REGISTERS", "SPILL B", "SIZE", "CREATED", "CACHE")
        cells = [(*_cells(info), "read-only" if read_only else "own") for info, read_only in found]
        columns = len(headers) if marked else len(headers) - 1
        show(table(headers[:columns], [row[:columns] for row in cells], left=(0, 1, 2, 7)))
    for (each, entries, damaged), size in zip(listed, sizes, strict=True):
        if not as_json:
            say(f"{counted(len(entries), 'kernel')}, {human_bytes(size)}, in {place(each)}")
        say_damaged(each, damaged)


@cache.command("info")
@click.argument("key", metavar="KEY|SPEC", shell_complete=complete_kernel)
@cache_dir_option
@json_option
def info(key: str, as_json: bool) -> None:
    """Show all that is known of one kernel.

    KEY may be cut short while it is unique; SPEC is SHAPE/VARIANT, as for `inspect`, or a kernel's name.  Of several
    entries of a SPEC the one that calls load is shown, and the others are named.
    """
    from megamoe_jit._cache.documents import CacheInfo, Entry

    found = find_entries(key)
    entry = Entry.of(entry_info(found[0]))
    if as_json:
        emit(CacheInfo(entry, tuple(each.key for each in others(found))))
    else:
        show(_fields(entry))
    note = "" if looks_like_key(key) else fit_note(found)
    if note:
        say(note)


def _fields(entry: Entry) -> str:
    """One line per value, what matters most first."""
    doc = plain(entry)
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
            rows.append((name, cell(value)))

    for name in (*first, *(name for name in doc if name not in first)):
        if name in doc:
            add(name, doc[name])
    return facts(rows)


def _stats_block(stats: Statistics, where: str) -> str:
    limit = "" if stats.limit_bytes is None else f" of {human_bytes(stats.limit_bytes)}"
    rows = [
        ("directory", where),
        ("kernels", stats.entries),
        ("size", human_bytes(stats.bytes) + limit),
        ("quarantined", f"{stats.quarantined}, {human_bytes(stats.quarantined_bytes)}"),
        ("last used", stats.newest_use or "-"),
        ("longest unused", stats.oldest_use or "-"),
    ]
    return facts(rows)


@cache.command("stats")
@cache_dir_option
@json_option
def stats(as_json: bool) -> None:
    """Show size, limit and last use; of the read-only caches too."""
    from megamoe_jit._cache.documents import CacheStatistics, Statistics

    found = all_caches()
    caches = tuple(Statistics.of(each) for each in found)
    if as_json:
        emit(CacheStatistics(caches))
    else:
        show("\n\n".join(map(_stats_block, caches, map(place, found))))
    for each, shown in zip(found, caches, strict=True):
        say_damaged(each, shown.damaged)


@cache.command("verify")
@click.option(
    "--fix", is_flag=True, help="Put damaged kernels aside and correct permissions, but not of read-only caches."
)
@cache_dir_option
@json_option
def verify(fix: bool, as_json: bool) -> None:
    """Check every kernel, those of the read-only caches too.

    Sizes, digests, architecture, whether each is what its key names, owners and permissions.

    Exit code 0 if all is well or was mended, 4 if a kernel is damaged, 1 if something else is wrong.
    """
    from megamoe_jit._cache.documents import CacheVerify, Wrong
    from megamoe_jit._diagnose.doctor import mending

    caches = all_caches()
    checked = sum(len(each.keys()) for each in caches)
    found = [(each, problem) for each in caches for problem in each.verify(fix=fix and not each.read_only)]
    left = [problem for _, problem in found if not problem.fixed]
    rows = tuple(Wrong.of(problem, each) for each, problem in found)
    if as_json:
        emit(CacheVerify(checked, rows, len(left)))
    else:
        for row in rows:
            word = ("put aside" if row.key else "mended") if row.fixed else "DAMAGED" if row.key else "WRONG"
            show(f"{word}  {row.path}: {row.message}")
    problems = counted(len(found), "problem")
    verdict = f"{problems}, {len(found) - len(left)} put right" if found else "all is well"
    say(f"{counted(checked, 'kernel')} checked in {', '.join(map(place, caches))}: {verdict}")
    if not fix and any(not each.read_only for each, _ in found):
        say("`megamoe-jit cache verify --fix` corrects permissions and puts damaged kernels aside for a recompile")
    for path in (problem.path for each, problem in found if each.read_only and not problem.key):
        if advice := mending([path], path):
            say(f"a read-only cache is never changed here; `{advice}` makes it usable")
    damaged = any(problem.key for problem in left)
    end(ExitCode.CORRUPTION if damaged else ExitCode.FAILED if left else ExitCode.OK)


for command in (clear_command, export_command, import_command, prune_command, rm_command):
    cache.add_command(command)
