"""Where a kernel comes from: read-only caches, imported packs, the user's cache, nowhere when sealed."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe_jit._cache import store as _store
from megamoe_jit._cache.cache import KernelCache, readonly_caches, user_cache
from megamoe_jit._compile.toolchain import Toolchain, find_toolchain
from megamoe_jit._errors import CompileError, ConfigError, KernelMissingError, PerformanceLossError, ToolchainError
from megamoe_jit._jit import lookup as _lookup
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.kernel import warmup_command
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel, replacement
from megamoe_jit._jit.pack import export_pack, import_pack
from megamoe_jit._jit.registry import reset
from megamoe_jit._jit.runtime import enumerate_specs, forget, seal, sealed, unseal, warmup
from megamoe_jit._settings.settings import get_settings, override
from megamoe_jit._spec import MAX_TOKENS, KernelSpec, MoEShape, Variant
from megamoe_jit._spec.any_layer import StageFormat, StageSpec
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit.heuristics.presets import preset, preset_names
from megamoe_jit.heuristics.select import choose
from tests.stubs import child_environment, rewrite_meta, write_rooms

SHAPE = MoEShape(256, 128, 8, 2)
PING = KernelSpec(SHAPE, Variant.PINGPONG)
COOP = KernelSpec(SHAPE, Variant.COOPERATIVE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A small kernel directory, a cold cache and a lock directory, in force as settings."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reset()
    with override(kernels_src=write_rooms(tmp_path / "src"), cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks"):
        yield tmp_path
    reset()


@pytest.fixture
def compiles(monkeypatch):
    """The entries compiled so far, by a compiler that needs no time once it has compiled one."""
    real, seen, results = _obtain.compile_source, [], {}

    def count(text, *, kernel_name, toolchain):
        seen.append(kernel_name)
        if text not in results:
            results[text] = real(text, kernel_name=kernel_name, toolchain=toolchain)
        return results[text]

    monkeypatch.setattr(_obtain, "compile_source", count)
    return seen


@pytest.fixture
def pack(place, compiles):
    """A directory with a ready kernel, which is in no other cache."""
    with override(cache_dir=place / "pack"):
        get_kernel(PING)
    reset()  # as if another process had made it
    compiles.clear()
    return place / "pack"


def another_compiler(monkeypatch, version=(12, 99), build="another"):
    real = find_toolchain()
    other = Toolchain(real.path, version, build)
    monkeypatch.setattr(_lookup, "find_toolchain", lambda: other)
    return other


def no_compiler(monkeypatch):
    def missing():
        raise ToolchainError("there is no NVRTC")

    monkeypatch.setattr(_lookup, "find_toolchain", missing)


def test_read_only_caches_come_first_and_are_never_written(pack, place, compiles):
    before = sorted((p, p.lstat().st_mtime_ns) for p in pack.rglob("*"))
    with override(readonly_cache=(place / "none", pack)):
        kernel = get_kernel(PING)
        assert (kernel.origin, kernel.spec) == ("pack", PING)
        assert get_kernel(COOP).origin == "compiled"
        forget()
        assert [get_kernel(spec).origin for spec in (PING, COOP)] == ["pack", "disk"]
    assert compiles == [COOP.kernel_name]
    assert sorted((p, p.lstat().st_mtime_ns) for p in pack.rglob("*")) == before
    assert [i.entry for i in user_cache().entries()] == [COOP.kernel_name]


def test_bad_read_only_cache_costs_a_compile_and_a_warning(pack, compiles, caplog):
    (KernelCache(pack).entry_path(Wanted.of(PING).key) / "kernel.cubin").write_bytes(b"")
    with override(readonly_cache=(pack,)), caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert get_kernel(PING).origin == "compiled"
        forget()
        assert get_kernel(PING).origin == "disk"
    assert len([r for r in caplog.records if "damaged" in r.getMessage()]) <= 1
    assert len(compiles) == 1


def test_read_only_cache_that_anybody_may_write_is_not_used(pack, caplog):
    (pack / "v1").chmod(0o777)
    with override(readonly_cache=(pack,)), caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert get_kernel(PING).origin == "compiled"
    assert "can be written by other users" in caplog.text


@pytest.mark.parametrize("how", ["read-only", "imported"])
@pytest.mark.parametrize("where", ["another compiler", "no compiler"])
def test_kernels_handed_over_are_used_whatever_compiler_there_is(pack, place, monkeypatch, compiles, how, where):
    export_pack(place / "k.tar", cache=KernelCache(pack))
    if where == "another compiler":
        another_compiler(monkeypatch)
    else:
        no_compiler(monkeypatch)
    caches = {"readonly_cache": (pack,)} if how == "read-only" else {}
    with override(**caches):
        if how == "imported":
            import_pack(place / "k.tar")
        kernel = get_kernel(PING)
        assert kernel.origin == ("pack" if how == "read-only" else "disk")
        seal()
        forget()
        assert get_kernel(PING).cubin == kernel.cubin
    assert compiles == []


def test_kernels_of_another_compiler_are_not_used_unless_handed_over(place, compiles, monkeypatch):
    get_kernel(PING)
    forget()
    another_compiler(monkeypatch)
    assert get_kernel(PING).origin == "compiled"
    assert len(compiles) == 2


def test_without_a_compiler_and_without_kernel_the_compiler_is_missing(place, monkeypatch):
    no_compiler(monkeypatch)
    with pytest.raises(ToolchainError, match="there is no NVRTC"):
        get_kernel(PING)
    with override(disable_jit=True), pytest.raises(KernelMissingError):
        get_kernel(PING)


def test_handed_over_kernels_with_losses_are_judged_too(pack, caplog):
    rewrite_meta(KernelCache(pack).entry_path(Wanted.of(PING).key), advisories=["C7510: slow"])
    with override(readonly_cache=(pack,), strict="error"), pytest.raises(PerformanceLossError, match="C7510"):
        get_kernel(PING)
    with override(readonly_cache=(pack,), strict="warn"), caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert get_kernel(PING).origin == "pack"
    assert "C7510" in caplog.text


def test_no_cache_keeps_kernels_in_memory(place, compiles):
    with override(no_cache=True):
        assert [get_kernel(PING).origin for _ in range(2)] == ["compiled", "memory"]
        forget()
        assert get_kernel(PING).origin == "compiled"
    assert not (place / "cache").exists()
    assert len(compiles) == 2


def test_sealed_process_compiles_nothing(place, compiles):
    assert not sealed()
    seal()
    seal()
    assert sealed()
    for _ in range(2):
        with pytest.raises(KernelMissingError) as caught:
            get_kernel(COOP)
        for words in (COOP.kernel_name, "this process is sealed", f"run: {warmup_command(COOP)}", str(place / "cache")):
            assert words in str(caught.value)
    assert isinstance(warmup([PING])[0].error, KernelMissingError)
    unseal()
    assert get_kernel(COOP).origin == "compiled"
    seal()
    forget()
    assert get_kernel(COOP).origin == "disk"
    assert compiles == [COOP.kernel_name]
    unseal()
    with override(disable_jit=True):
        assert sealed()


def test_no_call_of_any_preset_misses_after_warmup_and_seal(place, compiles):
    """For every shape known by name and every token count: the kernel that is picked was warmed up."""
    shapes = {(preset(name).shape, preset(name).ranks) for name in preset_names()}
    assert len(shapes) >= 8
    for shape, ranks in shapes:
        for count in {1, ranks}:
            specs = enumerate_specs(shape, count)
            assert all(result.ok for result in warmup(specs))
            seal()
            picked = {choose(shape, tokens, ranks=count).variant for tokens in range(MAX_TOKENS + 1)}
            for variant in picked:
                for spec in (KernelSpec(shape, variant, count, inputs=inputs) for inputs in Inputs):
                    assert spec in specs
                    get_kernel(spec)
            for form in StageFormat:
                get_kernel(StageSpec(form))
            for threshold in (0, 1, 300, MAX_TOKENS + 1):
                for forced in ("auto", "pingpong", "cooperative"):
                    for tokens in (0, 1, 255, 256, 299, 300, MAX_TOKENS):
                        choice = choose(shape, tokens, variant=forced, cooperative_threshold=threshold)
                        get_kernel(KernelSpec(shape, choice.variant, count))
            unseal()


def test_enumerated_specs():
    raw, staging = (
        [replace(each, inputs=Inputs.RAW) for each in (PING, COOP)],
        [StageSpec(form) for form in StageFormat],
    )
    assert enumerate_specs(SHAPE) == (PING, COOP, *raw, *staging)
    assert enumerate_specs(SHAPE, inputs="staged") == (PING, COOP)
    assert enumerate_specs(SHAPE, inputs="raw") == (*raw, *staging)
    assert enumerate_specs(SHAPE, variants=[Variant.COOPERATIVE], inputs="staged") == (COOP,)
    assert len(enumerate_specs(SHAPE, 2, fast_math=None, inputs="staged")) == 4
    assert {s.fast_math for s in enumerate_specs(SHAPE, fast_math=False, inputs="staged")} == {False}
    with pytest.raises(ConfigError, match="unknown inputs 'cooked'; allowed: staged, raw"):
        enumerate_specs(SHAPE, inputs="cooked")
    with pytest.raises(ConfigError):
        enumerate_specs(SHAPE, 3)


def test_distrusted_kernel_is_compiled_again_once(place, compiles):
    get_kernel(PING)
    reset()
    kernel = get_kernel(PING)
    assert kernel.origin == "disk"
    again = replacement(kernel, "refused", damaged=True)
    assert len(user_cache().quarantined()) == 1
    assert again.origin == "compiled"
    assert replacement(again, "refused", damaged=False) is None
    assert len(user_cache().quarantined()) == 1


def test_distrusted_read_only_kernel_stays_where_it_is(pack, compiles):
    with override(readonly_cache=(pack,)):
        assert replacement(get_kernel(PING), "refused", damaged=True).origin == "compiled"
    assert len(KernelCache(pack).entries()) == 1


def test_another_copy_of_a_distrusted_kernel_is_taken(place, pack, compiles):
    """A bad binary in one cache says nothing of a good one of the same kernel in another."""
    good = get_kernel(PING)
    reset()
    damaged = KernelCache(pack)
    damaged.remove([good.key])
    refused = good.cubin + b"refused"
    damaged.store(good.key, refused, "", good.meta)
    forget()
    with override(readonly_cache=(pack,), disable_jit=True):
        kernel = get_kernel(PING)
        assert (kernel.origin, kernel.cubin) == ("pack", refused)
        kernel = replacement(kernel, "refused", damaged=True)
        assert (kernel.origin, kernel.cubin) == ("disk", good.cubin)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk_costs_one_warning(place, compiles, caplog, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_store, "_write", fail)
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert [get_kernel(spec).origin for spec in (PING, COOP, PING)] == ["compiled", "compiled", "memory"]
    assert len(caplog.records) == 1


def test_loser_of_a_rename_that_cannot_see_the_winner_uses_its_own_bytes(place, compiles, monkeypatch):
    def lost(*_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(_store.os, "rename", lost)
    kernel = get_kernel(PING)
    assert kernel.origin == "compiled"
    assert kernel.cubin.startswith(b"\x7fELF")
    assert user_cache().entries() == []


HOMELESS = """
import json, logging, pwd
def nobody(_): raise KeyError
pwd.getpwuid = nobody
records = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("megamoe_jit").addHandler(handler)
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.runtime import forget
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
origins = [get_kernel(spec).origin]
forget()
origins.append(get_kernel(spec).origin)
print(json.dumps([origins, records]))
"""


@pytest.mark.parametrize("named", [None, "/proc/nowhere"])
def test_user_without_a_home(place, named):
    """A temporary cache.  One that was named and cannot be written: memory alone and one warning."""
    environment = child_environment(place, TMPDIR=place)
    for name in ("MEGAMOE_JIT_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    if named:
        environment["MEGAMOE_JIT_CACHE_DIR"] = named
    run = subprocess.run(
        [sys.executable, "-c", HOMELESS], capture_output=True, text=True, env=environment, cwd=place, timeout=60
    )
    assert run.returncode == 0, run.stderr
    origins, records = json.loads(run.stdout)
    assert origins == (["compiled", "compiled"] if named else ["compiled", "disk"])
    assert len(records) == (1 if named else 0), records
    assert not (place / "~").exists()


def test_failure_to_compile_keeps_the_source_and_says_where(place):
    (place / "src" / "room" / "fill.cuh").write_text("#pragma once\n__device__ void f() { undefined_thing(); }\n")
    with pytest.raises(CompileError) as caught:
        get_kernel(PING)
    kept = Path(str(caught.value).rsplit(": ", 1)[1])
    assert "undefined_thing" in kept.read_text()
    assert get_settings().dump_dir is None


def test_caches_of_the_settings(tmp_path):
    with override(cache_dir=tmp_path / "a", cache_max_bytes=5, readonly_cache=(tmp_path / "b", tmp_path / "c")):
        assert (user_cache().root, user_cache().max_bytes, user_cache().read_only) == (tmp_path / "a", 5, False)
        assert [(c.root, c.read_only) for c in readonly_caches()] == [(tmp_path / "b", True), (tmp_path / "c", True)]
