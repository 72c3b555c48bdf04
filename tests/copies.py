"""Programs of a copy of the checkout, forked from a process that has torch and what else takes long to import.

A fork keeps nothing of the checkout itself, so what it imports is the copy's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.zygote import REPO, answer, take_over, zygote

_MODULES = ("torch", "numpy", "pydantic", "jsonschema", "jinja2", "click", "pytest")
_OURS = ("tests", "megamoe_jit", "benchmarks", "heuristics")


def python(root: Path, *arguments: str, environ: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does in a copy; these begin with `-m` or `-c`."""
    variables = {**environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with contextlib.chdir(root):
        code, out, err = zygote("tests.copies:serve").run(list(arguments), variables, timeout=600)
    return subprocess.CompletedProcess([sys.executable, *arguments], code, out, err)


def serve() -> None:
    """Fork for each request."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _MODULES:
        importlib.import_module(name)
    answer(channel, _become)


def _become(request: Mapping[str, Any], streams: list[int]) -> None:
    take_over(request, streams)
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    sys.path[:] = [request["environ"]["PYTHONPATH"], *(path for path in sys.path[1:] if path != str(REPO))]
    option, what, *arguments = request["arguments"]
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert option == "-c"
        exec(what, {"__name__": "__main__"})
