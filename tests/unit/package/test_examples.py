"""The examples, as far as they get without a GPU; and to their end, with the reference in the kernel's place."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megamoe_jit as mm
from megamoe_jit._settings.variables import VARIABLES
from megamoe_jit.reference import expert_counts, moe_reference
from tests.stubs import REPO, child_environment, write_rooms
from tests.unit.layer.test_calls import Cuda
from tests.unit.layer.test_moe import at, quantise

EXAMPLES = REPO / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
DOCKER = EXAMPLES / "docker"
FP8, F32, I64 = torch.float8_e4m3fn, torch.float32, torch.int64


def example(name: str) -> ModuleType:
    """The example, imported and not yet run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_gpu(*command: str) -> subprocess.CompletedProcess[str]:
    """A new process that sees no GPU, started in another directory than the examples'."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ, cwd=REPO)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The stand-ins of a GPU; its kernels compute what the reference does, on what they find at their addresses."""
    it = Cuda(monkeypatch)

    def compute(params) -> None:
        shape, tokens, base = it.launches[-1].spec.shape, params.tokens, params.peers[0]
        experts, hidden, inner, topk = shape.experts, shape.hidden, shape.intermediate, shape.topk
        if params.raw_x:
            quantise(params, hidden, topk)
        ids = at(base + params.topk_ids, I64, tokens, topk)
        l1 = (
            at(params.weight1, FP8, experts, 2 * inner, hidden),
            at(params.weight1_scales, F32, experts, 2 * inner // 128, hidden // 128),
        )
        l2 = (
            at(params.weight2, FP8, experts, hidden, inner),
            at(params.weight2_scales, F32, experts, hidden // 128, inner // 128),
        )
        mm.mark_transformed(l1, l2)  # these are tensors of the test, over the memory that was checked
        y = moe_reference(
            at(base + params.x, FP8, tokens, hidden),
            at(base + params.x_scales, F32, tokens, hidden // 128),
            ids,
            at(base + params.topk_weights, F32, tokens, topk),
            *mm.inverse_transform_weights_for_mega_moe_sm90(l1, l2),
            activation_clamp=params.clamp,
        )
        at(params.y, torch.bfloat16, tokens, hidden).copy_(y)
        if params.stats:
            at(params.stats, torch.int32, experts).add_(expert_counts(ids, experts))

    it.kernel = compute
    return it


def test_each_is_described_and_listed():
    listed = re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text())
    for path in (*(EXAMPLES / f"{name}.py" for name in SCRIPTS), DOCKER / "Dockerfile", DOCKER / "warm_kernels.sh"):
        assert path.relative_to(EXAMPLES).as_posix() in listed
        words = re.findall(r"^(?:# )?(Run|Seen|Needs):", path.read_text(), re.MULTILINE)
        assert words == ["Run", "Seen", "Needs"], path


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_gpu_one_sentence_says_what_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert example(name).main([]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"{name}.py: ")
    assert "these kernels need a Hopper GPU" in line


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"in_transformers"}))  # that goes by the reference on a CPU
def test_another_gpu_is_refused_likewise(name: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    def refuse(*_: object, **__: object) -> None:
        raise mm.UnsupportedDeviceError("NVIDIA A100 has compute capability 8.0; these kernels need 9.0")

    module = example(name)
    owner = module.mm if name == "ranks" else module
    monkeypatch.setattr(owner, "get_symm_buffer_for_mega_moe" if name == "ranks" else "MegaMoE", refuse)
    assert module.main(["--device", "cpu"]) == 3
    assert "compute capability 8.0" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_used_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in (["--path", str(tmp_path / "nothing")], ["--path", str(tmp_path)], ["--device", "bogus"]):
        assert example("checkpoint").main(["--device", "cpu", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("checkpoint.py: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments(name: str, capsys: pytest.CaptureFixture[str]):
    for arguments, code in ((["--help"], 0), (["--no-such"], 2)):
        with pytest.raises(SystemExit) as end:
            example(name).main(arguments)
        assert end.value.code == code
    assert "--device" in capsys.readouterr().out


def test_as_a_process():
    done = without_gpu(sys.executable, str(EXAMPLES / "layer.py"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (3, "", 1), done.stderr


def test_under_torchrun():
    """Both ranks meet, and are refused together: nobody waits for the other."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1")
    done = without_gpu(sys.executable, *launcher, str(EXAMPLES / "ranks.py"))
    assert done.returncode == 1, "torchrun's own"
    said = [line for line in done.stderr.splitlines() if line.startswith("ranks.py: ")]
    assert said, done.stderr
    assert all(re.fullmatch(r"ranks.py: rank [01]: no CUDA device .* Hopper GPU.*", line) for line in said)
    assert 'examples/ranks.py"' not in done.stderr, "no traceback but torchrun's"


def test_layer(cuda: Cuda, capsys: pytest.CaptureFixture[str]):
    assert example("layer").main(["--device", "cpu"]) == 0
    assert re.fullmatch(r"torch.bfloat16 \(100, 512\), \S+ from the reference\n", capsys.readouterr().out)
    (launch,) = cuda.launches
    (table,) = tomllib.loads((DOCKER / "shapes.toml").read_text()).values()
    assert launch.spec.shape == mm.MoEShape(**table), "the image is warmed up for another shape"


def test_checkpoint(cuda: Cuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert example("checkpoint").main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("4 experts of layer 3, (100, 512), ")
    example("checkpoint").write_small_model(tmp_path)
    assert example("checkpoint").main(["--device", "cpu", "--path", str(tmp_path)]) == 0
    assert len(cuda.launches) == 2


@pytest.mark.filterwarnings("ignore:experts_implementation=.megamoe. on a CPU")
def test_in_transformers(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers")
    assert example("in_transformers").main(["--device", "cpu"]) == 0
    assert re.fullmatch(r"tokens \[.*\]\nlogits are \S+ from those of the eager loop\n", capsys.readouterr().out)


def test_a_layer_has_fifteen_lines():
    text = (EXAMPLES / "layer.py").read_text()
    body = text.partition('how far its output is from the reference."""\n')[2].partition("\n\n\n")[0]
    assert body.startswith("    experts, hidden")
    assert len(body.splitlines()) <= 15


def test_ranks(cuda: Cuda, capsys: pytest.CaptureFixture[str]):
    assert example("ranks").main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("rank 0 of 1: 128 tokens, 512 rows, ")
    assert len(cuda.launches) == 1


@pytest.mark.parametrize("name", ["layer", "ranks", "checkpoint"])
def test_a_wrong_output_is_told(name: str, cuda: Cuda):
    right = cuda.kernel

    def wrong(params) -> None:
        right(params)
        at(params.y, torch.bfloat16, params.tokens, cuda.launches[-1].spec.shape.hidden).add_(0.5)

    cuda.kernel = wrong
    assert example(name).main(["--device", "cpu"]) == 1


class Recorded(TorchDispatchMode):
    """Stands in for a CUDA graph: what torch and the kernel did inside is done again, on the same tensors."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda, self.steps = cuda, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, made))
        return made

    def __enter__(self):
        kernel = self.cuda.kernel
        self.cuda.capturing, self.kernel = True, kernel
        self.cuda.kernel = lambda params: self.steps.append((kernel, (params,), {}, None))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.cuda.capturing, self.cuda.kernel = False, self.kernel

    def replay(self) -> None:
        for function, args, kwargs, made in self.steps:
            again = function(*args, **kwargs)
            if isinstance(made, torch.Tensor) and made is not again:
                made.copy_(again)


@pytest.mark.parametrize("fresh", [True, False])
def test_cuda_graph(cuda: Cuda, monkeypatch, capsys: pytest.CaptureFixture[str], fresh: bool):
    """A replay that does nothing gives the output of the inputs before, which the example must notice."""
    recorded = Recorded(cuda)
    graph = SimpleNamespace(replay=recorded.replay if fresh else lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda it: recorded)
    assert example("cuda_graph").main(["--device", "cpu", "--replays", "2"]) == (0 if fresh else 1)
    seen = capsys.readouterr().out.splitlines()
    assert len(seen) == 2
    assert all(("OTHER" in line) is not fresh for line in seen)


@pytest.fixture
def warm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script of the image, with kernels that compile in no time."""
    write_rooms(tmp_path / "src")
    sealed = {"MEGAMOE_JIT_DISABLE_JIT": 1, "MEGAMOE_JIT_READONLY_CACHE": tmp_path / "kernels"}  # as the image has it
    environ = {**child_environment(tmp_path, **sealed), "PYTHON": sys.executable}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(DOCKER / "warm_kernels.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ, cwd=tmp_path)

    call.environ = environ
    return call


def test_an_image_is_warmed_up_and_needs_no_compiler_then(warm, tmp_path: Path):
    done = warm(str(DOCKER / "shapes.toml"), str(tmp_path / "kernels"))
    assert done.returncode == 0, done.stderr
    words = ["explain", "--shapes", str(DOCKER / "shapes.toml"), "--tokens", "1,300", "--json"]
    explained = subprocess.run(
        [sys.executable, "-m", "megamoe_jit", *words], capture_output=True, text=True, timeout=240, env=warm.environ
    )
    calls = json.loads(explained.stdout)["calls"]
    assert [call["cached"] for call in calls] == [True, True], "in the read-only cache: the user's is not there"
    assert not (tmp_path / "cache").exists()
    for path in (tmp_path / "kernels", *(tmp_path / "kernels").rglob("*")):
        if path.name != ".tmp":  # of whoever writes
            assert path.stat().st_mode & stat.S_IROTH, f"another user cannot read {path}"


def test_the_script_of_the_image_passes_refusals_on(warm, tmp_path: Path):
    assert warm().returncode == 2
    done = warm("no-such-shape", str(tmp_path / "kernels"))
    assert done.returncode == 2
    assert "no-such-shape" in done.stderr
    assert not (tmp_path / "kernels").exists()


def test_the_dockerfile_names_what_there_is():
    text = (DOCKER / "Dockerfile").read_text()
    (copied,) = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY examples/")]
    *sources, target = copied
    assert all((REPO / source).is_file() for source in sources)
    inside = {target + Path(source).name for source in sources}
    (warmed,) = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("RUN sh ")]
    assert set(warmed[1:3]) <= inside
    environ = dict(re.findall(r"^ENV (\w+)=(\S+)$", text, re.MULTILINE))
    assert environ["MEGAMOE_JIT_READONLY_CACHE"] == warmed[3]
    assert set(environ) <= {variable.name for variable in VARIABLES}
    (started,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(started)[1] in inside
