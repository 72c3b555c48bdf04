"""Where the releases are: a folder that `python -m tests.engines.fetch` filled, named by an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "ENGINE_RELEASES"


def releases() -> Path:
    """The folder of releases; without one these tests are an error, never a skip."""
    named = os.environ.get(VARIABLE)
    if not named or not Path(named).is_dir():
        raise pytest.UsageError(
            f"{VARIABLE} = {named!r} is no folder of engines' releases; next: make test-engines, which fetches them"
        )
    return Path(named)


def pytest_configure(config: pytest.Config) -> None:
    releases()


@pytest.fixture(scope="session")
def folder() -> Path:
    return releases()
