"""Checks of values that somebody wrote: each raises one `ConfigError` that says which value, and what is allowed."""

from __future__ import annotations

import math
import numbers
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown

__all__ = ["check", "check_callback", "check_clamp", "check_fields", "check_flag", "check_float32", "check_int"]


def check(ok: bool, what: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` unless it is `ok`, with the value and what is allowed."""
    if not ok:
        raise ConfigError(f"{what} = {shown(value)} is not supported; allowed: {allowed}")


def check_fields(
    what: str, data: dict[str, Any], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The data, if they are a table with these fields and no others."""
    check(isinstance(data, dict), what, data, f"a table with {', '.join(needed)}")
    for name in needed:
        check(name in data, what, data, f"a table with {', '.join(needed)}; it has no {name}")
    for name in data:
        check(name in needed + optional, what, data, f"a table with {', '.join(needed)}; not {shown(name)}")
    return data


def check_int(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is an integer, which a bool is not."""
    check(type(value) is int, what, value, "an integer")


def check_flag(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    check(type(value) is bool, what, value, "True or False")


def check_callback(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` can be called, or is None."""
    check(value is None or callable(value), what, value, "a function, or None")


def _as_float32(number: float) -> float:
    import ctypes  # the command line imports this module for its listings too

    return ctypes.c_float(number).value


def check_float32(what: str, value: float) -> float:
    """The value as a float; raises `ConfigError` unless it is a number that float32 holds."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
            if math.isfinite(_as_float32(number)):
                return number
        except OverflowError:  # an integer that no float holds
            pass
    raise ConfigError(f"{what} = {shown(value)} is not supported; allowed: a number that float32 holds")


def check_clamp(name: str, clamp: float | None) -> float:
    """Raise unless this is a bound or None; as the kernel takes it (infinity for none)."""
    if clamp is None:
        return math.inf
    bound = -1.0
    if type(clamp) is float or (isinstance(clamp, numbers.Real) and not isinstance(clamp, bool)):  # floats at once
        try:
            bound = _as_float32(float(clamp))  # as the kernel has it
        except OverflowError:  # an integer that no float holds
            bound = math.inf
    if not bound >= 0 or (bound == math.inf and clamp != math.inf):
        allowed = "0 or a positive number that float32 holds, or None"
        raise ConfigError(f"{name} = {shown(clamp)} is not supported; allowed: {allowed}")
    return bound
