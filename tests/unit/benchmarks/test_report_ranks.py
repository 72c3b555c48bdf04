"""benchmarks/report_ranks.py: what rows of several ranks become in the documents."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import report_ranks


def write(folder: Path, name: str, date: str, ranks: int = 2, tokens: int = 64, **rows: float) -> None:
    """A document: median times by layer, twice as long unfused where the name ends in `unfused`; 100 µs on one rank."""
    common = {"tokens": tokens, "variant": "auto", "ranks": ranks, "one_rank_us": 100.0}
    found = [
        {**common, "shape": s, "median_us": us, "baseline_us": 2 * us if "unfused" in name else None}
        for s, us in rows.items()
    ]
    found.append({**found[0], "variant": "pingpong", "median_us": 1.0})
    env = {
        "device": "NVIDIA H200",
        "date": date,
        "ranks": ranks,
        "commit": "0123456789ab",
        "driver": "580",
        "nvrtc": "13.0",
    }
    (folder / name).write_text(json.dumps({"kind": "bench", "environment": env, "rows": found}))


def times(folder: Path, unfused: bool = False) -> dict[str, float]:
    return {row["shape"]: row["median_us"] for row in report_ranks.rank_rows(folder, unfused)}


def test_each_row_is_the_newest(tmp_path: Path):
    write(tmp_path, "b-unfused.json", "2026-01-01T00", flash=110.0, pro=120.0)
    write(tmp_path, "a.json", "2026-01-02T00", flash=105.0)
    write(tmp_path, "c-unfused.json", "2025-12-01T00", flash=150.0, mimo=160.0)
    assert times(tmp_path) == {"flash": 105.0, "mimo": 160.0, "pro": 120.0}
    assert times(tmp_path, unfused=True) == {"flash": 110.0, "mimo": 160.0, "pro": 120.0}


def test_rows_of_a_run_without_the_unfused_layer_count_before_newer_ones_beside_it(tmp_path: Path):
    write(tmp_path, "a.json", "2026-01-01T00", flash=105.0)
    write(tmp_path, "b-unfused.json", "2026-01-02T00", flash=110.0)
    assert times(tmp_path) == {"flash": 105.0}
    assert times(tmp_path, unfused=True) == {"flash": 110.0}


def test_tables(tmp_path: Path):
    write(tmp_path, "a.json", "2026-01-02T00", flash=105.0, pro=112.0)
    write(tmp_path, "b.json", "2026-01-02T00", ranks=4, flash=113.0)
    write(tmp_path, "c.json", "2026-01-02T00", ranks=4, tokens=512, pro=106.0)
    write(tmp_path, "d-unfused.json", "2026-01-02T00", ranks=4, flash=110.0)
    rows, unfused = report_ranks.rank_rows(tmp_path), report_ranks.rank_rows(tmp_path, unfused=True)
    assert report_ranks.growth_table(rows).splitlines() == [
        "| tokens | 2 ranks, µs | 2 ranks, % | 4 ranks, µs | 4 ranks, % |",
        "| --- | --- | --- | --- | --- |",
        "| 64 | +5 to +12 | +5 to +12 | +13 to +13 | +13 to +13 |",
        "| 512 | - | - | +6 to +6 | +6 to +6 |",
    ]
    assert report_ranks.unfused_table(unfused).splitlines()[2:] == [
        "| flash | 64 | 4 | 100 | 110 | +10 | +10.0 | 220 | 2.00 |"
    ]
    assert report_ranks.compact_table(rows, unfused).splitlines() == [
        "| layer | tokens | 2 ranks, µs | more, µs | more, % | 4 ranks, µs | more, µs | more, % | times unfused |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| flash | 64 | 105 | +5 | +5.0 | 113 | +13 | +13.0 | 2.00 |",
    ]
    assert report_ranks.aims(rows) == (
        "The aim on 2 ranks is 8 µs more at most up to 64 tokens and 4 % from 512 on, "
        "reached by 1 of 2 and 0 of 0 rows. "
        "The aim on 4 ranks is 12 µs more at most up to 64 tokens and 6 % from 512 on, "
        "reached by 0 of 1 and 1 of 1 rows."
    )


def write_remote(folder: Path, date: str) -> None:
    """A document of `benchmarks.ranks`."""

    def row(tokens: int, weights: str, half: float, everything: float, before: bool) -> dict[str, object]:
        times = {"one_us": 100.0, "half_us": half, "all_us": everything, "uniform_us": half + 1}
        earlier = {"one_us": 200.0, "half_us": 220.0, "all_us": 230.0, "uniform_us": 222.0} if before else None
        return {"shape": "flash", "tokens": tokens, "ranks": 2, "weights": weights, **times, "before": earlier}

    rows = [
        row(64, "fp8", 104.0, 109.0, True),
        row(512, "fp8", 103.0, 104.0, True),
        row(64, "mxfp4", 105.0, 106.0, False),
    ]
    env = {"device": "NVIDIA H200", "date": date, "ranks": 2, "commit": "c", "driver": "580", "nvrtc": "13.0"}
    (folder / "r.json").write_text(json.dumps({"kind": "ranks", "environment": env, "rows": rows}))


def test_rows_by_how_many_are_remote(tmp_path: Path):
    write(tmp_path, "a.json", "2026-01-01T00", flash=120.0)
    assert report_ranks.remote_table(tmp_path, "fp8") == "", "nobody has measured them yet"
    write_remote(tmp_path, "2026-01-02T00")
    rows = report_ranks.rank_rows(tmp_path)
    assert [(row["tokens"], row["one_rank_us"], row["median_us"]) for row in rows] == [
        (64, 100.0, 105.0),
        (512, 100.0, 104.0),
    ], "of uniform routing, newer than those of `bench`, and of FP8 alone"
    assert report_ranks.remote_table(tmp_path, "fp8").splitlines() == [
        "| layer | tokens | one rank, µs | half remote | all remote | routed at random |",
        "| --- | --- | --- | --- | --- | --- |",
        "| flash | 64 | 100 | +4 µs, +4.0 % | +9 µs, +9.0 % | +5 µs, +5.0 % |",
        "| flash | 512 | 100 | +3 µs, +3.0 % | +4 µs, +4.0 % | +4 µs, +4.0 % |",
        "",
        "Within the aim are: half remote 1 of 1 and 1 of 1 rows; all remote 0 of 1 and 1 of 1 rows; "
        "routed at random 1 of 1 and 1 of 1 rows.",
    ]
    assert report_ranks.model_table(tmp_path).splitlines()[2:] == [  # through -1 and +4 µs beside the meetings
        "| flash | 64 | +4 µs | +6 µs | +7 µs |",
        "| flash | 512 | +3.0 % | +3.1 % | +3.5 % |",
    ]
    packed = report_ranks.remote_table(tmp_path, "mxfp4").splitlines()
    assert packed[2:4] == ["| flash | 64 | 100 | +5 µs, +5.0 % | +6 µs, +6.0 % | +6 µs, +6.0 % |", ""]
