"""Files that a user names: every kind of file at every place where one is read ends in one answer, at once."""

from __future__ import annotations

import codecs
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megamoe_jit._compile.render import render
from megamoe_jit._errors import ConfigError, RenderError
from megamoe_jit._files import read_plain, read_toml
from megamoe_jit._settings.settings import Settings, override
from megamoe_jit._settings.variables import PREFIX
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit.heuristics.presets import parse_shapes

SPEC = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
ENTRY = SPEC.template


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # an address is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


#: How to make each kind, and what is said of it.
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "exist|No such file"),
    "directory": (Path.mkdir, "Is a directory|does not exist"),
    "pipe": (os.mkfifo, "it is no regular file"),
    "link to a pipe": (lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path}.p")), "it is no regular file"),
    "socket": (_socket, "it is no regular file"),
    "device without an end": (lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), "it is no regular file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "terabyte": (_sparse, "it has more than"),
    "memory of the process": (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    "not UTF-8": (lambda path: path.write_bytes(b"x = '\xff'"), "utf-8|UTF-8"),
}


def _settings(path: Path) -> None:
    Settings.load({PREFIX + "CONFIG": str(path)})


def _shapes(path: Path) -> None:
    parse_shapes(str(path))


def _entry(path: Path) -> None:
    with override(kernels_src=path.parents[1]):
        render(SPEC)


def _room(path: Path) -> None:
    entry = path.parents[1] / ENTRY
    entry.parent.mkdir()
    entry.write_text('#include "a/room.toml"\n')
    with override(kernels_src=path.parents[1]):
        render(SPEC)


def _included(path: Path) -> None:
    entry = path.parents[1] / ENTRY
    entry.parent.mkdir()
    entry.write_text('{% include "a/room.toml" %}\n')
    with override(kernels_src=path.parents[1]):
        render(SPEC)


#: Where files are read: the path, and what reads it.
PLACES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "settings": ("a/settings.toml", _settings),
    "shapes": ("a/shapes.toml", _shapes),
    "template": (ENTRY, _entry),
    "room": ("a/room.toml", _room),
    "included template": ("a/room.toml", _included),
}


@pytest.fixture
def at_once() -> Callable[[Callable[[], None]], BaseException | None]:
    """Runs something that may hang, but not for long; what it raised."""

    def run(step: Callable[[], None]) -> BaseException | None:
        caught: list[BaseException] = []

        def body() -> None:
            try:
                step()
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it hangs"
        return caught[0] if caught else None

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_every_kind_of_file_at_every_place(place: str, kind: str, tmp_path: Path, at_once):
    name, read = PLACES[place]
    path = tmp_path / name
    path.parent.mkdir()
    make, said = KINDS[kind]
    make(path)
    error = at_once(lambda: read(path))
    assert type(error) in (ConfigError, RenderError), repr(error)
    assert re.search(said, str(error)), str(error)


def test_the_null_device_is_an_empty_file():
    assert read_plain(os.devnull) == b""
    assert Settings.load({PREFIX + "CONFIG": os.devnull}) == Settings(config=Path(os.devnull))


def test_a_file_may_be_as_long_as_its_bound(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 100)
    assert read_plain(path, 100) == b"a" * 100
    with pytest.raises(OSError, match="it has more than 99 B"):
        read_plain(path, 99)
    with pytest.raises(OSError, match="NUL"):
        read_plain("a\0b")


def test_a_byte_order_mark_and_line_ends_of_other_systems(tmp_path: Path):
    path = tmp_path / "x.toml"
    path.write_bytes(codecs.BOM_UTF8 + b'strict = "warn"\r\njobs = 3\r\n')
    assert read_toml(path) == {"strict": "warn", "jobs": 3}
    _settings(path)
    path.write_bytes(codecs.BOM_UTF16_LE + "jobs = 3".encode("utf-16-le"))
    with pytest.raises(ConfigError, match="x.toml is not valid TOML: .*utf-8"):
        _settings(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 2000, "nested too deep"),
        ("x = " + "{a = " * 2000, "nested too deep"),
        ("x = " + "1" * 5000, "digits"),
        (".".join("a" * 100_000) + " = 1", "more than 256 dots in one line"),
        ("[" + ".".join("a" * 100_000) + "]", "more than 256 dots in one line"),
        ("x = 1\nx = 2", "overwrite"),
    ],
    ids=["lists", "tables", "digits", "dotted key", "dotted table", "twice"],
)
def test_toml_that_is_too_much(text: str, said: str, tmp_path: Path):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_toml(path)
    for read in (_settings, _shapes):
        with pytest.raises(ConfigError, match=f"x.toml is not valid TOML: .*{said}"):
            read(path)
