"""Every setting, typed and read once: arguments win over environment, settings file and default.

Values are read at first use and never again: nothing on the launch path touches the environment or the file.

The file is TOML: the one that `MEGAMOE_JIT_CONFIG` names, else `config.toml` in the per-user configuration
directory. A key is the variable's name without the prefix, in lower case (`strict = "warn"`), at the top level or
in a `[tool.megamoe-jit]` table; both are read, and the table wins. The working directory is never searched: settings
name libraries that are loaded, and those must not depend on where a process was started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megamoe_jit._errors import ConfigError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._settings.read import Fault, read_environment, read_file
from megamoe_jit._settings.variables import PREFIX, cpu_count, default_cache_dir, default_config_file
from megamoe_jit._text import printable

LOG = logging.getLogger("megamoe_jit")


@dataclass(frozen=True, slots=True)
class Settings:
    """One field for every row of `VARIABLES`; hashable, so results can be remembered per settings.

    `sources` says where each field that is not a default came from; `ignored` names what the settings file holds to
    no effect, and why where there is more to say than that it is unknown; `unknown` has those names that mean
    nothing. They take no part in comparisons.
    """

    config: Path | None = None
    cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
    cache_max_bytes: int = 1 << 30
    readonly_cache: tuple[Path, ...] = ()
    no_cache: bool = False
    disable_jit: bool = False
    nvrtc: Path | None = None
    strict: str = "error"
    dump_dir: Path | None = None
    log_level: str | None = None
    timeout_s: float = 100.0
    variant: str = "auto"
    cooperative_threshold: int | None = None
    kernels_src: Path | None = None
    lock_dir: Path | None = None
    lock_timeout_s: float = 120.0
    jobs: int = dataclasses.field(default_factory=cpu_count)
    debug: bool = False
    l2_sides: bool = True
    ptxas_options: tuple[str, ...] = ()

    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    unknown: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)

    @classmethod
    def load(cls, environ: Mapping[str, str], faults: list[Fault] | None = None) -> Settings:
        """Read the environment and, for what it does not set, the settings file.

        Args:
            environ: usually `os.environ`; may name the file.
            faults: takes what would be an error; it counts as unset then.

        Raises:
            ConfigError: a value is not allowed, or the file that was named cannot be read.
        """
        values = read_environment(environ, faults)
        sources = dict.fromkeys(values, "environment")
        named: Path | None = values.get("config")
        path = named or default_config_file()
        written, unknown, lost = dict[str, Any](), dict[str, str](), dict[str, str]()
        try:
            written, unknown, lost = read_file(path, named is not None, faults)
        except ConfigError as error:
            if faults is None:
                raise
            faults.append(Fault("config", named, sources.get("config", "default"), str(error)))
        for field, value in written.items():
            if field not in values:
                values[field], sources[field] = value, f"file {path}"
        return cls(**values, sources=sources, ignored={**unknown, **lost}, unknown=frozenset(unknown))

    def source(self, field: str) -> str:
        """Where the value of a field came from: `default`, `environment`, `file PATH` or `argument`."""
        return self.sources.get(field, "default")

    def place(self, field: str) -> str:
        """What to change for another value of a field: its variable, its key in the settings file, or an argument."""
        source, name = self.source(field), f"{PREFIX}{field.upper()}"
        if source.startswith("file "):
            return f"{field} in the settings {source}"
        return f"the argument {field} (without it, {name})" if source == "argument" else name


_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_current: Settings | None = None
_handler: logging.Handler | None = None


def _make_printable(record: logging.LogRecord) -> bool:
    """Names and values in a message may hold control characters; whoever shows it shows none."""
    text = record.getMessage()
    clean = printable(text)
    if clean != text:
        record.msg, record.args = clean, ()
    return True


LOG.addFilter(_make_printable)


class _Printable(logging.Formatter):
    """For what a message alone does not hold, such as the text of a foreign exception."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a live display takes its place for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _configure_logging(level: str | None) -> None:
    """A library stays silent unless asked: only an explicit LOG_LEVEL installs a handler."""
    global _handler
    if level is None:
        return
    LOG.setLevel(level.upper())
    if _handler is None:
        _handler = _ToStandardError()
        _handler.setFormatter(_Printable("%(name)s %(levelname)s: %(message)s"))
        LOG.addHandler(_handler)


def get_settings() -> Settings:
    """The settings of this process, read from the environment and the settings file at the first call."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                settings = Settings.load(os.environ)
                _configure_logging(settings.log_level)
                _current = settings
    return _current


@contextlib.contextmanager
def lenient() -> Iterator[list[Fault]]:
    """Let values that are not allowed count as unset while the block runs: a diagnosis has to name them all.

    Yields:
        What is wrong with the settings of this process, what the environment says first; empty if nothing is.
    """
    global _current
    before, faults = _current, list[Fault]()
    if before is None:
        settings = Settings.load(os.environ, faults)
        _configure_logging(settings.log_level)
        _current = settings
        before = None if faults else settings
    try:
        yield faults
    finally:
        _current = before


@contextlib.contextmanager
def override(**fields: Any) -> Iterator[Settings]:
    """Replace some fields for all threads while the block runs (tests and the command line use it).

    Args:
        **fields: names and values of `Settings` fields.

    Yields:
        The settings in force inside the block.
    """
    global _current
    before = get_settings()
    sources = {**before.sources, **dict.fromkeys(fields, "argument")}
    _current = dataclasses.replace(before, **fields, sources=sources)
    try:
        yield _current
    finally:
        _current = before
