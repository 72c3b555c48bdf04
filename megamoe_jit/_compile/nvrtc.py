"""NVRTC: one source in, one checked cubin out.

Nothing here needs a GPU or a driver. The compiler's log is read, not just passed on: messages of the
front end and of ptxas become diagnostics that point at the room and line they came from, spilled
registers and the C75xx advisories (`setmaxnreg` ignored, WGMMA serialised) count as errors, since a
kernel that has them works but is slow for no visible reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._compile.cubin import CubinError, CubinInfo, KernelInfo, read_cubin
from megamoe_jit._compile.render import source_lines
from megamoe_jit._compile.signals import settle
from megamoe_jit._compile.toolchain import ARCH, Toolchain, activate, options_for
from megamoe_jit._errors import CompileError, PerformanceLossError, ToolchainError
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._trust import private_directory

LOG = logging.getLogger("megamoe_jit")
SHOWN = 8  #: diagnostics quoted in an error message

_FRONT_END = re.compile(
    r"^(?P<file>[^\s(][^(]*)\((?P<line>\d+)\): "
    r"(?P<severity>catastrophic error|error|warning|remark)(?: #(?P<code>[\w-]+))?: (?P<message>.*)$"
)
_PTXAS = re.compile(
    r"^ptxas [^,;]*?(?:, line (?P<line>\d+); )?(?P<severity>error|fatal|warning|info)\s*: "
    r"(?:\((?P<code>C\d+)\) )?(?P<message>.*)$"
)
_ADVISORY = re.compile(r"C75\d\d$")
_AROUND = re.compile(r"\baround line (\d+)\b")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_PTXAS_TIME = re.compile(r"Compile time = ([\d.]+) ms")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*\binlined_at\s+(\d+)\s+(\d+))?")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One message of the compiler.

    Attributes:
        severity: error, warning or info.
        code: `C7510`, `177-D`, or empty.
        file: virtual name of the room or template, empty if unknown.
        line: line in it, zero if unknown.
        message: the text.
    """

    severity: str
    code: str
    file: str
    line: int
    message: str

    @property
    def is_performance_loss(self) -> bool:
        """Whether this says that the kernel is slower than written."""
        return bool(_ADVISORY.match(self.code)) or "spilled to local memory" in self.message

    def __str__(self) -> str:
        place = f"{self.file}({self.line}): " if self.file else ""
        code = f" {self.code}" if self.code else ""
        return f"{place}{self.severity}{code}: {self.message}"


@dataclass(frozen=True, slots=True)
class CompileResult:
    """A compiled kernel and what the compiler said about it.

    Attributes:
        cubin: the binary, checked to hold exactly the expected entry.
        ptx: the intermediate text.
        log: the whole log.
        seconds: time by phase (`load`, `nvrtc`, of which `ptxas`; `total`).
        options: what the compiler was called with.
        diagnostics: its messages in order.
        kernel: the entry, as the cubin describes it.
        spill_bytes: spill stores and loads of the entry.
        stack_bytes: stack frame of the entry.
    """

    cubin: bytes
    ptx: str
    log: str
    seconds: dict[str, float]
    options: tuple[str, ...]
    diagnostics: tuple[Diagnostic, ...]
    kernel: KernelInfo
    spill_bytes: int
    stack_bytes: int

    @property
    def registers(self) -> int:
        """Registers per thread at launch."""
        return self.kernel.registers

    @property
    def advisories(self) -> tuple[str, ...]:
        """Messages that say the kernel is slower than written."""
        return tuple(str(d) for d in self.diagnostics if d.is_performance_loss)


def compile_source(
    text: str, *, kernel_name: str, toolchain: Toolchain, extra_options: Sequence[str] = ()
) -> CompileResult:
    """Compile one source to a cubin for SM90a.

    Args:
        text: the flattened source.
        kernel_name: the one kernel it defines, `extern "C"`.
        toolchain: the compiler.
        extra_options: further NVRTC options.

    Returns:
        The cubin, checked, with everything the compiler said.

    Raises:
        ToolchainError: the library cannot be used.
        CompileError: the source is refused, or gives something else than the entry.
        PerformanceLossError: it spills, or has C75xx advisories, and the settings do not allow that.
    """
    begin = time.perf_counter()
    activate(toolchain)
    loaded = time.perf_counter()
    options = options_for(toolchain, extra_options)
    status, log, ptx, cubin = _nvrtc(text, kernel_name, options)
    end = time.perf_counter()
    diagnostics = _diagnostics(log, ptx)
    _dump(text, kernel_name, log, ptx, cubin)
    if status:
        given = " ".join(get_settings().ptxas_options)
        given = f"; {get_settings().place('ptxas_options')} adds {given!r}" if given else ""
        what = f"NVRTC could not compile {kernel_name} ({status}){given}"
        raise CompileError(_report(what, text, log, ptx, kernel_name, diagnostics))
    try:
        kernel = _only_entry(read_cubin(cubin), kernel_name)
    except CubinError as error:
        raise CompileError(
            _report(f"compiling {kernel_name} failed: {error}", text, log, ptx, kernel_name, diagnostics)
        ) from None
    properties = _SPILL.search(log)
    stack, stores, loads = (int(n) for n in properties.groups()) if properties else (kernel.stack_bytes, 0, 0)
    ptxas = sum(float(ms) for ms in _PTXAS_TIME.findall(log)) / 1e3
    seconds = {"load": loaded - begin, "nvrtc": end - loaded, "ptxas": ptxas, "total": end - begin}
    result = CompileResult(cubin, ptx, log, seconds, options, diagnostics, kernel, stores + loads, stack)
    _judge(result, text, kernel_name)
    return result


def _judge(result: CompileResult, text: str, kernel_name: str) -> None:
    level = get_settings().strict
    losses = tuple(d for d in result.diagnostics if d.is_performance_loss)
    if level == "ignore" or not (losses or result.spill_bytes):
        return
    what = [f"{result.spill_bytes} bytes of spills"] if result.spill_bytes else []
    codes = sorted({d.code for d in losses if d.code})
    what += [f"advisories {', '.join(codes)}"] if codes else []
    headline = f"{kernel_name} compiled with {' and '.join(what)}"
    if level == "warn":
        LOG.warning("%s:\n%s", headline, "\n".join(f"  {d}" for d in losses))
        return
    headline += "; MEGAMOE_JIT_STRICT=warn accepts it"
    raise PerformanceLossError(_report(headline, text, result.log, result.ptx, kernel_name, losses))


def _only_entry(info: CubinInfo, kernel_name: str) -> KernelInfo:
    if info.arch not in (ARCH, ARCH.removesuffix("a")):  # CUDA 13 tells them apart only in a note
        raise CubinError(f"the cubin is for {info.arch}, not for {ARCH}")
    names = [kernel.name for kernel in info.entries]
    if names != [kernel_name]:
        raise CubinError(f"the cubin defines {', '.join(names) or 'no kernel'} instead of exactly {kernel_name}")
    return info.entries[0]


def _nvrtc(text: str, kernel_name: str, options: Iterable[str]) -> tuple[str, str, str, bytes]:
    """One compilation: (name of the failure or empty, log, PTX, cubin); releases the interpreter lock."""
    from cuda.bindings import nvrtc

    def call(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise ToolchainError(f"NVRTC failed: {getattr(result[0], 'name', result[0])}")
        return result[1] if len(result) > 1 else None

    def fetch(size: Any, get: Any) -> bytes:
        buffer = bytearray(int(call(size(program))))
        if buffer:
            call(get(program, buffer))
        return bytes(buffer)

    encoded = [option.encode(errors="surrogateescape") for option in options]
    settle(nvrtc, encoded)
    program = call(nvrtc.nvrtcCreateProgram(text.encode(), f"/megamoe_jit/{kernel_name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        # after a failure of ptxas the PTX is still there, and its line numbers are those of the messages
        ptx = fetch(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        cubin = b"" if int(status) else fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    failure = getattr(status, "name", str(status)) if int(status) else ""
    return failure, _decode(log), _decode(ptx), cubin


def _decode(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace").strip("\n")


def _diagnostics(log: str, ptx: str) -> tuple[Diagnostic, ...]:
    positions: _PtxPositions | None = None
    found = []
    for line in log.split("\n"):
        match = _FRONT_END.match(line)
        if match:
            severity = "error" if "error" in match["severity"] else match["severity"]
            found.append(Diagnostic(severity, match["code"] or "", match["file"], int(match["line"]), match["message"]))
            continue
        match = _PTXAS.match(line)
        if not match or (match["severity"] == "info" and not match["code"]):
            continue
        around = _AROUND.search(match["message"])
        number = int(match["line"] or (around[1] if around else 0))
        file, source_line, caller = "", 0, ""
        if number:
            positions = positions or _PtxPositions(ptx)
            file, source_line, caller = positions.of(number)
        severity = "error" if match["severity"] in ("error", "fatal") else match["severity"]
        message = match["message"] + (f" (inlined at {caller})" if caller else "")
        found.append(Diagnostic(severity, match["code"] or "", file, source_line, message))
    return tuple(found)


class _PtxPositions:
    """Maps a line of PTX to the source line of the `.loc` above it."""

    def __init__(self, ptx: str) -> None:
        self.lines = ptx.split("\n")
        self.files = {number: name for number, name in _FILE.findall(ptx)}

    def of(self, number: int) -> tuple[str, int, str]:
        """File, line, and the call that was inlined there, if it was."""
        for line in reversed(self.lines[: max(0, number)]):
            match = _LOC.search(line)
            if match:
                file, at, caller, caller_line = match.groups()
                where = f"{self.files.get(caller, '')}({caller_line})" if caller in self.files else ""
                return self.files.get(file, ""), int(at), where
            if line.startswith((".visible", ".entry", ".func")):
                break
        return "", 0, ""


def _report(headline: str, text: str, log: str, ptx: str, kernel_name: str, diagnostics: Sequence[Diagnostic]) -> str:
    """The message of an error: what, where with the source line, and where the whole source is kept."""
    kept = _keep(text, kernel_name, log, ptx)
    lines = source_lines(text)
    parts = [headline]
    errors = [d for d in diagnostics if d.severity == "error"] or list(diagnostics)
    for diagnostic in errors[:SHOWN]:
        parts.append(f"  {diagnostic}")
        source = lines.get((diagnostic.file, diagnostic.line), "").strip()
        if source:
            parts.append(f"    | {source}")
    if len(errors) > SHOWN:
        parts.append(f"  and {len(errors) - SHOWN} more")
    if not errors and log:
        parts.append(log[-2000:])
    parts.append(f"rendered source, PTX and log: {kept}")
    return "\n".join(parts)


def _keep(text: str, kernel_name: str, log: str, ptx: str) -> str:
    """Write what is needed to look into a failure, once per source; returns the path of the source."""
    try:
        folder = get_settings().dump_dir
        if folder is None:
            place = Path(tempfile.gettempdir()) / f"megamoe-jit-failed-{os.geteuid()}"
            folder = private_directory(place) / hashlib.sha256(text.encode()).hexdigest()[:12]
        _write_all(folder, kernel_name, {".cu": text.encode(), ".ptx": ptx.encode(), ".log": log.encode()})
    except OSError as error:
        return f"could not be kept ({error})"
    return str(folder / f"{kernel_name}.cu")


def _dump(text: str, kernel_name: str, log: str, ptx: str, cubin: bytes) -> None:
    folder = get_settings().dump_dir
    if folder is None:
        return
    parts = {".cu": text.encode(), ".ptx": ptx.encode(), ".log": log.encode(), ".cubin": cubin}
    try:
        _write_all(folder, kernel_name, parts)
    except OSError as error:
        LOG.warning("cannot dump to %s: %s", folder, error)


def _write_all(folder: Path, kernel_name: str, parts: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, data in parts.items():
        if data:
            temporary = folder / f".{kernel_name}{suffix}.{os.getpid()}-{threading.get_ident()}"
            try:
                temporary.write_bytes(data)
                temporary.replace(folder / f"{kernel_name}{suffix}")
            except BaseException:  # a full disk keeps nothing by halves
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
