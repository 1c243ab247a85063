"""The report's pictures: SVG by matplotlib, in colours of the page, which has a light and a dark form."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from tightfit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib wants colours, the page wants its own: each of these stands for a CSS variable, put in at the end.
COLORS = {
    "ink": "#010101",
    "muted": "#020202",
    "rule": "#030303",
    "exact": "#040404",
    "weights": "#050505",
    "kv": "#060606",
    "both": "#070707",
    "other": "#080808",
    "surface": "#090909",
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's font
    "text.parse_math": False,
    "font.size": 8,
    "axes.edgecolor": COLORS["rule"],
    "axes.labelcolor": COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": COLORS["rule"],
    "ytick.color": COLORS["rule"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "text.color": COLORS["ink"],
}
SIZE = (4.0, 3.1)  # inches of 72 of the SVG's units
LOGARITHMIC = 30  # a ratio of the largest to the smallest value beyond which an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """One configuration: its number in the table, ``x`` and ``y`` as (value, low, high), and whether it is on the
    front. ``kind`` is a color of :data:`COLORS`, ``title`` what is said where the pointer rests on it."""

    number: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    front: bool
    kind: str
    title: str


@dataclass(frozen=True)
class Axis:
    label: str
    better: Literal["lower", "higher"] = "lower"


def require_matplotlib() -> None:
    """Raises UsageError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "the page's plots need matplotlib, which is not installed",
            "Type `pip install 'tightfit[report]'`. The table and --json do without.",
        ) from None


def tradeoff(points: Sequence[Point], x: Axis, y: Axis, name: str) -> str:
    """Quality against a cost, which is better where it is lower, with the front of those that nothing else beats in
    both. ``name`` is unique in the page and says what is drawn."""
    from matplotlib import rc_context

    style: Any = STYLE | {"svg.hashsalt": name}  # names inside of an SVG, of which a page has many
    with rc_context(style):
        axes = _axes()
        members = sorted((point for point in points if point.front), key=lambda point: point.x[0])
        _scale(axes, "x", [point.x for point in points])
        _scale(axes, "y", [point.y for point in points])
        if members:
            axes.plot(
                [point.x[0] for point in members],
                [point.y[0] for point in members],
                drawstyle="steps-post",
                color=COLORS["muted"],
                linewidth=1,
                zorder=1,
            )
        colors = [COLORS[point.kind] for point in points]
        looks: dict[str, Any] = {"colors": colors, "linewidth": 0.7, "alpha": 0.55, "zorder": 2}
        (xs, left, right), (ys, low, high) = (
            zip(*(getattr(point, of) for point in points), strict=True) for of in "xy"
        )
        axes.hlines(ys, left, right, **looks)
        axes.vlines(xs, low, high, **looks)
        for point in points:
            [marker] = axes.plot(
                point.x[0],
                point.y[0],
                marker="o",
                markersize=5.5 if point.front else 4.5,
                markerfacecolor=COLORS[point.kind] if point.front else COLORS["surface"],
                markeredgecolor=COLORS[point.kind],
                markeredgewidth=1.1,
                linestyle="none",
                zorder=4 if point.front else 3,
            )
            marker.set_gid(f"point-{point.number}")
        axes.set_xlabel(f"{x.label}   ← better")
        axes.set_ylabel(f"{y.label}   {'better →' if y.better == 'higher' else '← better'}")
        _number(axes, points)
        return _svg(axes, name, {f"point-{point.number}": point.title for point in points})


def _axes() -> Axes:
    """An empty plot in a figure of its own, with room for the labels around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=72)  # so that a point is a unit of the drawing
    axes = figure.add_axes((0.185, 0.145, 0.8, 0.83))
    axes.patch.set_visible(False)
    axes.grid(color=COLORS["rule"], linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    return axes


def _scale(axes: Axes, which: Literal["x", "y"], values: Sequence[tuple[float, float, float]]) -> None:
    """Limits with room around all intervals; logarithmic where values span much, with zero, as of the exact model, at
    the edge."""
    from matplotlib.scale import SymmetricalLogScale
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lowest, highest = min(low for _, low, _ in values), max(high for _, _, high in values)
    positive = [value for value, _, _ in values if value > 0]
    axis, limit = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    if not positive or max(positive) < LOGARITHMIC * min(positive):
        room = 0.08 * (highest - lowest) or 1
        limit(lowest - room, highest + room)
        return
    if lowest > 0:
        axes.set(**{f"{which}scale": "log"})
        limit(lowest / 1.7, highest * 1.7)
    else:
        # Below the edge the scale is linear: what is five decades below the largest is as good as nothing.
        edge = 10.0 ** max(math.floor(math.log10(min(positive))), math.floor(math.log10(max(positive))) - 5)
        axes.set(**{f"{which}scale": SymmetricalLogScale(None, linthresh=edge, linscale=0.4)})
        limit(min(lowest, -0.3 * edge), highest * 1.7)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _number(axes: Axes, points: Sequence[Point]) -> None:
    """Puts its number beside each point, on the front first, where there is room; no two numbers overlap. Those that
    are not on the front and find no room have none: the page's table has all."""
    places = {point.number: axes.transData.transform((point.x[0], point.y[0])) for point in points}
    frame = axes.bbox
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places.values()]
    for point in sorted(points, key=lambda point: (not point.front, point.number)):
        x, y = places[point.number]
        width, height = 4.6 * len(str(point.number)) + 2, 8
        for distance, angle in product(
            (8, 12, 17, 23, 30, 40), (45, 135, 315, 225, 90, 0, 180, 270, 20, 160, 200, 340)
        ):
            if distance > 12 and not point.front:
                break
            right = x + distance * math.cos(math.radians(angle))
            up = y + distance * math.sin(math.radians(angle))
            box = (right - width / 2, up - height / 2, right + width / 2, up + height / 2)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if not inside or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            offset = (right - x, up - y)
            line = {"arrowstyle": "-", "color": COLORS["muted"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate(
                str(point.number),
                (point.x[0], point.y[0]),
                offset,
                textcoords="offset points",
                ha="center",
                va="center_baseline",
                fontsize=8 if point.front else 7,
                fontweight="bold" if point.front else "normal",
                color=COLORS["ink"] if point.front else COLORS["muted"],
                arrowprops=line if distance > 12 else None,
                zorder=5,
            )
            break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _svg(axes: Axes, name: str, titles: dict[str, str]) -> str:
    """The drawing as an element for a page: as wide as its place, with titles for those groups that have an id."""
    out = io.StringIO()
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(name)}">'
    text = re.sub(r"<svg[^>]*>", head, text, count=1)
    text = re.sub(r'<g id="(point-\d+)">', lambda found: f"<g><title>{html.escape(titles[found[1]])}</title>", text)
    text = re.sub(r'<g id="[a-zA-Z]+_?[\d_]*">', "<g>", text)  # axes, ticks, texts: the same in every drawing
    for css, stand_in in COLORS.items():
        text = text.replace(stand_in, f"var(--{css})")
    return re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text))
