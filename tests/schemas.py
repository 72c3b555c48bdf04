"""Keeps what the schemas of the command line say of variants and options true to `Variant` and `KernelSpec`.

    python -m tests.schemas        # or: make schemas

Three things in them are derived: a list that names any variant names all (with `auto` where it had it), an object that
describes a `KernelSpec` has its fields, and one that describes a `StageSpec` its formats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamoe_jit import _cli
from megamoe_jit._spec import KernelSpec, MoEShape
from megamoe_jit._spec.formats import FORMATS
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._spec.stage import StageFormat
from megamoe_jit._spec.variants import AUTO, Variant

FOLDER = Path(_cli.__file__).with_name("schemas")
NAMES = [variant.value for variant in Variant]
SIZES = [*MoEShape(256, 128, 8, 2).to_json()]


def _spec(properties: dict[str, Any]) -> dict[str, Any]:
    """The properties of a `KernelSpec`, in its order; those that were there as they were."""
    example = KernelSpec(MoEShape(256, 128, 8, 2), next(iter(Variant))).to_json()
    new = {name: {"type": "boolean"} for name in Numerics().options()}
    new["weights"] = {"type": "string", "enum": list(FORMATS)}
    new["inputs"] = {"type": "string", "enum": list(Inputs)}
    properties = {**properties, "weights": new["weights"], "inputs": new["inputs"]}
    return {name: properties.get(name) or new[name] for name in example}


def derived(node: Any) -> Any:
    """A schema, or a part of one, as it should be."""
    if isinstance(node, list):
        return [derived(part) for part in node]
    if not isinstance(node, dict):
        return node
    made = {name: derived(part) for name, part in node.items()}
    if set(NAMES) & set(map(str, made.get("enum", ()))):
        made["enum"] = [*([AUTO] if AUTO in made["enum"] else []), *NAMES]
    if set(made.get("properties", ())) == {"stage"}:
        made["properties"]["stage"]["enum"] = list(StageFormat)
    if [name for name in made.get("properties", ()) if name != "shared"] == SIZES:
        made["properties"].setdefault("shared", made["properties"]["topk"])
    if {"shape", "variant", "timeline"} <= set(made.get("properties", ())):
        made["properties"] = _spec(made["properties"])
    return made


def text(path: Path) -> str:
    """A schema's file as it should be: as it is, if only its layout differs."""
    written = path.read_text(encoding="utf-8")
    found = json.loads(written)
    made = derived(found)
    return written if made == found else json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    for file in sorted(FOLDER.glob("*.json")):
        file.write_text(text(file), encoding="utf-8")
