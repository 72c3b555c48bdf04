"""What packs, files and the environment hold cannot steer a terminal: no command prints their control characters."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cli import _io, cli
from megamoe_jit._cli._cache_options import _keys_beginning
from megamoe_jit._errors import ConfigError, PackError
from megamoe_jit._settings import settings as _settings
from megamoe_jit._settings.settings import override
from megamoe_jit._text import one_line, printable, several, shown
from tests.checkpoints import Model
from tests.commandline import SIZES, leaf_commands
from tests.stubs import KEY, REPO, fake_cubin, rewrite_meta

BAD = "\x1b]0;owned\x07\x9b31m\r\n\x7f\u202e\u2066x"
NAME = "c\x1b[31m\u202e\x7f"  # what a file may be called

#: Every command, with words that make it list something; None where that needs a GPU or another test.
WORDS: dict[str, tuple[str, ...] | None] = {
    "warmup": (*SIZES, "--dry-run"),
    "doctor": ("--no-trial",),
    "cache path": None,  # exact, for programs
    "cache ls": (),
    "cache info": (KEY[:12],),
    "cache stats": (),
    "cache verify": (),
    "cache prune": ("--dry-run", "--older-than", "0s"),
    "cache clear": ("--yes",),
    "cache rm": (KEY[:12],),
    "cache export": ("{place}/pack.tgz",),
    "cache import": ("{place}/pack.tgz",),
    "shapes ls": (),
    "explain": ("--shapes", "{place}/shapes.toml", "--tokens", "8"),
    "plan": ("--shapes", "{place}/shapes.toml", "--tokens", "8"),
    "render": (BAD,),
    "inspect": (KEY[:12],),
    "convert": ("{place}/model", "{place}/converted", "--format", "fp8"),
    "inspect-checkpoint": ("{place}/model",),
    "env": (),
    "demo": None,
    "verify": ("--list", "--filter", BAD),
    "bench": ("--shapes", BAD),
    "tune": ("--no-measure", "--data", "{place}/none.jsonl"),
    "completion": None,  # says nothing of this machine
}
SHAPES = f"[{json.dumps(BAD)}]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 1\nsource = {json.dumps(BAD)}\n"


def steering(text: str) -> list[str]:
    """The characters in a text that no listing may hold."""
    return [char for char in text if not (char.isprintable() or char in "\n\t")]


@pytest.fixture
def hostile(tmp_path: Path):
    """A cache with one entry whose metadata hold control characters in every text, in a folder of such a name."""
    root = tmp_path / NAME / "cache"
    root.parent.mkdir()
    cache = KernelCache(root)
    assert cache.store(KEY, fake_cubin(), BAD, {"registers": 168, "spill_bytes": 0})
    texts = ("entry", "created_at", "host", "package_version", "source_id")
    rewrite_meta(
        cache.entry_path(KEY),
        **dict.fromkeys(texts, BAD),
        nvrtc={"version": BAD, "build": BAD, "path": BAD},
        spec={"variant": BAD, BAD: BAD},
        options=[BAD],
        advisories=[BAD],
        files=[BAD],
        compile_ms={BAD: 1.0},
    )
    (tmp_path / NAME / "shapes.toml").write_text(SHAPES)
    Model(prefix=f"{BAD}.", layers=(1,), config={"model_type": BAD}).write(tmp_path / NAME / "model")
    with override(cache_dir=root, readonly_cache=(root,)):
        yield tmp_path / NAME


def test_the_sweep_has_every_command():
    assert set(WORDS) == {" ".join(words) for words in leaf_commands()}


@pytest.mark.parametrize("command", [name for name, words in WORDS.items() if words is not None])
def test_no_command_prints_a_control_character(command: str, hostile: Path, capfd):
    words = [word.replace("{place}", str(hostile)) for word in WORDS[command] or ()]
    for more in ([], ["--json"]):
        done = CliRunner().invoke(cli, [*command.split(), *words, *more])
        assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit), done.exc_info
        assert steering(done.stdout + done.stderr) == [], done.output
        assert done.output
    assert steering("".join(capfd.readouterr())) == []


def test_listings_keep_one_line_for_each_kernel(hostile: Path):
    plain = CliRunner().invoke(cli, ["cache", "ls"])
    assert [line[:12] for line in plain.stdout.splitlines()[1:]] in ([KEY[:12]] * 2, [])
    (found,) = _keys_beginning(KEY[:4], read_only_too=False) or [None]
    assert found is None or steering(found.help) == []


def test_the_environment_and_the_settings_file(tmp_path: Path):
    """In a new process, where the library warns of what it does not know before anybody has set up logging."""
    file = tmp_path / f"{NAME}.toml"
    file.write_text(f'{json.dumps(BAD)} = 1\nstrict = "warn"\nvariant = {json.dumps(BAD)}\n')
    environ = {**os.environ, "PYTHONPATH": REPO, "MEGAMOE_JIT_CONFIG": str(file), f"MEGAMOE_JIT_{NAME}\n": "1"}
    environ |= {"MEGAMOE_JIT_JOBS": BAD, "MEGAMOE_JIT_LOCK_DIR": f"/nonexistent/{NAME}", "PYTHONIOENCODING": "utf-8"}
    for words in (["env"], ["doctor", "--no-trial"], ["shapes", "ls", BAD], ["cache", "ls"]):
        done = subprocess.run(
            [sys.executable, "-m", "megamoe_jit", *words], env=environ, capture_output=True, timeout=60, check=False
        )
        assert steering((done.stdout + done.stderr).decode()) == []
        assert b"\\x1b" in done.stdout + done.stderr
        assert done.returncode in (2, 3)


def test_every_line_for_people_goes_through_one_door():
    """Only `_io` calls `click.echo`; elsewhere in the command line it would print what it is given."""
    for path in sorted((Path(REPO) / "megamoe_jit/_cli").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        used = {node.attr for node in calls if isinstance(node.value, ast.Name) and node.value.id == "click"}
        assert path.name == "_io.py" or not used & {"echo", "secho", "confirm", "prompt"}, path


def test_text_for_programs_is_exact_but_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    text = "int a;\x1b[31m\t\udcff\n"
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    _io.copy_out(text)
    out.flush()
    assert raw.getvalue() == b"int a;\x1b[31m\t\xff\n"

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(raw, encoding="utf-8"))
    _io.copy_out(text)
    sys.stdout.flush()
    assert raw.getvalue() == b"int a;\\x1b[31m\t\\udcff\n"


def test_errors_and_log_lines(caplog: pytest.LogCaptureFixture):
    assert str(ConfigError(f"a{BAD}b")) == "a\\x1b]0;owned\\x07\\x9b31m\\r\n\\x7f\\u202e\\u2066xb"
    assert isinstance(ConfigError(""), ValueError)
    assert str(PackError("two\nlines")) == "two\nlines"
    with caplog.at_level(logging.INFO, "megamoe_jit"):
        logging.getLogger("megamoe_jit").info("%s from %s", BAD, 7)
        logging.getLogger("megamoe_jit").info("%s from %s", "x", 7)
    assert steering(caplog.messages[0]) == []
    assert caplog.messages[0].endswith(" from 7")
    assert caplog.records[1].args == ("x", 7), "others may want the parts"
    record = logging.LogRecord("megamoe_jit", 40, "", 0, "failed", (), (ValueError, ValueError(BAD), None))
    assert steering(_settings._Printable("%(message)s").format(record)) == []


def test_words_of_text():
    assert printable("Größe … 中文\n\t") == "Größe … 中文\n\t"
    assert one_line("a\nb\tc\udc80") == "a\\nb\\tc\\udc80"
    assert shown("x" * 100) == "'" + "x" * 76 + "..."
    assert shown([1 << 20000]) == "a list too long to show"
    assert several("abc", 3) == "a, b, c"
    assert several((str(i) for i in range(5)), 3) == "0, 1, 2, and 2 more"
