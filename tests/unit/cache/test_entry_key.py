"""The key of a kernel: a pure function of the source, the options, the target and the compiler."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megamoe_jit._cache.identity import cache_key, is_key, source_id
from megamoe_jit._compile.render import render
from megamoe_jit._compile.toolchain import Toolchain, options_for
from megamoe_jit._errors import RenderError
from megamoe_jit._jit import lookup as _lookup
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from tests.stubs import ROOMS, child_environment, write_rooms

TOOLS = Toolchain(Path("/x/libnvrtc.so.12"), (12, 9), "abcd")
SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
ENTRY, INCLUDED = "kernels/entry.cuh.j2", "room/fill.cuh"
WORDS = st.text(max_size=8)


def key(source="s", options=("-a", "-b"), entry="e", arch="sm_90a", tools=TOOLS):
    return cache_key(source, options, entry, arch, tools.release, tools.build)


def test_key_depends_on_every_input_but_the_path():
    keys = [
        key(),
        key(source="s "),
        key(options=("-b", "-a")),
        key(options=("-a", "-b", "-c")),
        key(options=("-a-b",)),
        key(entry="f"),
        key(arch="sm_90"),
        key(tools=Toolchain(TOOLS.path, (12, 8), "abcd")),
        key(tools=Toolchain(TOOLS.path, (12, 9), "abce")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(tools=Toolchain(Path("/elsewhere"), (12, 9), "abcd")) == keys[0]
    assert all(is_key(k) for k in keys)
    assert not is_key("ab")
    assert not is_key("G" * 64)


@given(WORDS, WORDS, WORDS, WORDS)
def test_fields_cannot_run_into_each_other(a, b, c, d):
    assert (key(source=a, entry=b) == key(source=c, entry=d)) == ((a, b) == (c, d))


@given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=4))
def test_options_count_in_number_order_and_content(a, b):
    assert (key(options=a) == key(options=b)) == (a == b)


@given(
    st.tuples(st.integers(0, 99), st.integers(0, 99)), WORDS, st.tuples(st.integers(0, 99), st.integers(0, 99)), WORDS
)
def test_compiler_counts_with_version_and_build(v, a, w, b):
    first, second = (key(tools=Toolchain(Path("/x"), version, build)) for version, build in ((v, a), (w, b)))
    assert (first == second) == ((v, a) == (w, b))


def test_source_id_is_the_key_without_the_compiler():
    first = source_id("s", options_for(TOOLS), "e", "sm_90a")
    assert first == source_id("s", options_for(Toolchain(Path("/y"), (12, 8), "x")), "e", "sm_90a")
    assert first == source_id("s", options_for(None), "e", "sm_90a")
    others = [("t", options_for(None), "e", "a"), ("s", ("-x",), "e", "a"), ("s", (), "f", "a"), ("s", (), "e", "b")]
    assert len({first, *(source_id(*each) for each in others)}) == 5


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms"))


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.setattr(_lookup, "find_toolchain", lambda: TOOLS)


def directive(text, position):
    """Whether the character belongs to a line that the renderer replaces, or to the text of a template tag."""
    start = text.rfind("\n", 0, position) + 1
    line = text[start : (text + "\n").index("\n", position)]
    return line.lstrip().startswith("#") or "{{" in line


@functools.cache
def key_with(folder, file, text):
    (folder / file).write_bytes(text.encode())
    try:
        with override(kernels_src=folder):
            return cache_key(render(SPEC).text, (), SPEC.kernel_name, "sm_90a", TOOLS.release, TOOLS.build)
    finally:
        (folder / file).write_text(ROOMS[file])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([ENTRY, INCLUDED]), st.integers(0, 10_000), st.sampled_from("abz019 ;+{/\t\n"), st.booleans())
def test_any_changed_byte_of_any_included_file_changes_the_key(rooms, file, position, character, insert):
    text = ROOMS[file]
    position %= len(text)
    changed = text[:position] + character + text[position + (not insert) :]
    assume(changed != text and not directive(text, position))
    with contextlib.suppress(RenderError):  # no kernel at all is no wrong kernel
        assert key_with(rooms, file, changed) != key_with(rooms, file, text)


def test_every_room_of_the_real_kernels_counts(tmp_path, tools):
    with override(kernels_src=None):
        source = render(SPEC)
        folder = Path(shutil.copytree(render.__globals__["kernels_dir"](), tmp_path / "src"))
        before = Wanted.of(SPEC).key
    with override(kernels_src=folder):
        assert Wanted.of(SPEC).key == before
        for name in source.files:
            text = (folder / name).read_text()
            (folder / name).write_text(text + "// changed\n")
            assert Wanted.of(SPEC).key != before, name
            (folder / name).write_text(text)
        assert Wanted.of(SPEC).key == before
        variants = [Variant.PINGPONG, Variant.COOPERATIVE]
        specs = [KernelSpec(SPEC.shape, *rest) for rest in itertools.product(variants, (1, 2), (True, False))]
        assert len({Wanted.of(spec).key for spec in specs}) == len(specs)


CHILD = """
import json
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
print(json.dumps([Wanted.of(spec).key, Wanted.of(spec).source_id]))
"""


def test_same_key_in_every_process_directory_prefix_and_hash_seed(tmp_path):
    """Another working directory, another place of package and kernels, another user's HOME, another hash seed."""
    found = set()
    for number, seed in enumerate(("0", "1", "12345")):
        place = tmp_path / f"place{number}" / ("deep" * number)
        write_rooms(place / "src")
        import megamoe_jit

        package = place / "lib" / "megamoe_jit"
        shutil.copytree(Path(megamoe_jit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        environment = child_environment(place, PYTHONHASHSEED=seed, HOME=place, USER=f"user{number}", LANG="C")
        environment["PYTHONPATH"] = str(place / "lib")
        run = subprocess.run(
            [sys.executable, "-c", CHILD], capture_output=True, text=True, cwd=place, env=environment, check=True
        )
        found.add(tuple(json.loads(run.stdout)))
    assert len(found) == 1
    with override(kernels_src=write_rooms(tmp_path / "here")):
        assert Wanted.of(SPEC).key == found.pop()[0]
    assert os.getcwd() != str(tmp_path)
