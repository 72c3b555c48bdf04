"""Whether a plug-in would take in an engine that is installed here, and what to type: one probe for each engine.

A probe starts no engine. What it asks of the installed package is what the plug-in itself relies on, so both say the
same; a plug-in is imported only when it is asked about.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megamoe_jit._diagnose.finding import Check, Status
from megamoe_jit._diagnose.machine import installed

#: Of each engine: its package, as pip knows it; the module that has the releases `WANTED` and `TESTED`, and asks for
#: what is `relied_upon`; what to type so that the engine takes the plug-in, a line each.
_PLUGINS = {
    "flashinfer": (
        "flashinfer-python",
        "megamoe_jit.engines.flashinfer.seams",
        (
            "from megamoe_jit.engines.flashinfer import MegaMoeConfig, register; register()",
            "MoEEpLayer(..., backend=MegaConfig(megakernel=MegaMoeConfig(intermediate_size, top_k)))",
        ),
    ),
    "sglang": (
        "sglang",
        "megamoe_jit.engines.sglang.seams",
        (
            "sglang serve --model-path MODEL --tp N --ep N --moe-a2a-backend megamoe",
            "sglang serve --model-path MODEL --tp N --moe-runner-backend megamoe_jit",
        ),
    ),
    "transformers": (
        "transformers",
        "megamoe_jit.transformers.fit",
        (
            "import megamoe_jit.transformers",
            'AutoModelForCausalLM.from_pretrained(..., experts_implementation="megamoe")',
        ),
    ),
    "vllm": (
        "vllm",
        "megamoe_jit.engines.vllm.seams",
        (
            "vllm serve MODEL --quantization megamoe_jit",
            "vllm serve MODEL --quantization megamoe_jit --data-parallel-size N --enable-expert-parallel",
        ),
    ),
}
ENGINES = tuple(_PLUGINS)  #: what `doctor --engine` takes
PAGE = "docs/models.md"  #: what says more, in the documentation


@dataclass(frozen=True)
class EngineProbe:
    """What can be told of an engine without starting it.

    Attributes:
        name: of the engine, for `--engine`.
        distribution: its package, as pip knows it.
        wanted: the releases that the plug-in is written for, as pip writes it; those of the extra.
        tested: the releases it was run with.
        hooks: asks the installed package for each thing that the plug-in relies on: what the engine calls it, and how
            it differs from what the plug-in was written for, empty if it does not. Called where it is installed.
        typed: what to type so that the engine takes the plug-in, a line each.
    """

    name: str
    distribution: str
    wanted: str
    tested: tuple[str, ...]
    hooks: Callable[[], Iterable[tuple[str, str]]]
    typed: tuple[str, ...]


def probe_of(name: str) -> EngineProbe:
    """The probe of an engine of `ENGINES`."""
    distribution, module, typed = _PLUGINS[name]
    with warnings.catch_warnings():  # a plug-in that steps aside says what the probe's findings are to say
        warnings.filterwarnings("ignore", message=".* steps aside: ")
        facts = importlib.import_module(module)
    return EngineProbe(name, distribution, facts.WANTED, facts.TESTED, facts.relied_upon, typed)


def examine_engine(probe: EngineProbe) -> Iterator[Check]:
    """Look at an engine: its version, what the plug-in relies on, and what to type."""
    version = installed(probe.distribution)
    tested = f"tested: {', '.join(probe.tested)}"
    data = {"engine": probe.name, "version": version, "tested": list(probe.tested), "wanted": probe.wanted}
    if version is None:
        yield Check(probe.name, Status.FAIL, f"not installed; {tested}", f"pip install '{probe.wanted}'", data)
        return
    if version in probe.tested:
        yield Check(probe.name, Status.OK, version, None, data)
    else:
        detail = f"{version}, with which the plug-in was never run; {tested}"
        yield Check(probe.name, Status.WARN, detail, "it works if the hooks are as expected", data)
    yield _check_hooks(probe)
    typed = "\n".join(probe.typed)
    yield Check("to type", Status.OK, typed, None, {"lines": list(probe.typed), "page": PAGE})


def _check_hooks(probe: EngineProbe) -> Check:
    try:
        hooks = list(probe.hooks())
    except Exception as error:  # an engine that cannot be imported is a finding
        detail = f"{probe.name} cannot be imported: {type(error).__name__}: {error}"
        return Check("hooks", Status.FAIL, detail, f"mend that installation; {PAGE}", {})
    broken = [f"{name}: {problem}" for name, problem in hooks if problem]
    data = {"hooks": [{"name": name, "problem": problem} for name, problem in hooks]}
    if broken:
        detail = "\n".join(broken)
        step = f"the plug-in steps aside here; pip install '{probe.wanted}'"
        return Check("hooks", Status.FAIL, detail, step, data)
    return Check("hooks", Status.OK, f"all {len(hooks)} as expected", None, data)
