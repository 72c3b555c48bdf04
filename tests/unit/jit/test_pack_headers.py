"""What packs refuse at once: headers that would have tarfile read whatever they ask for, arguments that are none."""

from __future__ import annotations

import os
import tarfile
import tracemalloc

import pytest

from megamoe_jit._errors import ConfigError, PackError
from megamoe_jit._jit.pack import export_pack, import_pack, read_pack
from megamoe_jit._jit.pack_file import MANIFEST
from megamoe_jit._settings.settings import override

DECLARED = 1 << 40  #: bytes, by the header
THERE = 64 << 20  #: bytes of the file, which takes no place on the disk
ENOUGH = 1 << 20  #: bytes of memory
END = bytes(2 * tarfile.BLOCKSIZE)


def header(kind: bytes, size: int = 0, extended: bool = False) -> bytes:
    """A header of one block; that of a GNU sparse file may say that more blocks of its map follow."""
    member = tarfile.TarInfo(MANIFEST)
    member.type, member.size = kind, size
    data = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    data[482] |= extended
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


#: One block of a sparse file's map, with all of its 21 places taken, which says that another follows.
MAP = padded(b"00000000001\0" * 42 + b"\1")
PAX = b"22 GNU.sparse.map=a,b\n"
FIRST = {
    "GNU long name": header(tarfile.GNUTYPE_LONGNAME, DECLARED),
    "GNU long link": header(tarfile.GNUTYPE_LONGLINK, DECLARED),
    "pax": header(tarfile.XHDTYPE, DECLARED),
    "global pax": header(tarfile.XGLTYPE, DECLARED),
    "Solaris pax": header(tarfile.SOLARIS_XHDTYPE, DECLARED),
    "GNU sparse": header(tarfile.GNUTYPE_SPARSE, extended=True) + MAP * 8192,
    "pax of a sparse file": header(tarfile.XHDTYPE, len(PAX)) + padded(PAX) + header(tarfile.REGTYPE) + END,
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("attempt", [read_pack, import_pack])
def test_a_header_of_anything_but_a_plain_file_is_refused_before_memory_is_spent_on_it(tmp_path, name, attempt):
    (tmp_path / "k.tar").write_bytes(FIRST[name])
    os.truncate(tmp_path / "k.tar", THERE)
    tracemalloc.start()
    try:
        with override(cache_dir=tmp_path / "cache"), pytest.raises(PackError) as caught:
            attempt(tmp_path / "k.tar")
        spent = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert spent < ENOUGH
    assert str(caught.value) == f"{tmp_path / 'k.tar'} is not a pack of megamoe-jit: '{MANIFEST}' is not a plain file"
    assert not (tmp_path / "cache").exists()


def test_a_path_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="allowed: the path of a file or directory"):
        read_pack(f"{tmp_path}/a\0b")


@pytest.mark.parametrize("what", [[3], [None], [b"ab"], 3])
def test_what_is_neither_key_nor_spec_is_not_exported(tmp_path, what):
    with override(cache_dir=tmp_path / "cache"), pytest.raises(ConfigError, match="allowed: keys and KernelSpecs"):
        export_pack(tmp_path / "k.tar", what)
    assert list(tmp_path.iterdir()) == []
