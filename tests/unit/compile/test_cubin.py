"""The ELF reader, on real cubins of this NVRTC and on made-up ones of both layouts."""

from __future__ import annotations

import contextlib
import struct
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe_jit._compile import cubin as _cubin
from megamoe_jit._compile.cubin import CubinError, cubin_arch, read_cubin
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.toolchain import find_toolchain

SOURCE = """
struct alignas(64) Params { float* out; int n; char more[500]; };
extern "C" __global__ void __launch_bounds__(384, 1) probe(const __grid_constant__ Params p) {
  __shared__ float t[100];
  t[threadIdx.x % 100] = p.n;
  __syncthreads();
  p.out[threadIdx.x] = t[(threadIdx.x + 1) % 100];
}
"""


@pytest.fixture(scope="module")
def cubin():
    return compile_source(SOURCE, kernel_name="probe", toolchain=find_toolchain()).cubin


def test_real_cubin(cubin):
    info = read_cubin(cubin)
    assert info.arch == "sm_90a"
    (kernel,) = info.entries
    assert kernel.name == "probe"
    assert 8 <= kernel.registers <= 168
    assert kernel.stack_bytes == 0
    assert kernel.static_shared_bytes == 400
    assert kernel.param_bytes == 512  # the struct, although its alignment pads the block in front of it
    assert kernel.max_threads == 384


def test_two_kernels_are_both_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = 'extern "C" __global__ void b(int* p, char c, double d) { p[0] = c; }\n'
    with pytest.raises(Exception, match="instead of exactly a"):
        compile_source(source + 'extern "C" __global__ void a() {}\n', kernel_name="a", toolchain=find_toolchain())
    result = compile_source(source, kernel_name="b", toolchain=find_toolchain())
    assert result.kernel.param_bytes == 24
    assert result.kernel.max_threads == 0


def header(abi, flags, machine=190):
    data = bytearray(64)
    data[:6] = b"\x7fELF\x02\x01"
    data[8] = abi
    struct.pack_into("<H", data, 18, machine)
    struct.pack_into("<I", data, 48, flags)
    return bytes(data)


@pytest.mark.parametrize(
    ("abi", "flags", "arch"),
    [(7, 0x5A0D5A, "sm_90a"), (7, 0x5A055A, "sm_90"), (7, 0x500550, "sm_80"), (8, 0x6005A04, "sm_90")],
)
def test_architecture_in_both_layouts(abi, flags, arch):
    assert cubin_arch(header(abi, flags)) == arch


def test_what_is_no_cubin():
    for data in (b"", b"\x7fELF", b"garbage" * 20, header(7, 0x5A, machine=62)):
        with pytest.raises(CubinError):
            cubin_arch(data)
        with pytest.raises(CubinError):
            read_cubin(data)


def test_every_truncation_is_noticed(cubin):
    for size in range(0, len(cubin) - 1, 97):
        with pytest.raises(CubinError):
            read_cubin(cubin[:size])


def test_section_that_points_past_the_end(cubin):
    broken = bytearray(cubin)
    (table,) = struct.unpack_from("<Q", cubin, 40)
    struct.pack_into("<Q", broken, table + 64 + 32, len(cubin))  # the size of the first real section
    with pytest.raises(CubinError, match="lies outside the file"):
        read_cubin(bytes(broken))


@given(st.data())
def test_garbled_bytes_never_raise_anything_else(cubin, data):
    garbled = bytearray(cubin)
    for _ in range(data.draw(st.integers(1, 8))):
        garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CubinError):
        read_cubin(bytes(garbled))


@pytest.mark.parametrize(
    ("note", "arch"),
    [(b"ptxas -arch sm_90a -v", "sm_90a"), (b"-arch=sm_90 ", "sm_90"), (b"-arch sm_100a", "sm_90"), (b"", "sm_90")],
)
def test_cuda_13_notes_the_architecture_in_full(monkeypatch, note, arch):
    data = header(8, 0x6005A04)
    section = _cubin._Section(".note.nv.tkinfo", 7, len(data), len(note), 0)
    monkeypatch.setattr(_cubin, "sections_of", lambda _: [section._replace(name=".text"), section])
    assert cubin_arch(data + note) == arch
