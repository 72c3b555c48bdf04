"""Lines of code by room, before the rooms and now, as a table of docs/architecture.md.

    python -m tests.house      prints it

"Before" is commit 7ac5e69: what is one room now was files beside each other then.  What came since counts apart where
whole files or rooms are for it; what it added to other files is in their figures.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from typing import NamedTuple

from tests.stubs import REPO

#: Written by hand in 7ac5e69: Python and CUDA, and the JSON schemas of the command line's documents.
BEFORE = {
    "_settings": 677,
    "_spec": 254,
    "_compile": 1202,
    "_cache": 1258,
    "_jit": 1053,
    "_device": 979,
    "_layer": 1559,
    "_check": 1156,
    "_bench": 1999,
    "_diagnose": 1179,
    "_cli": 6343,
    "ground": 444,
    "heuristics": 534,
    "kernels_src": 2299,
    "benchmarks": 1257,
}
#: What nothing of 7ac5e69 could do: models in files, engines, several nodes, packed weights, inputs staged by a launch,
#: a layer as a module of torch.
SINCE = (
    *("megamoe_jit/checkpoints/*", "megamoe_jit/engines/*", "megamoe_jit/transformers/*", "megamoe_jit/_nodes/*"),
    *("megamoe_jit/_bench/*nodes.py", "megamoe_jit/_diagnose/between.py", "megamoe_jit/_diagnose/engines.py"),
    *(f"megamoe_jit/_cli/{name}.py" for name in ("_nodes", "_bench_nodes", "convert", "inspect_checkpoint")),
    *(f"megamoe_jit/_spec/{name}.py" for name in ("any_layer", "inputs", "kinds")),
    *(f"megamoe_jit/_layer/{name}.py" for name in ("*mxfp4", "binades", "expansion", "from_bf16", "local_experts")),
    *(f"megamoe_jit/_layer/{name}.py" for name in ("marks", "module_state", "operators", "plain_weights")),
    *(f"megamoe_jit/_layer/{name}.py" for name in ("raw_inputs", "serving", "stage*", "workspace")),
    *("kernels_src/stage/*", "kernels_src/expand/*", "kernels_src/formats/mxfp4*", "kernels_src/formats/fp8e5m2*"),
    *("kernels_src/mma/code_stream*", "kernels_src/mma/magnitudes*", "kernels_src/*swapped*"),
    *("kernels_src/kernels/nodes*", "kernels_src/kernels/stage*"),
    *("kernels_src/variants/[!cp]*", "kernels_src/variants/prefill*"),
    *("benchmarks/*bf16*", "benchmarks/in_transformers*", "benchmarks/ranks*", "benchmarks/report_models*"),
    *("benchmarks/report_ranks*", "benchmarks/report_others*", "benchmarks/others/*"),
)
GENERATED = "megamoe_jit/_spec/abi.py"
LINKED = ("megamoe_jit/heuristics/", "megamoe_jit/kernels_src/")
CODE = (".py", ".cuh", ".j2")


class Lines(NamedTuple):
    """Of one room now."""

    whole: int
    since: int  #: of those, in files of what came since


def room_of(path: str) -> str:
    """Where a file lies."""
    top, *rest = path.split("/")
    return top if top != "megamoe_jit" else rest[0] if len(rest) > 1 else "ground"


def lines_by_room() -> dict[str, Lines]:
    """Lines that are written by hand, tests apart."""
    found: dict[str, Lines] = {}
    for top in ("megamoe_jit", "heuristics", "kernels_src", "benchmarks"):
        for path in sorted((REPO / top).rglob("*")):
            name = path.relative_to(REPO).as_posix()
            if path.suffix in CODE and name != GENERATED and not name.startswith(LINKED):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                whole, since = found.get(room_of(name), (0, 0))
                new = lines if any(fnmatch(name, pattern) for pattern in SINCE) else 0
                found[room_of(name)] = Lines(whole + lines, since + new)
    return found


def table() -> str:
    """The rows as the page has them."""
    now = lines_by_room()
    rows = [(room, BEFORE.get(room, 0), *now[room]) for room in [*BEFORE, *sorted(set(now) - set(BEFORE))]]
    rows.append(("all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))))
    return "\n".join(f"| {room} | {then:,} | {whole - since:,} | {since:,} |" for room, then, whole, since in rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
