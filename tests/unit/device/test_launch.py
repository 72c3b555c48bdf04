"""Loading and launching against a stub driver: what reaches the driver, and what its refusals become.

The stub is a small C library with the driver's name; each case runs in a process of its own, since a process
loads one driver.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
NVRTC = "MEGAMOE_JIT_NVRTC"
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the stub driver")

STUB = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned gx, gy, gz, bx, by, bz, shared; void* stream; unsigned* attrs; unsigned n; } Config;
static int env(const char* name, int other) { const char* t = getenv(name); return t ? atoi(t) : other; }
static void* current;
int cuInit(unsigned f) { return env("STUB_INIT", 0); }
int cuDriverGetVersion(int* v) { *v = env("STUB_DRIVER", 99040); return 0; }  // newer than any compiler
int cuDeviceGet(int* d, int i) { *d = i; return i < 2 ? 0 : 101; }
int cuDeviceGetAttribute(int* v, int a, int d) {
  *v = a == 75 ? env("STUB_MAJOR", 9) : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)(uintptr_t)(0x1000 + d); return 0; }
int cuCtxGetCurrent(void** c) { *c = current; return 0; }
int cuCtxSetCurrent(void* c) { current = c; printf("context %p\n", c); return 0; }
int cuLibraryLoadData(void** l, const char* code, void* a, void* b, unsigned n, void* c, void* d,
                      unsigned m) {
  static int loads;
  printf("load %d\n", memcmp(code, "\x7f" "ELF", 4)); *l = (void*)0x2000;
  return loads++ < env("STUB_LOAD_TIMES", 99) ? env("STUB_LOAD", 0) : 0;
}
int cuLibraryGetKernel(void** k, void* l, const char* name) {
  printf("kernel %s\n", name); *k = (void*)0x3000; return 0;
}
int cuKernelGetFunction(void** f, void* k) { *f = (void*)0x4000; return env("STUB_FUNCTION", 0); }
int cuFuncSetAttribute(void* f, int a, int v) {
  printf("attribute %d %d\n", a, v);
  return env("STUB_SHARED", 0);
}
int cuGetErrorString(int e, const char** s) { *s = "the stub says no"; return 0; }
int cuLaunchKernelEx(const Config* c, void* f, void** params, void** extra) {
  int* p = (int*)params[0];
  printf("launch f=%p grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p ", f, c->gx, c->gy, c->gz, c->bx,
         c->by, c->bz, c->shared, c->stream);
  printf("attrs=%u/%u/%u first=%d last=%d\n", c->n, c->attrs[0], c->attrs[2], p[0], p[15]);
  return env("STUB_LAUNCH", 0);
}
int cuGetProcAddress_v2(const char* name, void** fn, int v, uint64_t flags, int* status) {
  static void* self;
  if (!self) self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *fn = dlsym(self, strcmp(name, "cuGetProcAddress") ? name : "cuGetProcAddress_v2");
  if (status) *status = *fn ? 0 : 1;
  return *fn ? 0 : 500;
}
"""

PRELUDE = """
import ctypes, os, sys, types
ctypes.CDLL(os.environ["STUB"], mode=ctypes.RTLD_GLOBAL)
from megamoe_jit import _errors as errors
from megamoe_jit._device.launch import Launcher
from megamoe_jit._device.load import load_kernel
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
class Params(ctypes.Structure):
    _fields_ = [("words", ctypes.c_int * 16)]
memory = (ctypes.c_char * 192)()
start = -ctypes.addressof(memory) % 64
params = Params.from_buffer(memory, start)
def say(*words):
    print(*words, flush=True)
def attempt(call, *args, **named):
    try:
        call(*args, **named)
    except errors.MegaMoeError as error:
        say(type(error).__name__ + ":", error)
    else:
        say("fine")
libc = ctypes.CDLL(None)
"""

KERNEL = """struct alignas(64) Params { int words[16]; };
extern "C" __global__ void __launch_bounds__(384, 1) {{ kernel_name }}(const __grid_constant__ Params p) {}
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text(STUB)
    library = folder / "libcuda.so.1"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "stub.c", "-ldl"], check=True
    )
    (folder / "src" / "kernels").mkdir(parents=True)
    (folder / "src" / "kernels" / "entry.cuh.j2").write_text(KERNEL)
    return folder


@pytest.fixture
def run(stub):
    """Run statements with the stub as the driver; returns what was printed, line by line."""

    def run(body, **variables):
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MEGAMOE_JIT_") or k == NVRTC},
            "PYTHONPATH": str(REPO),
            "STUB": str(stub / "libcuda.so.1"),
            "MEGAMOE_JIT_CACHE_DIR": str(stub / "cache"),
            "MEGAMOE_JIT_LOCK_DIR": str(stub / "locks"),
            "MEGAMOE_JIT_KERNELS_SRC": str(stub / "src"),
            **{k: str(v) for k, v in variables.items()},
        }
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + body + "\nlibc.fflush(None)\n"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_load_sets_everything_once(run):
    out = run(
        "first = load_kernel(spec, 0, param_bytes=64)\n"
        "assert load_kernel(spec, 0) is first\n"
        "assert (first.param_bytes, first.device_index, int(first.function)) == (64, 0, 0x4000)\n"
    )
    assert out[0] == "context 0x1000"
    assert out[1] == "load 0"
    assert out[2].startswith("kernel megamoe_pingpong_h256")
    name, attribute, shared = out[3].split()
    assert (name, attribute) == ("attribute", "8")
    assert 0 < int(shared) <= 232448
    assert len(out) == 4


def test_launch_passes_config_and_parameters(run):
    out = run(
        "launcher = Launcher(load_kernel(spec, 0), params)\n"
        "for grid, stream, value in ((132, 0x77, 5), (132, 0x77, 6), (64, 0, 7)):\n"
        "    params.words[0] = value; params.words[15] = -value\n"
        "    launcher.launch(grid, stream)\n"
        "libc.fflush(None)\nsay('shared', spec.shared_bytes)\n"
    )
    shared = out[-1].split()[1]
    tail = f"block=384,1,1 shared={shared}"
    launches = [line for line in out if line.startswith("launch")]
    assert launches == [
        f"launch f=0x4000 grid=132,1,1 {tail} stream=0x77 attrs=1/2/1 first=5 last=-5",
        f"launch f=0x4000 grid=132,1,1 {tail} stream=0x77 attrs=1/2/1 first=6 last=-6",
        f"launch f=0x4000 grid=64,1,1 {tail} stream=(nil) attrs=1/2/1 first=7 last=-7",
    ]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (720, "LaunchError", ["CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "grid 999", "number of SMs"]),
        (1, "LaunchError", ["CUDA_ERROR_INVALID_VALUE", "bytes of shared memory"]),
        (719, "DeviceFaultError", ["CUDA_ERROR_LAUNCH_FAILED", "earlier kernel", "start again"]),
    ],
)
def test_refused_launch(run, code, kind, words):
    out = run("attempt(Launcher(load_kernel(spec, 0), params).launch, 999, 0)\n", STUB_LAUNCH=code)
    (message,) = [line for line in out if "Error: " in line]
    assert message.startswith(kind + ": ")
    assert all(word in message for word in words)


def test_wrong_parameters_are_refused(run):
    out = run(
        "attempt(load_kernel, spec, 0, param_bytes=128)\n"
        "loaded = load_kernel(spec, 0)\n"
        "class Other(ctypes.Structure):\n    _fields_ = [('x', ctypes.c_int)]\n"
        "attempt(Launcher, loaded, Other())\n"
        "attempt(Launcher, loaded, Params.from_buffer(memory, start + 16))\n"
    )
    errors = [line for line in out if "Error: " in line]
    assert errors[0].startswith("LoadError: ")
    assert "takes 64 bytes of parameters, but the host passes 128" in errors[0]
    assert errors[1].endswith("takes 64 bytes of parameters, not 4")
    assert errors[2].endswith("must be 64-byte aligned")


@pytest.mark.parametrize(
    ("variables", "device", "words"),
    [
        ({"STUB_LOAD": 200}, 0, ["LoadError", "CUDA_ERROR_INVALID_IMAGE", "NVRTC 1", "CUDA 99.4", "is damaged"]),
        ({"STUB_LOAD": 209}, 0, ["LoadError", "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA 99.4", "is damaged"]),
        ({"STUB_LOAD": 209, "STUB_DRIVER": 11080}, 0, ["LoadError", "CUDA 11.8; install an NVRTC of CUDA 11"]),
        ({"STUB_FUNCTION": 209}, 0, ["LoadError", "CUDA_ERROR_NO_BINARY_FOR_GPU", "the binary is damaged"]),
        ({"STUB_LOAD": 2}, 0, ["LoadError", "CUDA_ERROR_OUT_OF_MEMORY", "the stub says no"]),
        ({"STUB_SHARED": 1}, 0, ["LoadError", "raising the shared memory", "CUDA_ERROR_INVALID_VALUE"]),
        ({"STUB_INIT": 100}, 0, ["LoadError", "cuInit failed: CUDA_ERROR_NO_DEVICE"]),
        ({"STUB_MAJOR": 10}, 0, ["UnsupportedDeviceError", "compute capability 10.0", "needs 9.0"]),
        ({}, 5, ["LoadError", "cuDeviceGet(5)", "CUDA_ERROR_INVALID_DEVICE"]),
    ],
)
def test_refused_load(run, variables, device, words):
    out = run(f"attempt(load_kernel, spec, {device})\n", **variables)
    (message,) = [line for line in out if "Error: " in line]
    assert all(word in message for word in words), message


REFUSED = """
import logging
from megamoe_jit._jit.registry import reset
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._cache.cache import user_cache
get_kernel(spec)
reset()  # as if another process had compiled it
logging.getLogger("megamoe_jit").addHandler(logging.StreamHandler(sys.stdout))
"""


def test_cached_kernel_that_the_driver_refuses_is_compiled_again_once(run, stub):
    out = run(
        REFUSED + "loaded = load_kernel(spec, 0)\nassert load_kernel(spec, 0) is loaded\n"
        "say(loaded.compiled.origin, len(user_cache().quarantined()))\n",
        STUB_LOAD=200,
        STUB_LOAD_TIMES=1,
        MEGAMOE_JIT_CACHE_DIR=stub / "refused",
    )
    assert len([line for line in out if line.startswith("load ")]) == 2
    assert [line for line in out if line.endswith(", or compiling it here")]
    assert "compiled 1" in out


@pytest.mark.parametrize(("sealed", "loads"), [(False, 2), (True, 1)])
def test_refusal_that_stays_is_the_same_error_every_time(run, stub, sealed, loads):
    seal = "from megamoe_jit._jit.runtime import seal\nseal()\n" if sealed else ""
    body = REFUSED + seal + "attempt(load_kernel, spec, 0)\n" * 3
    out = run(body, STUB_LOAD=200, MEGAMOE_JIT_CACHE_DIR=stub / f"stays{sealed}")
    assert len([line for line in out if line.startswith("load ")]) == loads
    errors = [line for line in out if "Error: " in line]
    assert len(errors) == 3
    assert len(set(errors)) == 1
    assert errors[0].startswith("LoadError: the driver refuses kernel")


def test_refused_kernel_is_tried_again_when_asked_to(run, stub):
    """Refused the first time, just compiled here; accepted the second time."""
    out = run(
        "from megamoe_jit import retry\nattempt(load_kernel, spec, 0)\nattempt(load_kernel, spec, 0)\n"
        "retry()\nattempt(load_kernel, spec, 0)\n",
        STUB_LOAD=200,
        STUB_LOAD_TIMES=1,
        MEGAMOE_JIT_CACHE_DIR=stub / "again",
    )
    spoken = [line.split(":")[0] for line in out if line.startswith(("LoadError", "fine"))]
    assert spoken == ["LoadError", "LoadError", "fine"]
    assert len([line for line in out if line.startswith("load ")]) == 2


def test_machine_without_a_driver_says_so(run):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has an NVIDIA driver")
    out = run("attempt(load_kernel, spec, 0)\n", STUB="libc.so.6")
    (message,) = [line for line in out if "Error: " in line]
    assert message.startswith("LoadError: there is no NVIDIA driver (libcuda.so.1)")


def test_kernel_that_is_too_new_for_the_driver_is_not_put_aside(run, stub):
    """Another node with a newer driver may use it; here the compiler of this driver's generation is the answer."""
    out = run(
        REFUSED + "from megamoe_jit._cache.metadata import dump_metadata, read_metadata\n"
        "path = user_cache().entries()[0].path / 'meta.json'\n"
        "meta = read_metadata(path.read_bytes()); meta['nvrtc']['version'] = '13.5'\n"
        "path.write_bytes(dump_metadata(meta))\n"
        "say(load_kernel(spec, 0).compiled.origin, len(user_cache().quarantined()))\n",
        STUB_LOAD=200,
        STUB_LOAD_TIMES=1,
        STUB_DRIVER=12040,
        MEGAMOE_JIT_CACHE_DIR=stub / "newer",
    )
    assert [line for line in out if "install an NVRTC of CUDA 12" in line]
    assert "compiled 0" in out


def test_context_of_another_device_is_refused(run):
    out = run("load_kernel(spec, 0)\nattempt(load_kernel, spec, 1)\n")
    (message,) = [line for line in out if "Error: " in line]
    assert "torch.cuda.set_device(1)" in message


def test_first_use_during_capture_touches_nothing(run):
    out = run(
        "from megamoe_jit._jit.kernel import warmup_command\n"
        "state = types.SimpleNamespace(capturing=True)\n"
        "torch = types.ModuleType('torch')\n"
        "torch.cuda = types.SimpleNamespace(is_initialized=lambda: True,\n"
        "    is_current_stream_capturing=lambda: state.capturing)\n"
        "sys.modules['torch'] = torch\n"
        "attempt(load_kernel, spec, 0)\n"
        "assert 'cuda.bindings.driver' not in sys.modules\n"
        "state.capturing = False\n"
        "attempt(load_kernel, spec, 0)\n"
        "state.capturing = True\n"
        "attempt(load_kernel, spec, 0)\n"
        "say(warmup_command(spec))\n"
    )
    spoken = [line for line in out if line.startswith(("CaptureError", "fine", "megamoe-jit"))]
    assert spoken[0].startswith("CaptureError: ")
    assert spoken[3] in spoken[0]
    assert spoken[1:3] == ["fine", "fine"]


COUNT = """
import megamoe_jit
from collections import Counter
from pathlib import Path
from megamoe_jit._compile import cubin
from megamoe_jit._jit import obtain
from megamoe_jit._jit.registry import reset
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._cache.cache import user_cache
package = str(Path(megamoe_jit.__file__).parent)
real, made = obtain.compile_source, {}
def compile_source(text, **named):
    if text not in made:
        made[text] = real(text, **named)
    return made[text]
obtain.compile_source = compile_source
def miss(name, spec):
    reset()
    calls = Counter()
    def note(frame, event, _):
        code = frame.f_code
        ours = code.co_filename.startswith(package) or code.co_qualname.startswith("__create_fn__")  # of dataclasses
        if event == "call" and ours:
            calls[f"{code.co_filename[len(package) + 1:]} {code.co_qualname}"] += 1
    fresh = KernelSpec(spec.shape, spec.variant)  # nothing is worked out of it yet
    sys.setprofile(note)
    try:
        loaded = load_kernel(fresh, 0)
    finally:
        sys.setprofile(None)
    say(name, loaded.compiled.origin, calls.total(), calls.most_common(12))
load_kernel(spec, 0)  # what is imported and found out once a process
other = KernelSpec(MoEShape(256, 128, 16, 2), Variant.PINGPONG)
get_kernel(other)  # the compiler's own part is no part of this
for known in (cubin.read_cubin, cubin.cubin_arch, cubin.sections_of):
    known.cache_clear()  # as a process that has not compiled it
miss("stored:", other)
user_cache().clear()
miss("made:", other)
"""


def test_a_miss_makes_few_calls(run, stub):
    """Functions of the package that run between the first call of a kernel and its handle."""
    out = run(COUNT, MEGAMOE_JIT_CACHE_DIR=stub / "counted")
    lines = [line.split(" ", 3) for line in out if line.startswith(("stored:", "made:"))]
    assert [line[:2] for line in lines] == [["stored:", "disk"], ["made:", "compiled"]]
    assert all(int(count) < 250 for _, _, count, _ in lines), [line[:3] for line in lines]
