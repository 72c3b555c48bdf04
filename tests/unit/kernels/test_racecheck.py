"""`python -m tests.racecheck`: what it makes of the kernels' sources, and of what compute-sanitizer says."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megamoe_jit._compile.render import kernels_dir
from megamoe_jit._settings.settings import override
from tests import racecheck

CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
READS = "megamoe::ptx::load_float_shared(unsigned int)"
WRITE = "megamoe::ptx::bulk_load(unsigned int, const void *, unsigned int, unsigned int)"
NAMED = f"""output right
========= Error: Race reported between Write access at {WRITE}+0x330 in tma.cuh:26
=========     and Read access at {READS}+0x43d0 in memory.cuh:162 [12608 hazards]
=========     and Read access at {READS}+0x4f90 in memory.cuh:162 [12192 hazards]
=========
========= Error: Race reported between Write access at {WRITE}+0x660 in tma.cuh:26
=========     and Read access at {READS}+0x4710 in memory.cuh:162 [31 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
PLACE = "Write access at ptx::bulk_load in tma.cuh:26 and Read access at ptx::load_float_shared in memory.cuh:162"


def test_kernels_for_racecheck_are_the_others_but_for_one_line(tmp_path: Path):
    made, own = racecheck.every_lane(tmp_path), kernels_dir()
    names = sorted(path.relative_to(own) for path in own.glob("*/*"))
    assert names == sorted(path.relative_to(made) for path in made.glob("*/*"))
    (changed,) = (name for name in names if (made / name).read_bytes() != (own / name).read_bytes())
    before, after = ((root / changed).read_text().splitlines() for root in (own, made))
    different = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert different == [
        tuple(f"constexpr u32 {line}   // of a warp" for line in (racecheck.ONE_LANE, racecheck.EVERY_LANE))
    ]


def test_kernels_that_are_being_changed_are_judged_as_they_are_now(tmp_path: Path):
    mine = racecheck.every_lane(tmp_path / "mine")
    text = (mine / racecheck.ROOM).read_text().replace(racecheck.EVERY_LANE, racecheck.ONE_LANE)
    (mine / racecheck.ROOM).write_text(f"// mine\n{text}")
    with override(kernels_src=mine):
        made = racecheck.every_lane(tmp_path / "made")
    assert (made / racecheck.ROOM).read_text().startswith("// mine\n")


def test_a_place_is_named_once():
    assert racecheck.places(NAMED) == [PLACE]
    assert racecheck.places(CLEAN) == []


@pytest.mark.parametrize(
    ("code", "report", "well", "words"),
    [
        (0, CLEAN, True, ("0 hazards", "output right")),
        (0, NAMED, False, ("2 hazards", "output right", PLACE)),
        (1, f"row diff 3\n{CLEAN}", False, ("0 hazards", "ended with 1", "row diff 3")),
        (-1, "=========", False, ("not judged", "ended with -1")),
        (0, "output right", False, ("not judged", "output right")),
    ],
)
def test_no_hazard_and_a_right_output_are_both_needed(
    capsys: pytest.CaptureFixture[str], code: int, report: str, well: bool, words: tuple[str, ...]
):
    assert racecheck.say("wide/mxfp4", code, report, 1.0) is well
    said = capsys.readouterr().out
    assert [word for word in words if word not in said] == []


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_sanitizer_that_does_not_come_back_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tool, started = tmp_path / "compute-sanitizer", tmp_path / "started"
    tool.write_text(
        f"#!/bin/sh\nsleep 60 >/dev/null 2>&1 &\necho $! >{started}.new\nmv {started}.new {started}\nwait\n"
    )
    tool.chmod(0o755)
    for seconds in (0.2, 1, 5, 25):  # as a busy machine needs
        monkeypatch.setattr(racecheck, "SECONDS", seconds)
        assert racecheck.judged(str(tool), "wide/mxfp4", dict(os.environ)) == (-1, "")
        if started.exists():
            break
    pid = started.read_text().strip()
    while_ends = (time.sleep(0.02) for _ in range(250))
    assert any(not is_running(pid) for _ in while_ends)
