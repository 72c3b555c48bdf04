"""What a plug-in relies on in an engine, read from the source of the installed release: nothing is imported or run.

Engines change monthly. A plug-in lists its seams, and asks before it touches anything whether each is as it was; so do
`doctor --engine` and the tests that read a release. All of them get the same sentences.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamoe_jit.engines.aside import step_aside

Use = Literal["replaced", "called", "wrapped", "read"]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Seam:
    """One thing of an engine that a plug-in relies on.

    Attributes:
        module: where it is defined.
        name: in that module; a dot for what a class has.
        use: "replaced", its calls come to the plug-in, so its parameters are these and no others; "called", by the
            plug-in, with these; "wrapped", its calls pass through, and begin with these; "read", it is there.
        takes: names of parameters, in order, with blanks between.
        optional: more names that the plug-in understands where they are.
    """

    module: str
    name: str
    use: Use = "read"
    takes: str = ""
    optional: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def attributes(module: str, owner: str, names: str) -> list[Seam]:
    """A seam for each of these things of a class, which are read; names have blanks between."""
    return [Seam(module, f"{owner}.{name}") for name in names.split()]


def root_of(engine: str) -> Path | None:
    """The folder of the package of an engine, which is not imported; None without one."""
    try:
        spec = importlib.util.find_spec(engine)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def misfits(seams: Iterable[Seam], root: Path) -> list[str]:
    """A sentence for each seam that is not as it is relied upon, in the engine whose package is this folder."""
    return [f"{seam}: {problem}" for seam in seams if (problem := problem_of(seam, root))]


def problem_of(seam: Seam, root: Path) -> str:
    """How the installed engine differs from what a seam says; empty if it does not."""
    try:
        tree = _parsed(_file_of(seam.module, root))
    except FileNotFoundError:
        return "its module is gone"
    except (OSError, SyntaxError, ValueError) as error:
        return f"its source cannot be read: {type(error).__name__}: {error}"
    found = _defined(tree, seam.name.split("."))
    if found is None:
        return "is gone"
    if seam.use == "read":
        return ""
    if not isinstance(found, _Function):
        return "is no function any more"
    return _compared(seam, found)


def _file_of(module: str, root: Path) -> Path:
    below = root.joinpath(*module.split(".")[1:])
    return below / "__init__.py" if below.is_dir() else below.with_suffix(".py")


@functools.lru_cache(maxsize=16)  # several seams of one file are asked for one after the other
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _defined(tree: ast.AST, path: list[str]) -> ast.AST | None:
    """What the last statement that binds this name binds it to, under `if` and `try` too."""
    found: ast.AST | None = None
    for node in _statements(tree):
        if isinstance(node, _Function | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        if path[0] in names:
            found = node
    return found if found is None or len(path) == 1 else _defined(found, path[1:])


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _statements(node)


def _compared(seam: Seam, function: _Function) -> str:
    arguments = function.args
    plain = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    keywords = [each.arg for each in arguments.kwonlyargs]
    names, takes = [*plain, *keywords], seam.takes.split()
    if seam.use == "wrapped":
        return "" if names[: len(takes)] == takes else _said(names, takes, "begin with")
    if seam.use == "replaced":
        asked_for = [name for name in names if name not in seam.optional.split()]
        exact = asked_for == takes and arguments.vararg is None and arguments.kwarg is None
        return "" if exact else _said(names, takes, "be")
    optional = set(plain[len(plain) - len(arguments.defaults) :])
    optional |= {name for name, default in zip(keywords, arguments.kw_defaults, strict=True) if default is not None}
    fits = set(takes) <= set(names) and set(names) - optional - {"self", "cls"} <= set(takes)
    return "" if fits else _said(names, takes, "be")


def _said(names: list[str], wanted: list[str], verb: str) -> str:
    return f"its parameters are ({', '.join(names)}); they were to {verb} ({', '.join(wanted)})"


def asked(seams: Iterable[Seam], engine: str) -> Iterator[tuple[str, str]]:
    """Each seam by name, with its problem in the engine that is installed; empty if there is none.

    Raises:
        ImportError: there is no such package.
    """
    root = root_of(engine)
    if root is None:
        raise ImportError(f"there is no package {engine}")
    for seam in seams:
        yield str(seam), problem_of(seam, root)


def fits(engine: str, seams: Iterable[Seam], feature: str = "") -> bool:
    """Whether the installed release is as expected; else the plug-in, or a feature of it, steps aside."""
    root = root_of(engine)
    moved = [f"there is no package {engine}"] if root is None else misfits(seams, root)
    if moved:
        step_aside(f"{engine} {feature}".rstrip(), moved)
    return not moved
