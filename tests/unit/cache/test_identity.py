"""A kernel is what its key names: an entry or a pack that says so and is another is refused, whatever digests agree."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.entry import CUBIN, META, SOURCE, Damaged, verify_files
from megamoe_jit._cache.metadata import dump_metadata
from megamoe_jit._errors import PackError
from megamoe_jit._jit import pack_file as _pack_file
from megamoe_jit._jit.pack import export_pack, import_pack, read_pack
from megamoe_jit._settings.settings import override
from tests.stubs import fake_cubin, fake_kernel

ONE = fake_kernel("same", "source one")
TWO = fake_kernel("same", "source two", b"other code")


@pytest.fixture
def here(tmp_path):
    with override(cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks"):
        yield tmp_path


def files_of(tmp_path, key, cubin, source, meta):
    """The files of an entry that says of itself whatever it is given, with digests that agree."""
    cache = KernelCache(tmp_path / "made")
    cache.remove([key])
    assert cache.store(key, cubin, source, meta)
    return {name: (cache.entry_path(key) / name).read_bytes() for name in (META, SOURCE, CUBIN)}


def swapped_options():
    return {**ONE[3], "options": [*ONE[3]["options"], "-lineinfo"]}


def other_compiler(**changes):
    return {**ONE[3], "nvrtc": {**ONE[3]["nvrtc"], **changes}}


def without(name):
    return {field: value for field, value in ONE[3].items() if field != name}


#: what an entry of the first key might hold instead, and what is said of it
FORGED = {
    "source of another": ((ONE[0], ONE[1], TWO[2], ONE[3]), "are not those of its key"),
    "source id of another": ((ONE[0], ONE[1], ONE[2], {**ONE[3], "source_id": TWO[3]["source_id"]}), "its source_id"),
    "all of another but the key": ((ONE[0], *TWO[1:]), "are not those of its key"),
    "other options": ((ONE[0], ONE[1], ONE[2], swapped_options()), "are not those of its key"),
    "another compiler": ((*ONE[:3], other_compiler(version="13.0")), "are not those of its key"),
    "another build": ((*ONE[:3], other_compiler(build="other")), "are not those of its key"),
    "another name": ((*ONE[:3], {**ONE[3], "entry": "other"}), "are not those of its key"),
    "another architecture": ((*ONE[:3], {**ONE[3], "options": ["--gpu-architecture=sm_100a"]}), "compiled for sm_100a"),
    "no compiler": ((*ONE[:3], without("nvrtc")), "do not say how it was compiled"),
    "no options": ((*ONE[:3], without("options")), "do not say how it was compiled"),
    "no name": ((*ONE[:3], without("entry")), "do not say how it was compiled"),
    "no source id": ((*ONE[:3], without("source_id")), "its source_id"),
    "binary of another name": ((ONE[0], fake_cubin(b"", "other"), *ONE[2:]), "defines other instead of same"),
    "binary without a kernel": ((ONE[0], fake_cubin(bytes(200)), *ONE[2:]), "cannot be read"),
    "other parameters": ((*ONE[:3], {**ONE[3], "param_bytes": 64}), "param_bytes of its binary is 0, not 64"),
    "other registers": ((*ONE[:3], {**ONE[3], "registers": 168}), "registers of its binary is 0, not 168"),
}


@pytest.mark.parametrize("name", FORGED)
def test_verify_finds_what_is_not_what_its_key_names(here, name):
    entry, says = FORGED[name]
    files = files_of(here, *entry)
    with pytest.raises(Damaged, match=says):
        verify_files(ONE[0], files)
    cache = KernelCache(here / "made")
    (problem,) = cache.verify()
    assert (problem.key, says in problem.message) == (ONE[0], True)
    with pytest.raises(PackError, match=says):
        export_pack(here / "k.tar", cache=cache)
    assert cache.verify(fix=True)[0].fixed
    assert cache.verify() == []


def pack_of(path, files, key, kernel="same"):
    """A pack of one entry as it is, with a manifest that agrees."""
    digests = {name: {"bytes": len(data), "sha256": _pack_file.sha256(data)} for name, data in files.items()}
    entries = {key: {"kernel": kernel, "files": digests}}
    manifest = {"kind": "megamoe-jit-pack", "schema": 1, "package_version": "0", "entries": entries}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        members = {f"entries/{key}/{name}": files[name] for name in (CUBIN, META, SOURCE)}
        for name, data in {"manifest.json": json.dumps(manifest).encode(), **members}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", FORGED)
def test_no_pack_brings_what_is_not_what_its_key_names(here, name):
    entry, says = FORGED[name]
    pack = pack_of(here / "k.tar", files_of(here, *entry), ONE[0])
    for attempt in (lambda: read_pack(pack), lambda: import_pack(pack), lambda: import_pack(pack, here / "new")):
        with pytest.raises(PackError, match=says):
            attempt()
    assert user_cache().keys() == []
    assert not (here / "new").exists()


def test_a_pack_that_is_what_it_says_is_taken(here):
    pack = pack_of(here / "k.tar", files_of(here, *ONE), ONE[0])
    assert import_pack(pack).imported == (ONE[0],)


def test_two_entries_whose_binaries_changed_places(here):
    """With digests that are right: of two kernels of other names nothing else tells."""
    first, second = fake_kernel("first"), fake_kernel("second")
    cache = user_cache()
    cache.store(first[0], second[1], *first[2:])
    cache.store(second[0], first[1], *second[2:])
    assert {problem.key for problem in cache.verify()} == {first[0], second[0]}
    assert not cache.usable(first[0], "first")
    assert cache.load(first[0], "first") is None
    assert len(cache.quarantined()) == 1


def test_a_small_pack_does_not_grow_beyond_its_limit(here, monkeypatch):
    """No size of the manifest makes up for another."""
    monkeypatch.setattr(_pack_file, "PACK_LIMIT", 10)
    pack = pack_of(here / "k.tar", files_of(here, *ONE), ONE[0])
    with pytest.raises(PackError, match="allowed: 10"):
        read_pack(pack)


def test_metadata_with_an_own_digest_that_is_wrong(here):
    files = files_of(here, *ONE)
    other = dump_metadata({**json.loads(files[META]), "registers": 3})
    with pytest.raises(Damaged, match="meta.json has another digest than it says"):
        verify_files(ONE[0], {**files, META: files[META][:90] + other[90:]})
