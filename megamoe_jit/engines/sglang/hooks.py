"""Hooks of SGLang's registry, and whether calls really arrive at them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

PROBE: Any = type("Probe", (), {})()  #: a hook answers with it to a call that is given it, and does nothing


def around(target: str, hook: Callable[..., Any]) -> None:
    """Have calls of `target` go to `hook`, which gets the original as its first argument."""
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry.HookRegistry.register(target, hook, registry.HookType.AROUND)


def reaches(target: str, before: int) -> bool:
    """Whether calls of `target` come to a hook of ours, which they do not where SGLang could not apply it.

    Args:
        target: its name.
        before: how many arguments come before the one that the hook looks at.
    """
    try:
        return pkgutil.resolve_name(target)(*[None] * before, PROBE) is PROBE
    except Exception:  # the original, which this is no call of
        return False
