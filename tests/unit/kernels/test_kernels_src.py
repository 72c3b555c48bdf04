"""The kernel sources as text: rooms in layers, short files, short functions, nothing that calls out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from megamoe_jit._spec import Variant
from megamoe_jit._spec.formats import FORMATS
from tests import host

#: Folders from the bottom up; a room includes only rooms of its own folder or of those before it.
LAYERS = (
    "base",
    "ptx",
    "layout",
    "comm",
    "sched",
    "pipe",
    "mma",
    "formats",
    "epilogue",
    "stage",
    "dispatch",
    "expand",
    "roles",
    "variants",
    "kernels",
)
HOST_FOLDERS = ("base", "sched")  #: pure index arithmetic, also built with the host's compiler
MAX_FILE, MAX_FUNCTION = 350, 80

FILES = sorted(p for p in host.KERNELS.rglob("*") if p.is_file())
NAMES = [p.relative_to(host.KERNELS).as_posix() for p in FILES]


class Function(NamedTuple):
    head: str
    lines: int


def code(path: Path) -> str:
    """Text without comments, strings, preprocessor lines and template values; lines keep their numbers."""
    text = host.without_comments(re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', path.read_text()))
    text = re.sub(r"\{\{.*?\}\}", "0", text)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE)


def functions(text: str) -> list[Function]:
    """Outermost braces after a parameter list, wherever they are, and how many lines each takes."""
    found: list[Function] = []
    containers: list[bool] = []  # open braces: True for a function and all in it
    begin, head = 0, ""
    for i, char in enumerate(text):
        if char == "{":
            inside = bool(containers) and containers[-1]
            container = re.search(r"\b(namespace|struct|class|enum|union)\b(?![^<]*>)", head)
            if not inside and "(" in head and not container:
                begin, name = i - len(head.lstrip()), " ".join(head.split())
                containers.append(True)
                found.append(Function(name, 0))
            else:
                containers.append(inside)
            head = ""
        elif char == "}":
            was = containers.pop()
            if was and not (containers and containers[-1]):
                found[-1] = found[-1]._replace(lines=text.count("\n", begin, i) + 1)
            head = ""
        else:
            head = "" if char == ";" else head + char
    assert containers == []
    return found


def test_there_is_something_to_look_at():
    assert len(FILES) > 20
    assert {Path(n).suffix for n in NAMES} == {".cuh", ".j2"}
    assert {n.split("/")[0] for n in NAMES} == set(LAYERS)
    assert all(n.startswith("kernels/") for n in NAMES if n.endswith(".j2"))


@pytest.mark.parametrize("name", NAMES)
def test_includes_go_down(name):
    folder = name.split("/")[0]
    allowed = HOST_FOLDERS if folder in HOST_FOLDERS else LAYERS
    allowed = allowed[: allowed.index(folder) + 1]
    for included in re.findall(r'^\s*#include\s+"([^"]+)"', (host.KERNELS / name).read_text(), re.MULTILINE):
        if "{{" in included:  # the entry's, of its variant
            continue
        assert included in NAMES
        assert included.split("/")[0] in allowed, f"{name} includes {included}"


def test_variants_are_told_apart_by_their_policies_alone():
    """So that another one is one header: no other room knows any by name."""
    names = {word for variant in Variant for word in (variant.value, variant.value.title())}
    assert {n.split("/")[1] for n in NAMES if n.startswith("variants/")} == {f"{v.value}.cuh" for v in Variant}
    assert {n.split("/")[1] for n in NAMES if n.startswith("formats/")} == {f"{name}.cuh" for name in FORMATS}
    for path, name in zip(FILES, NAMES, strict=True):
        if not name.startswith("variants/"):
            assert names & set(re.findall(r"\w+", code(path))) == set(), name


@pytest.mark.parametrize("named", [*Variant, *FORMATS.values()], ids=lambda named: named.header)
def test_a_policy_has_the_name_that_kernels_give_it(named):
    assert re.search(rf"\bstruct {named.policy}\b", code(host.KERNELS / named.header)), f"needs a struct {named.policy}"


def test_the_page_for_newcomers_has_every_folder_and_every_barrier():
    page = (host.KERNELS.parent / "docs" / "kernel.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)) == LAYERS
    mbarriers = set(re.findall(r"mbarrier_init\(shared\.(\w+)\(", host.room("kernels/megamoe.cuh")))
    assert len(mbarriers) == 8
    assert set(re.findall(r"^\| `(\w+)\[\w+\]`", page, re.MULTILINE)) >= mbarriers
    enumeration = re.search(r"enum Barrier[^{]*\{(.*?)\}", host.room("base/constants.cuh"), re.DOTALL)
    assert enumeration
    named = re.findall(r"(kBarrier\w+) =", enumeration[1])
    assert re.findall(r"^\| \d.*?, `(kBarrier\w+)` \|", page, re.MULTILINE) == named
    counters = re.findall(r"u32\* (\w+_(?:ready|done)|expanded);", host.room("layout/params.cuh"))
    assert [name for name in counters if f"| `{name}[" not in page] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    text = (host.KERNELS / name).read_text()
    assert text.isascii()
    assert text.count("\n") <= MAX_FILE
    for function in functions(code(host.KERNELS / name)):
        assert function.lines <= MAX_FUNCTION, f"{function.head} has {function.lines} lines"


def test_functions_are_counted_right():
    lines = [
        "constexpr int table[] = {1, 2};",
        "template <class T> struct S {",
        "    S(int x) : y(x) {",
        "        if (x) {",
        "        }",
        "    }",
        "    int f() const { return g([&] { return 1; }); }",
        "};",
    ]
    assert functions("\n".join(lines)) == [("S(int x) : y(x)", 4), ("int f() const", 1)]
    assert sum(len(functions(code(path))) for path in FILES) > 100


@pytest.mark.parametrize("name", NAMES)
def test_no_room_calls_out(name):
    """A call makes ptxas serialise WGMMA, and a header of CUDA would have to be found where there is none."""
    text = code(host.KERNELS / name)
    assert not re.search(r"\b(printf|assert|malloc|free)\s*\(", text)
    assert "#include <" not in (host.KERNELS / name).read_text()


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(".cuh")])
def test_rooms_enter_once(name):
    assert (host.KERNELS / name).read_text().splitlines().count("#pragma once") == 1
