"""A look into a compiled kernel: resources and PTX from the cubin itself, SASS through NVIDIA's disassembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._compile.cubin import CubinError, read_cubin, sections_of
from megamoe_jit._diagnose.machine import GET_A_TOOL, TOOLS, find_tool
from megamoe_jit._documents import Count, Digest, Document, Figure
from megamoe_jit._errors import LoadError, ToolchainError
from megamoe_jit._spec.abi import SHARED_LIMIT

_TIMEOUT_S = 120
_ARGUMENTS = {"nvdisasm": ("--print-code", "--print-line-info"), "cuobjdump": ("--dump-sass",)}
_PTX_SECTION = ".nv_debug_ptx_txt"
_DEBUG_INFO = re.compile(r"^\s*\.section\s+\.debug", re.MULTILINE)
REGISTER_FILE = 65536  #: 32-bit registers of a streaming multiprocessor


def _section(cubin: bytes, name: str) -> bytes | None:
    for section in sections_of(cubin):
        if section.name == name:
            return cubin[section.offset : section.offset + section.size]
    return None


View = Literal["resources", "ptx", "sass", "source"]


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes on the device, and how it was compiled.

    Attributes:
        kernel: its symbol
        max_threads: of a block
        register_file: 32-bit registers of a streaming multiprocessor
        code_bytes: instructions alone
        nvrtc: version of the compiler
    """

    key: Digest
    kernel: str
    arch: str
    registers: Count
    max_threads: Count
    block_registers: Count
    register_file: Count
    stack_bytes: Count
    spill_bytes: Count | None
    static_shared_bytes: Count
    dynamic_shared_bytes: Count | None
    shared_limit_bytes: Count
    param_bytes: Count
    code_bytes: Count | None
    cubin_bytes: Count
    nvrtc: str | None
    options: list[str] | None
    advisories: list[str] | None
    compile_ms: dict[str, Figure] | None


@dataclass(frozen=True, slots=True)
class Inspection(Document):
    """A compiled kernel from the inside.

    Attributes:
        text: the listing, null for resources
        tool: the disassembler
    """

    KIND = "inspect"

    view: View
    resources: Resources
    text: str | None
    tool: str | None


def resources(key: str, cubin: bytes, meta: Metadata) -> Resources:
    """What the kernel takes on the device, and how it was compiled.

    Args:
        key: of the kernel.
        cubin: the binary; it is the source of every figure that it holds.
        meta: what the cache entry says, for the others.

    Raises:
        LoadError: the bytes are not a cubin with one kernel.
    """
    try:
        info = read_cubin(cubin)
        (kernel,) = info.entries
    except (CubinError, ValueError) as error:
        raise LoadError(f"not a cubin with one kernel: {error}") from error
    code = _section(cubin, f".text.{kernel.name}")
    return Resources(
        key=key,
        kernel=kernel.name,
        arch=info.arch,
        registers=kernel.registers,
        max_threads=kernel.max_threads,
        block_registers=kernel.registers * kernel.max_threads,
        register_file=REGISTER_FILE,
        stack_bytes=kernel.stack_bytes,
        spill_bytes=meta.get("spill_bytes"),
        static_shared_bytes=kernel.static_shared_bytes,
        dynamic_shared_bytes=meta.get("dynamic_shared_bytes"),
        shared_limit_bytes=SHARED_LIMIT,
        param_bytes=kernel.param_bytes,
        code_bytes=len(code) if code is not None else None,
        cubin_bytes=len(cubin),
        nvrtc=meta.get("nvrtc", {}).get("version"),
        options=meta.get("options"),
        advisories=meta.get("advisories"),
        compile_ms=meta.get("compile_ms"),
    )


def ptx(cubin: bytes) -> str:
    """The PTX that the cubin carries for line information, without the debug tables at its end.

    Raises:
        LoadError: it carries none.
    """
    found = _section(cubin, _PTX_SECTION)
    if not found:
        raise LoadError(
            "this cubin carries no PTX (compiled without -lineinfo?); MEGAMOE_JIT_DUMP_DIR=DIR and "
            "`megamoe-jit warmup --force` keep the PTX of a new compilation"
        )
    text = found.replace(b"\0", b"\n").decode(errors="replace")
    debug = _DEBUG_INFO.search(text)
    return text[: debug.start() if debug else None].strip("\n") + "\n"


def sass(cubin: bytes) -> tuple[str, str]:
    """Disassemble.

    Returns:
        The listing and the path of the tool it is from.

    Raises:
        ToolchainError: there is no disassembler (says how to get one), or it fails.
    """
    for name in TOOLS:
        tool = find_tool(name)
        if tool is not None:
            return _run(tool, _ARGUMENTS[name], cubin), tool
    raise ToolchainError(f"SASS needs {' or '.join(TOOLS)}, and neither is installed or on PATH; run: {GET_A_TOOL}")


def _run(tool: str, arguments: tuple[str, ...], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="megamoe-jit-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        try:
            done = subprocess.run(
                [tool, *arguments, str(file)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ToolchainError(f"{tool} could not be run: {error}") from error
    if done.returncode or not done.stdout:
        raise ToolchainError(f"{tool} failed with status {done.returncode}: {done.stderr.strip() or 'no output'}")
    return done.stdout
