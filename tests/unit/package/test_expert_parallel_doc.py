"""The figures and the program in docs/expert-parallel.md."""

import ast
import re
from pathlib import Path

import megamoe_jit
from megamoe_jit._device.layout import buffer_layout
from megamoe_jit.heuristics.presets import preset

TEXT = (Path(__file__).parents[3] / "docs" / "expert-parallel.md").read_text(encoding="utf-8")


def test_memory_is_what_the_layout_says():
    rows = re.findall(r"^\| (\S+) \| (\d+) \|((?: [\d.]+ \+ [\d.]+ \|){4})$", TEXT, re.MULTILINE)
    assert len(rows) == 5
    for name, tokens, cells in rows:
        for ranks, cell in zip((1, 2, 4, 8), cells.strip("| ").split(" | "), strict=True):
            layout = buffer_layout(preset(name).shape, int(tokens), ranks)
            parts = (layout.symmetric_bytes, layout.local_bytes)
            assert cell == " + ".join(f"{size / 2**30:.2f}" for size in parts), (name, tokens, ranks)


def test_the_program_uses_what_there_is():
    program = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    names = {
        n.attr
        for n in ast.walk(ast.parse(program))
        if isinstance(n, ast.Attribute) and n.value.__dict__.get("id") == "mm"
    }
    assert len(names) == 5
    assert all(hasattr(megamoe_jit, name) for name in names)
