"""Entries that verify and are not the kernel they are filed as, and what listings make of odd metadata."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.documents import Statistics
from megamoe_jit._device import load as _loader
from megamoe_jit._errors import KernelMissingError, LoadError
from megamoe_jit._jit.obtain import get_kernel, replacement
from megamoe_jit._jit.registry import reset
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from tests.commandline import COOPERATIVE, PINGPONG, checked, keys_of, run, warm_cache
from tests.stubs import KEY, OTHER, fake_cubin, rewrite_meta

PING = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
COOP = KernelSpec(MoEShape(256, 128, 8, 2), Variant.COOPERATIVE)


@pytest.fixture
def good(place):
    """A kernel of the user's cache that another process compiled."""
    kernel = get_kernel(PING)
    reset()
    return kernel


@pytest.mark.parametrize("field", ["cubin_bytes", "source_bytes"])
@pytest.mark.parametrize("size", [float("inf"), float("-inf"), float("nan")])
def test_a_size_that_is_no_number_of_bytes_hides_its_entry_alone(cache, field, size):
    """Python's JSON has `Infinity`, which no integer holds."""
    for key in (KEY, OTHER):
        cache.store(key, fake_cubin(), "source", {})
    rewrite_meta(cache.entry_path(KEY), **{field: size})
    assert [info.key for info in cache.entries()] == [OTHER]
    assert (Statistics.of(cache).entries, Statistics.of(cache).damaged) == (1, 1)


@pytest.mark.parametrize("stranger", ["another kernel", "an ELF without any", "other parameters"])
def test_a_binary_that_is_not_its_kernel_is_put_aside_and_made_anew(good, stranger, warnings):
    """Such an entry verifies as far as digests go: they are its own."""
    cubin = get_kernel(COOP).cubin if stranger == "another kernel" else fake_cubin()
    meta = {**good.meta, "param_bytes": 1} if stranger == "other parameters" else good.meta
    user_cache().remove(good.key)
    user_cache().store(good.key, good.cubin if stranger == "other parameters" else cubin, "source", meta)
    with override(disable_jit=True), pytest.raises(KernelMissingError):
        get_kernel(PING)
    assert [str(user_cache().entry_path(good.key)) in warning.getMessage() for warning in warnings] == [True]
    assert len(user_cache().quarantined()) == 1
    made = get_kernel(PING)
    assert (made.origin, made.cubin) == ("compiled", good.cubin)


def test_a_binary_without_its_kernel_is_refused_before_the_driver_is_asked(good, monkeypatch):
    """Whatever it went through on its way."""

    def asked(*_):
        raise LoadError("the driver is asked")

    monkeypatch.setattr(_loader, "_enter_context", asked)
    refusal = _loader._load(dataclasses.replace(good, cubin=fake_cubin()), 0)
    assert refusal == _loader._Refusal(f"the cached kernel {good.key[:12]} is not {PING.kernel_name}", explained=False)


@pytest.mark.parametrize("same", [False, True], ids=["other bytes", "the same bytes"])
def test_distrust_of_a_read_only_kernel_puts_only_its_own_bytes_aside(good, place, same):
    """The user's entry of that key may be the one that works."""
    pack = KernelCache(place / "pack")
    pack.store(good.key, good.cubin if same else good.cubin + b"refused", "source", good.meta)
    with override(readonly_cache=(pack.root,)):
        bad = get_kernel(PING)
        assert bad.origin == "pack"
        other = replacement(bad, "refused", damaged=True)
    assert other.origin == ("compiled" if same else "disk")
    assert len(user_cache().quarantined()) == int(same)
    own = user_cache().load(good.key)
    assert own.cubin == other.cubin == good.cubin
    assert pack.load(good.key) is not None


def listing(root, *words):
    return run("cache", *words, "--cache-dir", str(root))


@pytest.mark.parametrize("flaw", ["{", '{"schema": 1}', "[]", None, "pipe", "source"])
def test_entries_whose_metadata_are_damaged_are_counted(tmp_path, flaw):
    """What `verify --fix` then puts aside."""
    root = warm_cache(tmp_path / "cache")
    keys = keys_of(root)
    meta = KernelCache(root).entry_path(keys[PINGPONG]) / "meta.json"
    text = json.dumps({**json.loads(meta.read_text()), "source_bytes": "many"})
    meta.unlink()
    if flaw == "pipe":
        os.mkfifo(meta, 0o600)
    elif flaw is not None:
        meta.write_text(text if flaw == "source" else flaw)
        meta.chmod(0o600)
    said = f"1 entry in {root} is damaged and left out; `megamoe-jit cache verify --fix` puts it aside\n"
    for words in (("ls",), ("stats",), ("ls", "--json"), ("stats", "--json")):
        done = listing(root, *words)
        assert done.returncode == 0
        assert done.stderr.endswith(said)
    listed, stats = (checked(listing(root, words, "--json").stdout) for words in ("ls", "stats"))
    assert (listed["damaged"], [entry["key"] for entry in listed["entries"]]) == (1, [keys[COOPERATIVE]])
    assert [(each["damaged"], each["entries"]) for each in stats["caches"]] == [(1, 1)]
    assert listing(root, "verify", "--fix").returncode == 0
    for words in ("ls", "stats"):
        assert "damaged" not in listing(root, words).stderr
    assert checked(listing(root, "ls", "--json").stdout)["damaged"] == 0


def test_entries_of_another_schema_are_not_damaged(tmp_path):
    root = warm_cache(tmp_path / "cache")
    meta = KernelCache(root).entry_path(keys_of(root)[PINGPONG]) / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "schema": 2}))
    assert checked(listing(root, "ls", "--json").stdout)["damaged"] == 0
