"""The GPU tests that break the kernel sources must still find the lines they break: noticed here, without a GPU."""

from __future__ import annotations

import pytest

from tests import host
from tests.gpu.test_faults import BROKEN


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_that_is_broken_is_there_once(name: str) -> None:
    room, line, _, _ = BROKEN[name]
    assert host.room(room).count(line) == 1
