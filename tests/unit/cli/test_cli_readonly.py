"""`megamoe-jit cache` beside read-only caches: what they hold is listed, shown and completed, and never removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cli._cache_options import complete_kernel, complete_key, complete_own_key
from megamoe_jit._settings.settings import override
from tests.commandline import COOPERATIVE, PINGPONG, checked, keys_of, run, warm_cache


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A read-only cache with both kernels."""
    return warm_cache(tmp_path / "given")


@pytest.fixture
def own(tmp_path: Path, given: Path) -> Path:
    """The user's cache, which holds one of them too."""
    root = warm_cache(tmp_path / "own")
    KernelCache(root).remove([keys_of(given)[COOPERATIVE]])
    return root


def cache(own: Path, given: Path, *words: str):
    return run("cache", *words, "--cache-dir", str(own), MEGAMOE_JIT_READONLY_CACHE=str(given))


def test_ls_marks_what_is_read_only(own: Path, given: Path):
    keys = keys_of(given)
    doc = checked(cache(own, given, "ls", "--json").stdout)
    found = sorted((entry["entry"], entry["read_only"]) for entry in doc["entries"])
    assert found == [(COOPERATIVE, True), (PINGPONG, False), (PINGPONG, True)]
    assert doc["path"] == str(own)
    assert doc["disk_bytes"] == sum(entry["disk_bytes"] for entry in doc["entries"] if not entry["read_only"])
    done = cache(own, given, "ls")
    head, *rows = (line.split() for line in done.stdout.splitlines())
    assert head[-1] == "CACHE"
    assert sorted((row[1], row[-1]) for row in rows) == [
        (COOPERATIVE, "read-only"),
        (PINGPONG, "own"),
        (PINGPONG, "read-only"),
    ]
    assert {row[0] for row in rows} == {key[:12] for key in keys.values()}
    assert f"in {own}\n" in done.stderr
    assert f"in {given} (read-only)\n" in done.stderr
    assert "CACHE" not in run("cache", "ls", "--cache-dir", str(own)).stdout, "there is nothing to tell apart"


def test_keys_of_read_only_caches_are_found_but_not_removed(own: Path, given: Path):
    keys = keys_of(given)
    assert str(own) in cache(own, given, "info", keys[PINGPONG][:8]).stdout
    assert str(given) in cache(own, given, "info", keys[COOPERATIVE][:8]).stdout
    for words in (("rm", keys[COOPERATIVE][:8]), ("rm", keys[PINGPONG], keys[COOPERATIVE])):
        done = cache(own, given, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"is in the read-only cache {given}" in done.stderr
    assert set(keys_of(own)) == {PINGPONG}, "nothing is removed"
    assert cache(own, given, "rm", keys[PINGPONG][:8]).returncode == 0
    assert cache(own, given, "clear", "--yes").returncode == 0
    assert (set(keys_of(own)), set(keys_of(given))) == (set(), {PINGPONG, COOPERATIVE})


def test_a_beginning_that_fits_keys_of_two_caches_is_not_unique(tmp_path: Path):
    from tests.stubs import KEY, fake_cubin

    twin = KEY[:-1] + "1"
    own, given = KernelCache(tmp_path / "own"), KernelCache(tmp_path / "given")
    own.store(KEY, fake_cubin(), "", {})
    given.store(twin, fake_cubin(), "", {})
    done = cache(own.root, given.root, "rm", KEY[:12])
    assert (done.returncode, "not unique" in done.stderr) == (2, True)
    assert cache(own.root, given.root, "rm", KEY).returncode == 0


def test_keys_are_completed(own: Path, given: Path):
    keys = {name: key[:12] for name, key in keys_of(given).items()}

    def offered(complete, incomplete: str = "") -> list[str]:
        return [item.value for item in complete(None, None, incomplete)]

    with override(cache_dir=own, readonly_cache=(given,)):
        assert sorted(offered(complete_key)) == sorted(keys.values())
        assert offered(complete_key, keys[COOPERATIVE][:4]) == [keys[COOPERATIVE]]
        assert offered(complete_own_key) == [keys[PINGPONG]]
        assert set(keys.values()) <= set(offered(complete_kernel))


@pytest.mark.parametrize("length", [1, 3, 12])
def test_keys_may_be_cut_short_in_the_same_way_everywhere(own: Path, length: int):
    key = keys_of(own)[PINGPONG]
    short = key[:length].upper()
    inspected = checked(run("inspect", short, "--json", "--cache-dir", str(own)).stdout)
    assert inspected["resources"]["key"] == key
    assert run("cache", "rm", short, "--cache-dir", str(own)).stdout == f"{key}\n"
    said = [run(*words, short, "--cache-dir", str(own)).stderr for words in (("inspect",), ("cache", "rm"))]
    assert said[0] == said[1]
    assert f"key {short!r} is not in the cache" in said[0]


def test_what_is_listed_can_be_exported(own: Path, given: Path, tmp_path: Path):
    keys = keys_of(given)
    for words in ((keys[COOPERATIVE][:8],), (keys[COOPERATIVE][:8], keys[PINGPONG]), ()):
        wanted = {COOPERATIVE} if len(words) == 1 else {COOPERATIVE, PINGPONG}
        doc = checked(cache(own, given, "export", str(tmp_path / "k.tar"), *words, "--json").stdout)
        assert {each["kernel"] for each in doc["kernels"]} == wanted
        assert {each["key"] for each in doc["kernels"]} == {keys[name] for name in wanted}


def test_damaged_entries_of_a_read_only_cache_are_told_of_without_advice(own: Path, given: Path):
    for meta in given.glob("v1/*/*/meta.json"):
        meta.write_text("{")
    said = f"2 entries in {given} (read-only) are damaged and left out\n"
    for words in ("ls", "stats"):
        assert cache(own, given, words).stderr.endswith(said)
    stats = checked(cache(own, given, "stats", "--json").stdout)["caches"]
    assert [each["damaged"] for each in stats] == [0, 2]
