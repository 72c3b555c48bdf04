"""`megamoe-jit env`: versions, compilers, GPUs and settings, for a bug report or a glance."""

from __future__ import annotations

import os
import platform
from typing import Any

import click

from megamoe_jit._cli._io import document, emit_json, json_option, table

__all__ = ["env"]

_PACKAGES = (
    "torch",
    "cuda-python",
    "cuda-bindings",
    "cuda-pathfinder",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-nvrtc",
    "jinja2",
    "platformdirs",
    "filelock",
    "click",
    "rich",
)


def _packages() -> dict[str, str | None]:
    """Installed versions, without importing anything."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _compilers() -> dict[str, Any]:
    from megamoe_jit._errors import ToolchainError
    from megamoe_jit._toolchain import candidates, find_toolchain

    found = [
        {
            "path": str(c.path),
            "version": ".".join(map(str, c.version)) if c.version else None,
            "major": c.major,
            "origin": c.origin,
        }
        for c in candidates()
    ]
    try:
        chosen = find_toolchain()
    except ToolchainError as error:
        return {"chosen": None, "problem": str(error), "candidates": found}
    return {
        "chosen": {
            "path": str(chosen.path),
            "version": ".".join(map(str, chosen.version)),
            "build": chosen.build,
        },
        "problem": None,
        "candidates": found,
    }


def _ask(result: tuple[Any, ...]) -> Any:
    """The value of a driver call; raises `RuntimeError` with the name of its error."""
    if int(result[0]) != 0:
        raise RuntimeError(result[0].name)
    return result[1] if len(result) > 1 else None


def _gpus() -> dict[str, Any]:
    """What the driver says, asked through cuda-bindings: torch need not be there."""
    try:
        from cuda.bindings import driver

        _ask(driver.cuInit(0))
        version = _ask(driver.cuDriverGetVersion())
        attribute = driver.CUdevice_attribute
        gpus = []
        for index in range(_ask(driver.cuDeviceGetCount())):
            device = _ask(driver.cuDeviceGet(index))
            major, minor, sms = (
                int(_ask(driver.cuDeviceGetAttribute(which, device)))
                for which in (
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                    attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                )
            )
            name = _ask(driver.cuDeviceGetName(96, device)).split(b"\0")[0].decode()
            gpus.append(
                {
                    "index": index,
                    "name": name,
                    "compute_capability": f"{major}.{minor}",
                    "sms": sms,
                    "memory_bytes": int(_ask(driver.cuDeviceTotalMem(device))),
                    "supported": (major, minor) == (9, 0),
                }
            )
    except (ImportError, RuntimeError) as error:
        return {"driver_cuda": None, "problem": str(error).splitlines()[0], "gpus": []}
    return {"driver_cuda": f"{version // 1000}.{version % 1000 // 10}", "problem": None, "gpus": gpus}


def _settings() -> list[dict[str, Any]]:
    from megamoe_jit._settings import VARIABLES, get_settings

    values = get_settings()
    return [
        {
            "name": variable.name,
            "value": getattr(values, variable.field),
            "set": bool(os.environ.get(variable.name)),
            "default": variable.default,
        }
        for variable in VARIABLES
    ]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sections(doc: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    compilers, machine = doc["nvrtc"], doc["driver"]
    chosen = compilers["chosen"]
    nvrtc = [("chosen", f"{chosen['version']}  {chosen['path']}" if chosen else compilers["problem"])]
    nvrtc += [("found", f"{c['version'] or c['major']}  {c['path']}  ({c['origin']})") for c in compilers["candidates"]]
    driver = [("CUDA", machine["driver_cuda"] or f"none: {machine['problem']}")]
    driver += [
        (
            f"GPU {g['index']}",
            f"{g['name']}, SM {g['compute_capability']}{'' if g['supported'] else ' (not supported)'}",
        )
        for g in machine["gpus"]
    ]
    return [
        (
            "megamoe-jit",
            [("version", doc["version"]), ("python", doc["python"]), ("platform", doc["platform"])],
        ),
        ("packages", [(name, version or "-") for name, version in doc["packages"].items()]),
        ("NVRTC", nvrtc),
        ("driver", driver),
        (
            "settings",
            [
                (s["name"], _shown(s["value"]) + ("  (from the environment)" if s["set"] else ""))
                for s in doc["settings"]
            ],
        ),
    ]


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, compilers, GPUs and settings."""
    from megamoe_jit._version import __version__

    doc = document(
        "env",
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=_packages(),
        nvrtc=_compilers(),
        driver=_gpus(),
        settings=_settings(),
    )
    if as_json:
        emit_json(doc)
        return
    for title, rows in _sections(doc):
        click.echo(title)
        for line in table(("", ""), rows, left=(0, 1)).splitlines()[1:]:
            click.echo(f"  {line}")
