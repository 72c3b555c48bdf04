"""The parameter block: the mirror in Python against the struct, by name, order, type, size and offset."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from megamoe_jit._device.params import MAX_RANKS, PARAMS_ALIGN, Params, TensorMap, aligned_params
from megamoe_jit._device.tensor_map import BOX_ROWS_ACT, BOX_ROWS_SMALL
from megamoe_jit._spec import MAX_RANKS as SPEC_MAX_RANKS
from tests import host

HEADER = "layout/params.cuh"
SCALARS = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "float": ctypes.c_float, "ptx::TensorMap": TensorMap}


class Field(NamedTuple):
    name: str
    kind: type
    count: int


def declared() -> list[Field]:
    """Fields of the C++ struct, in order; a pointer counts as its address."""
    body = re.search(r"struct alignas\((\d+)\) Params \{(.*?)\};", host.room(HEADER), re.DOTALL)
    assert body, f"{HEADER} no longer declares `struct alignas(..) Params`"
    assert int(body[1]) == PARAMS_ALIGN
    fields = []
    for statement in filter(None, (s.strip() for s in body[2].split(";"))):
        kind, declarators = re.fullmatch(r"(?:const )?([\w:]+\s*\*?)\s*(.*)", statement, re.DOTALL).groups()
        kind = kind.replace(" ", "")
        for declarator in declarators.split(","):
            name, length = re.fullmatch(r"\s*(\w+)\s*(?:\[(\w+)\])?\s*", declarator).groups()
            count = 1 if length is None else int(length) if length.isdigit() else host.constant(length)
            fields.append(Field(name, ctypes.c_uint64 if kind.endswith("*") else SCALARS[kind], count))
    return fields


def mirrored() -> list[Field]:
    """Fields of the ctypes structure, in order."""
    fields = []
    for name, kind in Params._fields_:
        array = issubclass(kind, ctypes.Array)
        fields.append(Field(name, kind._type_ if array else kind, kind._length_ if array else 1))
    return fields


def test_the_parser_sees_the_whole_struct():
    fields = declared()
    assert len(fields) > 30
    assert {"act1", "peers", "combine", "y", "fault", "clamp"} <= {f.name for f in fields}
    assert len({f.name for f in fields}) == len(fields)


def test_names_order_and_types_are_those_of_the_struct():
    assert mirrored() == declared()


def test_size():
    stated = re.search(r"static_assert\(sizeof\(Params\) == (\d+)", host.room(HEADER))
    assert stated
    assert ctypes.sizeof(Params) == int(stated[1])
    used = sum(ctypes.sizeof(f.kind) * f.count for f in declared())
    assert math.ceil(used / PARAMS_ALIGN) * PARAMS_ALIGN == ctypes.sizeof(Params)


def test_offsets_are_those_of_the_compiler(tmp_path: Path):
    names = [f.name for f in declared()]
    prints = "\n".join(f"  SHOW({name})" for name in names)
    source = tmp_path / "offsets.cpp"
    source.write_text(
        f'#include "{HEADER}"\n#include <cstddef>\n#include <cstdio>\n'
        "using megamoe::Params;\n"
        '#define SHOW(f) std::printf(#f " %zu %zu\\n", offsetof(Params, f), sizeof(Params::f));\n'
        f'int main() {{\n{prints}\n  std::printf("end %zu %zu\\n", sizeof(Params), alignof(Params));\n}}\n'
    )
    program = host.build(source, tmp_path / "offsets")
    lines = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    seen = {name: (int(offset), int(size)) for name, offset, size in map(str.split, lines)}
    assert seen.pop("end") == (ctypes.sizeof(Params), PARAMS_ALIGN)
    assert seen == {name: (getattr(Params, name).offset, getattr(Params, name).size) for name in names}


def test_limits_agree():
    assert host.constant("kMaxRanks") == MAX_RANKS == SPEC_MAX_RANKS
    assert ctypes.sizeof(TensorMap) == 128


@pytest.mark.parametrize("_", range(8))
def test_the_block_is_aligned_and_zero(_: int):
    params = aligned_params()
    assert ctypes.addressof(params) % PARAMS_ALIGN == 0
    assert bytes(params) == bytes(ctypes.sizeof(Params))
    maps = [name for name, kind in Params._fields_ if kind is TensorMap]
    assert len(maps) == 4
    assert all(getattr(Params, name).offset % 64 == 0 for name in maps)


def test_boxes_are_of_the_same_height():
    names = {"kActBoxRows": BOX_ROWS_ACT, "kSmallBoxRows": BOX_ROWS_SMALL}
    assert {name: host.constant(name, "roles/load.cuh") for name in names} == names
