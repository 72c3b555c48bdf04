"""The signatures that plug-ins rely on, of every release: `python -m tests.engines.record FOLDER` writes them down.

They are facts of those releases, small enough to be kept: tests without any release build a package from them.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterable
from pathlib import Path

from megamoe_jit.engines import seams as reading
from megamoe_jit.engines.flashinfer import seams as flashinfer
from megamoe_jit.engines.seams import Seam
from megamoe_jit.engines.sglang import seams as sglang
from megamoe_jit.engines.vllm import seams as vllm

__all__ = ["RECORDS", "SEAMS", "recorded", "write_package"]

RECORDS = Path(__file__).resolve().parents[1] / "unit/engines/signatures.json"
SEAMS = {
    "sglang": (sglang.SHARED + sglang.MEGA + sglang.RUNNER, sglang.TESTED),
    "vllm": (vllm.SEAMS, vllm.TESTED),
    "flashinfer": (flashinfer.SEAMS, flashinfer.TESTED),
}

Records = dict[str, dict[str, str | None]]  #: parameters, or None for what is no function, by module and name


def recorded(seams: Iterable[Seam], root: Path) -> Records:
    """The parameters of each seam in a release, without annotations and values of defaults."""
    found: Records = {}
    for seam in seams:
        tree = reading._parsed(reading._file_of(seam.module, root))
        node = reading._defined(tree, seam.name.split("."))
        assert node is not None, f"{seam} is not in {root}"
        found.setdefault(seam.module, {})[seam.name] = _parameters(node)
    return found


def _parameters(node: ast.AST) -> str | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    arguments = node.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    nothing = ast.Constant(...)
    arguments.defaults = [nothing for _ in arguments.defaults]
    arguments.kw_defaults = [None if each is None else nothing for each in arguments.kw_defaults]
    return ast.unparse(arguments)


def write_package(records: Records, place: Path) -> Path:
    """A package with these definitions and nothing else, in a folder; the folder of the package itself."""
    for module, names in records.items():
        file = place.joinpath(*module.split("."))
        for folder in file.parents:
            if folder == place:
                break
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        package = any(other.startswith(f"{module}.") for other in records)
        if package:
            file.mkdir(exist_ok=True)
        file = file / "__init__.py" if package else file.with_suffix(".py")
        file.write_text("\n".join(_definitions(names)) + "\n", encoding="utf-8")
    return place / next(iter(records)).partition(".")[0]


def _definitions(names: dict[str, str | None]) -> list[str]:
    lines: list[str] = []
    classes: dict[str, dict[str, str | None]] = {}
    for name, parameters in names.items():
        owner, _, member = name.rpartition(".")
        if owner:
            classes.setdefault(owner, {})[member] = parameters
        else:
            lines.append(f"{name} = None" if parameters is None else f"def {name}({parameters}): ...")
    for owner, members in classes.items():
        lines += [f"class {owner}:", *(f"    {line}" for line in _definitions(members))]
    return lines


def main() -> None:
    """Write what the fetched releases have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = {
        f"{engine}-{version}": recorded(seams, folder / f"{_distribution(engine)}-{version}" / engine)
        for engine, (seams, versions) in SEAMS.items()
        for version in versions
    }
    RECORDS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _distribution(engine: str) -> str:
    return "flashinfer-python" if engine == "flashinfer" else engine


if __name__ == "__main__":
    main()
