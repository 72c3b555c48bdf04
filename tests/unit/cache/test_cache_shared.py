"""A directory of kernels that one user fills and another loads from, as in an image."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._jit.pack import export_pack, import_pack
from megamoe_jit._settings.settings import override
from tests.stubs import child_environment, fake_kernel

KERNEL = fake_kernel()


@pytest.fixture
def here(tmp_path):
    """Settings whose cache holds a kernel."""
    with override(cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks"):
        user_cache().store(*KERNEL)
        yield tmp_path


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if ".tmp" not in path.parts}


def test_directory_that_was_filled_for_others_can_be_read_by_them(here):
    """An image is built by root and used by somebody else."""
    export_pack(here / "k.tar")
    import_pack(here / "k.tar", here / "shared")
    assert modes(here / "shared") == {0o755, 0o644}
    assert stat.S_IMODE((here / "shared").stat().st_mode) == 0o755
    assert KernelCache(here / "shared", read_only=True).verify() == []
    user_cache().clear()
    import_pack(here / "k.tar")
    assert modes(here / "cache") == {0o700, 0o600}


LOAD_AS_NOBODY = """
import os, sys
from pathlib import Path
from megamoe_jit._cache.cache import KernelCache
os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(KernelCache(Path(sys.argv[1]), read_only=True).load(sys.argv[2]) is not None)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_fills_a_directory_and_another_user_loads_from_it(here):
    export_pack(here / "k.tar")
    with tempfile.TemporaryDirectory(prefix="megamoe-jit-shared-") as folder:  # below a path that everybody may enter
        os.chmod(folder, 0o755)
        import_pack(here / "k.tar", Path(folder) / "kernels")
        run = subprocess.run(
            [sys.executable, "-c", LOAD_AS_NOBODY, f"{folder}/kernels", KERNEL[0]],
            capture_output=True,
            text=True,
            env=child_environment(here),
            timeout=60,
        )
    assert run.stdout == "True\n", run.stderr
