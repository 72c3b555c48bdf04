"""The settings file: what is read from it, what wins, and that nothing in it is dropped without a word."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from megamoe_jit._errors import ConfigError
from megamoe_jit._settings import settings as _settings
from megamoe_jit._settings.settings import Settings, override
from megamoe_jit._settings.variables import PREFIX, VARIABLES


@pytest.fixture
def file(tmp_path):
    """Writes a settings file; returns what it gives."""
    path = tmp_path / "settings.toml"

    def write(text, **environ):
        path.write_text(text)
        return Settings.load({PREFIX + "CONFIG": str(path), **{PREFIX + k: v for k, v in environ.items()}})

    write.path = path
    return write


def test_environment_wins_over_file_wins_over_default(file, tmp_path):
    settings = file('strict = "warn"\njobs = 3\n', JOBS="5")
    assert (settings.strict, settings.jobs, settings.timeout_s) == ("warn", 5, 100.0)
    sources = [settings.source(name) for name in ("strict", "jobs", "timeout_s", "config")]
    assert sources == [f"file {file.path}", "environment", "default", "environment"]
    assert settings == Settings(config=file.path, strict="warn", jobs=5)
    assert hash(settings) == hash(Settings(config=file.path, strict="warn", jobs=5))


def test_every_kind_of_value_in_a_file(file, tmp_path):
    settings = file(
        'cache-dir = "sub/cache"\nreadonly_cache = ["a", "/b"]\nno_cache = true\ncache_max_bytes = "2G"\n'
        'lock_timeout_s = 1.5\nptxas_options = ["-a", "-b"]\ndump_dir = "~/x"\nnvrtc = ""\ndisable_jit = 0\n'
    )
    assert settings.cache_dir == tmp_path / "sub" / "cache"
    assert settings.readonly_cache == (tmp_path / "a", Path("/b"))
    assert (settings.no_cache, settings.cache_max_bytes, settings.lock_timeout_s) == (True, 2 << 30, 1.5)
    assert settings.ptxas_options == ("-a", "-b")
    assert settings.dump_dir == Path("~/x").expanduser()
    assert (settings.nvrtc, settings.source("nvrtc"), settings.disable_jit) == (None, "default", False)
    assert file("cooperative_threshold = 256\n").cooperative_threshold == 256
    assert file('readonly_cache = "a:b"\n').readonly_cache[1].name == "b"
    assert file("[tool.megamoe-jit]\njobs = 2\n[tool.other]\nx = 1\n").jobs == 2
    assert file("[tool.other]\njobs = 2\n").source("jobs") == "default"


def test_a_table_that_is_nearly_ours_is_reported(file, caplog):
    assert file("[tool.megamoe_jit]\njobs = 2\n").source("jobs") == "default"
    assert "megamoe_jit (did you mean megamoe-jit?)" in caplog.text


@pytest.mark.parametrize("table", ["[tool.megamoe-jit]\nstrict = 'warn'\n", "[tool.ruff]\nline-length = 100\n"])
def test_keys_at_the_top_level_count_beside_tables_of_tools(file, tmp_path, table, caplog):
    settings = file(f"cache_dir = 'x'\n{table}")
    assert (settings.cache_dir, settings.source("cache_dir")) == (tmp_path / "x", f"file {file.path}")
    assert settings.strict == ("warn" if "strict" in table else "error")
    assert (settings.ignored, caplog.text) == ({}, "")


def test_a_pyproject_is_read_in_both_places_and_other_tables_are_left_alone(file, caplog):
    settings = file(
        'jobs = 3\n[project]\nname = "x"\n[build-system]\nrequires = []\n[dependency-groups]\ndev = []\n'
        "[tool.ruff.lint]\nselect = []\n[[tool.uv.index]]\nname = 'x'\n[[tool.others]]\nx = 1\n"
        "[tool.megamoe-jit]\ndebug = true\n"
    )
    assert (settings.jobs, settings.debug) == (3, True)
    assert (settings.ignored, caplog.text) == ({}, "")


def test_the_table_wins_over_the_top_level_and_says_so(file, caplog):
    settings = file("jobs = 3\nstrict = 'warn'\n[tool.megamoe-jit]\njobs = 2\nstrict = 'warn'\n")
    assert (settings.jobs, settings.strict) == (2, "warn")
    assert settings.ignored == {"jobs": "tool.megamoe-jit.jobs wins"}
    assert settings.unknown == set()
    assert [record.getMessage() for record in caplog.records] == [
        f"keys in {file.path} that another one overrules are ignored: jobs (tool.megamoe-jit.jobs wins)"
    ]
    assert file("jobs = 3\n[tool.megamoe-jit]\njobs = ''\n").jobs == 3, "an empty value is none"
    again = file("lock-dir = 'a'\nlock_dir = 'b'\n")
    assert (again.lock_dir.name, again.ignored) == ("b", {"lock-dir": "lock_dir wins"})


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        ("[tool.megamoe-jit]\njob = 1", "tool.megamoe-jit.job", "did you mean jobs?"),
        ("[tool.megamoe]\njobs = 1", "tool.megamoe", "did you mean megamoe-jit?"),
        ("[megamoe_jit]\njobs = 1", "megamoe_jit", "did you mean tool.megamoe-jit?"),
        ("[tool]\njobs = 1", "tool.jobs", "did you mean tool.megamoe-jit.jobs?"),
        ("[tool]\nx = 1", "tool.x", ""),
        ("tool = 1", "tool", ""),
        ("MEGAMOE_JIT_JOBS = 1", "MEGAMOE_JIT_JOBS", "did you mean jobs?"),
        ("megamoe-jit-nvrtc = ['/x']", "megamoe-jit-nvrtc", "did you mean nvrtc?"),
        ("LOCK-DIR = '/x'", "LOCK-DIR", "did you mean lock_dir?"),
        ("[tool.megamoe-jit]\nMEGAMOE_JIT_JOBS = 1", "tool.megamoe-jit.MEGAMOE_JIT_JOBS", "did you mean jobs?"),
        ("[tool]\nMEGAMOE_JIT_JOBS = 1", "tool.MEGAMOE_JIT_JOBS", "did you mean tool.megamoe-jit.jobs?"),
        ("megamoe_jit = 1", "megamoe_jit", ""),
        ("[tool]\nmegamoe_jit = 1", "tool.megamoe_jit", ""),
        ("[[tool.megamoe_jit]]\njobs = 1", "tool.megamoe_jit", "did you mean megamoe-jit?"),
        ("zzz = 1\n[tool.ruff]", "zzz", ""),
    ],
)
def test_nothing_in_a_file_is_dropped_without_a_word(file, caplog, text, name, why):
    settings = file(text)
    assert settings == Settings(config=file.path)
    assert settings.ignored == {name: why}
    assert settings.unknown == {name}
    assert f"unknown keys in {file.path} are ignored: {name}{f' ({why})' if why else ''}" in caplog.text


def test_place_is_where_to_change_a_value(file):
    settings = file("strict = 'warn'\n", JOBS="5")
    assert settings.place("jobs") == "MEGAMOE_JIT_JOBS"
    assert settings.place("strict") == f"strict in the settings file {file.path}"
    assert settings.place("debug") == "MEGAMOE_JIT_DEBUG"
    with override(debug=True) as given:
        assert given.place("debug") == "the argument debug (without it, MEGAMOE_JIT_DEBUG)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs = true", "jobs = True is not allowed; allowed: a whole number, one or more"),
        ("jobs = 0", "jobs = 0 is not allowed; allowed: a whole number, one or more"),
        ("jobs = [1]", r"jobs = \[1\] is not allowed; allowed: a whole number, one or more"),
        ("cooperative_threshold = 1.5", "allowed: a whole number, zero or more"),
        ("cache_max_bytes = []", "allowed: a number of bytes, such as 1073741824, 500M or 2GiB"),
        ("strict = 1", "strict = 1 is not allowed; allowed: error, warn, ignore"),
        ('strict = "fatal"', "strict = 'fatal' is not allowed; allowed: error, warn"),
        ("ptxas_options = [1]", r"ptxas_options = \[1\] is not allowed; allowed: printable words"),
        ("cache_dir = {}", "is not allowed; allowed: path"),
        ("no_cache = 2.5", "no_cache = 2.5 is not allowed; allowed: 1, true, yes, on or 0, false, no, off"),
        ("x = ", "is not valid TOML"),
        ("tool = {megamoe-jit = 1}", "tool.megamoe-jit must be a table"),
    ],
)
def test_bad_file_says_which_and_what(file, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        file(text)
    assert str(file.path) in str(caught.value)


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v.kind not in ("path", "paths")], ids=lambda v: v.field)
def test_a_wrong_type_in_a_file_is_answered_as_a_wrong_text_in_the_environment(file, variable):
    """Of paths no text is wrong."""
    with pytest.raises(ConfigError) as by_type:
        file(f"{variable.field} = {{}}")
    with pytest.raises(ConfigError) as by_text:
        Settings.load({variable.name: "\0"})
    assert str(by_type.value).partition(" allowed; ")[2] == str(by_text.value).partition(" allowed; ")[2] != ""


def test_what_is_wrong_can_be_collected(file):
    faults = []
    environ = {PREFIX + "CONFIG": str(file.path), PREFIX + "STRICT": "foo", PREFIX + "DEBUG": "1"}
    file.path.write_text("jobs = 0\nstrict = 'warn'\ndebug = 7\nl2_sides = false\n")
    settings = Settings.load(environ, faults)
    assert [(fault.field, fault.value, fault.source) for fault in faults] == [
        ("strict", "foo", "environment"),
        ("jobs", 0, f"file {file.path}"),
        ("debug", 7, f"file {file.path}"),
    ]
    assert [fault.message for fault in faults][1:2] == [
        f"settings file {file.path}: jobs = 0 is not allowed; allowed: a whole number, one or more"
    ]
    assert (settings.source("jobs"), settings.debug, settings.l2_sides) == ("default", True, False)
    file.path.write_text("jobs = ")
    faults.clear()
    assert Settings.load(environ, faults).source("jobs") == "default"
    assert [(fault.field, fault.source) for fault in faults] == [("strict", "environment"), ("config", "environment")]


def test_file_that_cannot_be_read(file, tmp_path, monkeypatch, caplog):
    with pytest.raises(ConfigError, match="none.toml .* does not exist"):
        Settings.load({PREFIX + "CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="cannot read settings file"):
        Settings.load({PREFIX + "CONFIG": str(tmp_path)})
    monkeypatch.setattr(_settings, "default_config_file", lambda: Path(os.devnull) / "config.toml")
    assert (Settings.load({}), caplog.records) == (Settings(), []), "a home that is no directory has none"
    monkeypatch.setattr(_settings, "default_config_file", lambda: tmp_path)
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        settings = Settings.load({})
    assert (settings, settings.ignored) == (Settings(), {"all of it": "cannot be read: Is a directory"})
    assert len(caplog.records) == 1


def test_unknown_keys_of_a_file_give_one_warning(file, caplog):
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        file('job = 1\nconfig = "x"\nzzz = 1\n')
    assert len(caplog.records) == 1
    assert re.search(r"keys in .*: config.*, job \(did you mean jobs\?\), zzz", caplog.text)
