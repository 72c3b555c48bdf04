"""The environment table: every variable parses, refuses nonsense by name, and is documented once."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import pytest

from megamoe_jit._errors import ConfigError
from megamoe_jit._settings import settings as _settings
from megamoe_jit._settings import variables as _variables
from megamoe_jit._settings.read import read_environment
from megamoe_jit._settings.settings import Settings, get_settings, lenient, override
from megamoe_jit._settings.variables import PREFIX, VARIABLES, default_cache_dir, default_config_file, parse_size
from tests.stubs import fail_with

GOOD = {
    "CONFIG": ("/x/c.toml", Path("/x/c.toml")),
    "CACHE_MAX_BYTES": ("1.5 GiB", 3 << 29),
    "READONLY_CACHE": ("/x/a: :/x/b", (Path("/x/a"), Path("/x/b"))),
    "NO_CACHE": ("1", True),
    "CACHE_DIR": ("/x/cache", Path("/x/cache")),
    "DISABLE_JIT": ("yes", True),
    "NVRTC": ("/x/libnvrtc.so.12", Path("/x/libnvrtc.so.12")),
    "STRICT": ("WARN", "warn"),
    "DUMP_DIR": ("/x/dump", Path("/x/dump")),
    "L2_SIDES": ("off", False),
    "LOG_LEVEL": ("Debug", "debug"),
    "TIMEOUT_S": ("2.5", 2.5),
    "VARIANT": ("pingpong", "pingpong"),
    "COOPERATIVE_THRESHOLD": ("256", 256),
    "KERNELS_SRC": ("/x/src", Path("/x/src")),
    "LOCK_DIR": ("/x/locks", Path("/x/locks")),
    "LOCK_TIMEOUT_S": ("0", 0.0),
    "JOBS": ("3", 3),
    "DEBUG": ("on", True),
    "PTXAS_OPTIONS": (" --a=1  -b ", ("--a=1", "-b")),
}
BAD = {
    "CACHE_MAX_BYTES": "much",
    "NO_CACHE": "perhaps",
    "DISABLE_JIT": "maybe",
    "STRICT": "fatal",
    "LOG_LEVEL": "loud",
    "TIMEOUT_S": "0",
    "VARIANT": "both",
    "COOPERATIVE_THRESHOLD": "some",
    "LOCK_TIMEOUT_S": "nan",
    "JOBS": "0",
    "DEBUG": "2",
}


def test_table_and_fields_are_the_same_set():
    assert {v.field for v in VARIABLES} == {f.name for f in dataclasses.fields(Settings)} - {
        "sources",
        "ignored",
        "unknown",
    }
    assert {v.name for v in VARIABLES} == {PREFIX + name for name in GOOD}
    assert all(v.meaning.endswith(".") and v.type and v.default for v in VARIABLES)


@pytest.mark.parametrize("name", GOOD)
def test_value_is_parsed(name):
    text, expected = GOOD[name]
    value = read_environment({PREFIX + name: text})[name.lower()]
    assert value == expected
    assert type(value) is type(expected) or isinstance(value, Path)


@pytest.mark.parametrize("name", BAD)
def test_bad_value_names_variable_value_and_allowed(name):
    with pytest.raises(ConfigError, match=f"{PREFIX}{name}='{BAD[name]}' is not allowed; allowed: .+"):
        Settings.load({PREFIX + name: BAD[name]})


@pytest.mark.parametrize("text", ["1.1e9", "1e10", "1e12", "inf"])
def test_a_deadline_must_fit_the_kernels_clock(text):
    """Kernels add up to five times as many nanoseconds to the time of day, in 63 bits."""
    with pytest.raises(ConfigError, match=r"TIMEOUT_S.*allowed: a number of seconds from 0.001 to 1e9"):
        Settings.load({PREFIX + "TIMEOUT_S": text})
    most = Settings.load({PREFIX + "TIMEOUT_S": "1e9"}).timeout_s
    assert time.time_ns() + 5 * int(most * 1e9) < 2**63


def test_defaults_and_empty_values():
    settings = Settings.load({PREFIX + "JOBS": "", PREFIX + "STRICT": "  "})
    assert settings == Settings()
    assert (settings.strict, settings.timeout_s, settings.cooperative_threshold) == ("error", 100.0, None)
    assert settings.jobs >= 1
    assert settings.cache_dir.name == "megamoe-jit"


def test_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Settings().cache_dir == tmp_path / "cache" / "megamoe-jit"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("12", 12), ("12b", 12), ("2k", 2048), ("2KiB", 2048), ("0.5M", 1 << 19), ("1tb", 1 << 40)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1e3", "1 parsec", "k"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="such as"):
        parse_size(text)


def test_user_without_home_gets_a_temporary_cache(monkeypatch, tmp_path):
    import pwd

    def nobody(_):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert default_cache_dir().parent == tmp_path
    assert Settings.load({}).source("cache_dir") == "default"


@pytest.mark.parametrize("home", ["/dev/null", None])
def test_without_a_home_and_a_temporary_directory_settings_are_read_all_the_same(monkeypatch, home):
    monkeypatch.setattr(tempfile, "gettempdir", fail_with(errno.ENOENT))
    monkeypatch.setattr(_variables, "_user_dir", lambda kind: home and Path(home, kind))
    assert Settings.load({}).cache_dir == Path(
        home or "/tmp", "user_cache_dir" if home else f"megamoe-jit-{os.geteuid()}"
    )


@pytest.mark.parametrize("home", ["/dev/null", "closed"])
def test_user_whose_home_is_not_theirs_gets_a_temporary_cache(monkeypatch, tmp_path, home):
    """As in a container that runs as any user; what is there already is read all the same."""
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(closed) if home == "closed" else home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if home == "closed":
        assert default_cache_dir() == closed / ".cache" / "megamoe-jit"
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert default_cache_dir() == tmp_path / f"megamoe-jit-{os.geteuid()}"
    (closed / ".cache" / "megamoe-jit").mkdir(parents=True)
    assert (default_cache_dir().parent == tmp_path) is (home != "closed")


def test_arguments_win_over_everything():
    before = get_settings()
    with override(strict="ignore") as settings:
        assert (settings.source("strict"), get_settings().strict) == ("argument", "ignore")
    assert get_settings() is before


def test_default_file_is_in_the_configuration_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_config_file() == tmp_path / "megamoe-jit" / "config.toml"
    default_config_file().parent.mkdir()
    default_config_file().write_text("jobs = 7\n")
    assert Settings.load({}).jobs == 7


def test_unknown_names_give_one_warning(caplog):
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        Settings.load({PREFIX + "CACHEDIR": "1", PREFIX + "ZZZ": "1", "OTHER": "1"})
    assert len(caplog.records) == 1
    assert re.search(r"CACHEDIR \(did you mean MEGAMOE_JIT_CACHE_DIR\?\), MEGAMOE_JIT_ZZZ$", caplog.text.strip())


def test_relative_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Settings.load({PREFIX + "CACHE_DIR": "c"}).cache_dir == tmp_path / "c"


def test_relative_paths_without_a_working_directory_are_refused(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="allowed: an absolute path, where the working directory is not there"):
        Settings.load({"MEGAMOE_JIT_CACHE_DIR": "kernels"})
    assert Settings.load({"MEGAMOE_JIT_CACHE_DIR": "/kernels"}).cache_dir == Path("/kernels")


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


def test_lenient_settings_end_with_the_block(monkeypatch):
    monkeypatch.setattr(_settings, "_current", None)
    monkeypatch.setenv(PREFIX + "STRICT", "fatal")
    with lenient() as faults:
        assert (get_settings().strict, [fault.field for fault in faults]) == ("error", ["strict"])
    with pytest.raises(ConfigError, match="STRICT='fatal'"):
        get_settings()
    monkeypatch.setenv(PREFIX + "STRICT", "warn")
    with lenient() as faults:
        inside = get_settings()
    assert (inside.strict, faults, get_settings() is inside) == ("warn", [], True)
    with override(strict="ignore"), lenient() as faults:
        assert (get_settings().strict, faults) == ("ignore", [])


def test_environment_is_read_once(monkeypatch):
    monkeypatch.setattr(_settings, "_current", None)
    monkeypatch.setenv(PREFIX + "STRICT", "warn")
    assert get_settings().strict == "warn"
    monkeypatch.setenv(PREFIX + "STRICT", "ignore")
    assert get_settings().strict == "warn"


def test_every_variable_read_anywhere_is_in_the_table():
    package = Path(_settings.__file__).parents[1]
    known = {v.name for v in VARIABLES}
    used = set()
    for path in package.rglob("*.py"):
        used |= set(re.findall(r"(?<!_)MEGAMOE_JIT_[A-Z][A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert used <= known


def test_log_level_installs_one_handler(monkeypatch):
    log = logging.getLogger("megamoe_jit")
    before, level = list(log.handlers), log.level
    monkeypatch.setattr(_settings, "_handler", None)
    try:
        _settings._configure_logging(None)
        assert log.handlers == before
        _settings._configure_logging("debug")
        _settings._configure_logging("info")
        assert len(log.handlers) == len(before) + 1
        assert log.level == logging.INFO
    finally:
        log.handlers[:] = before
        log.setLevel(level)


def test_default_number_of_jobs(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert Settings().jobs == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert Settings().jobs == 1


def test_first_use_from_many_threads_reads_once(monkeypatch):
    reads = []
    monkeypatch.setattr(_settings, "_current", None)
    monkeypatch.setattr(Settings, "load", lambda environ: reads.append(time.sleep(0.02)) or Settings())
    threads = [threading.Thread(target=get_settings) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
