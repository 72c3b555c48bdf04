"""Everything that can be wrong with the bytes of an entry: each bit of its files, each type of its metadata."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from click.testing import CliRunner

from megamoe_jit._cache.entry import CUBIN, META, SOURCE, Damaged, verify_files
from megamoe_jit._cache.metadata import Metadata, MetaError, dump_metadata, read_metadata
from megamoe_jit._cli import cli
from tests.stubs import fake_kernel, rewrite_meta

FULL = {
    "spec": {"shape": {"hidden": 256}, "variant": "pingpong", "ranks": 1, "fast_math": True, "timeline": False},
    "files": ["kernels/entry.cuh.j2"],
    "package_version": "0.1.0",
    "registers": 0,
    "stack_bytes": 0,
    "spill_bytes": 0,
    "static_shared_bytes": 0,
    "dynamic_shared_bytes": 1024,
    "param_bytes": 0,
    "max_threads": 0,
    "diagnostics": 1,
    "advisories": ["C7510: slow"],
    "compile_ms": {"total": 1.5},
}
DEEP = [[[[[[]]]]]]
#: values that are not of a field's type, by that type
WRONG = {
    "int": [None, True, -1, 10**30, 1.5, math.nan, "x", [], {}],
    "str": [None, True, 1, 1.5, "\ud800", "\x1b[31m", "two\nlines", [], {}],
    "list[str]": [None, True, 1, "x", {}, [1], [None], [[]], ["\x07"], ["\ud800"]],
    "dict[str, Any]": [None, 1, "x", [], {"\x1b": 1}, {"x": "\ud800"}, {"x": math.nan}, {"x": 10**30}, {"x": DEEP}],
    "dict[str, float]": [
        None,
        1,
        "x",
        [],
        {"\x1b": 1},
        *({"x": v} for v in (None, True, "1", -1, math.inf, 10**30, [])),
    ],
    "CompilerMeta": [None, 1, "12.9", [], {"\n": "x"}, *({"version": v} for v in (None, 12.9, ["12"], {}, "\ud800"))],
}


def kernel(number=0):
    key, cubin, source, meta = fake_kernel(f"kernel_{number}", f"source {number}\n")
    return key, cubin, source, {**meta, **FULL}


@pytest.fixture
def files(cache):
    """Key and files of a whole entry, with everything that metadata can hold."""
    key, *rest = kernel()
    assert cache.store(key, *rest)
    found = {name: (cache.entry_path(key) / name).read_bytes() for name in (META, SOURCE, CUBIN)}
    assert set(verify_files(key, found)) == set(Metadata.__annotations__)
    return key, found


@pytest.mark.parametrize("name", [META, SOURCE, CUBIN])
def test_every_bit_of_an_entry_counts(files, name):
    key, whole = files
    unseen = []
    for bit in range(8 * len(whole[name])):
        data = bytearray(whole[name])
        data[bit // 8] ^= 1 << bit % 8
        try:
            verify_files(key, {**whole, name: bytes(data)})
        except Damaged:
            continue
        unseen.append(bit)
    assert unseen == []


@pytest.mark.parametrize("name", [META, SOURCE, CUBIN])
def test_every_cut_of_an_entry_counts(files, name):
    key, whole = files
    for size in range(len(whole[name])):
        with pytest.raises(Damaged):
            verify_files(key, {**whole, name: whole[name][:size]})


def test_metadata_of_earlier_versions_have_no_digest_and_no_field_that_is_unknown(files):
    key, whole = files
    meta = json.loads(whole[META])
    del meta["meta_sha256"]
    earlier = json.dumps(meta, indent=1, sort_keys=True).encode()
    assert verify_files(key, {**whole, META: earlier}) == meta
    for name in ("meta_sha257", "meta_sha256"):
        with pytest.raises(MetaError, match=f"has a field '{name}' that is not known"):
            read_metadata(json.dumps({**meta, name: "0" * 64}).encode())
    assert read_metadata(dump_metadata({**meta, "of a later version": {"x": [1]}}))


@pytest.mark.parametrize("field", ["files", "nvrtc", "options", "spec"])
def test_fields_that_entries_have_in_common_are_each_entrys_own(files, field):
    """They are parsed and checked once for all: of no entry is anything believed that stands in another's."""
    meta = json.loads(files[1][META])
    del meta["meta_sha256"]
    other = {**meta, field: {"version": "1"} if isinstance(meta[field], dict) else ["another"]}
    without = {name: value for name, value in meta.items() if name != field}
    for each in (meta, other, without, meta, other):
        assert read_metadata(dump_metadata(each)) == each
    later = {**meta, "schema": 2, field: 7}
    assert read_metadata(dump_metadata(later)) == later  # means something else there, and is no damage


def test_metadata_in_any_layout_are_read_alike(files):
    """The digest is over whatever stands there; fields are told apart by their lines only where these are ours."""
    meta = json.loads(files[1][META])
    del meta["meta_sha256"]
    ours, begin = dump_metadata(meta), len('{\n "meta_sha256": "')
    for body in (json.dumps(meta)[1:], json.dumps(meta, indent=1)[2:] + "\n", json.dumps(meta, indent=0)[2:]):
        digest = hashlib.sha256(b"{\n" + body.encode()).hexdigest().encode()
        signed = ours[:begin] + digest + b'",\n' + body.encode()
        assert read_metadata(signed) == meta


def test_metadata_are_bounded(files):
    meta = json.loads(files[1][META])
    with pytest.raises(MetaError, match="more than any"):
        read_metadata(dump_metadata({**meta, "files": ["x" * 1000] * 2000}))


def wrong(field):
    """Values that `field` must not have."""
    return WRONG[Metadata.__annotations__[field].__forward_arg__]


@pytest.mark.parametrize("field", Metadata.__annotations__)
def test_every_wrong_type_in_metadata_is_damage(files, field):
    meta = json.loads(files[1][META])
    del meta["meta_sha256"]
    assert read_metadata(dump_metadata(meta)) == meta
    for value in wrong(field):
        if field == "schema" and type(value) is int:
            continue  # another version's: nothing else of it is read
        with pytest.raises(MetaError):
            read_metadata(dump_metadata({**meta, field: value}))
    for value in ("\ud800", math.nan, 10**30, DEEP, {"\x1b": 1}):
        with pytest.raises(MetaError):
            read_metadata(dump_metadata({**meta, "of a later version": value}))


def test_no_command_shows_metadata_of_a_wrong_type_or_ends_in_a_traceback(cache):
    """One damaged entry for each field, beside a whole one: as a pack that does not verify might leave them."""
    good = kernel()
    assert cache.store(*good)
    keys = []
    for number, field in enumerate(Metadata.__annotations__, start=1):
        key, *rest = kernel(number)
        assert cache.store(key, *rest)
        rewrite_meta(cache.entry_path(key), **{field: wrong(field)[number % len(wrong(field))]})
        keys.append(key)

    def run(*words):
        done = CliRunner().invoke(cli, [*words, "--cache-dir", str(cache.root)])
        assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
        return done

    listed = json.loads(run("cache", "ls", "--json").stdout)
    assert ([entry["key"] for entry in listed["entries"]], listed["damaged"]) == ([good[0]], len(keys))
    assert all(run("cache", *words).exit_code == 0 for words in (("ls",), ("stats",), ("info", good[0])))
    for key in keys:
        for words in (("cache", "info", key), ("inspect", key), ("cache", "export", str(cache.root / "pack.tar"), key)):
            assert run(*words).exit_code == 4, words
    assert run("cache", "verify").exit_code == 4
    assert run("cache", "verify", "--fix").exit_code == 0
    assert cache.keys() == [good[0]]
