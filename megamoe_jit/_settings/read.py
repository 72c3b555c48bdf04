"""What the environment and a settings file say, each value parsed, and which of them is not allowed.

`_settings` puts the two together and says which file it is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megamoe_jit._errors import ConfigError
from megamoe_jit._files import read_toml
from megamoe_jit._settings.variables import PREFIX, VARIABLES, Variable
from megamoe_jit._text import several, shown

LOG = logging.getLogger("megamoe_jit")
_OURS = "megamoe-jit"  #: name of our table among `[tool.*]`
_LONGEST_NAME = 64  #: of what a guess is made about
_MOST_HINTS = 20  #: unknown names with a guess at what was meant: each takes a millisecond
_STANDARD_TABLES = ("project", "build-system", "dependency-groups")  #: what a pyproject.toml holds beside `[tool.*]`


class Fault(NamedTuple):
    """A value that is not allowed.

    Attributes:
        field: of `Settings`; `config` where the file as a whole is at fault.
        value: what was written there.
        source: where, as `Settings.source` says it.
        message: what is wrong, and what is allowed.
    """

    field: str
    value: Any
    source: str
    message: str


def _refuse(faults: list[Fault] | None, fault: Fault) -> None:
    """Raise `ConfigError`, unless somebody collects what is wrong."""
    if faults is None:
        raise ConfigError(fault.message) from None
    faults.append(fault)


def read_environment(environ: Mapping[str, str], faults: list[Fault] | None = None) -> dict[str, Any]:
    """The values in the environment, by field.

    Args:
        environ: usually `os.environ`.
        faults: takes what would be an error.

    Raises:
        ConfigError: a value is not allowed.
    """
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        text = environ.get(variable.name, "").strip()
        if not text:
            continue
        try:
            values[variable.field] = variable.parse(text)
        except ValueError as error:
            message = f"{variable.name}={shown(text)} is not allowed; allowed: {error}"
            _refuse(faults, Fault(variable.field, text, "environment", message))
    known = {variable.name.removeprefix(PREFIX): variable.name for variable in VARIABLES}
    strange = [name for name in environ if name.startswith(PREFIX) and name not in known.values()]
    meant = {name: _meant(name.removeprefix(PREFIX), known) for name in strange[:_MOST_HINTS]}
    _warn("unknown environment variables", {**dict.fromkeys(strange, ""), **meant})
    return values


def read_file(
    path: Path, must_exist: bool, faults: list[Fault] | None = None
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The values in a settings file, and what it holds to no effect: unknown names with what was probably meant, and
    others with the reason. Its relative paths are relative to it.

    Args:
        path: of the file.
        must_exist: whether somebody named it.
        faults: takes what would be an error about one value.

    Raises:
        ConfigError: a value is not allowed, or the file as a whole means nothing.
    """
    try:
        document = read_toml(path)
    except (FileNotFoundError, NotADirectoryError):  # the home of some accounts is /dev/null
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
    hints = _MOST_HINTS
    for prefix, table in _tables(document, path):
        for key, value in table.items():
            name, variable = prefix + key, rows.get(key.replace("-", "_"))
            if variable is None:
                hints -= 1
                unknown.setdefault(name, _meant(_field(key), {row: row for row in rows}) if hints >= 0 else "")
            elif value != "":
                try:
                    parsed = _parse_toml(variable, value, path)
                except ValueError as error:
                    message = f"settings file {path}: {name} = {shown(value)} is not allowed; allowed: {error}"
                    _refuse(faults, Fault(variable.field, _plain(value), f"file {path}", message))
                    continue
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
        return len(name) < 4 * len(_OURS) and bool(_like(name.lower().replace("_", "-"), [_OURS], cutoff=0.75))

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


def _plain(value: object) -> object:
    """A value of a file, or text instead of it where JSON has none of that size."""
    try:
        json.dumps(value, default=str)
    except (ValueError, RecursionError):
        return shown(value)
    return value


def _parse_toml(variable: Variable, value: object, path: Path) -> Any:
    """A TOML value means what its text would mean in the environment; a list is one value per element.

    Raises:
        ValueError: says what is allowed.
    """
    several = isinstance(value, list) and variable.kind in ("paths", "words")
    items: list[object] = [*value] if several and isinstance(value, list) else [value]
    types = {"bool": bool | int | str, "number": int | float | str}.get(variable.kind, str)
    if not all(isinstance(i, types) and (variable.kind == "bool" or not isinstance(i, bool)) for i in items):
        raise ValueError(variable.allowed)
    texts = [str(item).strip() for item in items]
    if variable.kind in ("path", "paths"):
        texts = [os.path.join(path.parent, os.path.expanduser(text)) for text in texts if text]
    return variable.parse((os.pathsep if variable.kind == "paths" else " ").join(texts))


def _like(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known name that is most like this one, if one is."""
    import difflib  # where there is something to complain about

    return difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)


def _meant(name: str, known: Mapping[str, str]) -> str:
    """A question after the known name that is most like this one, by what tells them apart; empty if none is."""
    close = _like(name[:_LONGEST_NAME], known)
    return f"did you mean {known[close[0]]}?" if close else ""


def _warn(what: str, names: Mapping[str, str]) -> None:
    if names:
        LOG.warning("%s are ignored: %s", what, listed(names))


def listed(names: Mapping[str, str]) -> str:
    """Names in order, each with its reason, as in `Settings.ignored`; of very many the first ones."""
    return several(f"{name} ({names[name]})" if names[name] else name for name in sorted(names))
