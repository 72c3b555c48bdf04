"""What surrounds measured rows: the machine they come from, and files."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._version import __version__


def output_of(*command: str) -> str | None:
    """What a program prints; None if it cannot be run, fails, or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment(commit: str | None = None) -> dict[str, Any]:
    """The conditions of a measurement on the current CUDA device.

    Args:
        commit: of the sources that are measured, where somebody knows it; else the version stands for it.
    """
    import torch

    from megamoe_jit._compile.toolchain import find_toolchain

    index = torch.cuda.current_device()
    device = torch.cuda.get_device_properties(index)
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    smi = output_of("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={_smi_id(device)}")
    driver, watts, clock = (part.strip() for part in smi.split(",")) if smi else (None, None, None)
    return {
        "device": device.name,
        "sms": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "power_limit_w": watts,
        "max_sm_clock_mhz": clock,
        "driver": driver,
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(str(n) for n in find_toolchain().version),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or f"v{__version__}",
        "version": __version__,
    }


def _smi_id(device: Any) -> str:
    """nvidia-smi counts all GPUs, CUDA only the visible ones; the UUID means the same to both."""
    uuid = str(getattr(device, "uuid", "") or "")
    return f"GPU-{uuid}" if uuid and not uuid.startswith("GPU-") else uuid or "0"


def write(doc: Mapping[str, Any], path: Path) -> None:
    """Write JSON, or by the name's ending the rows as CSV with the conditions in every line."""
    if path.suffix == ".json":
        finite = json.loads(json.dumps(doc), parse_constant=lambda _: None)  # JSON has no NaN
        path.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        flat = [{**row, **doc["environment"]} for row in doc["rows"] or doc.get("nodes") or ()]
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, fieldnames=list(flat[0]) if flat else [])
            out.writeheader()
            out.writerows(flat)
    else:
        raise ConfigError(f"cannot write {path.name!r}; allowed: a name that ends in .json or .csv")
