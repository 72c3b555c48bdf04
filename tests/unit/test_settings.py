"""The environment table: every variable parses, refuses nonsense by name, and is documented once."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest

from megamoe_jit import _settings
from megamoe_jit._errors import ConfigError
from megamoe_jit._settings import PREFIX, VARIABLES, Settings, get_settings, override

GOOD = {
    "CACHE_DIR": ("/x/cache", Path("/x/cache")),
    "DISABLE_JIT": ("yes", True),
    "NVRTC": ("/x/libnvrtc.so.12", Path("/x/libnvrtc.so.12")),
    "STRICT": ("WARN", "warn"),
    "DUMP_DIR": ("/x/dump", Path("/x/dump")),
    "LOG_LEVEL": ("Debug", "debug"),
    "TIMEOUT_S": ("2.5", 2.5),
    "VARIANT": ("pingpong", "pingpong"),
    "COOPERATIVE_THRESHOLD": ("0", 0),
    "KERNELS_SRC": ("/x/src", Path("/x/src")),
    "LOCK_DIR": ("/x/locks", Path("/x/locks")),
    "LOCK_TIMEOUT_S": ("0", 0.0),
    "JOBS": ("3", 3),
    "DEBUG": ("on", True),
    "PTXAS_OPTIONS": (" --a=1  -b ", ("--a=1", "-b")),
}
BAD = {
    "DISABLE_JIT": "maybe",
    "STRICT": "fatal",
    "LOG_LEVEL": "loud",
    "TIMEOUT_S": "0",
    "VARIANT": "both",
    "COOPERATIVE_THRESHOLD": "-1",
    "LOCK_TIMEOUT_S": "nan",
    "JOBS": "0",
    "DEBUG": "2",
}


def test_table_and_fields_are_the_same_set():
    assert {v.field for v in VARIABLES} == {f.name for f in dataclasses.fields(Settings)}
    assert {v.name for v in VARIABLES} == {PREFIX + name for name in GOOD}
    assert all(v.meaning.endswith(".") and v.type and v.default for v in VARIABLES)


@pytest.mark.parametrize("name", GOOD)
def test_value_is_parsed(name):
    text, expected = GOOD[name]
    value = getattr(Settings.from_env({PREFIX + name: text}), name.lower())
    assert value == expected
    assert type(value) is type(expected) or isinstance(value, Path)


@pytest.mark.parametrize("name", BAD)
def test_bad_value_names_variable_value_and_allowed(name):
    with pytest.raises(ConfigError, match=f"{PREFIX}{name}='{BAD[name]}' is not allowed; allowed: .+"):
        Settings.from_env({PREFIX + name: BAD[name]})


def test_defaults_and_empty_values():
    settings = Settings.from_env({PREFIX + "JOBS": "", PREFIX + "STRICT": "  "})
    assert settings == Settings()
    assert (settings.strict, settings.timeout_s, settings.cooperative_threshold) == ("error", 100.0, 256)
    assert settings.jobs >= 1
    assert settings.cache_dir.name == "megamoe-jit"


def test_default_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert Settings().cache_dir == Path("/x/cache/megamoe-jit")


def test_unknown_names_give_one_warning(caplog):
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        Settings.from_env({PREFIX + "CACHEDIR": "1", PREFIX + "ZZZ": "1", "OTHER": "1"})
    assert len(caplog.records) == 1
    assert re.search(r"CACHEDIR \(did you mean MEGAMOE_JIT_CACHE_DIR\?\), MEGAMOE_JIT_ZZZ", caplog.text)


def test_relative_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Settings.from_env({PREFIX + "CACHE_DIR": "c"}).cache_dir == tmp_path / "c"


def test_override_nests_and_restores():
    before = get_settings()
    with override(strict="warn") as outer:
        assert get_settings() is outer
        with override(jobs=7):
            assert (get_settings().strict, get_settings().jobs) == ("warn", 7)
        assert get_settings() is outer
    assert get_settings() is before
    with pytest.raises(TypeError), override(no_such_field=1):
        pass


def test_environment_is_read_once(monkeypatch):
    monkeypatch.setattr(_settings, "_current", None)
    monkeypatch.setenv(PREFIX + "STRICT", "warn")
    assert get_settings().strict == "warn"
    monkeypatch.setenv(PREFIX + "STRICT", "ignore")
    assert get_settings().strict == "warn"


def test_every_variable_read_anywhere_is_in_the_table():
    package = Path(_settings.__file__).parent
    known = {v.name for v in VARIABLES}
    used = set()
    for path in package.rglob("*.py"):
        used |= set(re.findall(r"MEGAMOE_JIT_[A-Z][A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert used <= known
