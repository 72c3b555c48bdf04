"""The deadline of a wait in the kernel, built here with a clock and a condition that follow a script."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import host

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#define MEGA_DEVICE static
using u32 = unsigned; using u64 = unsigned long long;
struct Params { u64 timeout_ns; };
static char** step;  // a number: what the clock says; y, n: whether what is waited for has come
namespace ptx { static u64 nanoseconds() { return std::strtoull(*step++, nullptr, 10); } }
%(wait)s
static void give_up(const Params&, Wait what, u32 which, u32 expected, u32 seen) {
    const char* rest = *step ? *step : "none";
    std::printf("gave up %%u %%u %%u %%u, rest %%s", static_cast<u32>(what), which, expected, seen, rest);
    std::exit(0);
}
%(patience)s
%(wait_until)s
int main(int, char** arguments) {
    step = arguments + 1;
    const Params p{100};
    wait_until(p, Wait::%(which)s, 7, 8, [&] { return **step++ == 'y'; }, [&] { return 9u; });
    std::printf("came, rest %%s", *step ? *step : "none");
}
"""


def cut(text: str, begin: str) -> str:
    """A definition at the left margin, from its first line to its closing brace."""
    found = re.search(rf"^(?:template <[^\n]*\n)?[^\n]*\b{begin}\b.*?^}};?$", text, re.MULTILINE | re.DOTALL)
    assert found, begin
    return found[0]


@pytest.fixture(scope="module")
def wait(tmp_path_factory: pytest.TempPathFactory):
    """Runs a wait whose clock and condition follow the words; the patience of ``which`` is one deadline or three."""
    text, folder = host.room("comm/fault.cuh"), tmp_path_factory.mktemp("deadline")
    parts = {
        "wait": cut(text, "enum class Wait"),
        "patience": cut(text, "u32 patience"),
        "wait_until": cut(text, "void wait_until"),
    }
    programs: dict[str, Path] = {}
    for which in ("rows_dispatched", "gemm1_done"):
        source = folder / f"{which}.cpp"
        source.write_text(PROGRAM % {**parts, "which": which})
        programs[which] = host.build(source, folder / which)

    def run(which: str, script: str) -> str:
        return subprocess.run(
            [programs[which], *script.split()], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    return run


def test_what_has_come_is_not_waited_for(wait):
    assert wait("rows_dispatched", "y") == "came, rest none"


def test_what_comes_in_time(wait):
    assert wait("rows_dispatched", "n 1000 1050 n 1100 n 1100 y") == "came, rest none"


def test_who_is_late_looks_once_more_before_giving_up(wait):
    """It may have been the one that was stopped, by a debugger or another process, and not whom it waits for."""
    assert wait("rows_dispatched", "n 1000 1050 n 999999 y") == "came, rest none"
    assert wait("rows_dispatched", "n 1000 1050 n 1101 n") == "gave up 6 7 8 9, rest none"


def test_patience_is_a_multiple_of_the_deadline(wait):
    assert wait("gemm1_done", "n 1000 1101 n 1300 n 1301 n") == "gave up 7 7 8 9, rest none"
