"""The command line where a standard stream is closed, and what a live display must not swallow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cli import cli
from tests.commandline import SIZES, STAGED, Terminal, leaf_commands, warm_cache
from tests.stubs import REPO


def closed(streams: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    """A command whose streams are closed as the shell's words say."""
    words = [sys.executable, "-m", "megamoe_jit", *arguments, "--cache-dir", str(root)]
    return subprocess.run(
        ["sh", "-c", f'"$@" {streams}', "sh", *words], capture_output=True, text=True, timeout=240, check=False
    )


def test_commands_work_where_standard_error_is_closed(tmp_path: Path):
    done = closed("2>&-", "warmup", *STAGED, "--json", root=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["compiled"] == 2
    wrong = closed("2>&-", "cache", "info", "--json", root=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, ""), "an error is no data"


def test_a_working_directory_that_is_gone_is_said(tmp_path: Path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from megamoe_jit._cli import main; main()"
    environment = {**os.environ, "MEGAMOE_JIT_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, "cache", "export", "kernels.tgz"]
    done = subprocess.run(command, cwd=gone, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "Error: the working directory is not there any more; change to one that is\n"


@pytest.mark.parametrize("command", ["clear", "prune"])
def test_nobody_is_asked_where_standard_input_is_closed(tmp_path: Path, command: str):
    root = warm_cache(tmp_path / "cache")
    options = ["--max-bytes", "0"] if command == "prune" else []
    for entry in (root / "v1").glob("??/*"):
        os.utime(entry, (1, 1))
        for file in entry.iterdir():
            os.utime(file, (1, 1))
    done = closed("<&-", "cache", command, *options, root=root)
    assert "Traceback" not in done.stderr
    assert (done.returncode, "--yes answers" in done.stderr) == (2, True), done.stderr
    assert len(KernelCache(root).entries()) == 2


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_log_lines_stay_above_a_live_display(tmp_path: Path):
    """They go where warnings go, and not past the display, which would write over them."""
    terminal = Terminal("warmup", *STAGED, "--cache-dir", str(tmp_path), MEGAMOE_JIT_LOG_LEVEL="info")
    assert terminal.wait() == 0
    before = terminal.output[: terminal.output.index("megamoe_jit INFO: ")]
    assert before.endswith(("\x1b[2K", "\x1b[1A\x1b[2K", "\r\n")), "the display was taken away first"


def test_what_is_kept_after_an_interruption_is_said_after_the_display(tmp_path: Path):
    terminal = Terminal("warmup", "--shapes", "all", "--inputs", "staged", "--jobs", "1", "--cache-dir", str(tmp_path))
    terminal.read_until(lambda text: "working" in text)
    terminal.type("\x03")
    assert terminal.wait() == 130
    said = terminal.output.index("kernels are ready and kept")
    assert "\x1b[1A" not in terminal.output[said:], "nothing climbs over the line"
    assert plain(terminal.output[said:]).rstrip().endswith("interrupted")


def test_a_blocks_option_has_the_bound_of_the_largest_chip():
    from click.testing import CliRunner

    assert ("explain",) in leaf_commands()
    for command in (["explain", *SIZES, "--tokens", "8"], ["plan", *SIZES]):
        result = CliRunner().invoke(cli, [*command, "--sms", "145"])
        assert result.exit_code == 2
        assert "1<=x<=144" in result.stderr
