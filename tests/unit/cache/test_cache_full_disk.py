"""A disk that is really full, or read-only: a file system of 256 KiB that takes no kernel any more.

It is a tmpfs in a mount namespace of the test's own, which an ordinary user may make unless the kernel forbids it.  The
simulated errors of `test_cache.py` and `test_obtain.py` runs everywhere.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.stubs import child_environment, write_rooms

MOUNT = 'mount -t tmpfs -o size=256k,mode=700 none "$0" && exec "$@"'

PRELUDE = """
import json, logging, os, subprocess, sys
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._cache.cache import user_cache
from megamoe_jit._jit.runtime import forget
from megamoe_jit._spec import FP8, KernelSpec, MoEShape, Variant

warned = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("megamoe_jit").addHandler(handler)
cache = user_cache()

def get(*variants):
    forget()
    wanted = variants or Variant.reading(FP8)[:2]
    kernels = [get_kernel(KernelSpec(MoEShape(256, 128, 8, 2), variant)) for variant in wanted]
    assert all(kernel.cubin.startswith(b"\\x7fELF") and len(kernel.cubin) > 4096 for kernel in kernels)
    return [kernel.origin for kernel in kernels]
"""

#: Leaves so many bytes on the disk, gets two kernels, twice; then makes room and gets them twice again.
FULL = """
ballast = cache.root / "ballast"
status = os.statvfs(cache.root)
ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - int(sys.argv[1])))
found = {"full": [get(), get()]}
found["entries"], found["problems"] = len(cache.entries()), [problem.message for problem in cache.verify()]
found["left"] = os.listdir(cache.path / ".tmp")
ballast.unlink()
found["room"] = [get(), get()]
print(json.dumps({**found, "warned": warned}))
"""

#: Keeps one kernel, makes the disk read-only, and gets two, twice.  It is the mount that becomes so: that a user may do
#: in a namespace of theirs, where the file system itself is not theirs to change.
READ_ONLY = """
get(Variant.PINGPONG)
subprocess.run(["mount", "-o", "remount,bind,ro", str(cache.root)], check=True)
print(json.dumps({"found": [get(), get()], "warned": warned}))
"""


@functools.cache
def refusal() -> str:
    """Why no file system can be mounted here; empty if one can."""
    if shutil.which("unshare") is None:
        return "there is no unshare command (util-linux)"
    trial = ["unshare", "-rm", "sh", "-c", MOUNT, tempfile.gettempdir(), "true"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"this system lets no user mount a tmpfs of their own: {done.stderr.strip()}" if done.returncode else ""


@pytest.fixture
def on_small_disk(tmp_path):
    """Run code with the cache on a file system of its own; the document that it prints."""
    if refusal():
        pytest.skip(refusal())
    write_rooms(tmp_path / "src")
    (tmp_path / "cache").mkdir(mode=0o700)

    def run(code, *arguments):
        child = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", MOUNT, str(tmp_path / "cache"), *child],
            capture_output=True,
            text=True,
            env=child_environment(tmp_path),
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "cache").iterdir()) == [], "the file system was not the test's own"
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("left", [0, 8192], ids=["no byte left", "half an entry fits"])
def test_full_disk_costs_a_compile_and_one_warning(on_small_disk, left):
    found = on_small_disk(FULL, left)
    assert found["full"] == [["compiled", "compiled"]] * 2
    assert (found["entries"], found["problems"], found["left"]) == (0, [], [])
    assert len(found["warned"]) == 1, found["warned"]
    assert "No space left on device" in found["warned"][0]
    assert found["room"] == [["compiled", "compiled"], ["disk", "disk"]]


def test_read_only_disk_gives_what_it_has_and_costs_one_warning(on_small_disk):
    found = on_small_disk(READ_ONLY)
    assert found["found"] == [["disk", "compiled"]] * 2
    assert len(found["warned"]) == 1, found["warned"]
    assert "Read-only file system" in found["warned"][0]
