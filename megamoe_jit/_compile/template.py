"""The part of Jinja that a kernel's template may use, rendered so that no template can hang or fill the memory.

Entries are nearly plain CUDA: values, `{% if %}`, `{% set %}`, `{% for %}` over a list or `range(...)`, `{% include %}`
of a file of the folder by its name. There are no calls but `range`, no attributes but those of `loop`, no macros and no
inheritance; arithmetic is of numbers. What is left grows with the text of the files times the turns of its loops, and
both are bounded. Compiler and cache would take any output for what it is, so this protects the process that renders,
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from megamoe_jit._files import stays_inside

MOST_OUTPUT = 8 << 20  #: characters
MOST_TURNS = 100_000  #: of all loops together
MOST_INCLUDES = 1000
DEEPEST_INCLUDE = 50
MOST_SIZE = 2**64  #: of a number
_FILTERS = ("abs", "count", "d", "default", "first", "int", "last", "length", "lower", "max", "min", "string", "upper")
_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Tuple),
    *(nodes.If, nodes.CondExpr, nodes.For, nodes.Assign, nodes.Include, nodes.Compare, nodes.Operand, nodes.Test),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow),
    *(nodes.Neg, nodes.Pos, nodes.Getitem, nodes.Filter, nodes.Getattr, nodes.Call),
)


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template asks for more than any kernel needs."""


def render_template(load: Callable[[str], tuple[str, str]], name: str, values: Mapping[str, Any]) -> str:
    """The text of a template.

    Args:
        load: text of a file of the folder, and the name to show it under; raises `jinja2.TemplateNotFound`.
        name: of the template.
        values: what its names mean.

    Raises:
        jinja2.TemplateError: it is wrong, or uses what is not allowed.
        Exception: whatever else an expression of it raises.
    """
    environment = _Environment(load)
    size, parts = 0, list[str]()
    for part in environment.get_template(name).generate(values):
        size += len(part)
        if size > MOST_OUTPUT:
            raise TemplateLimitError(f"it renders to more than {MOST_OUTPUT} characters")
        parts.append(part)
    return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """Renders one template, once."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, load: Callable[[str], tuple[str, str]]) -> None:
        super().__init__(
            loader=jinja2.FunctionLoader(self._load),
            undefined=jinja2.StrictUndefined,
            autoescape=False,
            keep_trailing_newline=True,
            cache_size=0,
        )
        self._read = load
        self._turns = self._loads = 0
        self._included: dict[str, dict[str, int]] = {}  # by template: names and lines
        self._depth: dict[str, int] = {}
        self.globals = {"range": safe_range}
        self.filters = {name: self.filters[name] for name in _FILTERS} | {"_counted": self._counted}

    def _load(self, name: str) -> tuple[str, str, None]:
        self._loads += 1
        if self._loads > MOST_INCLUDES:
            raise TemplateLimitError(f"more than {MOST_INCLUDES} templates are included")
        text, shown = self._read(name)
        return text, shown, None

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all(nodes.Node)):
            if problem := _problem(node):
                raise jinja2.TemplateSyntaxError(problem, node.lineno or 1, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        if name is not None:
            self._note_includes(name, tree, filename)
        return tree

    def _note_includes(self, name: str, tree: nodes.Template, filename: str | None) -> None:
        """Raise `TemplateSyntaxError` if a template includes itself, or is the end of a long chain of includes."""
        lines = {node.template.as_const(): node.lineno for node in tree.find_all(nodes.Include)}
        self._included[name] = lines
        try:
            TopologicalSorter(self._included).prepare()
        except CycleError as error:
            cycle = error.args[1][:0:-1]  # each includes the next, and the last one the first
            at = cycle.index(name)
            chain = [*cycle[at:], *cycle[:at], name]
            problem = f"include cycle {' -> '.join(chain)}"
            raise jinja2.TemplateSyntaxError(problem, lines[chain[1]], name, filename) from None
        for target, line in lines.items():
            self._depth[target] = max(self._depth.get(target, 0), self._depth.get(name, 0) + 1)
            if self._depth[target] > DEEPEST_INCLUDE:
                problem = f"includes are nested more than {DEEPEST_INCLUDE} deep"
                raise jinja2.TemplateSyntaxError(problem, line, name, filename)

    @jinja2.pass_context  # which also keeps the compiler from working out the loop by itself
    def _counted(self, _: Context, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, as long as all loops together have not gone on for too long."""
        for item in items:
            self._turns += 1
            if self._turns > MOST_TURNS:
                raise TemplateLimitError(f"its loops take more than {MOST_TURNS} turns")
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value in (left, right):
            if not isinstance(value, int | float):
                raise TypeError(f"{operator} takes numbers, not {type(value).__name__}")
        if operator == "**" and not (abs(left) <= 2 or abs(right) <= 64):
            raise OverflowError("a power is too large")
        result = super().call_binop(context, operator, left, right)
        if abs(result) > MOST_SIZE:
            raise OverflowError(f"a number is larger than {MOST_SIZE}")
        return result


def _problem(node: nodes.Node) -> str:
    """Why a template may not hold this; empty if it may."""
    if not isinstance(node, _ALLOWED):
        return f"{type(node).__name__} is not allowed in a kernel's template; allowed: values, if, set, for, include"
    if isinstance(node, nodes.For) and node.recursive:
        return "a recursive loop is not allowed in a kernel's template"
    if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Name) and node.node.name == "range"):
        return "calls are not allowed in a kernel's template, but for range(...)"
    if isinstance(node, nodes.Getattr) and not (isinstance(node.node, nodes.Name) and node.node.name == "loop"):
        return f".{node.attr} is not allowed in a kernel's template; allowed: attributes of loop"
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return f"filter {node.name!r} is not allowed in a kernel's template; allowed: {', '.join(_FILTERS)}"
    if isinstance(node, nodes.List | nodes.Tuple) and any(n.ctx == "load" for n in node.find_all(nodes.Name)):
        return "a list in a kernel's template holds constants alone"
    if isinstance(node, nodes.Include):
        target = node.template
        if not (isinstance(target, nodes.Const) and isinstance(target.value, str) and stays_inside(target.value)):
            return 'include takes the name of a file of the folder, in quotes: {% include "folder/file" %}'
    return ""
