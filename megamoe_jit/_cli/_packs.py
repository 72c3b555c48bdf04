"""`megamoe-jit cache export` and `import`: kernels built here, used there."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe_jit._cli._cache_options import cache_dir_option, complete_kernel
from megamoe_jit._cli._io import CorruptionError, emit, json_option, must_be_writable, say, show
from megamoe_jit._cli._keys import DAMAGE_ADVICE, own_cache
from megamoe_jit._cli._names import looks_like_key, parse_spec
from megamoe_jit._errors import PackError
from megamoe_jit._text import counted, human_bytes, one_line


def _must_be_plain(file: Path) -> None:
    """Refuse devices and pipes: a pack is read twice, and replaces the file that it is written to."""
    if file.exists() and not file.is_file():
        raise click.BadParameter(f"{file} is not a plain file.", param_hint="FILE")


@click.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("kernels", metavar="[KEY|SPEC]...", nargs=-1, shell_complete=complete_kernel)
@cache_dir_option
@json_option
def export_command(file: Path, kernels: tuple[str, ...], as_json: bool) -> None:
    """Write kernels into one FILE for other machines.

    Every kernel of the caches if none is named.  A SPEC means the kernel that a call would load, else one that another
    compiler built from the same source.  FILE is a tar archive, compressed if its name ends in .gz or .tgz; one that
    exists is replaced.

    Exit code 4 if a kernel is damaged; nothing is written then, and nothing is put aside.
    """
    from megamoe_jit._cache.entry import Damaged
    from megamoe_jit._jit.documents import CacheExport
    from megamoe_jit._jit.pack import export_pack

    _must_be_plain(file)
    must_be_writable(file, "FILE")
    own_cache()  # one that cannot be read is refused, not empty
    wanted = [kernel if looks_like_key(kernel) else parse_spec(kernel) for kernel in kernels]
    try:
        pack = export_pack(file, wanted or None)
    except PackError as error:
        if isinstance(error.__context__, Damaged):
            raise CorruptionError(f"{error}; {DAMAGE_ADVICE}") from error
        raise
    if as_json:
        emit(CacheExport.of(pack))
    else:
        for key, kernel in zip(pack.keys, pack.kernels, strict=True):
            show(f"{key[:12]}  {one_line(kernel)}")
    say(f"exported {counted(len(pack.keys), 'kernel')} to {pack.path}: {human_bytes(pack.bytes)}, sha256 {pack.sha256}")


@click.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@cache_dir_option
@json_option
def import_command(file: Path, as_json: bool) -> None:
    """Take kernels from a FILE of `cache export`.

    The file is verified as a whole first.  Its kernels are used here even where another compiler is installed, or
    none.  With --cache-dir DIR they fill a directory that MEGAMOE_JIT_READONLY_CACHE may name, readable by
    everybody.  Exit code 4 if the file is damaged; nothing is imported then.
    """
    from megamoe_jit._cache.cache import user_cache
    from megamoe_jit._jit.documents import CacheImport
    from megamoe_jit._jit.lookup import find_key
    from megamoe_jit._jit.pack import import_pack, read_pack
    from megamoe_jit._settings.settings import get_settings

    if not file.exists():
        raise click.BadParameter(f"{file} does not exist.", param_hint="FILE")
    _must_be_plain(file)
    try:
        read_pack(file)
    except PackError as error:
        raise CorruptionError(str(error)) from error
    settings = get_settings()
    report = import_pack(file, settings.cache_dir if settings.source("cache_dir") == "argument" else None)
    if as_json:
        emit(CacheImport.of(str(file), report))
    else:
        for key in report.imported:
            show(f"{key[:12]}  {one_line(find_key(key, [user_cache()]).entry)}")
    there = f", {len(report.present)} there already" if report.present else ""
    say(f"imported {counted(len(report.imported), 'kernel')}{there}, {human_bytes(report.bytes)}, into {report.root}")
