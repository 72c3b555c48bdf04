"""Plug-ins in the sources of engines, with the real kernels: `python -m tests.engines.on_gpus --ranks 2` on Hoppers.

`ENGINE_RELEASES` names a folder that `python -m tests.engines.fetch` filled.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.engines.checks_gpu import CHECKS
from tests.multi.harness import run_checks


def main() -> int:
    """Run all checks on so many GPUs, one rank each; 1 if one of them fails on any rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--only", action="append", help="checks with this in their name, or with another of these")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until all ranks are ended")
    given = parser.parse_args()
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 1 <= given.ranks <= there:
        parser.exit(3, f"--ranks {given.ranks} with {there} GPUs here; allowed: at most one rank for each\n")
    names = [name for name in CHECKS if any(part in name for part in given.only or [""])]
    found = run_checks("tests.engines.checks_gpu", names, given.ranks, timeout_s=given.timeout)
    for name in names:
        sys.stdout.write(f"{name:32} {found[name] or 'right'}\n")
    failed = sum(map(bool, found.values()))
    sys.stdout.write(f"{len(names) - failed} of {len(names)} right on each of {given.ranks} ranks\n")
    return int(failed > 0 or not names)


if __name__ == "__main__":
    raise SystemExit(main())
