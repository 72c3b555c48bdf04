"""Paths that are none, and files that one may not read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe_jit as mm
from megamoe_jit.checkpoints import convert, inspect, load_experts
from tests.checkpoints import Model
from tests.stubs import REPO

HUMBLE = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []  #: root reads everything


@pytest.mark.parametrize("path", [None, 3, b"model", "a\0b", ""])
def test_what_is_no_path(tmp_path: Path, path: object):
    with pytest.raises(mm.ConfigError, match=r"path = .*; allowed: a path"):
        inspect(path)  # type: ignore[arg-type]
    with pytest.raises(mm.ConfigError, match=r"target = .*; allowed: a path"):
        convert(Model(layers=(1,)).write(tmp_path), path, "fp8")  # type: ignore[arg-type]


def test_a_path_that_the_library_does_not_open(tmp_path: Path):
    folder = Model(layers=(1,)).write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    with pytest.raises(mm.CheckpointError, match="cannot be read: .*; name a path in UTF-8, which a link"):
        load_experts(folder, 1, device="cpu")
    (tmp_path / "link").symlink_to(folder)
    load_experts(tmp_path / "link", 1, device="cpu")


@pytest.mark.parametrize("target", ["loop", "loop/made"])
def test_a_target_that_is_a_circle_of_links(tmp_path: Path, target: str):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        convert(Model(layers=(1,)).write(tmp_path / "source"), tmp_path / target, "fp8")


@pytest.mark.skipif(bool(HUMBLE) and not shutil.which("setpriv"), reason="root, and no setpriv")
def test_what_one_may_not_read(tmp_path: Path):
    closed, shard = tmp_path / "closed", tmp_path / "shard"
    for folder in (closed, shard):
        Model(layers=(1,)).write(folder)
    (shard / "model-00001-of-00003.safetensors").chmod(0)
    closed.chmod(0o644)
    code = (
        "import sys, megamoe_jit as mm\n"
        "from megamoe_jit.checkpoints import load_experts\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_experts(path, 1, device='cpu')\n"
        "    except mm.CheckpointError as error: print(error)\n"
    )
    command = [*HUMBLE, sys.executable, "-c", code, str(closed), str(shard)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    closed.chmod(0o755)
    folder, file = said.splitlines()
    assert "model.safetensors.index.json' cannot be read: Permission denied" in folder
    assert file.startswith("'model-00001-of-00003.safetensors' cannot be read: Permission denied")
