"""`megamoe-jit cache` with a kernel's name: what a call would load is found, whoever compiled it, with no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cache.entry import CUBIN, IMPORTED, read_entry
from megamoe_jit._cli import cli
from megamoe_jit._cli._names import parse_spec
from megamoe_jit._compile.render import render
from megamoe_jit._compile.toolchain import options_for
from megamoe_jit._errors import ToolchainError
from megamoe_jit._jit import lookup as _lookup
from megamoe_jit._jit.pack import read_pack
from megamoe_jit._settings.settings import override
from tests.commandline import COOPERATIVE, PINGPONG, checked, damage, keys_of, run, warm_cache
from tests.stubs import fake_kernel

OLDER = "// an older source\n"


def kernel_as(version: str, remark: str = "") -> tuple[str, str, dict[str, Any]]:
    """Key, source and metadata of the kernel as another NVRTC builds it, maybe from a source that is not ours."""
    spec = parse_spec(PINGPONG)
    key, _, source, meta = fake_kernel(
        spec.kernel_name, render(spec).text + remark, version=version, options=options_for(None)
    )
    return key, source, meta


ELSEWHERE = kernel_as("11.8")[0]  #: key of the kernel that another compiler built
OLD = kernel_as("11.8", OLDER)[0]  #: key of a kernel of the same name from another source


def cache(root: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["cache", *words, "--cache-dir", str(root)])


def copy_as(root: Path, source: Path, *, imported: bool, version: str = "11.8", remark: str = "") -> None:
    """Put a kernel into a cache as if another NVRTC had built it."""
    (about,) = [each for each in KernelCache(source).entries() if each.entry == PINGPONG]
    files, old = read_entry(about.key, about.path, with_source=True)
    key, text, meta = kernel_as(version, remark)
    target = KernelCache(root)
    assert target.store(key, files[CUBIN], text, {**old, **meta})
    if imported:
        (target.entry_path(key) / IMPORTED).write_text("pack.tar\n")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return warm_cache(tmp_path_factory.mktemp("warm") / "cache")


@pytest.fixture
def imported(tmp_path: Path, warm: Path) -> Path:
    """A cache with nothing but an imported kernel of another compiler."""
    copy_as(tmp_path / "imported", warm, imported=True)
    return tmp_path / "imported"


@pytest.fixture
def both(tmp_path: Path, warm: Path) -> Path:
    """A cache with the kernels of the compiler that is here, and an imported one of another."""
    root = tmp_path / "both"
    shutil.copytree(warm, root)
    copy_as(root, warm, imported=True)
    return root


@pytest.fixture(params=["another compiler", "no compiler"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the one that is here, which did not build what was imported, or none."""

    def nothing() -> None:
        raise ToolchainError("there is no NVRTC")

    if request.param == "no compiler":
        monkeypatch.setattr(_lookup, "find_toolchain", nothing)


def fields(result: Result) -> dict[str, str]:
    return dict(line.split(None, 1) for line in result.stdout.splitlines())


@pytest.mark.usefixtures("compiler")
def test_an_imported_kernel_is_found_by_its_name(imported: Path, tmp_path: Path):
    shown = cache(imported, "info", PINGPONG)
    assert (shown.exit_code, fields(shown)["key"], shown.stderr) == (0, ELSEWHERE, "")
    exported = cache(imported, "export", str(tmp_path / "k.tar"), PINGPONG)
    assert exported.exit_code == 0, exported.output
    assert read_pack(tmp_path / "k.tar").keys == (ELSEWHERE,)
    removed = cache(imported, "rm", PINGPONG)
    assert (removed.exit_code, removed.stdout) == (0, f"{ELSEWHERE}\n")


@pytest.mark.usefixtures("compiler")
def test_a_kernel_of_a_read_only_cache_is_found_by_its_name(imported: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    with override(readonly_cache=(imported,)):
        assert fields(cache(empty, "info", PINGPONG))["path"].startswith(str(imported))
        assert cache(empty, "export", str(tmp_path / "k.tar"), PINGPONG).exit_code == 0
        refused = cache(empty, "rm", PINGPONG)
    assert (refused.exit_code, f"is in the read-only cache {imported}" in refused.stderr) == (2, True)


def test_of_several_the_one_that_calls_load(both: Path, tmp_path: Path):
    here = keys_of_both(both)
    shown = cache(both, "info", PINGPONG)
    assert fields(shown)["key"] == here
    assert shown.stderr == f"calls try this one first; also cached: {ELSEWHERE[:12]} (NVRTC 11.8)\n"
    doc = checked(cache(both, "info", PINGPONG, "--json").stdout)
    assert (doc["entry"]["key"], doc["others"]) == (here, [ELSEWHERE])
    assert checked(cache(both, "info", here, "--json").stdout)["others"] == []
    assert cache(both, "export", str(tmp_path / "k.tar"), PINGPONG).exit_code == 0
    assert read_pack(tmp_path / "k.tar").keys == (here,)

    damage(both, here)
    passed = cache(both, "info", PINGPONG)
    assert fields(passed)["key"] == ELSEWHERE
    assert cache(both, "export", str(tmp_path / "k.tar"), PINGPONG).exit_code == 0
    assert read_pack(tmp_path / "k.tar").keys == (ELSEWHERE,)
    assert cache(both, "verify").exit_code == 4, "what is damaged is not put aside"


def keys_of_both(root: Path) -> str:
    """The key of the kernel that the compiler here built."""
    (key,) = {each.key for each in KernelCache(root).entries() if each.entry == PINGPONG} - {ELSEWHERE, OLD}
    return key


def test_none_of_several_is_removed_unless_its_key_says_so(both: Path):
    here = keys_of_both(both)
    for words in ((PINGPONG,), (COOPERATIVE, PINGPONG)):
        refused = cache(both, "rm", *words)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"'{PINGPONG}' is 2 times in the cache {both / 'v1'}; name a key: {here[:12]}" in refused.stderr
        assert f"{ELSEWHERE[:12]} (NVRTC 11.8)" in refused.stderr
    assert len(KernelCache(both).keys()) == 3
    assert cache(both, "rm", ELSEWHERE[:12]).stdout == f"{ELSEWHERE}\n"
    assert cache(both, "rm", PINGPONG).stdout == f"{here}\n"


def test_what_calls_do_not_load_is_found_when_there_is_nothing_else(tmp_path: Path, warm: Path):
    root = tmp_path / "cache"
    copy_as(root, warm, imported=False, remark=OLDER)
    old = cache(root, "info", PINGPONG)
    assert (fields(old)["key"], "calls do not load it: another version" in old.stderr) == (OLD, True)
    refused = cache(root, "export", str(tmp_path / "k.tar"), PINGPONG)
    assert (refused.exit_code, "run: megamoe-jit warmup" in refused.stderr) == (1, True)

    copy_as(root, warm, imported=False)
    same = cache(root, "info", PINGPONG)
    assert (fields(same)["key"], "the NVRTC that is found here did not compile it" in same.stderr) == (ELSEWHERE, True)
    assert f"also cached: {OLD[:12]}" in same.stderr
    assert cache(root, "export", str(tmp_path / "k.tar"), PINGPONG).exit_code == 0
    assert [cache(root, "rm", PINGPONG).stdout for _ in range(2)] == [f"{ELSEWHERE}\n", f"{OLD}\n"]
    assert cache(root, "rm", PINGPONG).exit_code == 1


def test_a_damaged_kernel_is_not_exported_by_its_name(tmp_path: Path):
    """Nor is it put aside: `cache verify` must see it."""
    root = warm_cache(tmp_path / "cache")
    key = keys_of(root)[PINGPONG]
    with (root / "v1" / key[:2] / key / "kernel.cubin").open("ab") as file:
        file.write(b"x")
    for name in ((PINGPONG,), (key,), ()):
        done = run("cache", "export", str(tmp_path / "k.tar"), *name, "--cache-dir", str(root))
        assert (done.returncode, done.stdout) == (4, ""), name
        assert key in done.stderr
        assert "`megamoe-jit cache verify --fix` puts it aside, `megamoe-jit warmup` compiles it again" in done.stderr
    assert run("cache", "verify", "--cache-dir", str(root)).returncode == 4
    assert not (tmp_path / "k.tar").exists()


def test_a_kernel_whose_metadata_cannot_be_read(tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    key = keys_of(root)[PINGPONG]
    (root / "v1" / key[:2] / key / "meta.json").write_text("{")
    for name in (PINGPONG, key, key[:12]):
        for words in (("info", name), ("export", str(tmp_path / "k.tar"), name)):
            done = cache(root, *words)
            assert (done.exit_code, done.stdout) == (4, ""), words
            assert key in done.stderr
    assert run("inspect", key, "--cache-dir", str(root)).returncode == 4
    assert cache(root, "rm", PINGPONG).stdout == f"{key}\n"


def test_a_damaged_kernel_is_compiled_again_by_inspect(tmp_path: Path):
    """With a SPEC; a KEY means this very kernel, which is damaged."""
    root = warm_cache(tmp_path / "cache")
    key = keys_of(root)[PINGPONG]
    damage(root, key)
    assert run("inspect", key, "--cache-dir", str(root)).returncode == 4
    done = run("inspect", PINGPONG, "--cache-dir", str(root))
    assert (done.returncode, "is damaged" in done.stderr, "compiled in" in done.stderr) == (0, True, True)
    assert run("cache", "verify", "--cache-dir", str(root)).returncode == 0


LOAD = """
from megamoe_jit._cli._names import parse_spec
from megamoe_jit._jit.obtain import get_kernel
print(get_kernel(parse_spec("%s")).key)
"""


def test_the_order_is_that_of_a_call(both: Path, warm: Path, tmp_path: Path):
    """Whatever is damaged, one after another, what is exported is what a call in a new process loads."""
    copy_as(both, warm, imported=True, version="12.1")
    copy_as(both, warm, imported=True, version="99.0")
    settings = {"MEGAMOE_JIT_CACHE_DIR": str(both), "MEGAMOE_JIT_DISABLE_JIT": "1"}
    order = []
    for _ in range(4):
        assert cache(both, "export", str(tmp_path / "k.tar"), PINGPONG).exit_code == 0
        order.extend(read_pack(tmp_path / "k.tar").keys)
        child = [sys.executable, "-c", LOAD % PINGPONG]
        done = subprocess.run(child, capture_output=True, text=True, timeout=120, env={**os.environ, **settings})
        assert (done.returncode, done.stdout) == (0, f"{order[-1]}\n"), done.stderr
        damage(both, order[-1])
    assert len(set(order)) == 4
