"""What surrounds measured rows: the machine they come from, the figures to compare with, files and plots."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._version import __version__

__all__ = ["commit", "compare", "environment", "plot", "targets", "write"]

_ROOT = Path(__file__).resolve().parents[1]


def _output_of(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit of the checkout (`-dirty` where files differ from it), else the package version."""
    if not (_ROOT / ".git").exists():
        return f"v{__version__}"
    head = _output_of("git", "rev-parse", "--short=12", "HEAD", cwd=_ROOT)
    if not head:
        return f"v{__version__}"
    return f"{head}-dirty" if _output_of("git", "status", "--porcelain", cwd=_ROOT) else head


def environment() -> dict[str, Any]:
    """The conditions of a measurement on the current CUDA device."""
    import torch

    from megamoe_jit._toolchain import find_toolchain

    index = torch.cuda.current_device()
    device = torch.cuda.get_device_properties(index)
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    smi = _output_of("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={_smi_id(device)}")
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
        "commit": commit(),
        "version": __version__,
    }


def _smi_id(device: Any) -> str:
    """nvidia-smi counts all GPUs, CUDA only the visible ones; the UUID means the same to both."""
    uuid = str(getattr(device, "uuid", "") or "")
    return f"GPU-{uuid}" if uuid and not uuid.startswith("GPU-") else uuid or "0"


def targets(path: Path | None = None) -> list[dict[str, Any]]:
    """The rows of `benchmarks/targets.json`; none outside a checkout."""
    path = path or _ROOT / "benchmarks" / "targets.json"
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        return []
    return rows


def compare(row: Mapping[str, Any], device: str, known: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The figures to hold a row against on this device, and the row's time as a multiple of each."""
    keys = ("shape", "hidden", "intermediate", "topk")
    match = next(
        (
            t
            for t in known
            if all(t[k] == row[k] for k in keys)
            and (t["experts_per_gpu"], t["tokens_per_gpu"]) == (row["experts"], row["tokens"])
        ),
        {},
    )
    if "H200" in device:
        best, limit = match.get("best_known_us"), match.get("limit_us")
    elif "H100" in device:
        best, limit = match.get("best_known_h100_us"), None
    else:
        best, limit = None, None
    time = row["median_us"]
    return {
        "best_known_us": best,
        "vs_best_known": time / best if best else None,
        "limit_us": limit,
        "vs_limit": time / limit if limit else None,
    }


def write(doc: Mapping[str, Any], path: Path) -> None:
    """Write JSON, or by the name's ending the rows as CSV with the conditions in every line."""
    if path.suffix == ".json":
        path.write_text(json.dumps(doc, indent=2) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        flat = [{**row, **doc["environment"]} for row in doc["rows"]]
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, fieldnames=list(flat[0]) if flat else [])
            out.writeheader()
            out.writerows(flat)
    else:
        raise ConfigError(f"cannot write {path.name!r}; allowed: a name that ends in .json or .csv")


def plot(doc: Mapping[str, Any], path: Path) -> None:
    """Time over tokens, one panel per shape, beside the best known time and the limit; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in doc["rows"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.5 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        rows = [row for row in doc["rows"] if row["shape"] == shape]
        for variant in dict.fromkeys(row["variant"] for row in rows):
            mine = [row for row in rows if row["variant"] == variant]
            axis.plot([r["tokens"] for r in mine], [r["median_us"] for r in mine], marker="o", label=variant)
        for key, style in (("best_known_us", "k--"), ("limit_us", "k:")):
            mine = list({r["tokens"]: r for r in rows if r[key]}.values())
            axis.plot([r["tokens"] for r in mine], [r[key] for r in mine], style, label=key.removesuffix("_us"))
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="us", title=shape)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    env = doc["environment"]
    figure.suptitle(f"{env['device']}, driver {env['driver']}, NVRTC {env['nvrtc']}, {env['commit']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
