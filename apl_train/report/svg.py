"""matplotlib figures as clean SVG text: one palette, light and dark, self-contained, the same bytes every time.

`draw` returns an `<svg>` for a page: text and axes take the page's `currentColor`, series its `--c-...` variables (with
a fallback), text stays text in the page's font, nothing is referenced from outside, and ids are prefixed by the chart's
name so that several fit in one page. `standalone` turns such a string into a file of its own.
The hues follow Okabe and Ito, told apart by colour-blind readers; markers differ as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = {  # name: (light scheme, dark scheme, marker)
    "off": ("#c2500a", "#f0925a", "o"),
    "on": ("#0969b5", "#5cb3f5", "D"),
    "description": ("#0b8462", "#45c9a0", "s"),
    "random": ("#a37a00", "#e6bd45", "^"),
    "phrase": ("#a8508a", "#e59ac9", "v"),
    "two_seeds": ("#70757d", "#9aa0a8", "P"),
}
SIZE = (5.6, 3.3)  # inches; 403 x 238 units, so that text stays readable on a phone
INK = "#010203"  # stands for currentColor until the SVG is text
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "apl",
    "text.parse_math": False,
    "font.size": 10.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.formatter.useoffset": False,
    "path.simplify": True,
    "figure.constrained_layout.use": True,
    "lines.solid_capstyle": "round",
}
FONT = "system-ui, -apple-system, Roboto, sans-serif"


def colour(name: str) -> str:
    return PALETTE.get(name, PALETTE["two_seeds"])[0]


def marker(name: str) -> str:
    return PALETTE.get(name, PALETTE["two_seeds"])[2]


def draw(name: str, title: str, plot: Callable[[Axes], Any]) -> str:
    """Draw with `plot(axes)` and return the cleaned SVG.

    Args:
        name: prefix of all ids, unique in a page.
        title: what the chart shows, for those who cannot see it.
        plot: fills the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says, the chart is the same
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=SIZE)
        plot(figure.add_subplot())
        buffer = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    return _clean(buffer.getvalue(), name, title)


def _clean(svg: str, name: str, title: str) -> str:
    """Only the `<svg>`, in the page's colours and font, without ids or addresses that could meet others in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    # the page scales the chart; the two attributes only give it its natural size
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = f'style="stroke-linejoin: round; font-family: {FONT}"'
    head = f'<svg class="chart" role="img" aria-label="{_escape(title)}" {box} {style}>'
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ((?:[a-z]+ )?)([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", svg)  # older matplotlib
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = svg.replace(INK, "currentColor")
    for key, (light, _, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--c-{key}, {light})")
    # matplotlib sets line joins for all elements through <style>, which inline would act on the whole page
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.S)
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return re.sub(r">\s*\n\s*<", ">\n<", svg).strip() + "\n"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def standalone(svg: str) -> str:
    """A chart as the text of an .svg file that follows the viewer's light or dark scheme, for documents."""
    dark = "".join(f"--c-{key}:{value[1]};" for key, value in PALETTE.items())
    style = f"<style>svg{{color:#2b2e33}}@media (prefers-color-scheme:dark){{svg{{color:#d7dadf;{dark}}}}}</style>"
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return re.sub(r"(<svg[^>]*>)", lambda found: found.group(1) + style, svg, count=1)
