"""`megamoe_jit/_spec/abi.py` is what the headers say, and its generator notices what it cannot see."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megamoe_jit._spec import MAX_TOKENS, MAX_TOPK
from megamoe_jit._spec import abi as _abi
from megamoe_jit._spec.abi import Wait
from tests import abi, host


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that the generator reads instead, and reads anew."""
    copy = shutil.copytree(host.KERNELS, tmp_path / "kernels_src")
    monkeypatch.setattr(host, "KERNELS", copy)
    monkeypatch.setattr(host, "room", host.room.__wrapped__)
    return copy


def test_it_is_up_to_date():
    assert Path(_abi.__file__).read_text(encoding="utf-8") == abi.text(), "run `make abi`"


@pytest.mark.parametrize(
    ("room", "old", "new", "problem"),
    [
        (
            "layout/params.cuh",
            "u64 timeout_ns;\n",
            "u64 timeout_ns;\n    u32 odd;\n    u64 wide;\n",
            "a hole before Params::wide",
        ),
        (
            "layout/params.cuh",
            "u64 timeout_ns;\n",
            "MEGA_HIDDEN\n    u64 timeout_ns;\n",
            "a member that was overlooked",
        ),
        ("comm/fault.cuh", "row_loaded = 5", "row_loaded = 4", "one value"),
        ("comm/fault.cuh", "enum class Wait", "enum class Awaited", "no longer declares"),
    ],
)
def test_a_change_that_python_would_not_see_is_an_error(kernels: Path, room, old, new, problem):
    path = kernels / room
    text = path.read_text().replace(old, new)
    if "MEGA_HIDDEN" in new:
        text = text.replace("namespace megamoe {", "#define MEGA_HIDDEN u64 hidden;\nnamespace megamoe {", 1)
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(AssertionError, match=problem):
        abi.text()


def test_a_new_constant_appears_in_the_text(kernels: Path):
    path = kernels / "comm/fault.cuh"
    path.write_text(path.read_text().replace("gemm2_done = 14,", "gemm2_done = 14,\n    other_thing = 16,"))
    assert set(abi.text().splitlines()) - set(Path(_abi.__file__).read_text().splitlines()) == {"    OTHER_THING = 16"}


def test_every_wait_is_used_by_a_room_and_fits_its_byte_of_the_record():
    text = "\n".join(host.without_comments(path.read_text()) for path in sorted(host.KERNELS.rglob("*.cuh")))
    assert [wait.name for wait in Wait if f"Wait::{wait.name.lower()}" not in text] == []
    assert all(0 < wait < 256 for wait in Wait)


def test_a_pair_has_bits_for_every_token_and_slot():
    assert 1 << _abi.PAIR_BITS >= MAX_TOKENS * MAX_TOPK
