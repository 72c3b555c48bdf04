"""The pages on adding a variant, a numeric option and a weight format, followed to the letter in a copy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import copies
from tests.stubs import REPO, child_environment

PAGES = REPO / "docs/how-to"
FOLDERS = ("kernels_src", "heuristics", "megamoe_jit", "tests", "docs")
STEP = re.compile(r"\*\*`([^`]+)`\*\*, (new|after|in place of)(?: `([^`]+)`)?:\n\n *```\w+\n(.*?)\n *```", re.DOTALL)
USE = """
import sys
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.render import render
from megamoe_jit._spec import KernelSpec, MoEShape
from megamoe_jit._compile.toolchain import find_toolchain
spec = KernelSpec.of_kernel_name(sys.argv[1])
assert spec is not None and KernelSpec.from_json(spec.to_json()) == spec
text = render(spec).text
assert sys.argv[2] in text, text[-2000:]
compile_source(text, kernel_name=spec.kernel_name, toolchain=find_toolchain())
"""


FORMAT = """
import torch
from megamoe_jit._spec.formats import WeightFormat
powers, fp8 = WeightFormat.parse("powers"), WeightFormat.parse("fp8")
codes = torch.randint(0, 256, (256, 128), dtype=torch.int64).to(torch.uint8)
assert torch.equal(powers.unpack(powers.pack(codes, True), True), codes)
scales = torch.tensor([[0.5], [4.0]])
codes = torch.ones(256, 128).to(powers.code_dtype)
values = powers.dequantize(codes, scales.to(powers.scale_dtype))
assert torch.equal(values, fp8.dequantize(codes, scales))
assert fp8.expert_bytes(256, 128) - powers.expert_bytes(256, 128) == 3 * 2 * 3
from megamoe_jit import ConfigError, MoEShape
from megamoe_jit._check.scenarios import make_weights
try:
    make_weights(MoEShape(256, 128, 4, 2), "cpu", weights=powers)
except ConfigError as error:
    assert str(error).startswith("weights in powers cannot be drawn"), error
else:
    raise AssertionError("weights of another format are taken for those of this one")
"""


VERIFIED = """
import torch
from megamoe_jit._check.scenarios import get
from megamoe_jit._cli.verify import _kernels
from tests.compile.test_presets import SPECS
case = get("numerics.plain_silu.t96")
assert case.options == {"activation_clamp": 10.0, "plain_silu": True}
(kernel,) = _kernels([case], ["pingpong"], torch.device("cpu"), 1)
assert kernel.kernel_name.endswith("_fast_plain")
assert SPECS["plain-pingpong"].numerics is SPECS["mxfp4-plain-decode"].numerics is case.numerics
"""


SAY_WHAT_WAS_FORGOTTEN = ("tests/unit/spec/test_numerics.py", "tests/unit/package/test_api_docs.py")


class Step(NamedTuple):
    file: str
    how: str
    anchor: str
    text: str


def steps(page: str) -> list[Step]:
    """The edits that a page asks for; code is indented like the step it belongs to."""
    found = STEP.findall((PAGES / page).read_text(encoding="utf-8"))
    lines = [(file, how, anchor, "\n".join(line[3:] for line in text.split("\n"))) for file, how, anchor, text in found]
    return [Step(*parts) for parts in lines]


def follow(tree: Path, page: str) -> set[str]:
    """Do what the page says; the source files that it touches."""
    for step in steps(page):
        path = tree / step.file
        if step.how == "new":
            assert not path.exists()
            path.write_text(step.text + "\n")
            continue
        before = path.read_text()
        assert before.count(step.anchor) == 1, (
            f"{page}: {step.file} has {step.anchor!r} {before.count(step.anchor)} times"
        )
        after = step.text if step.how == "in place of" else f"{step.anchor}\n{step.text}"
        path.write_text(before.replace(step.anchor, after))
    return {step.file for step in steps(page)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources."""
    for folder in FOLDERS:
        shutil.copytree(REPO / folder, tmp_path / folder, symlinks=True)
    shutil.copy(REPO / "README.md", tmp_path)
    return tmp_path


def python(tree: Path, *arguments: str) -> str:
    """What a process says that has the copy instead of these sources."""
    environment = child_environment(tree)
    del environment["MEGAMOE_JIT_KERNELS_SRC"]
    done = copies.python(tree, *arguments, environ=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def tidy(tree: Path) -> None:
    """What a page has written passes the linter, and is formatted."""
    for verb in (("check",), ("format", "--check")):
        python(tree, "-m", "ruff", *verb, "--no-cache", "--config", str(REPO / "pyproject.toml"), "megamoe_jit")


def test_a_variant_is_added_by_its_page(tree: Path):
    assert len(follow(tree, "add-a-kernel-variant.md")) == 3 <= 5
    tidy(tree)
    python(tree, "-m", "tests.schemas")
    python(tree, "-c", USE, "megamoe_shy_h256_i128_e8_k2_r2_fast", "using Policy = megamoe::Shy;")
    assert "decode|shy]" in python(tree, "-m", "megamoe_jit", "tune", "--help")
    ours = tree / "megamoe_jit/_cli/schemas/plan.json"
    assert ours.read_text().count('"shy"') == (REPO / "megamoe_jit/_cli/schemas/plan.json").read_text().count(
        '"pingpong"'
    )


def test_a_numeric_option_is_added_by_its_page(tree: Path):
    assert len(follow(tree, "add-a-numeric-option.md")) == 6
    tidy(tree)
    python(tree, "-m", "tests.schemas")
    python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SAY_WHAT_WAS_FORGOTTEN)
    python(tree, "-c", USE, "megamoe_pingpong_h256_i128_e8_k2_r1_fast_plain", "kPlainSilu = true")
    python(tree, "-c", USE, "megamoe_pingpong_h256_i128_e8_k2_r1_fast", "kPlainSilu = false")
    assert "--plain-silu" in python(tree, "-m", "megamoe_jit", "warmup", "--help")
    python(
        tree, "-c", "import megamoe_jit, inspect; inspect.signature(megamoe_jit.fp8_mega_moe).parameters['plain_silu']"
    )
    assert '"plain_silu"' in (tree / "megamoe_jit/_cli/schemas/warmup.json").read_text()
    python(tree, "-c", VERIFIED)


def test_a_weight_format_is_added_by_its_page(tree: Path):
    assert len(follow(tree, "add-a-weight-format.md")) == 3 <= 10
    tidy(tree)
    python(tree, "-m", "tests.schemas")
    python(tree, "-c", USE, "megamoe_pingpong_h256_i128_e8_k2_r1_powers_fast", "using Weights = megamoe::Powers;")
    python(tree, "-c", FORMAT)
    for verb in ("plan", "explain"):
        python(
            tree, "-m", "megamoe_jit", verb, "--shapes", "v4-flash", "--tokens", "1,4096", "--weight-format", "powers"
        )
    assert '"powers"' in (tree / "megamoe_jit/_cli/schemas/warmup.json").read_text()


@pytest.mark.parametrize("page", ["add-a-kernel-variant.md", "add-a-numeric-option.md", "add-a-weight-format.md"])
def test_the_page_on_the_rooms_says_how_many_files_each_page_touches(page: str):
    told = re.search(
        rf"^\| \[.*\]\(how-to/{page}\) \| (\d+) \|", (REPO / "docs/architecture.md").read_text(), re.MULTILINE
    )
    assert told is not None
    assert int(told[1]) == len({step.file for step in steps(page)})


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path):
    new = {step.file for step in steps(page.name) if step.how == "new"}
    text = page.read_text(encoding="utf-8")
    new |= set(re.findall(r"^## .*`([^`]+)`$", text, re.MULTILINE))
    paths = set(re.findall(r"`((?:kernels_src|megamoe_jit|heuristics|tests|docs)/[\w./-]+)`", text)) - new
    assert len(paths) > 4
    assert [path for path in paths if not (REPO / path).exists() and "NAME" not in path] == []
