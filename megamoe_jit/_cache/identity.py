"""What a kernel is: its key and its source's id, from everything that decides its bytes; whether an entry is that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from megamoe_jit._cache.metadata import SCHEMA, Metadata
from megamoe_jit._compile.cubin import CubinError, read_cubin

#: options that only some compilers know and that do not shape the code
_NEUTRAL_OPTIONS = ("--no-cache",)
_ARCH_OPTION = "--gpu-architecture="
#: what metadata repeat of the binary
_FIGURES = ("registers", "static_shared_bytes", "param_bytes", "max_threads")


def cache_key(source_text: str, options: Iterable[str], entry: str, arch: str, version: str, build: str) -> str:
    """The name of a compiled kernel: sha256 over everything that decides its bytes, and over nothing else.

    Paths, user, host, working directory, Python, torch and driver are not in it: a cache can be shared and
    moved.

    Args:
        source_text: the flattened source.
        options: compiler options, in order.
        entry: symbol of the kernel.
        arch: target architecture.
        version: of the compiler, such as `12.9`.
        build: of the compiler.

    Returns:
        64 hexadecimal digits.
    """
    compiler = [("compiler version", version), ("compiler build", build)]
    return _digest([*_identity(source_text, options, entry, arch), *compiler])


def source_id(source_text: str, options: Iterable[str], entry: str, arch: str) -> str:
    """What a kernel is whoever compiled it: `cache_key` without the compiler.

    Finds kernels that were built elsewhere, on purpose, by another compiler than the one installed here.
    """
    shaping = [option for option in options if option not in _NEUTRAL_OPTIONS]
    return _digest(_identity(source_text, shaping, entry, arch))


def is_key(text: str) -> bool:
    """Whether `text` is spelled like a key."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


def identity_problem(key: str, meta: Metadata, source: bytes) -> str:
    """Why this source, with what the metadata say of its compilation, is not what the key names; empty if it is.

    Args:
        key: the name of the entry.
        meta: checked metadata.
        source: the text that was compiled.
    """
    nvrtc, options = meta.get("nvrtc", {}), meta.get("options", [])
    entry, version, build = meta.get("entry", ""), nvrtc.get("version", ""), nvrtc.get("build", "")
    if not (entry and version and build and options):
        return "its metadata do not say how it was compiled"
    try:
        text = source.decode()
    except UnicodeDecodeError:
        return "its source is not text"
    arch = next((each[len(_ARCH_OPTION) :] for each in options if each.startswith(_ARCH_OPTION)), "")
    if meta.get("arch") not in (arch, arch.removesuffix("a")):  # CUDA 13 tells the two apart only in a note
        return f"it is for {meta.get('arch')}, but was compiled for {arch or 'none'}"
    if cache_key(text, options, entry, arch, version, build) != key:
        return "its source, options and compiler are not those of its key"
    if meta.get("source_id") != source_id(text, options, entry, arch):
        return "its source_id is not that of its source"
    return ""


def kernel_problem(cubin: bytes, meta: Metadata, symbol: str) -> str:
    """Why a binary is not the one kernel that it should be, with the parameters it should have; empty if it is."""
    try:
        kernels = read_cubin(cubin).entries
    except CubinError as error:
        return f"its binary cannot be read: {error}"
    if [kernel.name for kernel in kernels] != [symbol]:
        return f"its binary defines {', '.join(kernel.name for kernel in kernels) or 'no kernel'} instead of {symbol}"
    for name in _FIGURES:
        here, said = getattr(kernels[0], name), meta.get(name)
        if said is not None and said != here:
            return f"{name} of its binary is {here}, not {said}"
    return ""


def _identity(source_text: str, options: Iterable[str], entry: str, arch: str) -> list[tuple[str, str]]:
    given = [("option", option) for option in options]
    return [("schema", str(SCHEMA)), ("entry", entry), ("source", source_text), *given, ("arch", arch)]


def _digest(fields: Iterable[tuple[str, str]]) -> str:
    """Sha256 over labelled fields with their lengths, so that no two lists of fields look alike."""
    digest = hashlib.sha256()
    for field in fields:
        for part in field:
            data = part.encode(errors="surrogateescape")  # an option may hold bytes that are no text
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
