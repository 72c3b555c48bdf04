"""Where the releases are: a folder that `python -m tests.engines.fetch` filled, named by an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engines.standins import Buffer, kernels_by_reference

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that ask for a release in each of those that their module names, with the distribution's name."""
    if "release" in metafunc.fixturenames:
        distribution, versions = metafunc.module.RELEASES
        names = [f"{distribution}-{version}" for version in versions]
        metafunc.parametrize("release", names, indirect=True, ids=versions, scope="module")


@pytest.fixture(scope="module")
def release(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / request.param


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[Buffer]:
    return kernels_by_reference(monkeypatch)
