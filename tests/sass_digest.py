"""A digest of the machine code of each kernel, a line each.  Trees that say the same make the same kernels.

    python -m tests.sass_digest > before.txt        # every preset, variant, format and number of ranks: many minutes
    python -m tests.sass_digest v4-flash --ranks 1  # a few of them: seconds

What is digested is the code section of the cubin: every instruction with its scheduling, and nothing of names, line
tables or options.  Registers and shared memory of the launch follow it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator

from megamoe_jit._compile.cubin import sections_of
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.render import render
from megamoe_jit._compile.toolchain import Toolchain, find_toolchain
from megamoe_jit._spec import FP8, MXFP4, KernelSpec, Variant
from megamoe_jit.heuristics import preset, preset_names

RANKS = (1, 2, 4, 8)
WAYS = tuple((variant, weights) for weights in (FP8, MXFP4) for variant in Variant.reading(weights))


def specs(names: tuple[str, ...], ranks: tuple[int, ...]) -> Iterator[KernelSpec]:
    """Each preset with each variant and format over so many ranks that share its experts; the first exact too."""
    for name in names:
        shape = preset(name).shape
        for variant, weights in WAYS:
            for count in (n for n in ranks if shape.experts % n == 0):
                yield KernelSpec(shape, variant, count, weights=weights)
            yield KernelSpec(shape, variant, ranks[0], fast_math=False, weights=weights)


def digest(spec: KernelSpec, toolchain: Toolchain) -> str:
    """Compile a kernel, past every cache, and say what it is in one line."""
    result = compile_source(render(spec).text, kernel_name=spec.kernel_name, toolchain=toolchain)
    (code,) = (s for s in sections_of(result.cubin) if s.name == f".text.{spec.kernel_name}")
    sha = hashlib.sha256(result.cubin[code.offset : code.offset + code.size]).hexdigest()[:24]
    return f"{sha} {code.size:6d} B {result.registers} registers {spec.shared_bytes} B shared {spec.kernel_name}"


def main(arguments: list[str]) -> None:
    """Print the digests, in the order of the presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="names of presets (default: all)")
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS), help="default: 1 2 4 8")
    chosen = parser.parse_args(arguments)
    names, toolchain = tuple(chosen.presets) or preset_names(), find_toolchain()
    print(f"# NVRTC {toolchain.build}", flush=True)  # noqa: T201
    for spec in dict.fromkeys(specs(names, tuple(chosen.ranks))):
        print(digest(spec, toolchain), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
