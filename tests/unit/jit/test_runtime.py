"""From spec to kernel: one compile per process and machine, failures remembered, the disk never decisive."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megamoe_jit._cache import store as _store
from megamoe_jit._cache.cache import user_cache
from megamoe_jit._cli import cli
from megamoe_jit._errors import CompileError, KernelMissingError, PerformanceLossError, RenderError
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.kernel import warmup_command
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.runtime import forget, retry, warmup
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.any_layer import StageFormat, StageSpec
from megamoe_jit._spec.compilable import Compilable
from tests.stubs import ROOM, TEMPLATE, child_environment

SHAPE = MoEShape(256, 128, 8, 2)
PING = KernelSpec(SHAPE, Variant.PINGPONG)
COOP = KernelSpec(SHAPE, Variant.COOPERATIVE, ranks=2, fast_math=False)


CHILD = """
import json, sys, time
from pathlib import Path
from typing import Any
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.compilable import Compilable
gate = sys.argv[1]
print("ready", flush=True)
while gate and not Path(gate).exists():
    time.sleep(0.002)
kernel = get_kernel(KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG))
print(json.dumps({"end": time.monotonic(), "origin": kernel.origin, "key": kernel.key, "bytes": len(kernel.cubin),
                  "compiler": "cuda.bindings.nvrtc" in sys.modules, "torch": "torch" in sys.modules}))
"""


def child(place, gate=""):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(gate)],
        env=child_environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def test_memory_disk_compiled(place, compiles):
    first = get_kernel(PING)
    assert (first.origin, first.spec, len(compiles)) == ("compiled", PING, 1)
    again = get_kernel(PING)
    assert (again.origin, again.cubin, again.seconds) == ("memory", first.cubin, 0.0)
    forget(PING)
    third = get_kernel(PING)
    assert (third.origin, third.cubin, third.key) == ("disk", first.cubin, first.key)
    assert len(compiles) == 1
    assert first.key == Wanted.of(PING).key


def test_metadata(place):
    compiled = get_kernel(COOP).meta
    forget()
    stored = get_kernel(COOP).meta
    assert {k: stored[k] for k in compiled} == compiled
    assert stored["entry"] == COOP.kernel_name
    assert KernelSpec.from_json(stored["spec"]) == COOP
    assert stored["files"] == ["kernels/entry.cuh.j2", "room/fill.cuh"]
    assert stored["options"][0] == "--gpu-architecture=sm_90a"
    assert {"version", "build", "path"} == set(stored["nvrtc"])
    assert (stored["param_bytes"], stored["max_threads"], stored["spill_bytes"]) == (64, 384, 0)
    assert stored["dynamic_shared_bytes"] == COOP.shared_bytes
    assert stored["registers"] > 0
    assert stored["advisories"] == []
    assert set(stored["compile_ms"]) == {"load", "nvrtc", "ptxas", "total"}
    assert set(stored) >= {"schema", "key", "arch", "cubin_sha256", "cubin_bytes", "created_at", "host"}


def meet(place, count):
    """Let `count` processes go for one cold key at once; their results and the seconds until the last one has it."""
    processes = [child(place, place / f"gate{count}") for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    (place / f"gate{count}").touch()
    results = [finish(process)[0] for process in processes]
    return results, max(result["end"] for result in results) - begin


def test_eight_processes_with_a_cold_cache_compile_once(place):
    _, one = meet(place, 1)
    user_cache().clear()
    results, eight = meet(place, 8)
    assert sorted(r["origin"] for r in results) == ["compiled"] + ["disk"] * 7
    assert len({(r["key"], r["bytes"]) for r in results}) == 1
    assert eight < 4 * one + 2, "benchmarks/runtime.py measures it; this only sees that nobody waits for a timeout"


def test_second_process_starts_from_disk_without_the_compiler(place):
    key = get_kernel(PING).key
    result, err = finish(child(place))
    assert result["origin"] == "disk"
    assert result["key"] == key
    assert not result["compiler"]
    assert not result["torch"]
    assert err == ""


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_damaged_entry_is_compiled_again_with_one_warning(place, compiles, caplog, damage):
    good = get_kernel(PING)
    path = user_cache().entry_path(good.key) / "kernel.cubin"
    data = path.read_bytes()
    path.write_bytes(data[:-100] if damage == "truncated" else data[:-100] + bytes(100))
    forget()
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        again = get_kernel(PING)
    assert (again.origin, again.cubin) == ("compiled", good.cubin)
    assert len(compiles) == 2
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    forget()
    assert get_kernel(PING).origin == "disk"


def test_unwritable_cache_works_from_memory(place, caplog):
    (place / "file").write_text("")
    with override(cache_dir=place / "file" / "cache"), caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert get_kernel(PING).origin == "compiled"
        assert get_kernel(PING).origin == "memory"
        get_kernel(COOP)
        writes = [r for r in caplog.records if "cannot write" in r.getMessage()]
    assert len(writes) == 1


def test_read_only_cache_is_read(place, monkeypatch):
    get_kernel(PING)
    forget()

    def fail(*_, **__):
        raise OSError(30, "read-only file system")

    for name in ("rename", "utime"):
        monkeypatch.setattr(_store.os, name, fail)
    monkeypatch.setattr(Path, "mkdir", fail)
    assert get_kernel(PING).origin == "disk"
    assert get_kernel(COOP).origin == "compiled"


def test_failure_is_remembered_until_retry(place, compiles):
    room = place / "src" / "room" / "fill.cuh"
    room.write_text(ROOM.replace("value;", "undefined_thing;"))
    with pytest.raises(CompileError, match=r"room/fill\.cuh\(5\): error") as first:
        get_kernel(PING)
    with pytest.raises(CompileError) as second:
        get_kernel(PING)
    assert second.value is first.value
    assert len(compiles) == 1
    room.write_text(ROOM)
    with pytest.raises(CompileError):
        get_kernel(PING)
    retry()
    assert get_kernel(PING).origin == "compiled"


def test_a_forced_warmup_tries_again_what_failed(place, compiles):
    room = place / "src" / "room" / "fill.cuh"
    room.write_text(ROOM.replace("value;", "undefined_thing;"))
    with pytest.raises(CompileError):
        get_kernel(PING)
    room.write_text(ROOM)
    assert isinstance(warmup([PING])[0].error, CompileError), "remembered"
    (result,) = warmup([PING], force=True)
    assert result.ok, result.error
    assert get_kernel(PING).origin == "memory"
    assert len(compiles) == 2


def test_forget_clears_one_failure(place):
    (place / "src" / "room" / "fill.cuh").unlink()
    for spec in (PING, COOP):
        with pytest.raises(RenderError, match="room/fill.cuh"):
            get_kernel(spec)
    (place / "src" / "room" / "fill.cuh").write_text(ROOM)
    forget(PING)
    assert get_kernel(PING).origin == "compiled"
    with pytest.raises(RenderError):
        get_kernel(COOP)


def test_forbidden_compile_names_kernel_and_command(place, compiles):
    with override(disable_jit=True):
        with pytest.raises(KernelMissingError) as caught:
            get_kernel(COOP)
        assert COOP.kernel_name in str(caught.value)
        assert warmup_command(COOP) in str(caught.value)
        with override(disable_jit=False):
            get_kernel(COOP)
        forget()
        assert get_kernel(COOP).origin == "disk"
    assert len(compiles) == 1


def test_warmup_command():
    assert warmup_command(PING) == (
        "megamoe-jit warmup --hidden 256 --intermediate 128 --experts 8 --topk 2 --ranks 1 --variant pingpong "
        "--inputs staged"
    )
    assert warmup_command(COOP).endswith("--ranks 2 --variant cooperative --no-fast-math --inputs staged")
    assert warmup_command(StageSpec(StageFormat.F16)) == "megamoe-jit inspect megamoe_stage_f16"


def test_a_missing_kernel_with_a_timeline_says_what_makes_it(place, compiles):
    spec = replace(COOP, timeline=True)
    command = f"megamoe-jit inspect {spec.kernel_name} --cache-dir {place / 'cache'}"
    assert warmup_command(spec) == command
    with override(disable_jit=True), pytest.raises(KernelMissingError) as caught:
        get_kernel(spec)
    assert f"run: MEGAMOE_JIT_DISABLE_JIT=0 {command} (kernels with a timeline" in str(caught.value)
    result = CliRunner().invoke(cli, command.split()[1:])
    assert compiles == [spec.kernel_name], result.output
    with override(disable_jit=True):
        assert get_kernel(spec).spec == spec


def test_performance_losses_are_judged_on_cached_kernels_too(place, monkeypatch, caplog):
    template = place / "src" / "kernels" / "entry.cuh.j2"
    template.write_text(
        'extern "C" __global__ void {{ kernel_name }}(int* a) {\n'
        '  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");\n  a[0] = 1;\n}\n'
    )
    with pytest.raises(PerformanceLossError, match="C750"):
        get_kernel(PING)
    with override(strict="warn"):
        assert get_kernel(PING).origin == "compiled"
        forget()
        caplog.clear()
        assert get_kernel(PING).origin == "disk"
        assert "performance losses" in caplog.text
    retry()
    with pytest.raises(PerformanceLossError, match=r"(?s)cached kernel .*C750"):
        get_kernel(PING)
    with override(strict="ignore"):
        assert get_kernel(PING).origin == "disk"


def test_warmup_reports_each_kernel_in_order(place, compiles):
    broken = KernelSpec(SHAPE, Variant.COOPERATIVE, ranks=4)
    (place / "src" / "kernels" / "entry.cuh.j2").write_text(
        '{% if ranks == 4 %}\n#include "room/none.cuh"\n{% endif %}\n' + TEMPLATE
    )
    seen = []
    results = warmup([PING, broken, PING], jobs=2, progress=seen.append)
    assert [r.spec for r in results] == [PING, broken]
    assert [r.ok for r in results] == [True, False]
    assert results[0].kernel.origin == "compiled"
    assert isinstance(results[1].error, RenderError)
    assert sorted(r.ok for r in seen) == [False, True]
    forget()
    assert warmup([PING])[0].kernel.origin == "disk"
    assert len(compiles) == 1
    assert warmup([]) == []


def test_forced_warmup_replaces_the_entry(place, compiles):
    path = user_cache().entry_path(get_kernel(PING).key)
    (path / "kernel.cu").write_text("old")
    (result,) = warmup([PING], force=True)
    assert result.kernel.origin == "compiled"
    assert len(compiles) == 2
    assert (path / "kernel.cu").read_text() != "old"
    with override(disable_jit=True):
        assert isinstance(warmup([PING], force=True)[0].error, KernelMissingError)


def test_failure_that_nobody_foresaw_is_a_result_and_is_logged(place, monkeypatch, caplog):
    def fail(*_, **__):
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(_obtain, "compile_source", fail)
    (result,) = warmup([PING])
    assert isinstance(result.error, ZeroDivisionError)
    assert "unexpected failure" in caplog.text
    monkeypatch.undo()
    assert get_kernel(PING).origin == "compiled"


@dataclass(frozen=True)
class OtherKind:
    """A kernel that is no `KernelSpec`."""

    kernel_name: str = "other_kernel"
    template: str = "kernels/other.cuh.j2"
    shared_bytes: int = 0
    command: str = "other words"
    remark: str = "of another kind"

    def template_variables(self) -> dict[str, Any]:
        return {"kernel_name": self.kernel_name}

    def to_json(self) -> dict[str, Any]:
        return {"other": True}


def test_a_kernel_of_another_kind_lives_as_they_all_do(place, compiles):
    spec: Compilable = OtherKind()
    (place / "src" / "kernels" / "other.cuh.j2").write_text(
        'extern "C" __global__ void {{ kernel_name }}(int* a) { *a = 1; }'
    )
    with override(disable_jit=True), pytest.raises(KernelMissingError, match=r"megamoe-jit other words .*another kind"):
        get_kernel(spec)
    assert get_kernel(spec).origin == "compiled"
    forget(spec)
    found = get_kernel(spec)
    assert (found.origin, found.spec, found.meta["spec"]) == ("disk", spec, {"other": True})
    assert compiles == ["other_kernel"]
