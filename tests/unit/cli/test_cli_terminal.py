"""The command line on a real pseudo-terminal, and away from one."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from megamoe_jit._cli._live import _fitting
from tests.commandline import COOPERATIVE, PINGPONG, STAGED, Terminal, checked, run, warm_cache

ESCAPE = "\x1b"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
COLOUR = re.compile(r"\x1b\[[0-9;]*3\dm")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_live_line_for_every_kernel(tmp_path: Path):
    terminal = Terminal("warmup", *STAGED, "--jobs", "1", "--cache-dir", str(tmp_path))
    terminal.read_until(lambda text: "waiting" in text)
    assert HIDE_CURSOR in terminal.output
    assert COLOUR.search(terminal.output)
    shown = plain(terminal.output)
    assert re.search(rf"working   {PINGPONG} +\d+\.\d s", shown), "it is being compiled"
    assert re.search(rf"waiting   {COOPERATIVE}\r\n", shown), "one at a time"
    assert terminal.wait() == 0
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.rindex(HIDE_CURSOR)
    shown = plain(terminal.output)
    assert re.search(rf"compiled  {PINGPONG} +\d+\.\d\d s", shown)
    assert "2 of 2 done" in shown
    assert re.search(rf"{PINGPONG} +compiled +\d+ +0 +\d+ +\d+\.\d\d", shown), "the table comes last"
    assert "2 compiled, 0 cached, 0 failed" in shown


def test_lines_stay_where_no_table_follows_on_the_terminal(tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    terminal = Terminal("warmup", *STAGED, "--json", "--cache-dir", str(root), stdout=subprocess.PIPE)
    assert terminal.wait() == 0
    assert re.search(rf"cached    {COOPERATIVE} +\d+\.\d\d s\r\n", plain(terminal.output).split("2 of 2 done")[-2])
    assert terminal._process.stdout is not None
    doc = checked(terminal._process.stdout.read().decode())
    assert doc["cached"] == 2


@pytest.mark.parametrize(
    ("environ", "lives"), [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False), ({}, True)], ids=str
)
def test_terminals_that_want_less(environ: dict[str, str], lives: bool, tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    terminal = Terminal("warmup", *STAGED, "--cache-dir", str(root), **environ)
    assert terminal.wait() == 0
    assert (HIDE_CURSOR in terminal.output) == lives
    if environ:
        assert not STYLE.search(terminal.output)
    if not lives:
        assert ESCAPE not in terminal.output
        assert re.search(rf"^cached    {PINGPONG}  \d\.\d\d s\r$", terminal.output, re.MULTILINE)


def test_more_kernels_than_lines(tmp_path: Path):
    """What does not fit is counted, and the display never scrolls."""
    terminal = Terminal(
        *("warmup", "--shapes", "all", "--inputs", "staged", "--cache-dir", str(tmp_path)),
        rows=8,
        MEGAMOE_JIT_NVRTC="/nonexistent/libnvrtc.so",
    )
    assert terminal.wait() == 3
    shown = plain(terminal.output)
    assert re.search(r"and 1\d more", shown)
    assert shown.count("/nonexistent/libnvrtc.so") == 1


def test_away_from_a_terminal_there_are_plain_lines(tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    done = run("warmup", *STAGED, "--cache-dir", str(root), TERM="xterm")
    assert done.returncode == 0
    assert ESCAPE not in done.stdout + done.stderr
    assert {line.split()[1] for line in done.stderr.splitlines()[:2]} == {PINGPONG, COOPERATIVE}
    assert len(done.stdout.splitlines()) == 3


def test_doctor_colours_its_verdicts_only_where_wanted():
    terminal = Terminal("doctor", "--no-trial")
    terminal.wait()
    assert COLOUR.search(terminal.output)
    terminal = Terminal("doctor", "--no-trial", NO_COLOR="1")
    terminal.wait()
    assert ESCAPE not in terminal.output


SHAPES = """
[a]
hidden = 256
intermediate = 128
experts = 8
topk = 1
[b]
hidden = 256
intermediate = 256
experts = 8
topk = 1
[c]
hidden = 384
intermediate = 128
experts = 8
topk = 1
"""


def test_ctrl_c_leaves_a_whole_cache(tmp_path: Path):
    (tmp_path / "three.toml").write_text(SHAPES)
    root = tmp_path / "cache"
    arguments = (
        "warmup",
        "--shapes",
        str(tmp_path / "three.toml"),
        "--inputs",
        "staged",
        "--jobs",
        "1",
        "--cache-dir",
        str(root),
    )
    terminal = Terminal(*arguments)
    terminal.read_until(lambda text: "compiled" in text)
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert "Traceback" not in terminal.output
    assert "interrupted" in terminal.output
    assert re.search(r"[1-5] of 6 kernels are ready and kept; of the others, none was finished", terminal.output)
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.rindex(HIDE_CURSOR)

    checked_after = run("cache", "verify", "--json", "--cache-dir", str(root))
    assert checked_after.returncode == 0
    kept = checked(checked_after.stdout)["entries"]
    assert 1 <= kept < 6
    assert list((root / "v1" / ".tmp").iterdir()) == []
    again = checked(run(*arguments, "--dry-run", "--json").stdout)
    assert (again["cached"], again["missing"]) == (kept, 6 - kept)


def test_names_on_a_narrow_terminal_differ():
    names = [f"megamoe_{v}_h4096_i2048_e256_k{k}_r1_fast" for v in ("pingpong", "cooperative") for k in (6, 8)]
    for room in range(12, 60):
        shown = [_fitting(name, room) for name in names]
        assert max(map(len, shown)) <= max(room, len("coop…") + 8)
        assert room < 17 or len(set(shown)) == len(names)
    assert _fitting(names[0], 80) == names[0]
    assert _fitting(names[0], 40) == names[0].removeprefix("megamoe_")
    assert _fitting(names[2], 20) == "coop…e256_k6_r1_fast"


@pytest.mark.parametrize(("answer", "code", "left"), [("y\r", 0, 0), ("n\r", 1, 2)])
def test_clear_asks_on_a_terminal(answer: str, code: int, left: int, tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    terminal = Terminal("cache", "clear", "--cache-dir", str(root))
    terminal.read_until(lambda text: "[y/N]" in text)
    assert re.search(rf"Remove all of {root}: 2 kernels, \d+\.\d [KM]iB\?", terminal.output.replace("\r\n", ""))
    terminal.type(answer)
    assert terminal.wait() == code
    assert checked(run("cache", "stats", "--json", "--cache-dir", str(root)).stdout)["caches"][0]["entries"] == left


def test_ctrl_c_at_a_question_removes_nothing(tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    terminal = Terminal("cache", "clear", "--cache-dir", str(root))
    terminal.read_until(lambda text: "[y/N]" in text)
    time.sleep(0.3)  # the question is there before the process waits for the answer
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert checked(run("cache", "stats", "--json", "--cache-dir", str(root)).stdout)["caches"][0]["entries"] == 2
