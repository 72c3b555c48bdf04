"""What tests of the runtime share: a cubin that is only a header, a kernel directory that compiles in no time."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

KEY = "ab" + "0" * 62
OTHER = "cd" + "1" * 62
REPO = Path(__file__).resolve().parents[1]

TEMPLATE = """#include "room/fill.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) {{ entry }}(const __grid_constant__ mini::Params p) {
  mini::fill(p, {{ hidden }});
}
"""
ROOM = """#pragma once
namespace mini {
struct alignas(64) Params { int* out; int n; };
__device__ inline void fill(const Params& p, int value) {
  if (threadIdx.x < p.n) p.out[threadIdx.x] = value;
}
}
"""
ROOMS = {"kernels/entry.cuh.j2": TEMPLATE, "room/fill.cuh": ROOM}


def fake_cubin(body: bytes = b"body") -> bytes:
    """An ELF header of a cubin for sm_90a, then `body`."""
    data = bytearray(64)
    data[:6] = b"\x7fELF\x02\x01"
    data[8] = 7
    struct.pack_into("<H", data, 18, 190)
    struct.pack_into("<I", data, 48, 0x5A0D5A)
    return bytes(data) + body


def write_rooms(folder: Path, rooms: dict[str, str] = ROOMS) -> Path:
    """A small kernel directory."""
    for name, text in rooms.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def rewrite_meta(folder: Path, **changes: Any) -> None:
    """Change fields of an entry's metadata."""
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def child_environment(place: Path, **variables: object) -> dict[str, str]:
    """The environment of a child process with its cache, locks and kernels in `place`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEGAMOE_JIT_") or k == "MEGAMOE_JIT_NVRTC"}
    return {
        **kept,
        "PYTHONPATH": str(REPO),
        "MEGAMOE_JIT_CONFIG": os.devnull,
        "MEGAMOE_JIT_CACHE_DIR": str(place / "cache"),
        "MEGAMOE_JIT_LOCK_DIR": str(place / "locks"),
        "MEGAMOE_JIT_KERNELS_SRC": str(place / "src"),
        **{name: str(value) for name, value in variables.items()},
    }


def fail_with(number: int) -> Any:
    """A function that fails with this error of the operating system, whatever it is given."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail
