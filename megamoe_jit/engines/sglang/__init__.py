"""The plug-in of SGLang: `--moe-a2a-backend megamoe`, and `--moe-runner-backend megamoe_jit` without any all-to-all.

`register` is the entry point of group `sglang.srt.plugins`, called in every process of an engine before it starts.
"""

from __future__ import annotations

from megamoe_jit.engines.aside import guarded
from megamoe_jit.engines.seams import fits

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

    if not fits("sglang", seams.SHARED + seams.MEGA):
        return
    from megamoe_jit.engines.sglang import mega, runner

    mega.hook()
    if fits("sglang", seams.RUNNER, "--moe-runner-backend megamoe_jit"):
        runner.hook()
