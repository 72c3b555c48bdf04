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
import difflib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._variables import (
    PREFIX,
    VARIABLES,
    Variable,
    cpu_count,
    default_cache_dir,
    default_config_file,
    parse_size,
)

__all__ = [
    "PREFIX",
    "VARIABLES",
    "Settings",
    "Variable",
    "default_cache_dir",
    "default_config_file",
    "get_settings",
    "listed",
    "override",
    "parse_size",
]

LOG = logging.getLogger("megamoe_jit")
_OURS = "megamoe-jit"  #: name of our table among `[tool.*]`
_STANDARD_TABLES = ("project", "build-system", "dependency-groups")  #: what a pyproject.toml holds beside `[tool.*]`


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
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read every variable from the environment alone; an empty value means the default.

        Args:
            environ: usually `os.environ`.

        Raises:
            ConfigError: a value is not allowed; says which variable, the value, and what is allowed.
        """
        values, sources = _from_environment(environ)
        return cls(**values, sources=sources)

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Settings:
        """Read the environment and, for what it does not set, the settings file.

        Args:
            environ: usually `os.environ`; may name the file.

        Raises:
            ConfigError: a value is not allowed, or the file that was named cannot be read.
        """
        values, sources = _from_environment(environ)
        named: Path | None = values.get("config")
        path = named or default_config_file()
        written, unknown, lost = _from_file(path, must_exist=named is not None)
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


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        text = environ.get(variable.name, "").strip()
        if not text:
            continue
        try:
            values[variable.field] = variable.parse(text)
        except ValueError as error:
            raise ConfigError(f"{variable.name}={text!r} is not allowed; allowed: {error}") from None
    known = {variable.name.removeprefix(PREFIX): variable.name for variable in VARIABLES}
    strange = [name for name in environ if name.startswith(PREFIX) and name not in known.values()]
    _warn("unknown environment variables", {name: _meant(name.removeprefix(PREFIX), known) for name in strange})
    return values, dict.fromkeys(values, "environment")


def _from_file(path: Path, must_exist: bool) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The values in a settings file, and what it holds to no effect: unknown names with what was probably meant, and
    others with the reason. Its relative paths are relative to it.
    """
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"settings file {path} (from {PREFIX}CONFIG) does not exist") from None
        return {}, {}, {}
    except OSError as error:
        if must_exist:
            raise ConfigError(f"cannot read settings file {path}: {error.strerror}") from None
        LOG.warning("cannot read settings file %s: %s", path, error.strerror)
        return {}, {}, {"all of it": f"cannot be read: {error.strerror}"}
    except ValueError as error:  # not TOML, not UTF-8
        raise ConfigError(f"settings file {path} is not valid TOML: {error}") from None
    rows = {variable.field: variable for variable in VARIABLES if variable.field != "config"}
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    unknown = _misplaced(document, rows)
    lost: dict[str, str] = {}
    for prefix, table in _tables(document, path):
        for key, value in table.items():
            name, variable = prefix + key, rows.get(key.replace("-", "_"))
            if variable is None:
                unknown.setdefault(name, _meant(_field(key), {row: row for row in rows}))
            elif value != "":
                parsed = _parse_toml(variable, name, value, path)
                if values.get(variable.field, parsed) != parsed:
                    lost[names[variable.field]] = f"{name} wins"
                values[variable.field], names[variable.field] = parsed, name
    _warn(f"unknown keys in {path}", unknown)
    _warn(f"keys in {path} that another one overrules", lost)
    return values, unknown, lost


def _tables(document: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where settings may stand in a file, the place that wins last: how their names begin, and the keys there."""
    others = {name for name in ("tool", *_STANDARD_TABLES) if isinstance(document.get(name), dict)}
    yield "", {key: value for key, value in document.items() if key not in others}
    ours = document["tool"].get(_OURS, {}) if "tool" in others else {}
    if not isinstance(ours, dict):
        raise ConfigError(f"settings file {path}: tool.{_OURS} must be a table")
    yield f"tool.{_OURS}.", ours


def _misplaced(document: Mapping[str, Any], rows: Mapping[str, Variable]) -> dict[str, str]:
    """Names in a file that are nearly our table, or keys beside it, with what was meant; other tools' are theirs."""

    def nearly_ours(name: str) -> bool:
        return bool(difflib.get_close_matches(name.lower().replace("_", "-"), [_OURS], cutoff=0.75))

    def is_table(value: object) -> bool:
        several = value if isinstance(value, list) and value else [value]
        return all(isinstance(each, dict) for each in several)

    found = {key: f"did you mean tool.{_OURS}?" for key in document if is_table(document[key]) and nearly_ours(key)}
    tool = document.get("tool")
    for key, value in tool.items() if isinstance(tool, dict) else ():
        field = _field(key)
        if key == _OURS:
            continue
        if is_table(value):
            if nearly_ours(key):
                found[f"tool.{key}"] = f"did you mean {_OURS}?"
        elif field in rows:
            found[f"tool.{key}"] = f"did you mean tool.{_OURS}.{field}?"
        elif not isinstance(value, list):
            found[f"tool.{key}"] = ""
    return found


def _field(key: str) -> str:
    """What a key would be called if it were written as it should be: in lower case, without the prefix."""
    return key.lower().replace("-", "_").removeprefix(PREFIX.lower())


def _parse_toml(variable: Variable, key: str, value: object, path: Path) -> Any:
    """A TOML value means what its text would mean in the environment; a list is one value per element."""
    several = isinstance(value, list) and variable.kind in ("paths", "words")
    items: list[object] = [*value] if several and isinstance(value, list) else [value]
    types = {"bool": bool | int | str, "number": int | float | str}.get(variable.kind, str)
    if not all(isinstance(i, types) and (variable.kind == "bool" or not isinstance(i, bool)) for i in items):
        raise ConfigError(f"settings file {path}: {key} = {value!r} is not allowed; allowed: {variable.type}")
    texts = [str(item).strip() for item in items]
    if variable.kind in ("path", "paths"):
        texts = [os.path.join(path.parent, os.path.expanduser(text)) for text in texts if text]
    text = (os.pathsep if variable.kind == "paths" else " ").join(texts)
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ConfigError(f"settings file {path}: {key} = {value!r} is not allowed; allowed: {error}") from None


def _meant(name: str, known: Mapping[str, str]) -> str:
    """A question after the known name that is most like this one, by what tells them apart; empty if none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {known[close[0]]}?" if close else ""


def _warn(what: str, names: Mapping[str, str]) -> None:
    if names:
        LOG.warning("%s are ignored: %s", what, listed(names))


def listed(names: Mapping[str, str]) -> str:
    """Names in order, each with its reason, as in `Settings.ignored`."""
    return ", ".join(f"{name} ({names[name]})" if names[name] else name for name in sorted(names))


_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
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
