"""What a spec and the beginning of a key mean to `export_pack`: what a call would load, and nothing damaged."""

from __future__ import annotations

import pytest

from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._diagnose.explain import kernel_state
from megamoe_jit._errors import KernelMissingError, PackError
from megamoe_jit._jit.lookup import Fit, Wanted, entries_of, lookup
from megamoe_jit._jit.pack import export_pack
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from tests.stubs import KEY, fake_cubin, fake_kernel, kernel_of_spec

SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)


@pytest.fixture
def here(tmp_path):
    """Settings with an empty cache."""
    with override(cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks"):
        yield tmp_path


def keep_as_spec(cache, version="12.9"):
    """Store a kernel of `SPEC`, as another compiler than the one here makes it; its key."""
    kernel = kernel_of_spec(SPEC, version)
    assert cache.store(*kernel)
    return kernel[0]


def test_damaged_kernel_of_a_spec_is_not_exported_and_stays(here):
    third = keep_as_spec(user_cache())
    kernel = user_cache().entry_path(third) / "kernel.cubin"
    kernel.write_bytes(kernel.read_bytes() + b"x")
    with pytest.raises(PackError, match=f"cannot export .*{third}: kernel.cubin has .* bytes instead of"):
        export_pack(here / "k.tar", SPEC)
    assert [problem.key for problem in user_cache().verify()] == [third], "it is not put aside"
    assert not (here / "k.tar").exists()


def test_kernel_without_readable_metadata_is_damaged_not_missing(here):
    user_cache().store(KEY, fake_cubin(), "source", {"entry": "first"})
    (user_cache().entry_path(KEY) / "meta.json").write_text("{")
    with pytest.raises(PackError, match=f"cannot export .*{KEY}: meta.json is not JSON"):
        export_pack(here / "k.tar", KEY[:8])


def test_whole_kernel_of_a_spec_is_taken_before_a_damaged_one(here, warnings):
    """The order is that of a call: what was handed over, the newest compiler first, then what was compiled here."""
    newer, older = KernelCache(here / "given"), user_cache()
    first, second = keep_as_spec(newer, "12.9"), keep_as_spec(newer, "12.8")
    third = keep_as_spec(older, "12.7")
    with override(readonly_cache=(newer.root,)):
        for expected in (first, second, third):
            assert export_pack(here / "k.tar", SPEC).keys == (expected,)
            cache = older if expected == third else newer
            (cache.entry_path(expected) / "kernel.cubin").write_bytes(b"")
        assert [str(newer.entry_path(key)) in warnings[-1].getMessage() for key in (first, second)] == [False, True]
        with pytest.raises(PackError, match=first):
            export_pack(here / "k.tar", SPEC)


def test_spec_from_a_cache_that_others_can_write_is_not_exported(here):
    keep_as_spec(user_cache())
    user_cache().path.chmod(0o777)
    with pytest.raises(PackError, match="can be written by other users"):
        export_pack(here / "k.tar", SPEC)


def test_kernel_of_another_source_is_not_exported_for_a_spec(here):
    old = fake_kernel(SPEC.kernel_name, "old source")
    user_cache().store(*old)
    with pytest.raises(KernelMissingError, match="only as compiled from another source; run: megamoe-jit warmup"):
        export_pack(here / "k.tar", SPEC)
    assert export_pack(here / "k.tar", old[0]).kernels == (SPEC.kernel_name,)


def test_entries_come_as_a_call_tries_them_with_what_speaks_against_them(here):
    """What read-only caches have comes first; nothing is read of a cache before the very key was tried everywhere."""
    given, own = KernelCache(here / "given", read_only=True), user_cache()
    handed_over, older = (keep_as_spec(KernelCache(given.root), version) for version in ("12.7", "12.6"))
    own_build, foreign = keep_as_spec(own, "12.5"), fake_kernel(SPEC.kernel_name, "old source")
    own.store(*foreign)
    wanted = Wanted.of(SPEC)
    with override(readonly_cache=(given.root,)):
        found = [(each.cache.root, each.key, each.fit) for each in lookup(wanted)]
        taken = [each.key for each in lookup(wanted, least=Fit.LOADS)]
        assert kernel_state(SPEC).key == handed_over
        assert [each.key for each in entries_of(SPEC, [own, given])] == [handed_over, older, own_build, foreign[0]]
    assert found == [
        (given.root, wanted.key, Fit.LOADS),
        (own.root, wanted.key, Fit.LOADS),
        (given.root, handed_over, Fit.LOADS),
        (given.root, older, Fit.LOADS),
        (own.root, own_build, Fit.SOURCE),
        (own.root, foreign[0], Fit.NAME),
    ]
    assert taken == [wanted.key, wanted.key, handed_over, older]
    assert [bool(fit.reason) for fit in Fit] == [True, True, False]


def test_nothing_is_read_while_the_very_kernel_may_be_there(here, monkeypatch):
    monkeypatch.setattr(KernelCache, "of_source", lambda *_: pytest.fail("the cache is searched"))
    assert next(lookup(Wanted.of(SPEC))).key == Wanted.of(SPEC).key
