"""Small things a user meets at once: summaries that are cut, shapes without their option, a file that is no pack."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._cli._live import _all_fitting
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FP8
from megamoe_jit.heuristics.presets import preset, preset_names
from megamoe_jit.heuristics.select import choose
from megamoe_jit.heuristics.tables import tables
from tests.commandline import leaf_commands


def invoke(*words: str):
    return CliRunner().invoke(cli, list(words))


def test_no_summary_is_cut():
    groups = {words[:-1] for words in leaf_commands()}
    assert groups == {(), ("cache",), ("shapes",)}
    for group in groups:
        shown = invoke(*group, "--help")
        assert shown.exit_code == 0
        assert "..." not in shown.stdout.replace("[ARGS]...", "")
    assert "which are marked." in invoke("cache", "--help").stdout


@pytest.mark.parametrize("words", [words for words in leaf_commands() if len(words) == 1])
def test_shapes_without_their_option(words: tuple[str, ...]):
    takes_shapes = any("--shapes" in parameter.opts for parameter in _command(words).params)
    if takes_shapes:
        tokens = ("--tokens", "8") if words[0] in ("explain", "plan") else ()
        done = invoke(*words, *tokens, "v4-flash", "v4-pro")
        assert done.exit_code == 2
        assert f"shapes are named with --shapes: megamoe-jit {words[0]} --shapes v4-flash,v4-pro\n" in done.stderr
    else:
        assert "--shapes" not in invoke(*words, "a", "b", "c").stderr


def _command(words: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return command


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"hello\n", b"\0" * 5000, bytes(range(256)) * 100, gzip.compress(b"hello"), _tar(), gzip.compress(_tar())],
    ids=["empty", "text", "zeros", "bytes", "gzip", "tar", "tar.gz"],
)
def test_a_file_that_is_no_pack(data: bytes, tmp_path: Path):
    file = tmp_path / "x.tgz"
    file.write_bytes(data)
    done = invoke("cache", "import", str(file), "--cache-dir", str(tmp_path / "cache"))
    assert (done.exit_code, done.stdout) == (4, "")
    assert done.stderr.startswith(f"Error: {file} is not a pack of megamoe-jit: ")


def test_kernels_never_look_the_same_on_a_narrow_terminal():
    shapes = [preset(name).shape for name in preset_names()] + [MoEShape(h, 2048, 256, 6) for h in (1024, 2048, 4096)]
    names = list(
        dict.fromkeys(KernelSpec(shape, variant).kernel_name for shape in shapes for variant in Variant.reading(FP8))
    )
    for room in (6, 10, 19, 30, 80):
        shown = _all_fitting(names, room)
        assert len(set(shown.values())) == len(names)
        assert max(map(len, shown.values())) <= max(room, 15)
    assert list(_all_fitting(names, 80).values()) == names


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.devices[0])
def test_explain_of_a_layer_whose_share_was_measured_names_the_ranks(table):
    for share in table.rules:
        whole = MoEShape(share.hidden, share.intermediate, share.experts * 8, share.topk)
        if whole in table.rules:
            continue
        reason = choose(whole, 64, gpu=table.devices[0]).reasons[0]
        assert "(--ranks 8)" in reason or any(f"--ranks {n})" in reason for n in (1, 2, 4)), reason
        assert f"measured on {table.devices[0]}" in choose(whole, 64, ranks=8, gpu=table.devices[0]).reasons[0]
    strange = MoEShape(1152, 128, 8, 2)
    assert f"nobody measured this shape on {table.devices[0]}; " in choose(strange, 64, gpu=table.devices[0]).reasons[0]
