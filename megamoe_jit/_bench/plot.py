"""Two plots of a benchmark's document: time against tokens with the roofline, and the share of the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from megamoe_jit._bench.derived import Card, card_of, limit

Rows = Sequence[Mapping[str, Any]]
Line = tuple[str, str, str]  #: a field of the rows, in microseconds; style; label

Share = Callable[[Mapping[str, Any]], float]

UNFUSED: Line = ("baseline_us", "C7-.", "unfused")


def _source(doc: Mapping[str, Any]) -> str:
    env = doc["environment"]
    parts = [
        env.get("device"),
        *(f"{name} {env[key]}" for name, key in (("driver", "driver"), ("NVRTC", "nvrtc")) if env.get(key)),
        str(env.get("date", ""))[:10],
        env.get("commit"),
    ]
    return ", ".join(part for part in parts if part)


def _roofline(row: Mapping[str, Any], card: Card, counts: Sequence[int]) -> tuple[list[int], list[float]]:
    least, most = min(counts), max(counts)
    tokens = sorted({least, most, *(round(2 ** (i / 4)) for i in range(61) if least <= 2 ** (i / 4) <= most)})
    return tokens, [limit({**row, "tokens": count}, card)[1] for count in tokens]


def _finish(axis: Any) -> None:
    from matplotlib.ticker import ScalarFormatter

    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(ScalarFormatter())
    axis.grid(True, alpha=0.25)
    axis.legend(fontsize=8)


def _time_panel(axis: Any, rows: Rows, card: Card | None, beside: Sequence[Line]) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        axis.plot([r["tokens"] for r in mine], [r["median_us"] for r in mine], marker="o", ms=4, label=variant)
    for key, style, label in (*beside, UNFUSED):
        points = {r["tokens"]: r[key] for r in rows if r.get(key)}
        if points:
            axis.plot(list(points), list(points.values()), style, lw=1, label=label)
    if card is not None:
        axis.plot(*_roofline(rows[0], card, [r["tokens"] for r in rows]), "k", lw=1, label="limit")
    axis.set(yscale="log", ylabel="microseconds", title=rows[0]["shape"])
    _finish(axis)


def _share_panel(axis: Any, rows: Rows, share: Share, best: tuple[str, str] | None) -> None:
    one = "auto" if any(row["variant"] == "auto" for row in rows) else rows[0]["variant"]
    shown = [row for row in rows if row["variant"] == one and row["limit_us"]]
    for number, shape in enumerate(dict.fromkeys(row["shape"] for row in shown)):
        mine = [row for row in shown if row["shape"] == shape]
        colour = f"C{number}"
        shares = [100 * share(r) for r in mine]
        axis.plot([r["tokens"] for r in mine], shares, marker="o", ms=4, color=colour, label=shape)
        others = [(r["tokens"], 100 * r["limit_us"] / r[best[0]]) for r in mine if r[best[0]]] if best else []
        if others:
            axis.plot(*zip(*others, strict=True), "--", lw=1, color=colour)
    if best:
        axis.plot([], [], "k--", lw=1, label=best[1])
    axis.set(ylim=(0, 105), ylabel="share of the limit, %")
    _finish(axis)


def draw(
    doc: Mapping[str, Any],
    folder: Path,
    *,
    files: str = "{}.svg",
    beside: Sequence[Line] = (),
    share: Share = itemgetter("limit_share"),
    best: tuple[str, str] | None = None,
) -> list[Path]:
    """Draw both plots; needs matplotlib.

    Args:
        doc: of `bench`; its rows have their limits.
        folder: made if it is not there.
        files: what they are called, with `time` or `limit` for the braces.
        beside: more times to draw, where rows have them.
        share: of the limit that a row with a limit reaches, 1 is all of it.
        best: field and label of times whose share of the limit is drawn too.

    Returns:
        The files; without the second one if no limit is known for the device.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows, card = doc["rows"], card_of(doc["environment"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def save(figure: Any, name: str) -> None:
        figure.suptitle(_source(doc), fontsize=9)
        figure.tight_layout()
        path = folder / files.format(name)
        figure.savefig(path, dpi=120, metadata={"Date": None})
        plt.close(figure)
        drawn.append(path)

    # Equal documents give equal files: no date, no random identifiers, text as text.
    with mpl.rc_context({"svg.hashsalt": "megamoe-jit", "svg.fonttype": "none"}):
        shapes = list(dict.fromkeys(row["shape"] for row in rows))
        across = min(2, len(shapes))
        down = -(-len(shapes) // across)
        figure, axes = plt.subplots(down, across, figsize=(5.5 * across, 4 * down), squeeze=False)
        for axis in axes.flat[len(shapes) :]:
            axis.set_visible(False)
        for axis, shape in zip(axes.flat, shapes, strict=False):
            _time_panel(axis, [row for row in rows if row["shape"] == shape], card, beside)
        save(figure, "time")
        if any(row["limit_us"] for row in rows):
            figure, axis = plt.subplots(figsize=(8, 4.5))
            _share_panel(axis, rows, share, best)
            save(figure, "limit")
    return drawn
