"""The examples of engines, with stand-ins of these: what they ask for, and what they say without one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.stubs import REPO

EXAMPLES = REPO / "examples/engines"
NAMES = {"sglang_generate": "sglang", "vllm_generate": "vllm", "flashinfer_layer": "flashinfer"}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine(monkeypatch: pytest.MonkeyPatch, name: str, **names: object) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


def test_each_is_described_and_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NAMES)
    listed = re.findall(r"\]\(engines/(\w+)\.py\)", (REPO / "examples/README.md").read_text())
    assert sorted(listed) == sorted(NAMES)
    for name in NAMES:
        words = re.findall(r"^(Run|Seen|Needs):", (EXAMPLES / f"{name}.py").read_text(), re.MULTILINE)
        assert words == ["Run", "Seen", "Needs"], name


@pytest.mark.parametrize("name", NAMES)
def test_without_the_engine_one_sentence_says_so(name, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert example(name).main([] if name == "flashinfer_layer" else ["some/model"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"{name}\.py: there is no \w+; next: pip install .*\n", said.err)


@pytest.mark.parametrize(
    ("more", "opening"),
    [([], {"moe_a2a_backend": "megamoe", "ep_size": 2}), (["--no-all-to-all"], {"moe_runner_backend": "megamoe_jit"})],
)
def test_sglang(monkeypatch, capsys, more, opening):
    asked, ended = {}, []

    def make(**options):
        asked.update(options)
        return SimpleNamespace(generate=lambda *_: {"text": " small."}, shutdown=lambda: ended.append(1))

    engine(monkeypatch, "sglang", Engine=make)
    assert example("sglang_generate").main(["some/model", "--gpus", "2", *more]) == 0
    assert asked == {"model_path": "some/model", "tp_size": 2, **opening}
    assert capsys.readouterr().out == "A mixture of experts is small.\n"
    assert ended == [1]


def test_vllm(monkeypatch, capsys):
    asked = {}

    def make(**options):
        asked.update(options)
        return SimpleNamespace(generate=lambda *_: [SimpleNamespace(outputs=[SimpleNamespace(text=" small.")])])

    engine(monkeypatch, "vllm", LLM=make, SamplingParams=lambda **_: None)
    assert example("vllm_generate").main(["some/model", "--gpus", "2"]) == 0
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert asked == {"model": "some/model", "quantization": "megamoe_jit", **parallel}
    assert capsys.readouterr().out == "A mixture of experts is small.\n"
