"""Documents: typed, frozen, and each part described by nothing that is not there."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megamoe_jit._bench.documents import Bench, JudgedRow
from megamoe_jit._cache.documents import CachePath, Compiler
from megamoe_jit._documents import Document, content, envelope, plain, time_of
from tests import schemas

KINDS = schemas.documents()


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_a_frozen_dataclass_with_words_of_its_own(kind: str):
    document = KINDS[kind]
    assert dataclasses.is_dataclass(document)
    assert document.__dataclass_params__.frozen
    assert not schemas.summary(document).startswith(f"{document.__name__}("), "the docstring is that of dataclasses"
    assert set(schemas.attributes(document)) <= {field.name for field in dataclasses.fields(document)}
    assert {"schema_version", "kind"}.isdisjoint(field.name for field in dataclasses.fields(document))


def test_a_field_whose_default_is_none_is_left_out():
    assert content(Compiler("12.9", "b")) == {"version": "12.9", "build": "b"}
    assert content(Compiler("12.9", "b", "/x")) == {"version": "12.9", "build": "b", "path": "/x"}
    assert list(envelope(CachePath("/x", True))) == ["schema_version", "kind", "path", "exists"]


def test_times_are_those_of_greenwich():
    assert time_of(86400.0 * 365) == "1971-01-01T00:00:00Z"


def measured(**more: object) -> dict[str, object]:
    names = [field.name for field in dataclasses.fields(JudgedRow) if field.default is dataclasses.MISSING]
    row = {**dict.fromkeys(names, 1.0), "shape": "s", **more}
    return {"environment": {"device": "H200"}, "anchors": [{"a": 1.0}], "rows": [row], "summary": [], "choice": None}


def test_a_document_is_plain_data_down_to_the_last_part():
    others = {"baselines_not_timed": {"torch": "not there"}}
    doc = Bench.of({**measured(ranks=2, rank_medians_us=[1.0, 2.0]), **others})
    assert isinstance(doc, Document)
    found = plain(doc)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        *("schema_version", "kind", "environment", "anchors", "rows", "baselines_not_timed", "summary", "choice")
    ]
    assert (found["rows"][0]["ranks"], found["rows"][0]["rank_medians_us"]) == (2, [1.0, 2.0])
    assert "ranks" not in plain(Bench.of(measured()))["rows"][0]
