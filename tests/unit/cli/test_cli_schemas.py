"""Every command's document is what its published JSON Schema says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from click.testing import CliRunner

from megamoe_jit._bench import clock as _clock
from megamoe_jit._bench import conditions as _bench_report
from megamoe_jit._bench import measure as _bench
from megamoe_jit._check import verify as _verify
from megamoe_jit._cli import cli
from megamoe_jit._documents import SCHEMA_VERSION
from megamoe_jit._jit import runtime as _runtime
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.any_layer import Pass, StageFormat
from tests import schemas
from tests.commandline import (
    COOPERATIVE,
    PINGPONG,
    SCHEMAS,
    SIZES,
    STAGED,
    checked,
    damage,
    keys_of,
    leaf_commands,
    run,
    schema,
)
from tests.commandline import warm_cache as copy_warm_cache

#: The kind of document of every command, by its words.
KINDS = {
    "warmup": "warmup",
    "doctor": "doctor",
    "cache path": "cache-path",
    "cache ls": "cache-ls",
    "cache info": "cache-info",
    "cache stats": "cache-stats",
    "cache verify": "cache-verify",
    "cache prune": "cache-prune",
    "cache rm": "cache-rm",
    "cache clear": "cache-clear",
    "cache export": "cache-export",
    "cache import": "cache-import",
    "shapes ls": "shapes",
    "explain": "explain",
    "plan": "plan",
    "render": "render",
    "inspect": "inspect",
    "convert": "convert",
    "inspect-checkpoint": "inspect-checkpoint",
    "env": "env",
    "demo": "demo",
    "verify": "verify",
    "bench": "bench",
    "tune": "tune",
    "completion": "completion",
}
LISTED = "scenarios"  #: of `verify --list`


def test_every_command_has_a_schema_and_every_schema_a_command():
    assert {" ".join(words) for words in leaf_commands()} == set(KINDS)
    files = {Path(file.name).stem for file in SCHEMAS.iterdir() if file.name.endswith(".json")}
    assert files == {*KINDS.values(), LISTED}


@pytest.mark.parametrize("kind", [*KINDS.values(), LISTED])
def test_schemas_are_valid_and_name_what_they_describe(kind: str):
    found = schema(kind, closed=False)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["properties"]["kind"] == {"const": kind}
    assert found["properties"]["schema_version"] == {"const": SCHEMA_VERSION}
    assert {"schema_version", "kind"} <= set(found["required"])


def test_schemas_are_what_the_classes_of_documents_say():
    written = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in schemas.FOLDER.glob("*.json")}
    assert written == {name: json.loads(text) for name, text in schemas.texts().items()}, "run `make schemas`"


def test_what_is_known_of_a_value_is_in_its_schema():
    found = schema("cache-ls")["$defs"]["ListedEntry"]
    assert found["required"] == ["key", "path", "used_at", "disk_bytes", "read_only"]
    assert found["properties"]["registers"] == {"minimum": 0, "type": "integer"}, "left out, but never null"
    assert found["properties"]["read_only"]["description"] == "whether it is in a read-only cache"
    null = {"type": "null"}
    key = schema("explain")["$defs"]["Call"]["properties"]["key"]
    assert key["anyOf"] == [{"pattern": "^[0-9a-f]{64}$", "type": "string"}, null]
    assert schema("bench")["$defs"]["JudgedRow"]["properties"]["diff"]["type"] == ["number", "null"]
    spec, staging, nodes = schema("warmup")["$defs"]["Spec"]["anyOf"]
    assert staging["properties"]["stage"]["enum"] == [form.value for form in StageFormat]
    assert nodes["properties"]["nodes"]["enum"] == [step.value for step in Pass]
    assert list(spec["properties"]) == list(KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG).to_json())
    assert spec["required"] == ["shape", "variant", "ranks", "fast_math"]
    assert schema("warmup")["$defs"]["Variant"]["enum"] == [variant.value for variant in Variant]


def test_readers_must_expect_more_fields_but_none_less():
    doc = {"schema_version": SCHEMA_VERSION, "kind": "cache-path", "path": "/x", "exists": True}
    opened = jsonschema.Draft202012Validator(schema("cache-path", closed=False))
    assert opened.is_valid({**doc, "more": 1})
    assert not jsonschema.Draft202012Validator(schema("cache-path")).is_valid({**doc, "more": 1})
    del doc["path"]
    assert not opened.is_valid(doc)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_warm_cache(tmp_path_factory.mktemp("warm") / "cache")


@pytest.fixture(scope="module")
def invoke(root: Path) -> Callable[..., dict]:
    """Runs a command on the warm cache; its document, and its exit code as `exit_code`."""

    def call(words: str, *more: str, code: int = 0) -> dict:
        takes_root = words.split()[0] in ("cache", "warmup", "explain", "inspect")
        where = ["--cache-dir", str(root)] if takes_root else []
        result = CliRunner().invoke(cli, [*words.split(), *more, *where, "--json"])
        assert result.exit_code == code, result.output
        doc = checked(result.stdout)
        assert doc["kind"] == KINDS.get(words, LISTED)
        return doc

    return call


def test_looking_commands(invoke: Callable[..., dict], root: Path):
    keys = keys_of(root)
    assert set(keys) == {PINGPONG, COOPERATIVE}
    assert invoke("cache path") == {"schema_version": 1, "kind": "cache-path", "path": str(root), "exists": True}
    listed = invoke("cache ls")
    assert {entry["key"] for entry in listed["entries"]} == set(keys.values())
    assert listed["disk_bytes"] == sum(entry["disk_bytes"] for entry in listed["entries"])
    assert invoke("cache info", keys[PINGPONG][:8])["entry"]["entry"] == PINGPONG
    (stats,) = invoke("cache stats")["caches"]
    assert (stats["entries"], stats["bytes"]) == (2, listed["disk_bytes"])
    assert invoke("cache verify")["problems"] == []
    assert invoke("warmup", *STAGED, "--dry-run")["cached"] == 2
    assert invoke("warmup", *STAGED)["cached"] == 2
    assert invoke("shapes ls")["shapes"]
    assert len(invoke("explain", *SIZES, "--tokens", "1,300")["calls"]) == 2
    assert invoke("plan", "--shapes", "v4-flash", "--tokens", "4096", "--ranks", "8")["plans"]
    assert PINGPONG in invoke("render", PINGPONG)["source"]
    assert invoke("env")["settings"]
    assert "complete" in invoke("completion", "zsh")["script"]


@pytest.mark.parametrize("view", ["resources", "ptx", "sass", "source"])
def test_inspect(invoke: Callable[..., dict], view: str):
    from megamoe_jit._diagnose.machine import TOOLS, find_tool

    if view == "sass" and not any(map(find_tool, TOOLS)):
        pytest.skip("no disassembler is installed")
    doc = invoke("inspect", PINGPONG, f"--{view}")
    assert (doc["text"] is None) == (view == "resources")
    assert (doc["tool"] is None) == (view != "sass")


def test_doctor():
    done = run("doctor", "--json")
    assert done.returncode in (0, 1, 3)
    doc = checked(done.stdout)
    names = [check["name"] for check in doc["checks"]]
    assert names == [
        *("settings", "compiler", "torch", "driver", "gpu", "cache", "read-only", "locks", "tools", "trial compile")
    ]


def test_changing_commands(tmp_path: Path):
    root = copy_warm_cache(tmp_path / "cache")
    keys = keys_of(root)

    def call(*words: str, code: int = 0) -> dict:
        done = run("cache", *words, "--cache-dir", str(root), "--json")
        assert done.returncode == code, done.stderr
        return checked(done.stdout)

    pack = str(tmp_path / "pack.tgz")
    assert {kernel["key"] for kernel in call("export", pack)["kernels"]} == set(keys.values())
    assert call("rm", keys[PINGPONG])["removed"] == [keys[PINGPONG]]
    imported = call("import", pack)
    assert (imported["imported"], imported["present"]) == ([keys[PINGPONG]], [keys[COOPERATIVE]])
    damage(root, keys[PINGPONG])
    (problem,) = call("verify", code=4)["problems"]
    assert (problem["key"], problem["fixed"]) == (keys[PINGPONG], False)
    assert call("verify", "--fix")["unfixed"] == 0
    assert call("prune", "--dry-run", "--older-than", "0s")["dry_run"] is True
    assert call("prune", "--older-than", "30d", "--yes")["removed"] == []
    assert call("clear", "--yes")["removed"] == [keys[COOPERATIVE]]


def test_imported_kernels(tmp_path: Path):
    """A pack leaves out what is known of the machine that compiled."""
    given = copy_warm_cache(tmp_path / "given")
    key, pack, place = keys_of(given)[PINGPONG], str(tmp_path / "pack.tar"), {"MEGAMOE_JIT_CACHE_DIR": str(tmp_path)}
    assert run("cache", "export", pack, "--cache-dir", str(given)).returncode == 0

    def call(*words: str) -> dict:
        done = run(*words, "--json", **place)
        assert done.returncode == 0, done.stderr
        return checked(done.stdout)

    assert len(call("cache", "import", pack)["imported"]) == 2
    assert all("path" not in entry["nvrtc"] for entry in call("cache", "ls")["entries"])
    for name in (key, PINGPONG):
        info = call("cache", "info", name)
        assert (info["entry"]["key"], info["others"]) == (key, [])
        assert not {"host", "created_at", "compile_ms"} & set(info["entry"])
        assert call("inspect", name)["resources"]["compile_ms"] is None
        assert [kernel["key"] for kernel in call("cache", "export", pack, name)["kernels"]] == [key]
    assert call("cache", "stats")["caches"][0]["entries"] == 2
    assert call("cache", "verify")["problems"] == []
    assert call("cache", "prune", "--dry-run", "--older-than", "0s")["kept_recent"] == 2
    assert call("explain", *SIZES, "--tokens", "1")["calls"][0]["cached"] is True
    for words in ((), ("--dry-run",)):
        assert call("warmup", *STAGED, *words)["cached"] == 2
    assert call("cache", "rm", PINGPONG)["removed"] == [key]


def test_demo_verify_and_bench_on_stand_ins(monkeypatch: pytest.MonkeyPatch, invoke: Callable[..., dict]):
    monkeypatch.setattr(_bench, "require_hopper", lambda: torch.device("cpu"))
    monkeypatch.setattr(_runtime, "warmup", lambda *_, **__: [])
    outcome = _verify.Outcome("L1.smoke", "pingpong", float("nan"), 0.0, True, True, "")
    monkeypatch.setattr(_verify, "run_all", lambda *_, **__: [outcome])
    assert invoke("verify", "--filter", "L1.smoke", "--variant", "pingpong")["outcomes"][0]["diff"] is None
    assert invoke("verify --list", "--filter", "L1.smoke")["scenarios"] == ["L1.smoke"]

    times, unfused = (1.0, 1.0, 1.0, 1.0, 1.0), (None, None, None)
    row = _bench.Row("s", 256, 128, 4, 1, 8, "auto", "pingpong", "fp8", *times, 0.0, 0.0, True, 1.0, 1.0, *unfused)
    conditions = {"device": "NVIDIA H200", "driver": "1", "nvrtc": "12.9", "commit": "c"}
    monkeypatch.setattr(_bench_report, "environment", lambda commit: conditions)
    monkeypatch.setattr(_clock, "anchors", lambda: {"dense_fp8_8192_tflops": 1.0, "read_4gib_tb_s": 1.0})
    monkeypatch.setattr(_bench, "measure", lambda *_, **__: [row])
    assert invoke("bench", "--shapes", "v4-flash", "--tokens", "8")["rows"][0]["tokens"] == 8
    assert json.loads((SCHEMAS / "demo.json").read_text())["properties"]["kernels"]  # its document: test_cli.py
