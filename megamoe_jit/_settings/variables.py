"""The table of settings: name, type, default, meaning and parser of every `MEGAMOE_JIT_*` variable.

One table serves the parsers, the documentation and the `env` command, so a variable cannot exist without a
default, an allowed range and a meaning.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._spec.variants import VARIANT_CHOICES
from megamoe_jit._trust import own_name

PREFIX = "MEGAMOE_JIT_"

STRICT_LEVELS = ("error", "warn", "ignore")
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

    @property
    def kind(self) -> str:
        """How a value is written in a file: `text`, `number`, `bool`, `path`, `paths` or `words`."""
        return _KINDS.get(self.parse, "number" if self.type in ("int", "float", "size") else "text")

    @property
    def allowed(self) -> str:
        """What a value may be, in the words in which `parse` refuses one; its type where any text will do."""
        try:
            self.parse("\0")  # nothing that a setting could be
        except ValueError as error:
            return str(error)
        return self.type


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{', '.join(_TRUE)} or {', '.join(_FALSE)}")


def _parse_path(text: str) -> Path:
    if "\0" in text:  # no file system has such a name
        raise ValueError("path")
    try:
        return Path(os.path.abspath(os.path.expanduser(text)))
    except OSError:
        raise ValueError("an absolute path, where the working directory is not there any more") from None


def _parse_paths(text: str) -> tuple[Path, ...]:
    return tuple(_parse_path(part) for part in text.split(os.pathsep) if part.strip())


def parse_size(text: str) -> int:
    """Bytes from a number with an optional unit of 1024: `1073741824`, `500M`, `2GiB`; else `ValueError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?", text.strip().lower())
    if not match:
        raise ValueError("a number of bytes, such as 1073741824, 500M or 2GiB")
    try:
        return int(float(match[1]) * 1024 ** (" kmgt".index(match[2] or " ")))
    except OverflowError:
        raise ValueError("a number of bytes that a disk could have") from None


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.lower()
        if word not in names:
            raise ValueError(", ".join(names))
        return word

    return parse


def _number(
    kind: type[int] | type[float], least: float, allowed: str, most: float = math.inf
) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= value <= most or value == math.inf:
            raise ValueError(allowed)
        return value

    return parse


def _parse_words(text: str) -> tuple[str, ...]:
    if not text.isprintable():  # no compiler takes it, and no file could keep it
        raise ValueError("printable words")
    return tuple(text.split())


def cpu_count() -> int:
    """CPUs this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _user_dir(kind: str) -> Path | None:
    """A per-user directory of the platform; None for a user who has none."""
    import platformdirs

    try:
        path = Path(getattr(platformdirs, kind)("megamoe-jit", appauthor=False))
    except RuntimeError:  # no HOME and no entry in the user database
        return None
    return path if path.is_absolute() else None


def default_cache_dir() -> Path:
    """The per-user cache directory (follows `XDG_CACHE_HOME`); a temporary one for a user without a home.

    In containers that run as any user, the home is often `/` or not there: then none can be made in it.
    """
    path = _user_dir("user_cache_dir")
    if path is not None and _is_there_or_can_be_made(path):
        return path
    import tempfile

    try:
        return Path(tempfile.gettempdir()) / own_name()
    except FileNotFoundError:  # nothing can be written here at all; whoever tries is told of the path
        return path or Path("/tmp") / own_name()


def _is_there_or_can_be_made(path: Path) -> bool:
    nearest = next(each for each in (path, *path.parents) if os.path.lexists(each))
    return nearest == path or os.access(nearest, os.W_OK | os.X_OK)


def default_config_file() -> Path:
    """The settings file that is read, where it exists, when `MEGAMOE_JIT_CONFIG` names none."""
    path = _user_dir("user_config_dir")
    return Path(os.devnull) if path is None else path / "config.toml"


def _row(name: str, type_: str, default: str, parse: Callable[[str], Any], meaning: str) -> Variable:
    return Variable(PREFIX + name, type_, default, meaning, name.lower(), parse)


_KINDS: dict[Callable[[str], Any], str] = {
    _parse_bool: "bool",
    _parse_path: "path",
    _parse_paths: "paths",
    _parse_words: "words",
}

VARIABLES: tuple[Variable, ...] = (
    _row("CONFIG", "path", "per-user config.toml", _parse_path, "TOML file of settings; the environment wins over it."),
    _row("CACHE_DIR", "path", "per-user cache directory", _parse_path, "Where compiled kernels are kept."),
    _row("CACHE_MAX_BYTES", "size", "1GiB", parse_size, "Size from which the least recently used kernels go."),
    _row(
        "READONLY_CACHE",
        "paths, separated by :",
        "none",
        _parse_paths,
        "Directories with ready kernels, searched first and never written.",
    ),
    _row(
        "NO_CACHE",
        "bool",
        "0",
        _parse_bool,
        "Compile without CACHE_DIR; kernels live in memory alone. `cache` commands work on it all the same.",
    ),
    _row("DISABLE_JIT", "bool", "0", _parse_bool, "Forbid compiling; a kernel that is not cached is an error."),
    _row("NVRTC", "path", "found automatically", _parse_path, "The libnvrtc shared library to compile with."),
    _row(
        "STRICT",
        "error | warn | ignore",
        "error",
        _one_of(*STRICT_LEVELS),
        "What to do when ptxas spills registers or reports a C75xx performance advisory.",
    ),
    _row(
        "DUMP_DIR",
        "path",
        "unset",
        _parse_path,
        "Keep source, PTX, cubin and log of each kernel that is compiled here.",
    ),
    _row("LOG_LEVEL", "level name", "unset", _one_of(*LOG_LEVELS), "Log to stderr from this level on."),
    _row(
        "TIMEOUT_S",
        "float",
        "100",
        _number(float, 1e-3, "a number of seconds from 0.001 to 1e9", 1e9),  # in ns, times 5, it must fit 63 bits
        "Seconds a wait inside a kernel may take, 1 to 5 times as long by what it is for, before it gives up.",
    ),
    _row(
        "VARIANT",
        " | ".join(VARIANT_CHOICES),
        "auto",
        _one_of(*VARIANT_CHOICES),
        "Kernel variant; auto lets the heuristics choose.",
    ),
    _row(
        "COOPERATIVE_THRESHOLD",
        "int",
        "as measured on this GPU, else 256",
        _number(int, 0, "a whole number, zero or more"),
        "Tokens per rank from which auto takes the cooperative variant, of packed weights another than decode; "
        "overrules what was measured.",
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
    _row(
        "DEBUG", "bool", "0", _parse_bool, "Validate expert ids on the host before each launch (slow); not in a graph."
    ),
    _row(
        "L2_SIDES",
        "bool",
        "1",
        _parse_bool,
        "Measure which half of the L2 each SM is next to, and let each half read its own weights.",
    ),
    _row("PTXAS_OPTIONS", "words", "none", _parse_words, "Extra ptxas options, separated by spaces."),
)
