#!/bin/sh
# Fills a directory with compiled kernels that every user of an image can read; needs no GPU.
#
# Run:   warm_kernels.sh SHAPES TARGET [more options of warmup, such as --ranks 8]
#        SHAPES is what `megamoe-jit warmup --shapes` takes: names, .toml files, models' config.json; TARGET becomes the directory.
# Seen:  the table of `warmup`, how many kernels the pack holds and how many were imported, and exit code 0.
# Needs: NVRTC; without it, exit code 3 and what to install. PYTHON names the interpreter, else python3.
set -eu
if [ $# -lt 2 ]; then
    echo "usage: warm_kernels.sh SHAPES TARGET [options of warmup]" >&2
    exit 2
fi
shapes=$1 target=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

megamoe_jit() { "${PYTHON:-python3}" -m megamoe_jit "$@"; }

# Whatever the image's own settings say: compile everything here, into a cache that is thrown away.
unset MEGAMOE_JIT_READONLY_CACHE MEGAMOE_JIT_DISABLE_JIT MEGAMOE_JIT_NO_CACHE
export MEGAMOE_JIT_CACHE_DIR="$work/cache"
megamoe_jit warmup --shapes "$shapes" "$@"
megamoe_jit cache export "$work/kernels.tar"
# An import makes what everybody may read; a directory that warmup itself fills is as private as any cache.
megamoe_jit cache import "$work/kernels.tar" --cache-dir "$target"
