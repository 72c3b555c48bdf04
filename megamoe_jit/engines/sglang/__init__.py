"""The plug-in of SGLang: `--moe-a2a-backend megamoe`, and `--moe-runner-backend megamoe_jit` without any all-to-all.

`register` is the entry point of group `sglang.srt.plugins`, called in every process of an engine before it starts.
"""

from __future__ import annotations

from megamoe_jit.engines.aside import guarded, step_aside
from megamoe_jit.engines.seams import misfits, root_of

__all__ = ["register"]

_registered = False


@guarded("sglang")
def register() -> None:
    """Hook the layer into SGLang, as far as the installed release is as expected; else warn once and leave it alone."""
    global _registered
    if _registered:
        return
    _registered = True
    from megamoe_jit.engines.sglang import seams

    root = root_of("sglang")
    if root is None:
        step_aside("sglang", ["there is no package sglang"])
        return
    moved = misfits(seams.SHARED + seams.MEGA, root)
    if moved:
        step_aside("sglang", moved)
        return
    from megamoe_jit.engines.sglang import mega, runner

    mega.hook()
    moved = misfits(seams.RUNNER, root)
    if moved:
        step_aside("sglang --moe-runner-backend megamoe_jit", moved)
        return
    runner.hook()
