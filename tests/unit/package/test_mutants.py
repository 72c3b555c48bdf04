"""The mutants of `make mutants` can be made: noticed at once when a text or a test that one names is gone."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, REPO, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_is_there_once_and_its_test_exists(mutant: Mutant):
    text = (REPO / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    if mutant.file.endswith(".py"):
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    file, _, name = mutant.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (REPO / "tests" / "unit" / file).read_text(encoding="utf-8")
