"""Rendering: includes once, positions kept, nothing of the machine in the text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megamoe_jit._compile.render import kernels_dir, render, source_lines, sources_digest
from megamoe_jit._errors import ConfigError, RenderError
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FORMATS, FP8

SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
ROOT = "/megamoe_jit/kernels_src"
ENTRY = "kernels/entry.cuh.j2"


@pytest.fixture
def source(tmp_path):
    """Write files given as `path=text` pairs and make them the kernel directory."""
    folder = tmp_path / "src"

    def write(files):
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return folder

    folder.mkdir()
    with override(kernels_src=folder):
        yield write


def test_includes_enter_once_in_order(source):
    source(
        {
            ENTRY: '#include "a/x.cuh"\n#include "a/y.cuh"\nint {{ kernel_name }}_{{ hidden }};\n',
            "a/x.cuh": '#pragma once\n#include "b/z.cuh"\nint x;\n',
            "a/y.cuh": '#pragma once\n#include "b/z.cuh"  // again\n#include "a/x.cuh"\nint y;\n',
            "b/z.cuh": "#pragma once\nint z;\n",
        }
    )
    result = render(SPEC)
    assert result.files == (ENTRY, "a/x.cuh", "b/z.cuh", "a/y.cuh")
    assert "#include" not in result.text
    assert "#pragma" not in result.text
    code = [line for line in result.text.splitlines() if line and not line.startswith("#line")]
    assert code == ["int z;", "int x;", "int y;", f"int {SPEC.kernel_name}_256;"]


def test_every_line_keeps_its_position(source):
    files = {
        ENTRY: "\n".join(
            [
                "{# a comment",
                "   of two lines #}",
                '#include "a/x.cuh"',
                "int after_include;  // line 4",
                "{% for i in [1, 2] %}",
                "int loop{{ i }};  // line 6",
                "{% endfor %}",
                "int last;  // line 8",
                "",
            ]
        ),
        "a/x.cuh": "#pragma once\n\nint x;  // line 3\n",
    }
    source(files)
    table = source_lines(render(SPEC).text)
    for (file, number), line in table.items():
        if "// line" in line:
            assert line.endswith(f"// line {number}"), (file, number, line)
    assert table[f"{ROOT}/a/x.cuh", 3].startswith("int x;")
    assert table[f"{ROOT}/{ENTRY}", 8].startswith("int last;")
    assert table[f"{ROOT}/{ENTRY}", 6].startswith("int loop1;")


def test_file_without_a_last_newline_keeps_its_last_line(source):
    source({ENTRY: '#include "a/x.cuh"\nint last;', "a/x.cuh": "#pragma once\nint x;"})
    lines = source_lines(render(SPEC).text)
    assert (lines[f"{ROOT}/a/x.cuh", 2], lines[f"{ROOT}/{ENTRY}", 2]) == ("int x;", "int last;")


def test_text_is_independent_of_place_and_directory(source, tmp_path, monkeypatch):
    folder = source({ENTRY: '#include "a/x.cuh"\nint e;\n', "a/x.cuh": "int x;\r\n"})
    first = render(SPEC)
    moved = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder, moved)
    monkeypatch.chdir(moved)
    with override(kernels_src=moved):
        assert render(SPEC) == first
    assert str(tmp_path) not in first.text


@pytest.mark.parametrize(
    ("files", "place", "what"),
    [
        ({ENTRY: 'int a;\n#include "a/no.cuh"\n'}, f"{ROOT}/{ENTRY}(2)", 'cannot include "a/no.cuh"'),
        ({ENTRY: "#include <cuda_fp8.h>\n"}, f"{ROOT}/{ENTRY}(1)", "#include <cuda_fp8.h> is not allowed"),
        ({ENTRY: "#include MACRO\n"}, f"{ROOT}/{ENTRY}(1)", "not allowed"),
        ({ENTRY: '#include "../x.cuh"\n'}, f"{ROOT}/{ENTRY}(1)", "plain path"),
        ({ENTRY: '#include "/etc/passwd"\n'}, f"{ROOT}/{ENTRY}(1)", "plain path"),
        ({ENTRY: '#if 1\n#include "a/x.cuh"\n#endif\n', "a/x.cuh": ""}, f"{ROOT}/{ENTRY}(2)", "inside #if"),
        (
            {ENTRY: '#include "a/x.cuh"\n', "a/x.cuh": '#include "a/y.cuh"\n', "a/y.cuh": '\n#include "a/x.cuh"\n'},
            f"{ROOT}/a/y.cuh(2)",
            "include cycle a/x.cuh -> a/y.cuh -> a/x.cuh",
        ),
        ({ENTRY: "int a;\n{{ no_such }}\n"}, f"{ROOT}/{ENTRY}(2)", "'no_such' is undefined"),
        ({ENTRY: "{# x #}\nint a;\n{{ no_such }}\n"}, f"{ROOT}/{ENTRY}(3)", "'no_such' is undefined"),
        ({ENTRY: "int a;\n\n{% if %}\n"}, f"{ROOT}/{ENTRY}(3)", "Expected an expression"),
        ({ENTRY: "{{ hidden // 0 }}\n"}, f"{ROOT}/{ENTRY}(1)", "zero"),
    ],
)
def test_mistakes_name_file_and_line(source, files, place, what):
    source(files)
    with pytest.raises(RenderError) as caught:
        render(SPEC)
    assert str(caught.value).startswith(place)
    assert what in str(caught.value)


def test_missing_entry_and_missing_directory(source, tmp_path):
    source({"a/x.cuh": ""})
    with pytest.raises(RenderError, match=r"kernels/entry\.cuh\.j2"):
        render(SPEC)
    with (
        override(kernels_src=tmp_path / "none"),
        pytest.raises(ConfigError, match="MEGAMOE_JIT_KERNELS_SRC='.*none' is no"),
    ):
        kernels_dir()


def test_the_digest_of_the_sources_is_over_names_and_bytes_and_not_over_their_place(source, tmp_path):
    files = {ENTRY: "int a;\n", "a/x.cuh": "int b;\n"}
    folder = source(files)
    first = sources_digest()
    with override(kernels_src=Path(shutil.copytree(folder, tmp_path / "copy"))):
        assert sources_digest() == first
    (folder / "a/x.cuh").rename(folder / "a/y.cuh")
    renamed = sources_digest()
    source({"a/y.cuh": "int c;\n"})
    changed = sources_digest()
    source({"a/z.cuh": "", "notes.txt": "no kernel is made of this"})
    assert len({first, renamed, changed, sources_digest()}) == 4
    (folder / "a/z.cuh").unlink()
    assert sources_digest() == changed
    (folder / "a/y.cuh").write_bytes(b"\xff")
    with pytest.raises(RenderError, match=r"cannot read 'a/y.cuh' in .*: not UTF-8"):
        sources_digest()


def test_the_digest_of_the_sources_is_over_all_that_kernels_are_made_of():
    kinds = [(variant, stored) for stored in FORMATS.values() for variant in Variant.reading(stored)]
    files = {
        file for variant, stored in kinds for file in render(KernelSpec(SPEC.shape, variant, weights=stored)).files
    }
    assert files <= {path.relative_to(kernels_dir()).as_posix() for path in kernels_dir().glob("*/*.cuh*")}


@pytest.mark.parametrize("variant", Variant.reading(FP8))
def test_packaged_kernels_render(variant):
    result = render(KernelSpec(SPEC.shape, variant))
    assert result.files[0] == "kernels/entry.cuh.j2"
    assert [name for name in result.files if name.startswith("variants/")] == [f"variants/{variant.value}.cuh"]
    assert len(set(result.files)) == len(result.files)
    assert KernelSpec(SPEC.shape, variant).kernel_name in result.text
    assert result.text.isascii()
