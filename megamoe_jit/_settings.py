"""Every `MEGAMOE_JIT_*` environment variable, typed, in one table that is read once.

One table serves the parser, the documentation and the `env` command, so a variable cannot exist without a
default, an allowed range and a meaning. Values are read at first use and never again: nothing on the
launch path touches the environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError

__all__ = ["PREFIX", "VARIABLES", "Settings", "Variable", "default_cache_dir", "get_settings", "override"]

PREFIX = "MEGAMOE_JIT_"
LOG = logging.getLogger("megamoe_jit")

STRICT_LEVELS = ("error", "warn", "ignore")
VARIANT_CHOICES = ("auto", "pingpong", "cooperative")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Variable:
    """One row of the table.

    Attributes:
        name: full name of the environment variable.
        type: what a value looks like, for people.
        default: the default, for people.
        meaning: one sentence.
        field: name of the `Settings` field it sets.
        parse: turns a non-empty text into the field's value; raises `ValueError` saying what is allowed.
    """

    name: str
    type: str
    default: str
    meaning: str
    field: str
    parse: Callable[[str], Any]


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{', '.join(_TRUE)} or {', '.join(_FALSE)}")


def _parse_path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.lower()
        if word not in names:
            raise ValueError(", ".join(names))
        return word

    return parse


def _number(kind: type[int] | type[float], least: float, allowed: str) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= value < float("inf"):
            raise ValueError(allowed)
        return value

    return parse


def _parse_words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _cpu_count() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def default_cache_dir() -> Path:
    """The per-user cache directory of the platform (follows `XDG_CACHE_HOME`)."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("megamoe-jit", appauthor=False))


def _row(name: str, type_: str, default: str, parse: Callable[[str], Any], meaning: str) -> Variable:
    return Variable(PREFIX + name, type_, default, meaning, name.lower(), parse)


VARIABLES: tuple[Variable, ...] = (
    _row("CACHE_DIR", "path", "per-user cache directory", _parse_path, "Where compiled kernels are kept."),
    _row("DISABLE_JIT", "bool", "0", _parse_bool, "Forbid compiling; a kernel that is not cached is an error."),
    _row("NVRTC", "path", "found automatically", _parse_path, "The libnvrtc shared library to compile with."),
    _row(
        "STRICT",
        "error | warn | ignore",
        "error",
        _one_of(*STRICT_LEVELS),
        "What to do when ptxas spills registers or reports a C75xx performance advisory.",
    ),
    _row("DUMP_DIR", "path", "unset", _parse_path, "Keep rendered source, PTX, cubin and compiler log here."),
    _row("LOG_LEVEL", "level name", "unset", _one_of(*LOG_LEVELS), "Log to stderr from this level on."),
    _row(
        "TIMEOUT_S",
        "float",
        "100",
        _number(float, 1e-3, "a number of seconds above zero"),
        "Seconds a rank waits for its peers inside a kernel before it gives up.",
    ),
    _row(
        "VARIANT",
        "auto | pingpong | cooperative",
        "auto",
        _one_of(*VARIANT_CHOICES),
        "Kernel variant; auto lets the heuristics choose.",
    ),
    _row(
        "COOPERATIVE_THRESHOLD",
        "int",
        "256",
        _number(int, 0, "a whole number, zero or more"),
        "Threshold from which auto chooses the cooperative variant.",
    ),
    _row("KERNELS_SRC", "path", "the packaged one", _parse_path, "Directory to render kernels from."),
    _row(
        "LOCK_DIR",
        "path",
        "a node-local directory",
        _parse_path,
        "Where processes of one node meet to compile each kernel once.",
    ),
    _row(
        "LOCK_TIMEOUT_S",
        "float",
        "120",
        _number(float, 0, "a number of seconds, zero or more"),
        "How long to wait for another process that compiles the same kernel.",
    ),
    _row("JOBS", "int", "number of CPUs", _number(int, 1, "a whole number, one or more"), "Threads of warmup."),
    _row("DEBUG", "bool", "0", _parse_bool, "Validate expert ids on the host before each launch (slow)."),
    _row("PTXAS_OPTIONS", "words", "none", _parse_words, "Extra ptxas options, separated by spaces."),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """One field for every row of `VARIABLES`; hashable, so results can be remembered per settings."""

    cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
    disable_jit: bool = False
    nvrtc: Path | None = None
    strict: str = "error"
    dump_dir: Path | None = None
    log_level: str | None = None
    timeout_s: float = 100.0
    variant: str = "auto"
    cooperative_threshold: int = 256
    kernels_src: Path | None = None
    lock_dir: Path | None = None
    lock_timeout_s: float = 120.0
    jobs: int = dataclasses.field(default_factory=_cpu_count)
    debug: bool = False
    ptxas_options: tuple[str, ...] = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read every variable; an empty value means the default.

        Args:
            environ: usually `os.environ`.

        Raises:
            ConfigError: a value is not allowed; says which variable, the value, and what is allowed.
        """
        values: dict[str, Any] = {}
        for variable in VARIABLES:
            text = environ.get(variable.name, "").strip()
            if not text:
                continue
            try:
                values[variable.field] = variable.parse(text)
            except ValueError as error:
                raise ConfigError(f"{variable.name}={text!r} is not allowed; allowed: {error}") from None
        _warn_unknown(environ)
        return cls(**values)


def _warn_unknown(environ: Mapping[str, str]) -> None:
    known = [variable.name for variable in VARIABLES]
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if not unknown:
        return
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        parts.append(f"{name} (did you mean {close[0]}?)" if close else name)
    LOG.warning("unknown environment variables are ignored: %s", ", ".join(parts))


_lock = threading.Lock()
_current: Settings | None = None
_handler: logging.Handler | None = None


def _configure_logging(level: str | None) -> None:
    """A library stays silent unless asked: only an explicit LOG_LEVEL installs a handler."""
    global _handler
    if level is None:
        return
    LOG.setLevel(level.upper())
    if _handler is None:
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        LOG.addHandler(_handler)


def get_settings() -> Settings:
    """The settings of this process, read from the environment at the first call."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                settings = Settings.from_env(os.environ)
                _configure_logging(settings.log_level)
                _current = settings
    return _current


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
    _current = dataclasses.replace(before, **fields)
    try:
        yield _current
    finally:
        _current = before
