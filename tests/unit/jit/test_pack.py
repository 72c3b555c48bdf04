"""Packs: what is exported is what is imported, byte for byte, and nothing else is ever written."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import time
from pathlib import Path

import pytest

from megamoe_jit._cache import store as _store
from megamoe_jit._cache.cache import KernelCache, readonly_caches, user_cache
from megamoe_jit._cache.metadata import dump_metadata
from megamoe_jit._errors import ConfigError, KernelMissingError, PackError
from megamoe_jit._jit import pack as _pack
from megamoe_jit._jit.lookup import Fit, entries_of
from megamoe_jit._jit.pack import export_pack, import_pack, read_pack
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FORMATS, MXFP4, KernelSpec, MoEShape, Variant
from tests.stubs import fake_kernel, kernel_of_spec

SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
ONE, TWO = fake_kernel("first", "source one", b"one"), fake_kernel("second", "source two", b"two" * 5000)
ONE, TWO = sorted((ONE, TWO))
KEY, OTHER = ONE[0], TWO[0]
NAMES = (ONE[3]["entry"], TWO[3]["entry"])
PARTS = ("kernel.cubin", "meta.json", "kernel.cu")


@pytest.fixture
def here(tmp_path):
    """Settings whose cache holds two kernels."""
    with override(cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks"):
        user_cache().store(*ONE)
        user_cache().store(*TWO)
        yield tmp_path


def contents(cache):
    return {i.key: {part: (i.path / part).read_bytes() for part in PARTS} for i in cache.entries()}


def shipped(cache):
    """What a pack has of a cache: not the date and the host."""
    found = contents(cache)
    for files in found.values():
        meta = json.loads(files["meta.json"])
        del meta["created_at"], meta["host"], meta["nvrtc"]["path"], meta["meta_sha256"]
        files["meta.json"] = dump_metadata(meta)
    return found


@pytest.mark.parametrize("name", ["k.tar", "k.tar.gz", "k.tgz"])
def test_there_and_back(here, name):
    info = export_pack(here / name)
    assert (info.path, info.keys, info.kernels) == (here / name, (KEY, OTHER), NAMES)
    assert info.bytes == (here / name).stat().st_size
    assert read_pack(here / name) == info
    assert [p.name for p in here.iterdir() if p.name.startswith(".")] == []
    report = import_pack(str(here / name), here / "new")
    fresh = KernelCache(here / "new")
    assert (report.root, report.imported, report.present) == (here / "new", (KEY, OTHER), ())
    assert contents(fresh) == shipped(user_cache())
    assert report.bytes == sum(len(data) for files in contents(fresh).values() for data in files.values())
    assert fresh.verify() == []
    again = import_pack(here / name, here / "new")
    assert (again.imported, again.present, again.bytes) == ((), (KEY, OTHER), 0)
    with override(readonly_cache=(here / "new",)):
        assert readonly_caches()[0].load(KEY).cubin == ONE[1]


def test_same_kernels_give_the_same_bytes(here):
    first, second = (export_pack(here / name).path.read_bytes() for name in ("a.tgz", "b.tgz"))
    assert first == second
    assert export_pack(here / "c.tar", [OTHER, KEY[:6], KEY]).sha256 == export_pack(here / "d.tar").sha256


def test_nothing_of_the_machine_that_compiled_is_in_a_pack(here, monkeypatch):
    packs = []
    for host, folder, seconds in (("alpha", "/home/a", 7), ("beta", "/home/b", 9)):
        monkeypatch.setattr(_store, "_host", lambda host=host: host)
        monkeypatch.setattr(
            _store.time, "gmtime", lambda s=seconds: time.struct_time((2026, 1, 2, 3, 4, s // 60, 5, 6, 7))
        )
        with override(cache_dir=here / host):
            nvrtc = {**ONE[3]["nvrtc"], "path": f"{folder}/libnvrtc.so"}
            user_cache().store(*ONE[:3], {**ONE[3], "compile_ms": {"total": seconds}, "nvrtc": nvrtc})
            packs.append(export_pack(here / f"{host}.tar").path.read_bytes())
    assert packs[0] == packs[1]
    for word in (b"alpha", b"/home/a", b"2026"):
        assert word not in packs[0]
    import_pack(here / "alpha.tar", here / "new")
    (info,) = KernelCache(here / "new").entries()
    assert (info.compiler, info.created_at) == ("12.9", "")


def test_import_replaces_what_is_damaged_and_keeps_the_rest(here):
    export_pack(here / "k.tar")
    (user_cache().entry_path(KEY) / "kernel.cubin").write_bytes(b"")
    report = import_pack(here / "k.tar")
    assert (report.imported, report.present) == ((KEY,), (OTHER,))
    assert user_cache().load(KEY).cubin == ONE[1]


def test_without_names_nothing_is_left_out(here):
    """Neither what cannot be read, nor is anything written then; what is of another version is no kernel of ours."""
    meta = user_cache().entry_path(KEY) / "meta.json"
    for text, says in (("garbage", "is not JSON"), ("{}", "has no schema"), (None, "is missing")):
        meta.unlink() if text is None else meta.write_text(text)
        with pytest.raises(PackError, match=f"{KEY}: meta.json {says}"):
            export_pack(here / "k.tar")
        assert not (here / "k.tar").exists()
    meta.write_text('{"schema": 99}')
    assert export_pack(here / "k.tar").keys == (OTHER,)


def test_what_goes_while_all_is_exported_is_left_out(here, monkeypatch):
    read = KernelCache.read

    def gone(cache, key, **named):
        if key == KEY:
            raise FileNotFoundError(2, "No such file or directory")
        return read(cache, key, **named)

    monkeypatch.setattr(KernelCache, "read", gone)
    assert export_pack(here / "k.tar").keys == (OTHER,)
    with pytest.raises(PackError, match="cannot export"):
        export_pack(here / "k.tar", [KEY])


def test_choice_of_what_to_export(here):
    assert export_pack(here / "k.tar", [OTHER[:6]]).keys == (OTHER,)
    assert export_pack(here / "k.tar", KEY[:6]).keys == (KEY,)
    with pytest.raises(ConfigError, match="is not in the cache"):
        export_pack(here / "k.tar", ["0" * 8])
    third = kernel_of_spec(SPEC)
    user_cache().store(*third)
    assert export_pack(here / "k.tar", [SPEC]).kernels == (SPEC.kernel_name,)
    with override(cache_dir=here / "empty", readonly_cache=(here / "cache",)):
        assert export_pack(here / "k.tar", SPEC).keys == (third[0],)
    with override(cache_dir=here / "empty"):
        with pytest.raises(KernelMissingError, match="run: megamoe-jit warmup --hidden 256"):
            export_pack(here / "k.tar", [SPEC])
        with pytest.raises(PackError, match="no kernels to export"):
            export_pack(here / "k.tar")
    assert export_pack(here / "k.tar", cache=KernelCache(here / "cache", read_only=True)).keys == tuple(
        sorted((KEY, OTHER, third[0]))
    )


@pytest.mark.parametrize("variant", Variant.reading(MXFP4), ids=str)
def test_a_kernel_of_packed_weights_travels_and_is_taken_for_no_other(here, variant):
    spec = KernelSpec(SPEC.shape, variant, weights=MXFP4)
    others = [
        KernelSpec(SPEC.shape, other, weights=stored)
        for stored in FORMATS.values()
        for other in Variant.reading(stored)
        if (other, stored) != (variant, MXFP4)
    ]
    kept = kernel_of_spec(spec, "12.8")  # by another compiler than the one here
    user_cache().store(*kept)
    info = export_pack(here / "k.tgz", [spec])
    assert (info.keys, info.kernels) == ((kept[0],), (spec.kernel_name,))
    assert import_pack(here / "k.tgz", here / "new").imported == info.keys
    with override(cache_dir=here / "empty", readonly_cache=(here / "new",)):
        given = readonly_caches()
        assert [(found.key, found.fit) for found in entries_of(spec, given)] == [(kept[0], Fit.LOADS)]
        assert [found for other in others for found in entries_of(other, given)] == []
        with pytest.raises(KernelMissingError, match=f"run: megamoe-jit warmup .*--variant {others[0].variant.value}"):
            export_pack(here / "l.tgz", others[0])


def test_damaged_entry_is_not_exported(here):
    (user_cache().entry_path(KEY) / "kernel.cu").write_text("changed")
    with pytest.raises(PackError, match=f"cannot export .*{KEY}: the digest of kernel.cu is wrong"):
        export_pack(here / "k.tar")
    assert not (here / "k.tar").exists()


def test_file_that_cannot_be_written_leaves_nothing(here, monkeypatch):
    with pytest.raises(PackError, match="cannot write"):
        export_pack(here / "none" / "k.tar")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_pack.os, "fsync", full)
    with pytest.raises(PackError, match=r"cannot write .*No space left"):
        export_pack(here / "k.tar")
    assert {p.name for p in here.iterdir()} <= {"cache", "locks"}


def members(path):
    with tarfile.open(path) as archive:
        return [(m, archive.extractfile(m).read()) for m in archive]


def rebuilt(path, change):
    """The pack with its list of (member, bytes) changed by a function."""
    parts = members(path)
    parts = change(parts) or parts
    with tarfile.open(path, "w") as archive:
        for member, data in parts:
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data))
    return path


def with_manifest(change):
    def apply(parts):
        manifest = json.loads(parts[0][1])
        manifest = change(manifest) or manifest
        parts[0] = parts[0][0], json.dumps(manifest).encode()

    return apply


def renamed(index, name):
    def apply(parts):
        parts[index][0].name = name

    return apply


def added(name, **fields):
    def apply(parts):
        member = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(member, field, value)
        parts.append((member, b"x"))

    return apply


def turned_into(kind):
    def apply(parts):
        parts[1][0].type, parts[1][0].linkname = kind, "/etc/passwd"

    return apply


def other_bytes(parts):
    parts[1] = parts[1][0], parts[1][1][:-1] + b"!"


def mixed_order(parts):
    return [parts[0], parts[1], *parts[4:5], *parts[2:4], *parts[5:]]


def digest_of_damage(parts):
    """A manifest that agrees with a damaged entry."""
    import hashlib

    data = parts[1][1][:-1] + b"!"
    parts[1] = parts[1][0], data
    manifest = json.loads(parts[0][1])
    manifest["entries"][KEY]["files"]["kernel.cubin"]["sha256"] = hashlib.sha256(data).hexdigest()
    parts[0] = parts[0][0], json.dumps(manifest).encode()


def entry_of_another_schema(parts):
    import hashlib

    index = next(i for i, (m, _) in enumerate(parts) if m.name == f"entries/{KEY}/meta.json")
    data = json.dumps({"schema": 9}).encode()
    parts[index] = parts[index][0], data
    manifest = json.loads(parts[0][1])
    manifest["entries"][KEY]["files"]["meta.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    parts[0] = parts[0][0], json.dumps(manifest).encode()


def without_digest(manifest):
    del manifest["entries"][KEY]["files"]["kernel.cubin"]["sha256"]


def endless(manifest):
    manifest["entries"][KEY]["files"]["kernel.cubin"]["bytes"] = float("inf")


def deep(parts):
    parts[0] = parts[0][0], b"[" * 100_000


def huge(manifest):
    manifest["entries"][KEY]["files"]["kernel.cubin"]["bytes"] = 1 << 50


def negative(manifest):
    """It would make room for others."""
    manifest["entries"][KEY]["files"]["kernel.cu"]["bytes"] = -(1 << 40)


def a_number_as_text(manifest):
    manifest["entries"][KEY]["files"]["kernel.cu"]["bytes"] = "12"


def digest_as_number(manifest):
    manifest["entries"][KEY]["files"]["kernel.cu"]["sha256"] = 12


def without_name(manifest):
    manifest["entries"][KEY]["kernel"] = None


def another_name(manifest):
    manifest["entries"][KEY]["kernel"] = "other"


BAD = {
    "no manifest": (lambda parts: parts[1:], "does not begin with manifest.json"),
    "empty": (lambda parts: [(tarfile.TarInfo("x"), b"")], "does not begin with manifest.json"),
    "not json": (lambda parts: [(parts[0][0], b"{")], "manifest is damaged"),
    "no kind": (with_manifest(lambda m: {"entries": {}}), "manifest is damaged"),
    "list": (with_manifest(lambda m: [1]), "manifest is damaged"),
    "no digest": (with_manifest(without_digest), "manifest is damaged"),
    "endless": (with_manifest(endless), "manifest is damaged"),
    "deep": (deep, "manifest is damaged"),
    "foreign kind": (with_manifest(lambda m: {**m, "kind": "other"}), "is 'other' of schema 1; this version reads"),
    "foreign schema": (with_manifest(lambda m: {**m, "schema": 2}), "of schema 2; this version reads"),
    "odd key": (with_manifest(lambda m: m["entries"].update({"../x": m["entries"][KEY]})), "names '../x'"),
    "oversize": (with_manifest(huge), "manifest is damaged"),
    "negative": (with_manifest(negative), "manifest is damaged"),
    "no number of bytes": (with_manifest(a_number_as_text), "manifest is damaged"),
    "digest of another kind": (with_manifest(digest_as_number), "manifest is damaged"),
    "no name": (with_manifest(without_name), "manifest is damaged"),
    "another name": (with_manifest(another_name), "is not what the manifest says"),
    "traversal": (renamed(1, f"entries/{KEY}/../../../kernel.cubin"), "which is not in its manifest"),
    "absolute": (renamed(1, "/etc/cron.d/x"), "which is not in its manifest"),
    "one more": (added(f"entries/{KEY}/kernel.ptx"), "which is not in its manifest"),
    "twice": (added(f"entries/{KEY}/kernel.cubin"), "which is not in its manifest"),
    "symlink": (turned_into(tarfile.SYMTYPE), "is not a plain file"),
    "hard link": (turned_into(tarfile.LNKTYPE), "is not a plain file"),
    "device": (turned_into(tarfile.CHRTYPE), "is not a plain file"),
    "other bytes": (other_bytes, "is not what its manifest says"),
    "longer": (lambda parts: parts.__setitem__(1, (parts[1][0], parts[1][1] + b"x")), "bytes; allowed"),
    "one missing": (lambda parts: parts[:-1], "1 kernels of its manifest are missing"),
    "mixed": (mixed_order, "do not follow each other"),
    "damaged entry": (digest_of_damage, f"kernel {KEY} is damaged: the digest of kernel.cubin"),
    "schema of entry": (entry_of_another_schema, "has schema 9, not 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pack_is_refused_before_anything_is_written(here, name):
    change, message = BAD[name]
    pack = rebuilt(export_pack(here / "k.tar").path, change)
    for attempt in (lambda: import_pack(pack, here / "new"), lambda: read_pack(pack)):
        with pytest.raises(PackError, match=message) as caught:
            attempt()
        assert str(pack) in str(caught.value)
    assert not (here / "new").exists()


@pytest.mark.parametrize("keep", [0, 300, 0.5, 0.8])
@pytest.mark.parametrize("name", ["k.tar", "k.tgz"])
def test_cut_off_pack_is_refused(here, name, keep):
    pack = export_pack(here / name).path
    data = pack.read_bytes()
    inner = gzip.decompress(data) if name == "k.tgz" else data
    end = max(i for i in range(0, len(inner), 512) if any(inner[i : i + 512])) + 512
    size = len(data) if name == "k.tgz" else end
    pack.write_bytes(data[: keep if isinstance(keep, int) else int(size * keep)])
    with pytest.raises(PackError):
        import_pack(pack, here / "new")
    assert not (here / "new").exists()


def test_pack_that_is_not_there_or_no_pack(here):
    with pytest.raises(PackError, match="does not exist"):
        import_pack(here / "none.tar")
    (here / "text").write_text("hello " * 1000)
    with pytest.raises(PackError, match="is not a pack of megamoe-jit"):
        read_pack(here / "text")


def test_pack_that_changes_between_check_and_import(here, monkeypatch):
    pack = export_pack(here / "k.tar").path
    real = _pack.entries_in

    def swap(path, archive, manifest):
        yield from real(path, archive, manifest)
        export_pack(pack, [KEY])

    monkeypatch.setattr(_pack, "entries_in", swap)
    with pytest.raises(PackError, match="changed while it was read"):
        import_pack(pack, here / "new")
    assert not (here / "new").exists()


def test_cache_that_cannot_be_written(here):
    pack = export_pack(here / "k.tar").path
    (here / "file").write_text("")
    with pytest.raises(PackError, match="cannot be written"):
        import_pack(pack, here / "file" / "x")


@pytest.mark.parametrize("name", ["k.tar", "k.tgz"])
def test_no_damage_to_a_pack_is_anything_but_a_pack_error(here, name):
    """Changed bytes, mostly among the headers and the manifest."""
    whole = export_pack(here / name).path.read_bytes()
    chance = random.Random(name)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            data[chance.randrange(min(len(data), chance.choice((1024, len(data)))))] = chance.choice((0, 255, *b"xLg1"))
        (here / "broken").write_bytes(data)
        try:
            read_pack(here / "broken")
        except PackError:
            refused += 1
    assert refused > 100


def test_pack_may_be_read_by_everybody(here):
    assert Path(export_pack(here / "k.tar").path).stat().st_mode & 0o777 == 0o644
    assert os.path.isdir(here / "cache")
