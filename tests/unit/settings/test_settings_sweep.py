"""Values of every type in every setting, of the file and of the environment: taken, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamoe_jit._diagnose.machine import settings_table
from megamoe_jit._documents import content
from megamoe_jit._errors import ConfigError
from megamoe_jit._settings.settings import Settings, lenient, override
from megamoe_jit._settings.variables import PREFIX, VARIABLES
from megamoe_jit._text import printable

#: TOML of each type, plain and at its ends.
VALUES = {
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "huge": "0x" + "f" * 20_000,
    "too many digits": "1" * 5000,
    "float": "1.5",
    "infinite": "inf",
    "not a number": "nan",
    "largest": "1e308",
    "empty text": '""',
    "text": '"x"',
    "number in text": '"1e400"',
    "digits in text": f'"{"9" * 5000}"',
    "control characters": '"\\u001b[31m\\u0007"',
    "NUL": '"a\\u0000b"',
    "beyond a path": f'"{"x" * 5000}"',
    "right to left": '"\\u202e"',
    "list": "[1, 2]",
    "list of texts": '["a", "b"]',
    "list of NUL": '["a\\u0000"]',
    "mixed list": '["a", 1, true]',
    "lists in lists": "[" * 100 + "]" * 100,
    "table": "{a = 1}",
    "date": "2020-01-01",
    "time": "12:00:00",
    "many": "[" + "'a', " * 10_000 + "]",
}
FIELDS = [variable.field for variable in VARIABLES if variable.field != "config"]


def usable(settings: Settings) -> None:
    """Whatever was taken can be compared, shown and written down."""
    assert hash(settings) == hash(settings)
    with override():
        pass
    for field in FIELDS:
        value = getattr(settings, field)
        if isinstance(value, Path):
            value.exists() if len(str(value)) < 4000 else None
        elif isinstance(value, int | float):
            assert value == value, "not a number"
            str(value)


def refusal(environ: dict[str, str]) -> str:
    """Why settings are refused; empty if they are taken."""
    try:
        usable(Settings.load(environ))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", VALUES)
def test_values_in_the_file(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "settings.toml"
    monkeypatch.setattr("megamoe_jit._settings.settings._current", None)
    monkeypatch.setenv(PREFIX + "CONFIG", str(file))
    refused = 0
    for field in FIELDS:
        file.write_text(f"{field} = {VALUES[value]}\n")
        text = refusal({PREFIX + "CONFIG": str(file)})
        refused += bool(text)
        assert not text or str(file) in text
        assert len(text) < 600 + len(str(file)), field
        assert printable(text, keep="") == text
        with lenient() as faults:  # what `env` and `doctor` do
            json.dumps(settings_table(faults), default=content)
            assert all(len(fault.message) < 600 + len(str(file)) for fault in faults)
    assert refused or value == "empty text"


@pytest.mark.parametrize("field", [*FIELDS, "config"])
def test_values_in_the_environment(field: str):
    texts = ("0", "-1", "1" * 5000, "inf", "nan", "1e400", "x", "\x1b[31m", "\udcff", "a\nb", "x" * 100_000, "٣", "1_0")
    for text in texts:
        said = refusal({PREFIX + "CONFIG": "/dev/null", PREFIX + field.upper(): text})
        assert printable(said) == said
        assert field == "config" or (len(said) < 800 and "\n" not in said), "a path is named in full"


def test_thousands_of_unknown_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Each is counted, the first ones are named, and finding out what was meant takes no minute."""
    file = tmp_path / "settings.toml"
    names = [f"cache_direktory_{number}" for number in range(10_000)]
    file.write_text("".join(f"{name} = 1\n" for name in names))
    settings = Settings.load({PREFIX + "CONFIG": str(file)})
    assert settings.unknown == set(names)
    assert sum("did you mean" in why for why in settings.ignored.values()) == 20
    (record,) = caplog.records
    assert record.getMessage().endswith(", and 9980 more")
    assert len(record.getMessage()) < 3000
    Settings.load({**{f"{PREFIX}CACHE_DIREKTORY_{n}": "1" for n in range(5000)}, PREFIX + "CONFIG": "/dev/null"})
    assert caplog.records[-1].getMessage().endswith(", and 4980 more")
