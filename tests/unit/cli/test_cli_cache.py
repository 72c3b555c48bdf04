"""`megamoe-jit cache`: keys cut short, what is asked, what is removed, how it ends."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cli import cli
from tests.commandline import COOPERATIVE, PINGPONG, SIZES, STAGED, checked, damage, keys_of, run, warm_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return warm_cache(tmp_path / "cache")


def cache(root: Path, *words: str, **environ: str):
    return run("cache", *words, "--cache-dir", str(root), **environ)


def age(root: Path, seconds: float) -> None:
    """Make every kernel look unused for so long."""
    for meta in root.glob("v1/*/*/meta.json"):
        os.utime(meta, (time.time() - seconds,) * 2)


def test_keys_may_be_cut_short_while_unique(root: Path):
    keys = keys_of(root)
    short = cache(root, "info", keys[PINGPONG][:6])
    assert short.returncode == 0
    rows = dict(line.split(None, 1) for line in short.stdout.splitlines())
    assert (rows["key"], rows["entry"]) == (keys[PINGPONG], PINGPONG)
    assert list(rows)[:3] == ["key", "entry", "path"]

    missing = "0" * 8 if not any(key.startswith("0" * 8) for key in keys.values()) else "1" * 8
    for words in (("info", missing), ("rm", missing), ("rm", keys[PINGPONG], missing)):
        done = cache(root, *words)
        assert done.returncode == 2, "and nothing is removed"
        assert missing in done.stderr
    assert set(keys_of(root)) == set(keys)


def test_a_kernel_by_its_spec(root: Path):
    """As `inspect` and `export` take it."""
    keys = keys_of(root)
    rows = dict(line.split(None, 1) for line in cache(root, "info", PINGPONG).stdout.splitlines())
    assert rows["key"] == keys[PINGPONG]
    assert cache(root, "rm", PINGPONG).returncode == 0
    assert set(keys_of(root)) == {COOPERATIVE}
    gone = cache(root, "rm", PINGPONG, keys[COOPERATIVE])
    assert gone.returncode == 1
    advice = "`megamoe-jit cache ls` lists the kernels"
    assert gone.stderr == f"Error: kernel {PINGPONG} is not in the cache {root / 'v1'}; {advice}\n"
    advice = (
        f"run: megamoe-jit warmup {' '.join(SIZES)} --ranks 1 --variant pingpong --inputs staged --cache-dir {root}"
    )
    absent = cache(root, "info", PINGPONG)
    assert absent.stderr == f"Error: kernel {PINGPONG} is not in the cache {root / 'v1'}; {advice}\n"
    assert set(keys_of(root)) == {COOPERATIVE}


def test_a_key_that_fits_several(root: Path):
    keys = keys_of(root)
    twin = keys[PINGPONG][:-1] + ("0" if keys[PINGPONG][-1] != "0" else "1")
    source = KernelCache(root).entry_path(keys[PINGPONG])
    os.rename(source, source.with_name(twin))
    os.makedirs(source)
    done = cache(root, "rm", keys[PINGPONG][:10])
    assert done.returncode == 2
    assert "not unique" in done.stderr


def test_rm(root: Path):
    keys = keys_of(root)
    done = cache(root, "rm", keys[PINGPONG][:8], keys[PINGPONG])
    assert (done.returncode, done.stdout) == (0, keys[PINGPONG] + "\n")
    assert "removed 1 kernel" in done.stderr
    assert set(keys_of(root)) == {COOPERATIVE}


def test_nothing_is_removed_where_nobody_can_be_asked(root: Path):
    age(root, 86400)
    for words in (("clear",), ("prune", "--older-than", "1h")):
        done = cache(root, *words)
        assert done.returncode == 2
        assert "2 kernels" in done.stderr
        assert re.search(r"\d [KM]iB", done.stderr)
        assert "--yes" in done.stderr
    assert len(keys_of(root)) == 2


def test_clear(root: Path):
    damage(root, keys_of(root)[PINGPONG])
    assert cache(root, "verify", "--fix").returncode == 0
    done = cache(root, "clear", "--yes")
    assert done.returncode == 0
    assert "removed 1 kernel" in done.stderr
    assert len(KernelCache(root).quarantined()) == 0
    assert cache(root, "clear").returncode == 0, "nothing is left to ask about"
    absent = run("cache", "clear", "--cache-dir", str(root / "absent"))
    assert absent.returncode == 0
    assert not (root / "absent").exists()


def test_prune_by_age_and_size(root: Path):
    keys = keys_of(root)
    fresh = cache(root, "prune", "--older-than", "0s", "--yes")
    assert (fresh.returncode, fresh.stdout) == (0, ""), "what was used just now stays"
    age(root, 7200)
    os.utime(KernelCache(root).entry_path(keys[COOPERATIVE]) / "meta.json", (time.time() - 3600,) * 2)
    shown = cache(root, "prune", "--older-than", "90m", "--dry-run")
    assert shown.stdout.split()[:2] == [keys[PINGPONG][:12], PINGPONG]
    assert "would remove 1 kernel" in shown.stderr
    assert len(keys_of(root)) == 2
    assert cache(root, "prune", "--older-than", "90m", "--yes").returncode == 0
    assert set(keys_of(root)) == {COOPERATIVE}
    assert cache(root, "prune", "--max-bytes", "1K", "--yes").returncode == 0
    assert keys_of(root) == {}


def test_prune_comes_down_to_the_setting(root: Path):
    age(root, 7200)
    kept = cache(root, "prune")
    assert (kept.returncode, "nothing to remove" in kept.stderr) == (0, True)
    size = sum(path.stat().st_size for path in root.glob("v1/*/*/*"))
    done = cache(root, "prune", "--yes", MEGAMOE_JIT_CACHE_MAX_BYTES=str(size - 1))
    assert done.returncode == 0
    assert "removed 1 kernel" in done.stderr


def test_prune_says_what_only_its_age_keeps(root: Path):
    for words in (("--max-bytes", "0"), ("--older-than", "0s"), ("--max-bytes", "0", "--dry-run")):
        done = cache(root, "prune", "--yes", *words)
        assert "nothing to remove" in done.stderr
        assert "2 kernels more would go, but for having been used in the last ten minutes" in done.stderr
    assert checked(cache(root, "prune", "--max-bytes", "0", "--json").stdout)["kept_recent"] == 2
    assert "ten minutes" not in cache(root, "prune").stderr
    age(root, 3600)
    assert checked(cache(root, "prune", "--yes", "--max-bytes", "0", "--json").stdout)["kept_recent"] == 0


def test_a_directory_that_does_not_exist_is_said_to(tmp_path: Path):
    for words in ("ls", "verify", "prune"):
        done = cache(tmp_path / "typo", words)
        assert done.returncode == 0
        assert f"{tmp_path / 'typo'} (does not exist)" in done.stderr
    assert f"{tmp_path / 'typo'} (does not exist)" in cache(tmp_path / "typo", "stats").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("prune", "--max-bytes", "much"), "2GiB"),
        (("prune", "--older-than", "long"), "30d"),
        (("rm",), "KEY"),
        (("info", "../../etc"), "unknown shape '..'"),
        (("info", "v4-flash"), "names no kernel; allowed: SHAPE/VARIANT"),
        (("rm", "abc"), "key 'abc' is not in the cache"),
        (("export", "/nonexistent/x.tar"), "/nonexistent does not exist"),
        (("import", "/nonexistent.tar"), "does not exist"),
        (("export", "/tmp/x.tar", "v4-flash"), "names no kernel"),
    ],
    ids=str,
)
def test_wrong_usage(words: tuple[str, ...], says: str, root: Path):
    done = cache(root, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_verify_finds_and_mends(root: Path):
    keys = keys_of(root)
    assert cache(root, "verify").returncode == 0
    damage(root, keys[PINGPONG])
    found = cache(root, "verify")
    assert found.returncode == 4
    assert found.stdout.startswith("DAMAGED")
    assert keys[PINGPONG] in found.stdout
    assert "--fix" in found.stderr
    mended = cache(root, "verify", "--fix")
    assert mended.returncode == 0
    assert mended.stdout.startswith("put aside")
    assert cache(root, "verify").returncode == 0
    assert set(keys_of(root)) == {COOPERATIVE}
    assert "removed 0 kernels and 1 put aside, " in cache(root, "prune", "--yes").stderr


def test_verify_looks_at_permissions(root: Path):
    (root / "v1").chmod(0o777)
    found = cache(root, "verify")
    assert found.returncode in (1, 4)
    assert "written by other users" in found.stdout
    assert cache(root, "verify", "--fix").returncode == 0
    assert cache(root, "verify").returncode == 0


def test_a_damaged_kernel_is_not_shown_or_exported(root: Path, tmp_path: Path):
    keys = keys_of(root)
    damage(root, keys[PINGPONG])
    inspected = run("inspect", keys[PINGPONG], "--cache-dir", str(root))
    assert inspected.returncode == 4
    assert "damaged" in inspected.stderr
    for text in (None, "garbage"):
        if text is not None:
            (KernelCache(root).entry_path(keys[PINGPONG]) / "meta.json").write_text(text)
        exported = cache(root, "export", str(tmp_path / "pack.tar"))
        assert exported.returncode == 4, exported.stderr
        assert not (tmp_path / "pack.tar").exists()


def test_a_kernel_that_cannot_be_removed_is_named(root: Path):
    key = keys_of(root)[PINGPONG]
    (root / "v1" / ".tmp").chmod(0o777)  # nothing is moved to where others can write
    for words, named in ((("rm", key), {key}), (("clear", "--yes"), set(keys_of(root).values()))):
        done = cache(root, *words)
        assert (done.returncode, done.stdout) == (1, "")
        told = {str(KernelCache(root).entry_path(each)) for each in named}
        ending = " could not be removed"
        lines = done.stderr.splitlines()
        assert {line.removesuffix(ending) for line in lines if line.endswith(ending)} == told
        assert "cannot remove from kernel cache" in done.stderr
    assert len(keys_of(root)) == 2


def test_a_kernel_that_prune_cannot_remove_is_named(root: Path):
    keys = keys_of(root)
    age(root, 7200)
    path = KernelCache(root).entry_path(keys[PINGPONG])
    (root / "v1" / ".tmp").chmod(0o777)  # nothing is moved to where others can write
    words = ("prune", "--older-than", "1h", "--yes")
    done = cache(root, *words)
    assert done.returncode == 1
    assert f"{path} could not be removed\n" in done.stderr
    assert done.stderr.count(" could not be removed\n") == 2
    doc = checked(cache(root, *words, "--json").stdout)
    assert (doc["removed"], set(doc["not_removed"])) == ([], set(keys.values()))
    assert checked(cache(root, *words, "--json", "--dry-run").stdout)["not_removed"] == []
    (root / "v1" / ".tmp").chmod(0o700)
    assert checked(cache(root, *words, "--json").stdout)["not_removed"] == []


@pytest.mark.parametrize("words", [("prune", "--yes"), ("clear", "--yes")], ids=lambda words: words[0])
def test_kernels_put_aside_that_cannot_be_removed_are_told_of(root: Path, words: tuple[str, ...]):
    KernelCache(root).quarantine(keys_of(root)[PINGPONG])
    (root / "v1" / ".tmp").chmod(0o777)  # nothing is moved to where others can write
    done = cache(root, *words)
    assert done.returncode == 1
    assert f"1 put aside in {root / 'v1' / 'quarantine'} could not be removed\n" in done.stderr


def test_a_kernel_that_goes_before_it_is_removed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch):
    key = keys_of(root)[PINGPONG]
    remove = KernelCache.remove
    monkeypatch.setattr(KernelCache, "remove", lambda self, keys: (remove(self, keys), remove(self, keys))[1])
    done = CliRunner().invoke(cli, ["cache", "rm", key, "--cache-dir", str(root)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{KernelCache(root).entry_path(key)} was gone already\n" in done.stderr


def test_a_folder_in_the_wrong_place_is_no_entry(root: Path, tmp_path: Path):
    """No call would find it there, nor would `rm`."""
    key = keys_of(root)[PINGPONG]
    wrong = "00" if key[:2] != "00" else "01"
    (root / "v1" / wrong).mkdir(mode=0o700, exist_ok=True)
    KernelCache(root).entry_path(key).rename(root / "v1" / wrong / key)
    found = KernelCache(root).keys()
    assert key not in found
    assert set(keys_of(root)) == {COOPERATIVE}
    assert cache(root, "info", key).returncode == 2
    assert cache(root, "export", str(tmp_path / "k.tar")).returncode == 0
    assert cache(root, "clear", "--yes").returncode == 0


def test_verify_advises_to_mend_only_what_can_be_mended(root: Path, tmp_path: Path):
    given = warm_cache(tmp_path / "given")
    key = keys_of(given)[PINGPONG]
    damage(given, key)
    done = cache(root, "verify", MEGAMOE_JIT_READONLY_CACHE=str(given))
    assert (done.returncode, "--fix" in done.stderr) == (4, False)
    (given / "v1").chmod(0o777)
    KernelCache(given).remove([key])
    done = cache(root, "verify", MEGAMOE_JIT_READONLY_CACHE=str(given))
    assert (done.returncode, "--fix" in done.stderr) == (1, False)
    damage(root, key)
    done = cache(root, "verify", MEGAMOE_JIT_READONLY_CACHE=str(given))
    assert (done.returncode, "--fix" in done.stderr) == (4, True)


def test_a_pack_travels(root: Path, tmp_path: Path):
    keys = keys_of(root)
    pack, there = tmp_path / "kernels.tgz", tmp_path / "there"
    done = cache(root, "export", str(pack), keys[PINGPONG][:8], COOPERATIVE)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == [COOPERATIVE, PINGPONG]

    imported = cache(there, "import", str(pack))
    assert imported.returncode == 0, imported.stderr
    shown = {name: key for key, name in (line.split() for line in imported.stdout.splitlines())}
    assert shown == {name: key[:12] for name, key in keys.items()}
    readonly = {"MEGAMOE_JIT_READONLY_CACHE": str(there), "MEGAMOE_JIT_DISABLE_JIT": "1"}
    elsewhere = str(tmp_path / "empty")
    warmed = run("warmup", *STAGED, "--cache-dir", elsewhere, "--json", **readonly)
    assert warmed.returncode == 0, warmed.stderr
    assert checked(warmed.stdout)["cached"] == 2
    stats = checked(run("cache", "stats", "--json", "--cache-dir", elsewhere, **readonly).stdout)["caches"]
    assert [(each["read_only"], each["entries"]) for each in stats] == [(False, 0), (True, 2)]
    info = run("cache", "info", keys[PINGPONG][:8], "--cache-dir", elsewhere, **readonly)
    assert str(there) in info.stdout
    call = run("explain", *SIZES, "--tokens", "1", "--cache-dir", elsewhere, "--json", **readonly)
    assert json.loads(call.stdout)["calls"][0]["path"].startswith(str(there))


def test_a_damaged_pack_changes_nothing(root: Path, tmp_path: Path):
    pack = tmp_path / "pack.tar"
    assert cache(root, "export", str(pack)).returncode == 0
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    done = cache(tmp_path / "there", "import", str(pack))
    assert done.returncode == 4
    assert done.stderr.startswith("Error: ")
    assert keys_of(tmp_path / "there") == {}


def test_a_directory_that_is_a_file_is_said_to_be_no_directory(root: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "v1").write_text("")
    for place, said in (("file", "file"), ("file/below", "file/below"), ("half", "half/v1")):
        for words in (("ls",), ("stats",), ("verify",), ("info", PINGPONG), ("export", str(tmp_path / "k.tar"))):
            done = run("cache", *words, MEGAMOE_JIT_CACHE_DIR=str(tmp_path / place))
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == f"Error: {tmp_path / said}: Not a directory\n"


def test_what_is_no_plain_file_is_no_pack(root: Path, tmp_path: Path):
    """An export would replace it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words in (("import", os.devnull), ("import", str(pipe)), ("export", str(pipe))):
        done = cache(root, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{words[1]} is not a plain file" in done.stderr
    assert pipe.is_fifo()


def test_nothing_to_export(tmp_path: Path):
    done = cache(tmp_path / "empty", "export", str(tmp_path / "pack.tar"))
    assert done.returncode == 1
    assert "megamoe-jit warmup" in done.stderr
