"""Writes the schemas of the command line's documents from their dataclasses.

    python -m tests.schemas        # or: make schemas

Types become rules by pydantic; descriptions are the docstrings' first paragraphs and `Attributes:`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

import megamoe_jit
from megamoe_jit import _cli
from megamoe_jit._documents import SCHEMA_VERSION, Document, Says
from megamoe_jit._spec import KernelSpec, MoEShape
from megamoe_jit._spec.any_layer import ForAnyLayer, PassSpec, StageSpec
from megamoe_jit._spec.formats import FORMATS, FP8
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._spec.variants import Variant

FOLDER = Path(_cli.__file__).with_name("schemas")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_NEVER_MISSING = ("shape", "variant", "ranks", "fast_math")  # a cache may hold kernels of versions that knew no more


def documents() -> dict[str, type[Document]]:
    """Every class of documents, by kind."""
    package = Path(megamoe_jit.__file__).parent
    for file in package.rglob("*.py"):
        if "    KIND = " in file.read_text(encoding="utf-8"):  # other modules may import much
            importlib.import_module(".".join(file.relative_to(package.parent).with_suffix("").parts))
    classes: list[type[Document]] = [Document]
    found = {}
    for each in classes:
        classes += each.__subclasses__()
        ours = each is not Document and each.__module__.startswith("megamoe_jit.")
        if ours and getattr(sys.modules[each.__module__], each.__name__) is each:
            found[each.KIND] = each  # not what the class was before it got slots
    return dict(sorted(found.items()))


def attributes(kind: type) -> dict[str, str]:
    """What the `Attributes:` of a class and of those that it is made from say, by field."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        section = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
        found.update((name, " ".join(text.split()).rstrip(".")) for name, text in _ATTRIBUTE.findall(section))
    return found


def summary(kind: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


class _Generator(GenerateJsonSchema):
    """Pydantic's, but for what documents have of their own: docstrings, and fields that may be left out."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        made = super().dataclass_schema(schema)
        made.pop("title", None)
        made["description"] = summary(schema["cls"])
        for name, text in attributes(schema["cls"]).items():
            made["properties"][name]["description"] = text
        return made

    def enum_schema(self, schema: core_schema.EnumSchema) -> JsonSchemaValue:
        return {"type": "string", "enum": [member.value for member in schema["members"]]}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """A field that is left out is not null."""
        inner = schema["schema"]
        return self.generate_inner(inner["schema"] if inner["type"] == "nullable" else inner)


def _spec() -> dict[str, Any]:
    """Of a spec of any kind as data."""
    kinds: dict[str, Any] = {name: bool for name in Numerics().options()}
    kinds |= {"shape": MoEShape, "variant": Variant, "ranks": Annotated[int, Says(minimum=1)], "timeline": bool}
    kinds["weights"] = Literal[tuple(FORMATS)]
    kinds["inputs"] = Inputs
    example = KernelSpec(MoEShape(256, 128, 8, 2), next(iter(Variant.reading(FP8)))).to_json()
    data = dataclasses.make_dataclass("Spec", [(name, kinds[name]) for name in example])
    made = TypeAdapter(data).json_schema(schema_generator=_Generator)
    of_layer = {**made, "description": "A kernel of the layer.", "required": list(_NEVER_MISSING)}
    parts = of_layer.pop("$defs")
    of_staging = _for_any_layer(StageSpec, "One that stages inputs.")
    of_nodes = _for_any_layer(PassSpec, "A pass over rows that travel between nodes.")
    return {"description": "What a kernel is compiled for.", "anyOf": [of_layer, of_staging, of_nodes], "$defs": parts}


def _for_any_layer(spec: type[ForAnyLayer], what: str) -> dict[str, Any]:
    values = {"type": "string", "enum": [kind.value for kind in spec.kinds]}
    return {"description": what, "type": "object", "properties": {spec.word: values}, "required": [spec.word]}


def _referring(node: Any) -> Any:
    """A schema, or a part of one, with references to that of a `KernelSpec` in place of its mark."""
    if isinstance(node, list):
        return [_referring(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {"$ref": "#/$defs/Spec"} if node.get("spec") is True else {k: _referring(part) for k, part in node.items()}


def schema(document: type[Document]) -> dict[str, Any]:
    """The schema of a kind of documents."""
    plain = TypeAdapter(document).json_schema(schema_generator=_Generator)
    made = _referring(plain)
    parts = made.get("$defs", {})
    if made != plain:
        spec = _spec()
        parts |= {**spec.pop("$defs"), "Spec": spec}
    head = {"schema_version": {"const": SCHEMA_VERSION}, "kind": {"const": document.KIND}}
    return {
        "$schema": DIALECT,
        "title": f"megamoe-jit {document.KIND}",
        "description": made["description"],
        "type": "object",
        "properties": {**head, **made["properties"]},
        "required": [*head, *made.get("required", [])],
        **({"$defs": dict(sorted(parts.items()))} if parts else {}),
    }


def texts() -> dict[str, str]:
    """The files as they should be, by name."""
    return {f"{kind}.json": json.dumps(schema(each), indent=1) + "\n" for kind, each in documents().items()}


if __name__ == "__main__":
    made = texts()
    for file in FOLDER.glob("*.json"):
        if file.name not in made:
            file.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
