"""What tests of the runtime share: a cubin that is only a header, a kernel directory that compiles in no time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamoe_jit._cache.identity import cache_key, source_id
from megamoe_jit._cache.metadata import dump_metadata
from megamoe_jit._compile.render import render
from megamoe_jit._compile.toolchain import options_for

KEY = "ab" + "0" * 62
OTHER = "cd" + "1" * 62
REPO = Path(__file__).resolve().parents[1]

TEMPLATE = """#include "room/fill.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) {{ kernel_name }}(const __grid_constant__ mini::Params p) {
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
ROOMS = {
    "kernels/entry.cuh.j2": TEMPLATE,
    "kernels/stage.cuh.j2": TEMPLATE.replace("{{ hidden }}", 'sizeof("{{ format }}")'),
    "room/fill.cuh": ROOM,
}


def fake_cubin(body: bytes = b"body", entry: str | None = None) -> bytes:
    """An ELF header of a cubin for sm_90a, the symbol of a kernel if one is named, then `body`."""
    data = bytearray(64)
    data[:6] = b"\x7fELF\x02\x01"
    data[8] = 7
    struct.pack_into("<H", data, 18, 190)
    struct.pack_into("<I", data, 48, 0x5A0D5A)
    if entry is not None:
        names, symbol = b"\0" + entry.encode() + b"\0", struct.pack("<IBB18x", 1, 0, 0x10)
        tables = [(3, 64, len(names), 0), (2, 64 + len(names), len(symbol), 0)]  # of strings, of symbols
        struct.pack_into("<Q", data, 40, 64 + len(names) + len(symbol))
        struct.pack_into("<HHH", data, 58, 64, len(tables), 0)
        data += names + symbol
        for kind, offset, size, link in tables:
            data += struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 0, 1, 24)
    return bytes(data) + body


def fake_kernel(
    entry: str = "first",
    source: str = "source",
    body: bytes = b"",
    *,
    version: str = "12.9",
    options: Sequence[str] = ("--gpu-architecture=sm_90a",),
) -> tuple[Any, ...]:
    """Key, binary, source and metadata of a kernel that is what its key names: what `EntryStore.store` takes."""
    about = {
        "entry": entry,
        "options": list(options),
        "source_id": source_id(source, options, entry, "sm_90a"),
        "nvrtc": {"version": version, "build": "build", "path": "/lib/libnvrtc.so"},
    }
    key = cache_key(source, options, entry, "sm_90a", version, "build")
    return key, fake_cubin(body, entry), source, about


def kernel_of_spec(spec: Any, version: str = "12.9", body: bytes = b"") -> tuple[Any, ...]:
    """`fake_kernel` for a spec, from its source, as another compiler than the one here makes it."""
    return fake_kernel(spec.kernel_name, render(spec).text, body, version=version, options=list(options_for(None)))


def write_rooms(folder: Path, rooms: dict[str, str] = ROOMS) -> Path:
    """A small kernel directory."""
    for name, text in rooms.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def rewrite_meta(folder: Path, **changes: Any) -> None:
    """Change fields of an entry's metadata, whose digest is right then."""
    path = folder / "meta.json"
    meta = {**json.loads(path.read_text()), **changes}
    meta.pop("meta_sha256", None)
    path.write_bytes(dump_metadata(meta))


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


@contextmanager
def changed(get: Callable[[], object], put: Callable[[object], object], value: object) -> Iterator[None]:
    """A global setting of torch while something runs."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)
