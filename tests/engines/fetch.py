"""Releases of engines as sources: `python -m tests.engines.fetch FOLDER` keeps the Python files of their wheels."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megamoe_jit._nodes import deep_ep, nccl_ep
from megamoe_jit.engines.flashinfer import seams as flashinfer
from megamoe_jit.engines.sglang import seams as sglang
from megamoe_jit.engines.vllm import seams as vllm

RELEASES = {
    "flashinfer-python": flashinfer.TESTED,
    "nccl-extensions": nccl_ep.TESTED,
    "sgl-deep-ep": deep_ep.TESTED,
    "sglang": sglang.TESTED,
    "vllm": vllm.TESTED,
}


def fetch(distribution: str, version: str, folder: Path) -> None:
    """Put the sources of a release into `FOLDER/DISTRIBUTION-VERSION`, unless they are there."""
    place = folder / f"{distribution}-{version}"
    if place.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        # The sources are the same in the wheels of all interpreters.
        anywhere = ["--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_34_x86_64"]
        anywhere += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_31_x86_64", "--platform", "any"]
        subprocess.run([*pip, *anywhere, "--dest", scratch, f"{distribution}=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        sources = Path(scratch) / "sources"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(sources, [name for name in archive.namelist() if name.endswith(".py")])
        sources.rename(place)


def main() -> None:
    """Fetch all releases that the plug-ins were run with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=sorted(RELEASES), help="this engine alone")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for distribution, versions in RELEASES.items():
        for version in versions if given.only in (None, distribution) else ():
            sys.stderr.write(f"{distribution} {version}\n")
            fetch(distribution, version, given.folder)


if __name__ == "__main__":
    main()
