"""The charts of the report and of the documents, each as the text of an `<svg>` (see `svg.py`).

Whatever is null, missing or not finite is left out; a chart without anything to show says "not measured".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from apl_train.report.svg import INK, PALETTE, colour, draw, marker
from apl_train.report.table import CONDITIONS, DRIFT, DRIFT_CONDITIONS, MISSING, get, measured, unseen

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _short(condition: str) -> str:
    """A condition without the word that nearly all of them share."""
    return CONDITIONS.get(condition, condition).removeprefix("name, ")


def _blank(axes: Axes, text: str = MISSING) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", alpha=0.6)
    axes.set_axis_off()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about 1/15 of the run, at least 5 points; ends use what there is. float [n] -> [n]."""
    half = max(2, len(values) // 30)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.clip(np.arange(len(values)) - half, 0, None)
    high = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    return (total[high] - total[low]) / (high - low)


def loss_curves(events: Sequence[Mapping[str, Any]]) -> str:
    """L_ID and L_Reg (equations 6 and 7) over steps, log scale: raw values faint, their running mean strong."""
    series = {}
    for key in ("l_id", "l_reg"):
        pairs = [(measured(e.get("step")), measured(e.get(key))) for e in events if e.get("event") == "step"]
        series[key] = np.array([(s, v) for s, v in pairs if s is not None and v is not None and v > 0]).reshape(-1, 2)

    def plot(axes: Axes) -> None:
        if not any(len(points) for points in series.values()):
            return _blank(axes)
        looks = (("l_id", "on", "L_ID, named persons"), ("l_reg", "description", "L_Reg, everything else"))
        for key, look, label in looks:
            points = series[key]
            if not len(points):
                continue
            thin = points[:: max(1, len(points) // 600)]  # the faint line need not hold every step of a long run
            axes.plot(thin[:, 0], thin[:, 1], color=colour(look), alpha=0.22, linewidth=0.7)
            smooth = np.column_stack([points[:, 0], np.exp(_smooth(np.log(points[:, 1])))])[
                :: max(1, len(points) // 300)
            ]
            axes.plot(smooth[:, 0], smooth[:, 1], color=colour(look), linewidth=2, label=label)
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.margins(x=0.01)
        _legend(axes, 2)
        return None

    return draw("loss", "Losses over training steps", plot)


def _plain(value: float, _: int) -> str:
    return np.format_float_positional(value, precision=4, fractional=False, trim="-")


def _plain_log(axis: Any) -> None:
    """Ticks of a log axis as plain numbers at 1, 2, 5 of each decade (the default writes TeX)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.5,
        columnspacing=1.4,
    )


def _level_line(axes: Axes, scores: Mapping[str, Any], key: str) -> None:
    """A dashed line at a condition's ID-ACC, labelled above it, or below where the curve comes down to it."""
    value = measured(get(scores, "persons", unseen(scores), key, "id_acc_mean"))
    if value is None:
        return
    axes.axhline(value, color=colour(key), linewidth=1.4, linestyle=(0, (5, 3)))
    low, high = axes.get_ylim()
    below = key == "description" and value - low > 0.08 * (high - low)
    axes.annotate(
        _short(key),
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -4 if below else 4),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        color=colour(key),
        fontsize=10,
    )


def id_acc_levels(level_scores: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> str:
    """ID-ACC of unseen persons over the saved levels with 95% band, between off and description (paper Fig. 6b)."""
    points = [
        (measured(p.get("step")), measured(p.get("id_acc_mean")), measured(p.get("lo")), measured(p.get("hi")))
        for p in level_scores
    ]
    points = sorted(p for p in points if p[0] is not None and p[1] is not None)

    def plot(axes: Axes) -> None:
        if not points:
            return _blank(axes)
        steps, means = [p[0] for p in points], [p[1] for p in points]
        banded = [p for p in points if p[2] is not None and p[3] is not None]
        if banded:
            axes.fill_between(
                [p[0] for p in banded],
                [p[2] for p in banded],
                [p[3] for p in banded],
                color=colour("on"),
                alpha=0.17,
                linewidth=0,
            )
        axes.plot(steps, means, color=colour("on"), linewidth=2, marker=marker("on"), markersize=5)
        third = len(steps) // 3  # the curve falls, so there is room to the right of and above an early point
        axes.annotate(
            "prefix on",
            (steps[third], means[third]),
            xytext=(12, 10),
            textcoords="offset points",
            color=colour("on"),
            fontsize=10,
        )
        marks = [measured(get(scores, "persons", unseen(scores), key, "id_acc_mean")) for key in ("off", "description")]
        low, high = axes.get_ylim()
        low, high = (
            min(0.0, low, *(v for v in marks if v is not None)),
            max(high, *(v for v in marks if v is not None), 0.0),
        )
        axes.set_ylim(low, high + 0.1 * (high - low))
        _level_line(axes, scores, "off")
        _level_line(axes, scores, "description")
        axes.set_xlabel("step of the level")
        axes.set_ylabel("ID-ACC, unseen persons")
        axes.set_xlim(left=0)
        return None

    return draw("levels", "Identity accuracy over saved levels", plot)


def conditions(scores: Mapping[str, Any]) -> str:
    """ID-ACC mean with 95% intervals by condition: filled markers are unseen persons, hollow ones those learned on."""
    new = unseen(scores)
    splits = (new, "train")
    means = {
        (split, key): measured(get(scores, "persons", split, key, "id_acc_mean"))
        for split in splits
        for key in CONDITIONS
    }
    rows = [key for key in CONDITIONS if any(means[split, key] is not None for split in splits)]

    def plot(axes: Axes) -> None:
        if not rows:
            return _blank(axes)
        for y, key in enumerate(rows):
            for split, shift, face in ((new, -0.13, colour(key)), ("train", 0.17, "none")):
                value = means[split, key]
                if value is None:
                    continue
                pair = get(scores, "persons", split, key, "ci95") or ()
                ends = [measured(v) for v in pair] if len(pair) == 2 else []
                if ends and None not in ends:
                    axes.plot(ends, [y + shift] * 2, color=colour(key), linewidth=2.2 if split == new else 1.2)
                axes.plot(
                    [value],
                    [y + shift],
                    marker(key),
                    color=colour(key),
                    markerfacecolor=face,
                    markersize=7,
                    markeredgewidth=1.4,
                )
        axes.set_yticks(range(len(rows)), [_short(key) for key in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        for key, label in (("impostor_mean", "other persons"), ("ceiling", "same person")):
            value = measured(get(scores, "persons", key))
            if value is not None:
                axes.axvline(value, color=INK, linewidth=1, alpha=0.45, linestyle=(0, (1, 2)))
                axes.annotate(
                    label,
                    (value, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3 if key != "ceiling" else -3, 2),
                    textcoords="offset points",
                    ha="left" if key != "ceiling" else "right",
                    fontsize=9.5,
                    alpha=0.75,
                )
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("ID-ACC (filled: unseen persons, hollow: learned on)")
        return None

    return draw("conditions", "Identity accuracy by condition with 95% intervals", plot)


def drift(scores: Mapping[str, Any]) -> str:
    """How far pictures of neutral prompts move in latent space, with two seeds as the yardstick."""
    bars: list[tuple[float, str, float]] = []
    ticks: list[tuple[float, str]] = []
    titles: list[tuple[float, str]] = []
    y = 0.0
    for kind, title in DRIFT.items():
        found = [(key, measured(get(scores, "drift", kind, key))) for key in DRIFT_CONDITIONS]
        found = [(key, value) for key, value in found if value is not None]
        if not found:
            continue
        titles.append((y - 0.1, title))
        for key, value in found:
            y += 1
            bars.append((y, key, value))
            ticks.append((y, DRIFT_CONDITIONS[key]))
        y += 1.6

    def plot(axes: Axes) -> None:
        if not bars:
            return _blank(axes)
        for at, key, value in bars:
            axes.barh(at, value, height=0.66, color=colour(key), linewidth=0)
            axes.annotate(
                f"{value:.2f}", (value, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10
            )
        for at, title in titles:
            axes.annotate(
                title,
                (0, at),
                xycoords=("axes fraction", "data"),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                fontweight="bold",
            )
        axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
        axes.set_ylim(max(at for at, _, _ in bars) + 0.6, -0.6)
        axes.set_xlim(0, 1.12 * max(value for _, _, value in bars) or 1)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("distance to the picture without prefix, latents (same seed)")
        return None

    return draw("drift", "Drift of pictures that should not change", plot)


def sweep_plot(points: Sequence[Mapping[str, Any]], x_label: str, log: bool = False) -> str:
    """ID-ACC over one setting (alpha, m, persons), one line per series, for documents (paper Tables 3, 4, Fig. 8).

    Args:
        points: dicts with "x" and "id_acc_mean", optionally "lo", "hi" (95% interval) and "series": a condition, which
            has its own colour ("off", "on", "description", "random", "phrase"), or any other label; "on" if not given.
        x_label: what x is.
        log: logarithmic x; points at x <= 0 are then left out.
    """
    series: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for point in points:
        x, y = measured(point.get("x")), measured(point.get("id_acc_mean"))
        if x is not None and y is not None and not (log and x <= 0):
            series.setdefault(str(point.get("series", "on")), []).append(
                (x, y, measured(point.get("lo")), measured(point.get("hi")))
            )
    # a series with a name of its own takes the next colour that no series present owns, "off" last
    order = [key for key in ("on", "description", "random", "phrase", "two_seeds", "off") if key not in series] or list(
        PALETTE
    )
    free = itertools.cycle(order)
    looks = {key: key if key in PALETTE else next(free) for key in series}

    def plot(axes: Axes) -> None:
        if not series:
            return _blank(axes)
        ticks = sorted({p[0] for line in series.values() for p in line})
        if log:
            axes.set_xscale("log")
            _plain_log(axes.xaxis)
        for key, line in series.items():
            line.sort()
            xs, ys = [p[0] for p in line], [p[1] for p in line]
            look = colour(looks[key])
            for x, _, lo, hi in line:
                if lo is not None and hi is not None:
                    axes.plot([x, x], [lo, hi], color=look, linewidth=1.4, alpha=0.6)
            axes.plot(xs, ys, color=look, marker=marker(looks[key]), linewidth=2, markersize=6, label=_short(key))
        if len(ticks) <= 8:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel("ID-ACC")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if len(series) > 1:
            _legend(axes, 3)
        return None

    return draw("sweep", f"Identity accuracy over {x_label}", plot)
