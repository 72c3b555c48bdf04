"""A cache that belongs to somebody else: nothing is there, one warning says why, nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commandline import STAGED
from tests.stubs import child_environment, write_rooms

#: Root may enter every directory, unless it gives that up.
HUMBLE = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
pytestmark = pytest.mark.skipif(bool(HUMBLE) and not shutil.which("setpriv"), reason="root, and no setpriv")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `cache` may not be entered, as that of another user with mode 0700."""
    write_rooms(tmp_path / "src")
    (tmp_path / "cache").mkdir(mode=0o000)
    yield tmp_path
    (tmp_path / "cache").chmod(0o700)


def python(place: Path, *arguments: str, **environ: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HUMBLE, sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=child_environment(place, **environ),
    )


@pytest.mark.parametrize(
    "words",
    [
        "cache clear --yes",
        "cache ls",
        "cache stats",
        "cache verify --fix",
        "cache prune --yes",
        "cache info ab",
        "cache rm ab",
        "inspect ab",
    ],
)
def test_commands_about_it_say_so_and_fail(place: Path, words: str):
    """That a cache which may not be read is empty, or was cleared, would be wrong."""
    done = python(place, "-m", "megamoe_jit", *words.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {place / 'cache'}: Permission denied\n"


def test_warmup_says_it_once(place: Path):
    done = python(place, "-m", "megamoe_jit", "warmup", *STAGED)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "kernel cache" in line]
    assert len(said) == 1, done.stderr
    assert f"cannot read kernel cache {place / 'cache' / 'v1'}" in said[0]


def test_path_completion_and_doctor(place: Path):
    root = place / "cache"
    below = python(place, "-m", "megamoe_jit", "cache", "path", "--json", MEGAMOE_JIT_CACHE_DIR=root / "below")
    assert json.loads(below.stdout)["exists"] is False
    completing = {"_MEGAMOE_JIT_COMPLETE": "bash_complete", "COMP_WORDS": "megamoe-jit cache rm ", "COMP_CWORD": "3"}
    completed = python(place, "-m", "megamoe_jit", **completing)
    assert (completed.stdout.strip(), completed.stderr) == ("", "")
    for variable, name in (("MEGAMOE_JIT_CACHE_DIR", "cache"), ("MEGAMOE_JIT_READONLY_CACHE", "read-only")):
        done = python(place, "-m", "megamoe_jit", "doctor", "--no-trial", "--json", **{variable: root / "below"})
        check = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == name)
        assert check["status"] == "warn", check
        assert variable in check["next_step"], "no internal error to report"


WAIT = """
import threading
from megamoe_jit._cache.locks import key_lock
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._spec import KernelSpec, MoEShape, Variant

spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
found = []
thread = threading.Thread(target=lambda: found.append(get_kernel(spec).origin))
with key_lock(Wanted.of(spec).key, "as another process does"):
    thread.start()
    thread.join()
print(*found)
"""


def test_a_call_whose_kernel_cannot_be_kept_waits_for_nobody(place: Path):
    """What will not be published is compiled by each process, at the same time."""
    done = python(place, "-c", WAIT)
    assert done.stdout == "compiled\n", done.stderr
    assert done.stderr.count("kernel cache") == 1, done.stderr
