"""What `make test` gives to one worker."""

import pytest

pytest.importorskip("xdist")

from tests.scheduling import unit_of


def test_a_file_is_a_unit_and_so_is_a_kernel():
    kernel = "[v4-flash-whole-decode]"
    assert unit_of("tests/unit/cli/test_cli.py::test_verbs") == "tests/unit/cli/test_cli.py"
    assert unit_of("tests/unit/cli/test_cli.py::test_listings[a::b]") == "tests/unit/cli/test_cli.py"
    assert unit_of(f"tests/compile/test_presets.py::test_compiles_without_loss{kernel}") == kernel
    assert unit_of(f"tests/compile/test_hazards.py::test_no_kernel_reads_a_register_too_early{kernel}") == kernel
    assert unit_of("tests/compile/test_presets.py::test_the_list_is_complete") == "tests/compile/test_presets.py"
