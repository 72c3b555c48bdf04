"""Writes `megamoe_jit/_spec/abi.py`, what kernels and Python agree on, from the headers in `kernels_src/`.

    python -m tests.abi > megamoe_jit/_spec/abi.py       # or: make abi

Every number is the compiler's: a probe that includes the headers holds a table of constants, sizes and offsets, NVRTC
compiles it, and the table is read out of the cubin.  Only the names of members and enumerators are read from the text,
since C++17 cannot tell them; a member that was overlooked leaves a hole in its struct, which is an error here.
"""

from __future__ import annotations

import re
import struct
import sys

from megamoe_jit._compile.cubin import sections_of
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.toolchain import find_toolchain
from tests import host

#: By room: the constants that Python needs.
CONSTANTS = {
    "base/constants.cuh": (
        *("kQuantBlock", "kBlockK", "kBlockN", "kPoolAlign", "kCounterRows", "kUnitRows", "kMaxRanks", "kSideWords"),
        *("kDispatchChunk", "kTileSlots", "kSharedLimit", "kStagingBytes"),
        *("kWarp", "kGroup", "kMathWarps", "kThreads", "kPairBits"),
    ),
    "comm/timeline.cuh": ("kRecords", "kRecordWords"),
    "roles/load.cuh": ("kActBoxRows", "kSmallBoxRows"),
    "kernels/stage.cuh": ("kStageThreads",),
    "kernels/nodes.cuh": ("kNodesThreads",),
}
#: By name in Python: the room, the enumeration there, and what it is.
ENUMS = {
    "Wait": ("comm/fault.cuh", "enum class Wait", "What a kernel that gave up had waited for."),
    "Meeting": ("comm/barriers.cuh", "enum class Meeting", "Where all ranks meet in a launch."),
    "Role": ("comm/timeline.cuh", "enum class Role", "Who writes a record of the timeline."),
    "Span": ("comm/timeline.cuh", "enum class Span", "What a record of the timeline is about."),
    "Control": ("layout/params.cuh", "enum Control", "Words of the control section, and how many there are."),
}
STRUCTS = {
    "PARAMS": ("layout/params.cuh", "Params"),
    "STAGE_PARAMS": ("kernels/stage.cuh", "StageParams"),
    "NODES_PARAMS": ("kernels/nodes.cuh", "NodesParams"),
    "TILE": ("sched/experts.cuh", "Tile"),
}
MARK = 0x6D656761_6D6F6521  #: before the table, which is not alone in its section
KINDS = ("u32", "u64", "float", "TensorMap")

PROBE = """
#include "kernels/megamoe.cuh"
#include "kernels/stage.cuh"
#include "kernels/nodes.cuh"
using namespace megamoe;
using namespace megamoe::ptx;

template <class T> struct Kind;
template <> struct Kind<u32> { enum : u64 { value = 0 }; };
template <> struct Kind<u64> { enum : u64 { value = 1 }; };
template <> struct Kind<float> { enum : u64 { value = 2 }; };
template <> struct Kind<TensorMap> { enum : u64 { value = 3 }; };
template <class T> struct Kind<T*> : Kind<u64> {};   // an address
template <class T> struct Element { using type = T; };
template <class T, decltype(sizeof(0)) n> struct Element<T[n]> { using type = T; };
#define MEMBER(s, m) MEGA_OFFSET(s, m), sizeof(s::m), sizeof(Element<decltype(s::m)>::type), \\
    Kind<Element<decltype(s::m)>::type>::value
extern "C" __device__ u64 table[] = {%s, %s};
extern "C" __global__ void probe(u64* out) { *out = table[*out]; }
"""


def python_name(name: str) -> str:
    """`kPoolAlign` or `pool_align` as Python writes a constant."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.sub(r"^k(?=[A-Z])", "", name)).upper()


def names(room: str, declaration: str) -> list[str]:
    """Names of the members or enumerators that a declaration has in its braces, in order."""
    text = re.sub(r"enum Kind [^;]*;|alignas\(\d+\) ", "", host.room(room))
    _, found, rest = text.partition(f"{declaration} ")
    assert found, f"{room} no longer declares `{declaration}`"
    body = rest.partition("{")[2].partition("}")[0]
    parts = [part.partition("=")[0].split("[")[0].split() for part in re.split("[,;]", body)]
    return [part[-1].lstrip("*") for part in parts if part]


def enum_values(room: str, declaration: str) -> dict[str, str]:
    """By enumerator: the expression that is its value."""
    prefix = f"{declaration.split()[-1]}::" if "class" in declaration else ""
    return {name: prefix + name for name in names(room, declaration)}


def member_values(room: str, declared: str) -> dict[str, str]:
    """By member: the expressions for its offset, its size, that of an element, and the element's kind."""
    return {name: f"MEMBER({declared}, {name})" for name in names(room, f"struct {declared}")}


def compiled() -> dict[str, tuple[int, ...]]:
    """What the compiler makes of each expression that is asked for anywhere."""
    wanted = [name for some in CONSTANTS.values() for name in some]
    wanted += [value for room, declaration, _ in ENUMS.values() for value in enum_values(room, declaration).values()]
    for room, declared in STRUCTS.values():
        wanted += [f"sizeof({declared})", f"alignof({declared})", *member_values(room, declared).values()]
    options = [f"--include-path={host.KERNELS}"]
    source = PROBE % (f"{MARK}ull", ", ".join(value if "MEMBER" in value else f"u64({value})" for value in wanted))
    cubin = compile_source(source, kernel_name="probe", toolchain=find_toolchain(), extra_options=options).cubin
    (data,) = (cubin[s.offset : s.offset + s.size] for s in sections_of(cubin) if s.name == ".nv.global.init")
    mark = struct.pack("<Q", MARK)
    assert data.count(mark) == 1
    at, found = data.index(mark) + len(mark), {}
    for value in wanted:
        count = 4 if "MEMBER" in value else 1
        found[value] = struct.unpack_from(f"<{count}Q", data, at)
        at += 8 * count
    return found


def constants_text(values: dict[str, tuple[int, ...]]) -> str:
    """The lines of all constants."""
    rooms = [
        f"# {room}\n" + "".join(f"{python_name(name)} = {values[name][0]}\n" for name in some)
        for room, some in CONSTANTS.items()
    ]
    return "\n".join(rooms)


def enum_text(values: dict[str, tuple[int, ...]], name: str) -> str:
    """An enumeration as a class."""
    room, declaration, what = ENUMS[name]
    members = {member: values[value][0] for member, value in enum_values(room, declaration).items()}
    assert len(set(members.values())) == len(members), f"{room}: two of {declaration} have one value"
    lines = [f"    {python_name(member.removeprefix(f'k{name}'))} = {value}\n" for member, value in members.items()]
    return f'class {name}(IntEnum):\n    """{what}  `{room}`"""\n\n{"".join(lines)}'


def struct_text(values: dict[str, tuple[int, ...]], name: str) -> str:
    """Size, alignment and members of a struct."""
    room, declared = STRUCTS[name]
    (size,), (align,) = values[f"sizeof({declared})"], values[f"alignof({declared})"]
    lines, end = [], 0
    for member, value in member_values(room, declared).items():
        offset, total, each, kind = values[value]
        assert offset == end, f"{room}: a hole before {declared}::{member}, or a member that was overlooked"
        lines.append(f'    ("{member}", "{KINDS[kind]}", {total // each}, {offset}),\n')
        end += total
    assert end == size, f"{room}: {declared} ends with a hole, or a member was overlooked"
    return (
        f"#: `{declared}` of {room}: name, type, how many, and offset in bytes.\n"
        f"{name}_BYTES, {name}_ALIGN = {size}, {align}\n{name} = (\n{''.join(lines)})\n"
    )


def text() -> str:
    """The whole module."""
    values = compiled()
    doc = '"""What kernels and Python agree on.  Written by `make abi` from `kernels_src/`; not by hand."""\n'
    head = f"{doc}\nfrom __future__ import annotations\n\nfrom enum import IntEnum\n\n"
    structs = [struct_text(values, name) for name in STRUCTS]
    enums = [enum_text(values, name) for name in ENUMS]
    return head + constants_text(values) + "\n" + "\n".join(structs) + "\n\n" + "\n\n".join(enums)


if __name__ == "__main__":
    sys.stdout.write(text())
