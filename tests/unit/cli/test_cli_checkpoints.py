"""`convert` and `inspect-checkpoint` on the command line: documents, texts, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe_jit._cli.convert import convert
from megamoe_jit.checkpoints.converted import FORMATS
from tests.checkpoints import Model, model
from tests.commandline import checked
from tests.commandline import run_with_torch as run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("deepseek-v4").write(tmp_path_factory.mktemp("v4"))


def test_convert_offers_what_can_be_written():
    (option,) = (each for each in convert.params if each.name == "weight_format")
    assert tuple(option.type.choices) == FORMATS


def test_inspect_checkpoint(folder: Path, tmp_path: Path):
    done = run("inspect-checkpoint", str(folder), "--ranks", "2", "--json")
    found = checked(done.stdout)
    assert (done.returncode, found["usable"], found["ranks"], len(found["layers"])) == (0, True, 2, 2)
    assert found["layers"][0]["spread"]["blocks"] == 6
    done = run("inspect-checkpoint", str(folder))
    text, first = done.stdout, found["layers"][0]["layer"]
    assert f"MegaMoE.from_checkpoint({str(folder)!r}, {first}, max_tokens=4096)" in done.stderr
    assert "model deepseek_v4, names deepseek-v4, top-k 2, clamp 10.0" in text
    assert "mxfp4" in text
    assert "6 of 6" in text
    refused = run("inspect-checkpoint", str(Model(config={"hidden_act": "gelu"}).write(tmp_path)))
    assert (refused.returncode, "cannot be used: " in refused.stdout) == (1, True)
    assert "from_checkpoint" not in refused.stderr
    assert run("inspect-checkpoint", str(tmp_path / "nothing")).returncode == 2
    other = run("inspect-checkpoint", __file__)
    assert (other.returncode, "is no checkpoint; allowed: a folder, an index (.json)" in other.stderr) == (2, True)


def test_convert(folder: Path, tmp_path: Path):
    words = "convert", str(folder), str(tmp_path / "fp8"), "--format", "fp8"
    done = run(*words, "--json")
    found = checked(done.stdout)
    assert (done.returncode, found["format"]) == (0, "fp8")
    assert f"written {found['files'][0]['name']}" in done.stderr
    again = run(*words)
    assert (again.returncode, "experts in fp8" in again.stdout, "verified" in again.stderr) == (0, True, True)
    other = run("convert", str(folder), str(tmp_path / "fp8"), "--format", "megamoe")
    assert (other.returncode, "another format" in other.stderr) == (2, True)


def test_convert_on_a_device_that_is_not_there(folder: Path, tmp_path: Path):
    for device, code in (("bogus", 2), ("cuda:99", 3)):
        done = run("convert", str(folder), str(tmp_path / "out"), "--format", "fp8", "--device", device)
        assert (done.returncode, device in done.stderr, done.stderr.count("\n")) == (code, True, 1)


def test_an_unset_variable_is_not_the_working_directory(folder: Path, tmp_path: Path):
    for words in (["inspect-checkpoint", ""], ["convert", "", str(tmp_path)], ["convert", str(folder), ""]):
        more = ["--format", "fp8"] if words[0] == "convert" else []
        done = run(*words, *more)
        assert (done.returncode, "'' is no path" in done.stderr) == (2, True)


def test_a_damaged_file_has_an_exit_code_of_its_own(folder: Path, tmp_path: Path):
    damaged = model("mixtral").write(tmp_path / "damaged")
    first = sorted(damaged.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:100])
    done = run("convert", str(damaged), str(tmp_path / "out"), "--format", "fp8")
    assert (done.returncode, "cannot be read" in done.stderr, done.stderr.count("\n")) == (4, True, 1)
