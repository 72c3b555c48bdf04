"""The compiler: what it was called with, what it said, and where its complaints point."""

from __future__ import annotations

import logging
import pickle
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._compile import nvrtc as _compiler
from megamoe_jit._compile import signals as _settle
from megamoe_jit._compile.cubin import CubinInfo
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.render import render
from megamoe_jit._compile.toolchain import Toolchain, find_toolchain, options_for
from megamoe_jit._errors import CompileError, ConfigError, PerformanceLossError, ToolchainError
from megamoe_jit._settings.settings import Settings, override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant

ROOT = "/megamoe_jit/kernels_src"
SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
GOOD = """
extern "C" __global__ void __launch_bounds__(384, 1) good(float* out) {
  asm volatile("fence.proxy.async;");
  out[threadIdx.x] = 1.f;
}
"""
SPILLS = """#line 1 "/megamoe_jit/kernels_src/mma/big.cuh"
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* a) {
  float v[96];
  for (int i = 0; i < 96; i++) v[i] = a[i * 1024 + threadIdx.x];
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i + 7) % 96] + a[j];
  }
#pragma unroll
  for (int i = 0; i < 96; i++) a[i * 1024 + threadIdx.x] = v[i];
}
"""
SERIAL = """#line 1 "/megamoe_jit/kernels_src/mma/serial.cuh"
extern "C" __global__ void __launch_bounds__(128) serial(float* a, unsigned long long d) {
  float c0 = a[0], c1 = a[1], c2 = a[2], c3 = a[3];
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < 2; i++) {
    asm volatile("{wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, %4, %4, 1, 1, 1;}"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "l"(d + i));
    c0 *= 2.f;
  }
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  a[0] = c0; a[1] = c1; a[2] = c2; a[3] = c3;
}
"""
KEPT = re.compile(r"rendered source, PTX and log: (\S+)$")


@pytest.fixture(scope="module")
def toolchain():
    return find_toolchain()


@pytest.fixture(autouse=True)
def failures_here(tmp_path, monkeypatch):
    monkeypatch.setattr(_compiler.tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize(("version", "cached"), [((12, 8), False), ((12, 9), True), ((13, 0), True)])
def test_options(version, cached):
    options = options_for(Toolchain(Path("/x/libnvrtc.so"), version, "b"), ["--extra"])
    assert options[:6] == (
        "--gpu-architecture=sm_90a",
        "-std=c++17",
        "-default-device",
        "-lineinfo",
        "--ptxas-options=-v",
        "--ptxas-options=--warn-on-spills",
    )
    assert ("--no-cache" in options) is cached
    assert options[-1] == "--extra"
    assert not any(option.startswith(("-I", "--include")) for option in options)
    with override(ptxas_options=("--register-usage-level=10",)):
        assert options_for(Toolchain(Path("/x"), version, "b"))[-1] == "--ptxas-options=--register-usage-level=10"


def test_result(toolchain, tmp_path):
    result = compile_source(GOOD, kernel_name="good", toolchain=toolchain)
    assert result.cubin.startswith(b"\x7fELF")
    assert "good" in result.ptx
    assert "fence.proxy.async" in result.ptx
    assert (result.kernel.name, result.kernel.max_threads, result.kernel.param_bytes) == ("good", 384, 8)
    assert (result.spill_bytes, result.stack_bytes) == (0, 0)
    assert result.registers >= 8
    assert result.diagnostics == result.advisories == ()
    assert result.options == options_for(toolchain)
    assert 0 < result.seconds["nvrtc"] < result.seconds["total"]
    assert 0 < result.seconds["ptxas"] < result.seconds["nvrtc"]
    assert list(tmp_path.iterdir()) == []


def test_same_bytes_twice(toolchain):
    first = compile_source(GOOD, kernel_name="good", toolchain=toolchain)
    assert compile_source(GOOD, kernel_name="good", toolchain=toolchain).cubin == first.cubin


def test_front_end_error_points_at_room_and_line(toolchain, tmp_path):
    for name, text in {
        "kernels/entry.cuh.j2": '#include "room/file.cuh"\nextern "C" __global__ void {{ kernel_name }}() { f(); }\n',
        "room/file.cuh": "#pragma once\n\n__device__ void f() { undefined_thing(); }\n",
    }.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    with override(kernels_src=tmp_path / "src"):
        source = render(SPEC).text
    with pytest.raises(CompileError) as caught:
        compile_source(source, kernel_name=SPEC.kernel_name, toolchain=toolchain)
    message = str(caught.value)
    assert not isinstance(caught.value, PerformanceLossError)
    assert f'{ROOT}/room/file.cuh(3): error: identifier "undefined_thing" is undefined' in message
    assert "| __device__ void f() { undefined_thing(); }" in message
    kept = Path(KEPT.search(message)[1])
    assert kept.read_text() == source
    assert "undefined_thing" in kept.with_suffix(".log").read_text()
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_assembler_error_points_at_room_and_line(toolchain):
    source = (
        f'#line 1 "{ROOT}/ptx/bad.cuh"\n\n'
        '__device__ void bad(int x) { asm volatile("bogus.op %0;" :: "r"(x)); }\n'
        f'#line 40 "{ROOT}/kernels/x.cuh.j2"\nextern "C" __global__ void k(int* a) {{ bad(a[0]); }}\n'
    )
    with pytest.raises(CompileError) as caught:
        compile_source(source, kernel_name="k", toolchain=toolchain)
    message = str(caught.value)
    assert f"{ROOT}/ptx/bad.cuh(2): error: Not a name of any known instruction: 'bogus'" in message
    assert f"(inlined at {ROOT}/kernels/x.cuh.j2(40))" in message
    assert "| __device__ void bad" in message
    assert "bogus.op" in Path(KEPT.search(message)[1]).with_suffix(".ptx").read_text()


def test_warnings_are_diagnostics(toolchain):
    source = f'#line 7 "{ROOT}/a/b.cuh"\nextern "C" __global__ void k(int* a) {{ int q = 3; a[0] = 1; }}\n'
    (diagnostic,) = compile_source(source, kernel_name="k", toolchain=toolchain).diagnostics
    assert (diagnostic.severity, diagnostic.code) == ("warning", "177-D")
    assert (diagnostic.file, diagnostic.line) == (f"{ROOT}/a/b.cuh", 7)
    assert not diagnostic.is_performance_loss


@pytest.mark.parametrize(
    ("source", "entry", "what"), [(SPILLS, "spills", "bytes of spills"), (SERIAL, "serial", "C75")]
)
def test_performance_losses_fail_warn_or_pass(toolchain, caplog, source, entry, what):
    with pytest.raises(PerformanceLossError, match=what) as caught:
        compile_source(source, kernel_name=entry, toolchain=toolchain)
    assert "MEGAMOE_JIT_STRICT=warn" in str(caught.value)
    assert Path(KEPT.search(str(caught.value))[1]).read_text() == source
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        with override(strict="warn"):
            result = compile_source(source, kernel_name=entry, toolchain=toolchain)
        assert len(caplog.records) == 1
        assert what in caplog.text
        with override(strict="ignore"):
            compile_source(source, kernel_name=entry, toolchain=toolchain)
        assert len(caplog.records) == 1
    assert result.advisories
    assert (result.spill_bytes > 0) == (entry == "spills")
    assert result.stack_bytes == result.kernel.stack_bytes


@pytest.mark.parametrize(("stores", "loads"), [(8, 4), (8, 0), (0, 4)])
def test_spills_that_only_the_summary_of_ptxas_tells_are_losses(toolchain, monkeypatch, stores, loads):
    """The warning has an option of its own, which the settings may take back; the summary is always there."""
    real, none = _compiler._nvrtc, "0 bytes spill stores, 0 bytes spill loads"

    def spilling(*arguments):
        status, log, ptx, cubin = real(*arguments)
        assert none in log
        return status, log.replace(none, f"{stores} bytes spill stores, {loads} bytes spill loads"), ptx, cubin

    monkeypatch.setattr(_compiler, "_nvrtc", spilling)
    with override(strict="ignore"):
        result = compile_source(GOOD, kernel_name="good", toolchain=toolchain)
    assert (result.spill_bytes, result.advisories) == (stores + loads, ())
    with pytest.raises(PerformanceLossError, match=f"good compiled with {stores + loads} bytes of spills; MEGAMOE"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain)


def test_advisory_points_at_the_source(toolchain):
    with override(strict="ignore"):
        result = compile_source(SERIAL, kernel_name="serial", toolchain=toolchain)
    placed = [d for d in result.diagnostics if d.code in ("C7517", "C7519") and d.file]
    assert placed
    assert {d.file for d in placed} == {f"{ROOT}/mma/serial.cuh"}
    assert {d.line for d in placed} <= set(range(1, 13))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("", "no kernel instead of exactly good"),
        ('extern "C" __global__ void other() {}', "other instead of exactly good"),
        (GOOD + 'extern "C" __global__ void z() {}', "good, z instead of exactly good"),
    ],
)
def test_exactly_the_entry_is_expected(toolchain, source, what):
    with pytest.raises(CompileError, match=what):
        compile_source(source, kernel_name="good", toolchain=toolchain)


def test_empty_cubin_is_refused(toolchain, monkeypatch):
    monkeypatch.setattr(_compiler, "_nvrtc", lambda *a: ("", "", "", b""))
    with pytest.raises(CompileError, match="not a 64-bit little-endian ELF"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain)


def test_bad_option_is_reported(toolchain):
    with pytest.raises(CompileError, match="no-such-option"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain, extra_options=["--no-such-option"])


def test_dump_directory(toolchain, tmp_path):
    with override(dump_dir=tmp_path / "dump"):
        result = compile_source(GOOD, kernel_name="good", toolchain=toolchain)
    assert (tmp_path / "dump" / "good.cu").read_text() == GOOD
    assert (tmp_path / "dump" / "good.cubin").read_bytes() == result.cubin
    assert {p.suffix for p in (tmp_path / "dump").iterdir()} == {".cu", ".cubin", ".ptx", ".log"}


def test_assembler_error_outside_of_any_function_has_no_position():
    positions = _compiler._PtxPositions(
        '.file 1 "/a"\n.visible .entry k()\nbogus;\n.loc 1 7 3\n.loc 9 2 1, inlined_at 8 1 1\n'
    )
    assert [positions.of(n) for n in (0, 3, 4, 5)] == [("", 0, ""), ("", 0, ""), ("/a", 7, ""), ("", 2, "")]


def test_many_errors_are_cut_short(toolchain):
    lines = "".join(f"int v{n} = undefined{n};" for n in range(20))
    with pytest.raises(CompileError, match=r"(?s)undefined0.*undefined7.*and \d+ more") as caught:
        compile_source(f'extern "C" __global__ void k() {{\n{lines}\n}}', kernel_name="k", toolchain=toolchain)
    assert '"undefined9"' not in str(caught.value)


def test_failure_that_is_not_understood_shows_the_log(toolchain, monkeypatch, tmp_path):
    monkeypatch.setattr(_compiler, "_nvrtc", lambda *_: ("NVRTC_ERROR_ODD", "something new", "", b""))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_compiler.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(CompileError, match=r"(?s)NVRTC_ERROR_ODD.*something new.*could not be kept"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain)


def test_failure_is_kept_in_the_dump_directory(toolchain, tmp_path):
    with override(dump_dir=tmp_path), pytest.raises(CompileError) as caught:
        compile_source("int x = nothing;", kernel_name="bad", toolchain=toolchain)
    assert KEPT.search(str(caught.value))[1] == str(tmp_path / "bad.cu")
    assert (tmp_path / "bad.cu").read_text() == "int x = nothing;"
    assert "nothing" in (tmp_path / "bad.log").read_text()


def test_dump_directory_that_cannot_be_written_is_a_warning(toolchain, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with override(dump_dir=tmp_path / "file" / "dump"), caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert compile_source(GOOD, kernel_name="good", toolchain=toolchain).cubin
    assert "cannot dump to" in caplog.text


def test_cubin_for_another_architecture_is_refused(toolchain, monkeypatch):
    info = CubinInfo("sm_100a", ())
    monkeypatch.setattr(_compiler, "read_cubin", lambda _: info)
    with pytest.raises(CompileError, match="the cubin is for sm_100a, not for sm_90a"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain)


def test_nvrtc_that_fails_by_itself_is_a_toolchain_error(toolchain, monkeypatch):
    from cuda.bindings import nvrtc

    monkeypatch.setattr(nvrtc, "nvrtcGetPTXSize", lambda program: (nvrtc.nvrtcResult.NVRTC_ERROR_OUT_OF_MEMORY, 0))
    with pytest.raises(ToolchainError, match="NVRTC failed: NVRTC_ERROR_OUT_OF_MEMORY"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain)


def test_ptxas_option_that_is_unknown_says_so(toolchain):
    with override(ptxas_options=("--no-such-thing",)), pytest.raises(CompileError, match="no-such-thing"):
        compile_source(GOOD, kernel_name="good", toolchain=toolchain)


@pytest.mark.parametrize("text", ["-v \x1b[2J", "a\0b", "-O3\ud800"])
def test_ptxas_options_that_cannot_be_written_are_refused(text):
    """They go into the metadata of every kernel and to the compiler, and neither takes them."""
    with pytest.raises(ConfigError, match="MEGAMOE_JIT_PTXAS_OPTIONS=.* is not allowed; allowed: printable words"):
        Settings.load({"MEGAMOE_JIT_PTXAS_OPTIONS": text})


@pytest.mark.parametrize("size", [6, 10, 63, 64])
def test_library_that_is_cut_short_is_said_to_be_and_stops_no_diagnosis(tmp_path, size):
    """Of 64 bytes the header is whole, and its offsets lead beyond any file."""
    path = tmp_path / "libnvrtc.so.12.9.86"
    path.write_bytes((b"\x7fELF\x02\x01" + b"\1" * 10 + b"\xff" * 48)[:size])
    with override(nvrtc=path):
        with pytest.raises(ToolchainError, match=f"cannot read NVRTC library {path}: it is cut short, at {size} bytes"):
            find_toolchain()
        for command in ("doctor", "env"):
            result = CliRunner().invoke(cli, [command, "--json"])
            assert isinstance(result.exception, SystemExit | None), result.exception
            assert f"it is cut short, at {size} bytes" in result.stdout


def test_signals_are_put_off_while_nvrtc_has_handlers_of_its_own(monkeypatch):
    """Its first compilation in a process ends it with 4 on SIGINT or SIGTERM, past the caller's handlers."""
    from cuda.bindings import nvrtc

    put_off = []
    compile_program = nvrtc.nvrtcCompileProgram

    def watch(*given):
        put_off.append({signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return compile_program(*given)

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", watch)
    monkeypatch.setattr(_settle, "_settled", False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for _ in range(2):
        _compiler._nvrtc('extern "C" __global__ void k() {}', "k", ["--gpu-architecture=sm_90a"])
    assert put_off == [True, False, False]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
