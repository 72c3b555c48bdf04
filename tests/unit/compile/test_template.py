"""A kernel directory of a user's own: whatever its templates ask for ends in one clear error, soon."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest

from megamoe_jit._compile import template as _template
from megamoe_jit._compile.render import render
from megamoe_jit._errors import RenderError, ToolchainError
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from tests.stubs import write_rooms

SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
ENTRY = SPEC.template
PLACE = f"/megamoe_jit/kernels_src/{ENTRY}"


@pytest.fixture
def rendered(tmp_path: Path):
    """Renders an entry; other files may lie beside it."""

    def render_it(entry: str, **files: str) -> str:
        write_rooms(tmp_path / "src", {ENTRY: entry, **files})
        with override(kernels_src=tmp_path / "src"):
            return render(SPEC).text

    return render_it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ 'x' * 10**12 }}", r"\(1\): \* takes numbers, not str"),
        ("int a;\n{{ 'x' + 'y' }}", r"\(2\): \+ takes numbers, not str"),
        ("{{ '%1000000000d' % 1 }}", "% takes numbers"),
        ("{{ 10**10**10 }}", "too large|larger than"),
        ("{{ 10**64 }}", "larger than"),
        ("{{ 2.0**5000 }}", "larger than|out of range"),
        ("{{ " + "9" * 5000 + " }}", "digits"),
        ("{{ 'x' ~ 'y' }}", "Concat is not allowed"),
        ("{{ 'x'.ljust(10**10) }}", "calls are not allowed"),
        ("{{ 'x'.upper }}", ".upper is not allowed"),
        ("{{ 'x'|center(10000000000) }}", "filter 'center' is not allowed"),
        ("{{ lipsum(1000000) }}", "calls are not allowed"),
        ("{{ range(10**9)|max }}", "Range too big"),
        ("{{ [[1]]|first|first + 1 }}{{ ''['__class__'] }}", "__class__"),
        ("{% set a = [1] %}{% set a = [a, a] %}", "a list in a kernel's template holds constants alone"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "Macro is not allowed"),
        ("{% extends 'x' %}", "Extends is not allowed"),
        ("{% block b %}{{ self.b() }}{% endblock %}", "Block is not allowed"),
        ("{% import 'x' as x %}", "Import is not allowed"),
        ("{% set x %}a{% endset %}", "AssignBlock is not allowed"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive loop"),
        ("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "more than 100000 turns"),
        ("{% for i in range(9999) %}" + "x" * 10_000 + "{% endfor %}", "more than 8388608 characters"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deep"),
        ("{{ " + "not " * 5000 + "1 }}", "nested too deep"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "too many"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many"),
        ("{% include '/etc/passwd' %}", "include takes the name of a file of the folder"),
        ("{% include '../../x' %}", "include takes the name of a file of the folder"),
        ("{% include entry %}", "include takes the name of a file of the folder"),
        ("{% include ['a', 'b'] %}", "include takes the name of a file of the folder"),
        ("{% include 'a/none' %}", "kernel template 'a/none' does not exist"),
        (f"int a;\n{{% include '{ENTRY}' %}}", rf"\(2\): include cycle {ENTRY} -> {ENTRY}"),
    ],
    ids=lambda value: value[:40] if "{" in value else "",
)
def test_what_a_template_may_not_do(rendered, text: str, said: str):
    with pytest.raises(RenderError, match=said) as caught:
        rendered(text)
    assert str(caught.value).startswith((PLACE, "kernel template"))


def test_what_a_template_may_do(rendered):
    text = rendered(
        "{% set wide = hidden // 128 * 2 %}{% if topk > 1 and not timeline == 'x' %}many{% else %}one{% endif %}"
        " {{ wide }}"
        "{% for a, b in [(1, 2), (3, 4)] %} {{ loop.index }}:{{ a + b }}{% if not loop.last %},{% endif %}{% endfor %}"
        "{% for i in range(3) %}{{ i }}{% endfor %} {{ kernel_name|upper|length }} {{ none_such|default(7) }}"
        '{# note #}{% include "a/part" %}',
        **{"a/part": " part {{ experts }}"},
    )
    assert text.split("\n", 1)[1].startswith(f"many 4 1:3, 2:7012 {len(SPEC.kernel_name)} 7")
    assert " part 8" in text


def test_chains_of_includes(rendered):
    chain = {f"a/{i}": f'{{% include "a/{i + 1}" %}}' for i in range(400)}
    with pytest.raises(RenderError, match=r"a/49\(1\): includes are nested more than 50 deep"):
        rendered('{% include "a/0" %}', **chain)
    with pytest.raises(RenderError, match=r"a/2\(1\): include cycle a/2 -> a/1 -> a/2"):
        rendered('{% include "a/1" %}', **{"a/1": '{% include "a/2" %}', "a/2": '{% include "a/1" %}'})
    rooms = {f"r/{i}": f'#include "r/{i + 1}"\n' for i in range(2000)}
    with pytest.raises(RenderError, match="includes are nested more than 50 deep"):
        rendered('#include "r/0"\n', **rooms)


def test_includes_that_double(rendered, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_template, "MOST_INCLUDES", 40)
    with pytest.raises(RenderError, match="more than 40 templates are included"):
        rendered(
            '{% include "a/0" %}', **{f"a/{i}": f'{{% include "a/{i + 1}" %}}' * 2 for i in range(30)}, **{"a/30": ""}
        )


def test_rooms_without_an_end(rendered):
    rooms = {f"r/{i}": "x" * 250_000 + "\n" for i in range(80)}
    with pytest.raises(RenderError, match="with this file the source has more than"):
        rendered("".join(f'#include "{name}"\n' for name in rooms), **rooms)


def test_without_jinja2_the_environment_is_at_fault(rendered, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.split(".")[0] == "jinja2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.split(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "megamoe_jit._compile.template")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ToolchainError, match="'jinja2', which is not installed. Run: pip install"):
        rendered("int a;\n")
