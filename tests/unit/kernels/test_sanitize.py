"""`python -m tests.sanitize`: what it makes of the kernels' sources, and of what compute-sanitizer's tools say."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megamoe_jit._compile.render import kernels_dir
from megamoe_jit._settings.settings import override
from tests import sanitize

CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
NO_ERROR = "========= COMPUTE-SANITIZER\noutput right\n========= ERROR SUMMARY: 0 errors"
READS = "megamoe::ptx::load_float_shared(unsigned int)"
WRITE = "megamoe::ptx::bulk_load(unsigned int, const void *, unsigned int, unsigned int)"
RACES = f"""output right
========= Error: Race reported between Write access at {WRITE}+0x330 in tma.cuh:26
=========     and Read access at {READS}+0x43d0 in memory.cuh:162 [12608 hazards]
=========     and Read access at {READS}+0x4f90 in memory.cuh:162 [12192 hazards]
=========
========= Error: Race reported between Write access at {WRITE}+0x660 in tma.cuh:26
=========     and Read access at {READS}+0x4710 in memory.cuh:162 [31 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
RACE = "Write access at ptx::bulk_load in tma.cuh:26 and Read access at ptx::load_float_shared in memory.cuh:162"
#: one place twice, by other threads at other addresses, and another
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at megamoe::ptx::load(const unsigned int *)+0x70 in memory.cuh:40
=========     by thread (1,0,0) in block (0,0,0)
=========     Address 0x7b3c42e00400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7b3c42e00000 of size 1,024 bytes
=========         Device Frame: megamoe::dispatch(megamoe::Work &)+0x60 in rows.cuh:51
=========
========= Invalid __global__ read of size 4 bytes
=========     at megamoe::ptx::load(const unsigned int *)+0x90 in memory.cuh:40
=========     by thread (2,0,0) in block (7,0,0)
=========     Address 0x7b3c42e00404 is out of bounds
=========     and is 5 bytes after the nearest allocation at 0x7b3c42e00000 of size 1,024 bytes
=========         Device Frame: megamoe::dispatch(megamoe::Work &)+0x80 in rows.cuh:51
=========
========= Invalid __shared__ write of size 16 bytes
=========     at megamoe::ptx::store_shared(unsigned int)+0x20 in memory.cuh:90
=========     by thread (2,0,0) in block (7,0,0)
=========     Access to 0x402 is misaligned
=========
Traceback (most recent call last):
  File "sanitize.py", line 1
RuntimeError: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 257 errors
========= ERROR SUMMARY: 157 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
FAR = "Invalid __global__ read of size 4 bytes at ptx::load in memory.cuh:40 Address is out of bounds "
INVALID = [
    FAR + "Device Frame: dispatch in rows.cuh:51",
    "Invalid __shared__ write of size 16 bytes at ptx::store_shared in memory.cuh:90 Access is misaligned",
]


def test_kernels_for_racecheck_are_the_others_but_for_one_line(tmp_path: Path):
    made, own = sanitize.every_lane(tmp_path), kernels_dir()
    names = sorted(path.relative_to(own) for path in own.glob("*/*"))
    assert names == sorted(path.relative_to(made) for path in made.glob("*/*"))
    (changed,) = (name for name in names if (made / name).read_bytes() != (own / name).read_bytes())
    before, after = ((root / changed).read_text().splitlines() for root in (own, made))
    different = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert different == [
        tuple(f"constexpr u32 {line}   // of a warp" for line in (sanitize.ONE_LANE, sanitize.EVERY_LANE))
    ]


def test_kernels_that_are_being_changed_are_judged_as_they_are_now(tmp_path: Path):
    mine = sanitize.every_lane(tmp_path / "mine")
    text = (mine / sanitize.ROOM).read_text().replace(sanitize.EVERY_LANE, sanitize.ONE_LANE)
    (mine / sanitize.ROOM).write_text(f"// mine\n{text}")
    with override(kernels_src=mine):
        made = sanitize.every_lane(tmp_path / "made")
    assert (made / sanitize.ROOM).read_text().startswith("// mine\n")


@pytest.mark.parametrize(
    ("report", "places"),
    [(RACES, [RACE]), (OUT_OF_BOUNDS, INVALID), (CLEAN, []), (NO_ERROR, [])],
)
def test_a_place_is_named_once(report: str, places: list[str]):
    assert sanitize.places(report) == places


@pytest.mark.parametrize(
    ("code", "report", "well", "words"),
    [
        (0, CLEAN, True, ("0 hazards", "output right")),
        (0, NO_ERROR, True, ("0 errors", "output right")),
        (0, RACES, False, ("2 hazards", "output right", RACE)),
        (1, OUT_OF_BOUNDS, False, ("257 errors", "ended with 1", *INVALID, "RuntimeError")),
        (1, f"row diff 3\n{CLEAN}", False, ("0 hazards", "ended with 1", "row diff 3")),
        (-1, "=========", False, ("not judged", "ended with -1")),
        (0, "output right", False, ("not judged", "output right")),
    ],
)
def test_nothing_named_and_a_right_output_are_both_needed(
    capsys: pytest.CaptureFixture[str], code: int, report: str, well: bool, words: tuple[str, ...]
):
    assert sanitize.say("memcheck wide/mxfp4", code, report, 1.0) is well
    said = capsys.readouterr().out
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ([], {"racecheck": True, "memcheck": False}),
        (["--as-is", "--tool", "racecheck"], {"racecheck": False}),
        (["--tool", "memcheck"], {"memcheck": False}),
    ],
)
def test_every_lane_arrives_for_racecheck_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], every: dict[str, bool]
):
    def judged(sanitizer: str, tool: str, kernel: str, environment: dict[str, str]) -> tuple[int, str]:
        seen[tool] = environment["every"] == "True"
        return 0, f"{sanitizer} {kernel} {NO_ERROR}"

    seen: dict[str, bool] = {}
    monkeypatch.setattr(sanitize, "find_tool", lambda name: name)
    monkeypatch.setattr(sanitize, "prepared", lambda specs, folder, *, every: {"every": str(every)})
    monkeypatch.setattr(sanitize, "judged", judged)
    assert sanitize.main(["wide/mxfp4", "--logs", str(tmp_path), *options]) == 0
    assert seen == every
    assert {path.name for path in tmp_path.iterdir()} == {f"{tool}-wide-mxfp4.txt" for tool in every}


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
        monkeypatch.setattr(sanitize, "SECONDS", seconds)
        assert sanitize.judged(str(tool), "memcheck", "wide/mxfp4", dict(os.environ)) == (-1, "")
        if started.exists():
            break
    pid = started.read_text().strip()
    while_ends = (time.sleep(0.02) for _ in range(250))
    assert any(not is_running(pid) for _ in while_ends)
