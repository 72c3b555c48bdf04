"""`megamoe-jit env`: versions, compilers, GPUs and settings, for a bug report or a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._io import ExitCode, emit, end, facts, json_option, say, show

if TYPE_CHECKING:
    from megamoe_jit._diagnose.machine import Environment


def _shown(value: object) -> str:
    if value is None or value == []:
        return "-"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if text.isprintable() else repr(text)


def _sections(doc: Environment) -> list[tuple[str, list[tuple[str, ...]]]]:
    chosen = doc.nvrtc.chosen
    nvrtc = [("chosen", f"{chosen.version}  {chosen.path}" if chosen else str(doc.nvrtc.problem))]
    nvrtc += [("found", f"{c.version or c.major}  {c.path}  ({c.origin})") for c in doc.nvrtc.candidates]
    driver = [("CUDA", doc.driver.driver_cuda or f"none: {doc.driver.problem}")]
    driver += [
        (f"GPU {g.index}", f"{g.name}, SM {g.compute_capability}{'' if g.supported else ' (not supported)'}")
        for g in doc.driver.gpus
    ]
    return [
        ("megamoe-jit", [("version", doc.version), ("python", doc.python), ("platform", doc.platform)]),
        ("packages", [(name, version or "-") for name, version in doc.packages.items()]),
        ("NVRTC", list(nvrtc)),
        ("driver", list(driver)),
        ("settings", [(s.name, _shown(s.value), f"({s.source})", s.problem or "") for s in doc.settings]),
    ]


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, compilers, GPUs, and every setting with its value and source.

    Exit code 2 if a setting is not allowed: it is shown with what is wrong, and counts as unset for the rest.
    """
    from megamoe_jit._diagnose.machine import examine_environment
    from megamoe_jit._settings.settings import lenient

    with lenient() as faults:
        doc = examine_environment(faults)
    if as_json:
        emit(doc)
    else:
        for title, rows in _sections(doc):
            show(title)
            for line in facts(rows).splitlines():
                show(f"  {line}")
    for fault in faults:
        say(f"Error: {fault.message}")
    end(ExitCode.USAGE if faults else ExitCode.OK)
