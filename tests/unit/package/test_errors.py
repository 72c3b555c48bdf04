"""The exception tree: documented, exported, and able to cross process boundaries."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

import megamoe_jit
from megamoe_jit import _errors
from megamoe_jit._errors import ConfigError, MegaMoeError

ERRORS = sorted((e for _, e in inspect.getmembers(_errors, inspect.isclass)), key=lambda e: e.__name__)


def test_every_error_is_exported_and_drawn_in_the_tree():
    names = {error.__name__ for error in ERRORS}
    assert names == set(_errors.__all__)
    assert names <= set(megamoe_jit.__all__)
    assert names == set(re.findall(r"\b(\w+Error)\b", _errors.__doc__)) - {"ValueError"}
    for error in ERRORS:
        assert issubclass(error, MegaMoeError)
        assert inspect.getdoc(error).endswith(".")
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_pickles(error, protocol):
    original = error("what went wrong, 7 of 9")
    for again in (pickle.loads(pickle.dumps(original, protocol)), copy.deepcopy(original)):
        assert type(again) is error
        assert (str(again), again.args) == (str(original), original.args)
