"""Hooks of SGLang's registry, and whether calls really arrive at them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

PROBE: Any = type("Probe", (), {})()  #: a hook answers with it to a call that is given it, and does nothing


def around(target: str, hook: Callable[..., Any]) -> None:
    """Have calls of `target` go to `hook`, which gets the original as its first argument."""
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry.HookRegistry.register(target, hook, registry.HookType.AROUND)


def unreached(targets: Iterable[tuple[str, int]]) -> list[str]:
    """Those whose calls do not come to our hooks, as when SGLang could not apply one.

    Args:
        targets: names, and how many arguments come before the one that a hook looks at.
    """
    return [name for name, before in targets if not _reaches(name, before)]


def _reaches(target: str, before: int) -> bool:
    import pkgutil

    try:
        return pkgutil.resolve_name(target)(*[None] * before, PROBE) is PROBE
    except Exception:  # the original, which this is no call of
        return False
