"""What the plug-in relies on holds in the installed transformers, and a release in which it does not is let be."""

from __future__ import annotations

import re
import warnings

import pytest

pytest.importorskip("transformers")

from megamoe_jit.transformers.fit import NAME, TESTED, WANTED, problems, relied_upon
from megamoe_jit.transformers.register import megamoe_experts_forward, register
from tests.copies import python
from tests.stubs import REPO


def test_everything_is_as_expected():
    """Fails with a sentence for each thing that moved; then read what it became, and say so in `fit`."""
    assert problems() == []
    assert len(list(relied_upon())) >= 5


def test_both_registries_know_it():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert register()
    for registry in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        assert registry.get_interface(NAME, None) is megamoe_experts_forward


def test_the_range_is_that_of_the_extra_and_holds_what_was_run():
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{WANTED}"' in text
    assert re.fullmatch(r"transformers>=5\.17,<6", WANTED)
    assert all(re.match(r"5\.(1[7-9]|[2-9]\d)\.", version) for version in TESTED)


MOVED = {
    "no registry": ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS", None, "is gone"),
    "no FP8 registry": ("transformers.integrations.finegrained_fp8", "ALL_FP8_EXPERTS_FUNCTIONS", None, "is gone"),
    "a plain table": ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS", {}, "has no register"),
    "other arguments": ("transformers.integrations.moe", "grouped_mm_experts_forward", lambda self, x: x, "takes"),
    "other options": ("transformers.integrations.moe", "use_experts_implementation", lambda cls: cls, "has no is_con"),
    "other parameters": ("transformers.integrations.finegrained_fp8", "FP8Experts", type("FP8Experts", (), {}), "FP8"),
}


@pytest.mark.parametrize("what", MOVED)
def test_a_release_that_moved_gets_one_warning_and_is_let_be(what: str, monkeypatch: pytest.MonkeyPatch):
    module, name, value, says = MOVED[what]
    monkeypatch.setattr(f"{module}.{name}", value)
    (found,) = problems()
    assert says in found
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert not register()
    (warning,) = seen
    assert "steps aside" in str(warning.message)
    assert "doctor --engine transformers" in str(warning.message)


def test_without_transformers_it_steps_aside_too():
    code = "import sys; sys.modules['transformers'] = None; import megamoe_jit.transformers as m; print(m.registered)"
    done = python(REPO, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    assert done.stderr.count("steps aside") == 1
    assert f"transformers is not installed; pip install '{WANTED}'" in done.stderr


def test_doctor_says_once_that_transformers_is_not_installed():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from megamoe_jit._diagnose.engines import probe_of; print(probe_of('transformers').wanted)"
    )
    done = python(REPO, "-c", code)
    assert (done.stdout.strip(), done.stderr) == (WANTED, "")


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    code = (
        "import sys, megamoe_jit, megamoe_jit._cli; megamoe_jit.MegaMoE\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('transformers', 'safetensors')"
        " or name.startswith(('megamoe_jit.transformers', 'megamoe_jit.checkpoints'))])"
    )
    done = python(REPO, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr
