"""What is built is what a user needs: the wheel, the wheel from the sdist, and an installation of it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from megamoe_jit._version import __version__

pytest.importorskip("build")
pytest.importorskip("hatchling")

ROOT = Path(__file__).resolve().parents[3]
CARRIED = {"kernels_src": "megamoe_jit/kernels_src", "heuristics": "megamoe_jit/heuristics"}


def build(out: Path, *options: str) -> Path:
    """Build without isolation, so that nothing is fetched; the wheel."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=240,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


def payload(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_real_files_and_one_package(wheel: Path):
    assert wheel.name == f"megamoe_jit-{__version__}-py3-none-any.whl"
    files = payload(wheel)
    assert {name.split("/")[0] for name in files} == {"megamoe_jit", f"megamoe_jit-{__version__}.dist-info"}
    with zipfile.ZipFile(wheel) as archive:
        assert not [i.filename for i in archive.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
    for folder, inside in CARRIED.items():
        sources = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert sources
        for source in sources:
            assert files[f"{inside}/{source.relative_to(ROOT / folder).as_posix()}"] == source.read_bytes()
    assert "megamoe_jit/py.typed" in files
    for schema in (ROOT / "megamoe_jit" / "_cli" / "schemas").glob("*.json"):
        assert files[f"megamoe_jit/_cli/schemas/{schema.name}"] == schema.read_bytes()
    assert not [name for name in files if name.endswith(".pyc")]
    for module in (ROOT / "megamoe_jit").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in files


def test_wheel_metadata(wheel: Path):
    files = payload(wheel)
    folder = f"megamoe_jit-{__version__}.dist-info"
    metadata = files[f"{folder}/METADATA"].decode()
    head = metadata.split("\n\n", 1)[0].splitlines()
    assert "Requires-Python: >=3.11" in head
    assert {
        f"Provides-Extra: {extra}" for extra in ("cu12", "cu13", "bench", "checkpoints", "transformers", "dev")
    } <= set(head)
    required = {line.split()[1].split(">")[0].split("<")[0] for line in head if line.startswith("Requires-Dist:")}
    base = {"cuda-python", "torch", "jinja2", "platformdirs", "click", "rich"}
    assert base <= required
    assert b"megamoe-jit = megamoe_jit._cli:main" in files[f"{folder}/entry_points.txt"]
    assert files[f"{folder}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_wheel_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path):
    def without_record(path: Path) -> dict[str, bytes]:
        return {name: data for name, data in payload(path).items() if not name.endswith("/RECORD")}

    assert without_record(build(tmp_path)) == without_record(wheel)


INSTALLED = """
import json, sys
from pathlib import Path
import megamoe_jit, megamoe_jit._cli
from megamoe_jit import KernelSpec, MoEShape, Variant
from megamoe_jit._compile.render import render
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit.heuristics.presets import preset

spec = KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG)
kernel = get_kernel(spec)
modules = ("megamoe_jit", "megamoe_jit._cli", "megamoe_jit.heuristics")
print(json.dumps({
    "carried": [sys.modules[name].__file__ for name in modules],
    "links": [str(p) for p in Path(megamoe_jit.__file__).parent.rglob("*") if p.is_symlink()],
    "source": len(render(spec).text),
    "entry": spec.kernel_name in render(spec).text,
    "origin": kernel.origin,
    "cubin": kernel.cubin[:4].hex(),
    "registers": kernel.meta["registers"],
    "hidden": preset("v4-flash").shape.hidden,
}))
"""


def test_wheel(wheel: Path, tmp_path: Path):
    """Installed outside the checkout, from another directory: imports, renders and compiles a kernel.

    The new environment sees torch and the other dependencies of the running one through a .pth file, behind
    its own packages; nothing is downloaded.
    """
    home = tmp_path / "environment"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(home)
    python = home / "bin" / "python"
    site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=240)
    shared = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ["MEGAMOE_JIT_CACHE_DIR"] = str(tmp_path / "cache")

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=elsewhere, env=environ, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    seen = json.loads(run(str(python), "-I", "-c", INSTALLED))
    for path in seen["carried"]:
        assert Path(path).is_relative_to(site / "megamoe_jit"), f"{path} is not the installed wheel"
    assert seen["links"] == []
    assert (seen["origin"], seen["cubin"], seen["hidden"]) == ("compiled", b"\x7fELF".hex(), 4096)
    assert seen["entry"]
    assert seen["source"] > 10_000
    assert seen["registers"] > 0

    script = str(home / "bin" / "megamoe-jit")
    assert run(script, "--version").strip() == f"megamoe-jit, version {__version__}"
    sizes = ("--hidden", "256", "--intermediate", "128", "--experts", "4", "--topk", "1")
    again = json.loads(run(script, "warmup", *sizes, "--variant", "pingpong", "--json"))
    assert again["cached"] == 1, "the script must find the kernel that the library compiled"
