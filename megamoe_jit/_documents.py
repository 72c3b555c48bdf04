"""What the JSON documents of the command line are made of: frozen dataclasses, in the rooms that know their facts.

A document is a `Document`; its parts are plain dataclasses.  A field whose default is None is left out while it is
None; every other field is always there.  The schemas of the documents are written from these classes by
`make schemas`: types, and what is annotated with `Says`, become rules, docstrings become descriptions.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA_VERSION = 1  #: of every document; raised when a field changes its meaning or goes away


class Says:
    """What a schema says of a value beside its type, as keywords of JSON Schema: `Annotated[int, Says(minimum=0)]`."""

    def __init__(self, **keywords: object) -> None:
        self.keywords = keywords

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        """Asked by the generator alone."""
        return {**handler(core), **self.keywords}


Count = Annotated[int, Says(minimum=0)]  #: also of bytes
Figure = Annotated[float, Says(minimum=0)]  #: in the unit that the field's name ends with; seconds unless it says one
Measured = Annotated[float, Says(type=["number", "null"])]  #: what is no number becomes null
Digest = Annotated[str, Says(pattern="^[0-9a-f]{64}$")]
Time = Annotated[str, Says(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
SpecData = Annotated[dict[str, Any], Says(spec=True)]  #: of `KernelSpec.to_json`, from which its rules are read


class Document:
    """What a command prints with `--json`.

    A subclass is a frozen dataclass; the first paragraph of its docstring says what its schema describes.
    """

    __slots__ = ()
    KIND: ClassVar[str]  #: which document it is, and the name of its schema


def content(part: DataclassInstance) -> dict[str, Any]:
    """The fields of a document or of a part of one, by name; their values as they are.

    Args:
        part: an instance.
    """
    values = ((each.name, getattr(part, each.name), each.default) for each in fields(part))
    return {name: value for name, value, default in values if value is not None or default is not None}


def envelope(doc: Document) -> dict[str, Any]:
    """The fields of a document, behind those that every document begins with; its parts are still dataclasses."""
    assert is_dataclass(doc)
    return {"schema_version": SCHEMA_VERSION, "kind": doc.KIND, **content(doc)}


def plain(value: Any) -> Any:
    """A document, or a part of one, as JSON has it, down to the last part."""
    if isinstance(value, Document):
        value = envelope(value)
    elif is_dataclass(value) and not isinstance(value, type):
        value = content(value)
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def time_of(seconds: float) -> str:
    """A time in seconds since 1970 as documents have it."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
