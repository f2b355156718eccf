"""Loss curves as inline SVG in plain Python, drawn anew every other second: no plot library inside a host.

Raw values faint, their running mean strong, on a log scale. L_ID and L_Reg (equations 6 and 7) have a chart each: they
differ by orders of magnitude, and one falls while the other must not rise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 460, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
POINTS = 240
COLOURS = ("#0969b5", "#c2500a", "#0b8462", "#a8508a")
"""As in svg.PALETTE (Okabe and Ito): told apart by colour-blind readers."""

Series = Sequence[tuple[float, float]]


def smooth(points: Series) -> list[tuple[float, float]]:
    """Centred running geometric mean over about 1/15 of the points, at least 5; ends use what there is."""
    half = max(2, len(points) // 30)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + math.log(value))
    found = []
    for i, (step, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        found.append((step, math.exp((sums[high] - sums[low]) / (high - low))))
    return found


def ticks(low: float, high: float) -> list[float]:
    """Values at 1, 2 and 5 of each decade inside [low, high]; at most six, at least one."""
    found: list[float] = []
    for marks in ((1, 2, 5), (1, 3), (1,)):
        found = [mark * 10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
                 for mark in marks if low <= mark * 10.0**power <= high]
        if len(found) <= 6:
            break
    return found[:: max(1, len(found) // 5)] or [math.sqrt(low * high)]


def loss_chart(title: str, lines: Sequence[tuple[str, Series]], steps: int, *, colours: Sequence[str] = COLOURS,
               marks: Sequence[int] = ()) -> str:
    """One chart.

    Args:
        title: above it, also for those who cannot see it.
        lines: (label, points) with points (step, value); values that are not above 0 or not finite are left out.
        steps: right end of the axis; 0 for the last point.
        colours: of the lines, in their order.
        marks: steps of saved levels, as small notches on the axis.
    """
    kept = [(label, [(s, v) for s, v in points if v > 0 and math.isfinite(v)]) for label, points in lines]
    values = [v for _, points in kept for _, v in points]
    head = (f'<svg class="apl-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escape(title)}">')
    if not values:
        middle = (LEFT + WIDTH - RIGHT) / 2
        return (f'{head}<text x="{middle}" y="{HEIGHT / 2}" text-anchor="middle" opacity="0.55">nothing yet</text>'
                "</svg>")
    means = [smooth(points) for _, points in kept]
    inner = sorted(values)
    low = min(inner[len(inner) // 100], *(v for mean in means for _, v in mean))  # one outlier is not the scale
    high = max(inner[-1 - len(inner) // 100], *(v for mean in means for _, v in mean))
    low, high = (low / 1.25, high * 1.25) if high / low < 1.5 else (low / 1.08, high * 1.08)
    end = max(steps, *(int(points[-1][0]) for _, points in kept if points), 1)

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / end
        share = (math.log(min(max(value, low), high)) - math.log(low)) / (math.log(high) - math.log(low))
        return f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share:.1f}"

    parts = [head]
    for value in ticks(low, high):
        y = place(0, value).partition(",")[2]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" '
                     f'stroke-opacity="0.12"/><text x="{LEFT - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">'
                     f"{value:.3g}</text>")
    base = HEIGHT - BOTTOM
    for step in (0, end / 2, end):
        x = place(step, low).partition(",")[0]
        anchor = "start" if step == 0 else "end" if step == end else "middle"
        parts.append(f'<text x="{x}" y="{base + 17}" text-anchor="{anchor}">{step:,.0f}</text>')
    for step in marks:
        x = place(step, low).partition(",")[0]
        parts.append(f'<line x1="{x}" x2="{x}" y1="{base}" y2="{base + 5}" stroke="currentColor" '
                     'stroke-opacity="0.5"/>')
    for (_, points), mean, colour in zip(kept, means, _cycle(colours, len(kept)), strict=True):
        if not points:
            continue
        if len(kept) == 1:
            parts.append(_polyline([place(*p) for p in _thin(points)], colour, 0.25, 1))
        parts.append(_polyline([place(*p) for p in _thin(mean)], colour, 1, 2))
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
    parts.append("</svg>")
    return "".join(parts)


def _thin(points: Series) -> Series:
    step = max(1, len(points) // POINTS)
    thinned = list(points[::step])
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]


def _polyline(places: Sequence[str], colour: str, opacity: float, width: float) -> str:
    return (f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-opacity="{opacity}" '
            f'stroke-width="{width}" stroke-linejoin="round" stroke-linecap="round"/>')


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
