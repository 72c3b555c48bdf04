"""What `meta.json` of an entry says, as a typed value: written with a digest of itself, checked once where it is read.

The first line of the document is the digest of the document without that line, so that every byte of the file is
covered. Metadata of earlier versions have none: they hold known fields alone, so that a document whose digest lost its
name is not taken for one of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast

from megamoe_jit._text import one_line

SCHEMA = 1
_HEAD, _END = b'{\n "meta_sha256": "', b'",\n'
_COMMON, _NEXT = ('\n "files": ', '\n "nvrtc": ', '\n "options": ', '\n "spec": '), ',\n "'
_LIMIT = 1 << 20  #: bytes; ours have three thousand
_DEPTH = 4  #: lists and objects in one another; ours need two
_INTEGERS = 2**63


class CompilerMeta(TypedDict, total=False):
    """The NVRTC that made a kernel: `12.9`, the digest of its build, where it lay."""

    version: str
    build: str
    path: str


class Metadata(TypedDict, total=False):
    """What is known of a compiled kernel; sizes in bytes, `compile_ms` in milliseconds, `created_at` as ISO 8601.

    `schema`, `key` and what describes the two files are always there, the rest where the writer knew it.
    """

    schema: int
    key: str
    arch: str
    cubin_bytes: int
    cubin_sha256: str
    source_bytes: int
    source_sha256: str
    entry: str
    spec: dict[str, Any]
    source_id: str
    files: list[str]
    options: list[str]
    nvrtc: CompilerMeta
    package_version: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    param_bytes: int
    max_threads: int
    diagnostics: int
    advisories: list[str]
    compile_ms: dict[str, float]
    created_at: str
    host: str


class MetaError(ValueError):
    """The bytes are no metadata of ours."""


def dump_metadata(meta: Mapping[str, Any]) -> bytes:
    """The file: the digest of the rest, then the fields by name."""
    body = json.dumps(meta, indent=1, sort_keys=True).encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _END + body.removeprefix(b"{\n")


def read_metadata(data: bytes) -> Metadata:
    """Check and read the file.

    Returns:
        What it says.  Of another `schema` than ours nothing but that is certain; else every field is of its type.

    Raises:
        MetaError: it is damaged; says how.
    """
    if len(data) > _LIMIT:
        raise MetaError(f"has {len(data)} bytes, more than any")
    begin = len(_HEAD) + 64
    signed = data.startswith(_HEAD) and data[begin : begin + len(_END)] == _END
    body = b"{\n" + data[begin + len(_END) :] if signed else data
    if signed and hashlib.sha256(body).hexdigest().encode() != data[len(_HEAD) : begin]:
        raise MetaError("has another digest than it says")
    try:
        common, text = _apart(body.decode()) if signed else ({}, body.decode())
        document = _parsed(text)
    except (ValueError, RecursionError):
        raise MetaError("is not JSON") from None
    if not isinstance(document, dict) or type(document.get("schema")) is not int:
        raise MetaError("has no schema")
    if document["schema"] == SCHEMA:
        _check_fields(document, signed)
        lacking = [name for name in _NEEDED if name not in document]
        if lacking:
            raise MetaError(f"does not say {', '.join(lacking)}")
    document.update(common)
    return cast(Metadata, document)


def _parsed(text: str) -> Any:
    """As `json.loads`, which takes as long again to find out what it was given."""
    document, end = _raw_decode(text)
    if text[end:].strip(" \t\n\r"):
        raise ValueError("more than one value")
    return document


def _apart(text: str) -> tuple[dict[str, Any], str]:
    """The fields that many entries have in common, and the document without them.

    A listing spends most of its time on metadata, and more than half of their text is the same in all that one compiler
    made of one version's sources.  `dump_metadata` begins the line of each field, and no other, with one blank.
    """
    common, own, done = dict[str, Any](), list[str](), 0
    for start in _COMMON:
        begin = text.find(start, done)
        end = text.find(_NEXT, begin + 1)
        field = _common_field(text[begin + 2 : end]) if 0 <= begin < end else None
        if field is not None:
            common.update(field)
            own.append(text[done:begin])
            done = end + 1
    own.append(text[done:])
    return common, "".join(own)


@functools.lru_cache(maxsize=512)
def _common_field(text: str) -> dict[str, Any] | None:
    """A field by its text, parsed and checked, for all to read; None if it is none, or says what it must not."""
    try:
        field: dict[str, Any] = _parsed(f"{{{text}}}")
        _check_fields(field, signed=True)
    except (ValueError, RecursionError):
        return None
    return field if len(field) == 1 else None


def _check_fields(document: dict[str, Any], signed: bool) -> None:
    for name, value in document.items():
        check = _FIELDS.get(name)
        if check is None and not signed:
            raise MetaError(f"has a field {one_line(name)[:40]!r} that is not known")
        if not (check(value) if check is not None else name.isprintable() and _is_plain(value)):
            raise MetaError(f"says {one_line(repr(value))[:40]} for {one_line(name)[:40]!r}")


#: asked of the same texts for each entry that a compiler made
_printable = functools.lru_cache(maxsize=128)(str.isprintable)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _INTEGERS


def _is_time(value: object) -> bool:
    return (math.isfinite(value) and value >= 0) if type(value) is float else _is_size(value)


def _are_texts(value: object) -> bool:
    try:
        return isinstance(value, list) and _printable("".join(value))
    except TypeError:  # not all are texts
        return False


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value read from JSON can be printed, and written as JSON by whoever gets it."""
    kind = type(value)
    if depth > _DEPTH:
        return False
    if kind is str:
        return _printable(value)
    if kind is int or kind is bool:
        return bool(-_INTEGERS <= value < _INTEGERS)
    if kind is list:
        return all([_is_plain(part, depth + 1) for part in value])
    if kind is dict:
        return _printable("".join(value)) and all([_is_plain(part, depth + 1) for part in value.values()])
    return value is None or math.isfinite(value)


def _is_compiler(value: object) -> bool:
    return isinstance(value, dict) and _are_texts([*value, *value.values()])


def _are_times(value: object) -> bool:
    return isinstance(value, dict) and _are_texts([*value]) and all(map(_is_time, value.values()))


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and _is_plain(value)


#: what a field's type in `Metadata` means for its value
_CHECKS: dict[str, Callable[[object], bool]] = {
    "int": _is_size,
    "str": _is_text,
    "list[str]": _are_texts,
    "dict[str, Any]": _is_object,
    "dict[str, float]": _are_times,
    "CompilerMeta": _is_compiler,
}
_FIELDS = {name: _CHECKS[kind.__forward_arg__] for name, kind in Metadata.__annotations__.items()}
_raw_decode = json.JSONDecoder().raw_decode
_NEEDED = ("key", "arch", "cubin_bytes", "cubin_sha256", "source_bytes", "source_sha256")
