"""Which tests pytest-xdist gives to one worker: those of a file, which share its fixtures; or those of one kernel.

Kernels come last, one by one: what takes long and cannot be cut is under way by then, and they fill up what is left.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Units with the most tests first, which is what its base does, so that units of one or two are the last."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(nodeid: str) -> str:
    """What the tests have in common that one worker must run: a kernel's name in brackets, or a file.

    Tests of one kernel in several files of `tests/compile` are together: nobody waits while another compiles it.
    """
    file, _, test = nodeid.partition("::")
    name = test.partition("[")[2]
    return f"[{name}" if name and "tests/compile/" in file else file
