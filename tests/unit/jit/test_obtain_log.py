"""At level INFO every kernel says once where it came from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megamoe_jit._cache.cache import user_cache
from megamoe_jit._compile.toolchain import Toolchain, find_toolchain
from megamoe_jit._jit import lookup as _lookup
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.registry import reset
from megamoe_jit._jit.runtime import forget
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant

SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)


@pytest.fixture(autouse=True)
def new_process(caplog: pytest.LogCaptureFixture) -> None:
    reset()
    caplog.set_level(logging.INFO, "megamoe_jit")


def test_kernels_from_disk_say_so_once(place: Path, caplog: pytest.LogCaptureFixture):
    get_kernel(SPEC)
    assert not [line for line in caplog.messages if ": from " in line], "it was compiled"
    caplog.clear()
    for _ in range(2):
        forget()
        assert get_kernel(SPEC).origin == "disk"
        get_kernel(SPEC)
    assert caplog.messages == [f"{SPEC.kernel_name}: from {user_cache().entry_path(Wanted.of(SPEC).key)}"]


def test_kernel_of_another_compiler_says_so(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    key = get_kernel(SPEC).key
    real = find_toolchain()
    other = Toolchain(real.path, real.version, "another build")
    monkeypatch.setattr(_lookup, "find_toolchain", lambda: other)
    forget()
    caplog.clear()
    with override(readonly_cache=(place / "cache",), cache_dir=place / "empty"):
        assert get_kernel(SPEC).origin == "pack"
    path = place / "cache" / "v1" / key[:2] / key
    assert caplog.messages == [f"{SPEC.kernel_name}: from {path}, built elsewhere"]
