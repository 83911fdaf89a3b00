"""The figures of a page, in the light theme's colours.

Each colour is unique, so that the page can turn it into a CSS variable, and the same SVG is readable in a
light and in a dark browser.
"""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from growjax.plan.plan import Plan
from growjax.report.arms import Arm


# name -> (light, dark)
COLOURS = {
    "ink": ("#1c2128", "#d8dee6"),
    "soft": ("#5d6671", "#9aa4af"),
    "line": ("#d3d8de", "#3a424c"),
    "paper": ("#fdfdfc", "#14181d"),
    "series0": ("#5f6b7a", "#a3afbd"),
    "series1": ("#c2571a", "#f2975a"),
    "series2": ("#1769aa", "#6cb6f0"),
    "series3": ("#2a7d4f", "#62c893"),
    "series4": ("#8d44a8", "#cd8fe3"),
    "series5": ("#a5790c", "#e0b84c"),
}
_SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("series")]
_DASHES = ["-", "-", (0, (5, 2)), (0, (5, 1.5, 1, 1.5)), "-", (0, (1, 1.5))]
_DASHES += [(0, (3, 1, 1, 1, 1, 1))] * len(_SERIES) + [(0, (8, 1.5))] * len(_SERIES)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw a page's figures inside this: its colours, no frame, text that stays text."""
    ink, soft, line = (COLOURS[name][0] for name in ("ink", "soft", "line"))
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "growjax",
            "font.size": 10,
            "text.color": ink,
            "axes.labelcolor": soft,
            "axes.edgecolor": line,
            "axes.titlecolor": ink,
            "axes.prop_cycle": cycler("color", _SERIES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": line,
            "grid.linewidth": 0.6,
            "xtick.color": line,
            "ytick.color": line,
            "xtick.labelcolor": soft,
            "ytick.labelcolor": soft,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
        }
    ):
        yield


def canvas(height: float = 3.6, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure as wide as the page, with the axes that `plt.subplots` would make."""
    # At a phone's width letters are 8 pixels high, and 6 where three figures stand in a row
    width = 8.0 if kwargs.get("ncols", 1) > 2 else 6.0
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**kwargs)


# The figures of a comparison ---------------------------------------------------------------------

Looks = Mapping[str, Mapping[str, Any]]
# Up to so many arms have a strip below their curves, by default
_STRIP = 6


def loss_figure(
    arms: Sequence[Arm],
    *,
    looks: Looks | None = None,
    target: str | None = None,
    per: str = "token",
    strip: bool | None = None,
) -> Figure:
    """Held-out loss against cost, means over seeds, with a bar where a stage begins.

    **Arguments**

    - `looks`: colours and dashes by arm; see `looks_of`, which is the default.
    - `target`: the arm whose final loss a thin line marks.
    - `per`: what a loss is counted per.
    - `strip`: draw a strip below the curves that names the stages; for up to six arms by default.
    """
    looks = looks_of(arms) if looks is None else looks
    divisor, name = unit_of(arms)
    below = None
    with style():
        if len(arms) <= _STRIP if strip is None else strip:
            heights = (4.2, 0.12 + 0.28 * len(arms))
            figure, (axes, below) = canvas(
                sum(heights), nrows=2, sharex=True, height_ratios=heights
            )
        else:
            figure, axes = canvas(4.4)
        late, ends = [], []
        for arm in arms:
            color = looks[arm.name]["color"]
            x = [cost / divisor for cost, _ in arm.curve]
            y = [loss for _, loss in arm.curve]
            label = f"{plain(arm.name)}  {arm.loss:.3f}"
            (line,) = axes.plot(x, y, label=label, **looks[arm.name])
            axes.plot(x[-1], y[-1], "o", color=color, markersize=4)
            for stage in arm.stages[1:]:
                start = stage.start / divisor
                axes.plot(start, np.interp(start, x, y), "|", color=color, markersize=10)
            if arm.name == target:
                axes.axhline(arm.loss, color=COLOURS["soft"][0], linewidth=0.8, zorder=0)
            ends.append((y[-1], line))
            # The first quarter is the same steep fall for all arms and would flatten the rest
            late += [loss for cost, loss in zip(x, y, strict=True) if cost > x[-1] / 4]
        # One evaluation has no extent, and would be no range of an axis
        margin = max(late) - min(late) or 1.0
        axes.set_ylim(min(late) - 0.05 * margin, max(late) + 0.02 * margin)
        axes.set_ylabel(f"held-out loss (nats per {per})")
        if below is None:
            axes.set_xlabel(name)
            legend(figure, ends, "arm, final loss")
        else:
            lines = [line for _, line in sorted(ends, key=lambda end: -end[0])]
            axes.legend(handles=lines, loc="upper right", title="arm, final loss", alignment="left")
            _strip(below, arms, looks, divisor)
            below.set_xlabel(name)
        axes.set_xlim(0, None)
    return figure


def _strip(axes: Axes, arms: Sequence[Arm], looks: Looks, divisor: float) -> None:
    """A row of boxes for each arm: its stages, each with its label."""
    for row, arm in enumerate(arms):
        color = looks[arm.name]["color"]
        for stage in arm.stages:
            start, stop = stage.start / divisor, stage.stop / divisor
            axes.barh(row, stop - start, 0.78, start, color=color, alpha=0.22, linewidth=0)
            axes.plot([start, start], [row - 0.39, row + 0.39], color=color, linewidth=1.6)
            axes.annotate(
                plain(stage.label),
                (start, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=9,
            )
    axes.set_yticks(range(len(arms)), [plain(arm.name) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines["left"].set_visible(False)


class Line(NamedTuple):
    """A line of a figure: its name, its points (x, y), and how it is drawn."""

    name: str
    points: Sequence[tuple[float, float]]
    look: Mapping[str, Any]


def lines_figure(lines: Sequence[Line], x: str, y: str, *, steps: bool = False) -> Figure:
    """Lines over one axis, with a legend inside; `steps` holds each value until the next point."""
    with style():
        figure, axes = canvas(3.2)
        for line in lines:
            if line.points:
                draw = axes.step if steps else axes.plot
                more = {"where": "post"} if steps else {}
                draw(*zip(*line.points, strict=True), label=plain(line.name), **more, **line.look)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_xlim(0, None)
        axes.legend(loc="best")
    return figure


def cost_figure(plans: Sequence[Plan]) -> Figure:
    """FLOPs of each step along a run, a plan a line."""
    costs = [[flops for span in plan.spans for flops in span.flops] for plan in plans]
    unit, name = flops_unit(max(map(max, costs)))
    lines = []
    for n, (plan, flops) in enumerate(zip(plans, costs, strict=True)):
        # Apart by less than a line's width, so that plans of equal cost can be told apart
        apart = 1 + 0.012 * ((len(plans) - 1) / 2 - n)
        changes = [(i, f) for i, f in enumerate(flops) if i == 0 or f != flops[i - 1]]
        points = [(i, f / unit * apart) for i, f in [*changes, (len(flops), flops[-1])]]
        lines.append(Line(plan.name, points, look(n)))
    figure = lines_figure(lines, "step", f"{name} per step", steps=True)
    figure.axes[0].set_ylim(0, None)
    return figure


class Bar(NamedTuple):
    """One difference of a figure of differences: its mean, 95% interval and values, and the verdict.

    One seed tells no interval (None).
    """

    group: str
    label: str
    mean: float
    interval: tuple[float | None, float | None] | None
    values: Sequence[float]
    verdict: str


def differences_figure(
    bars: Sequence[Bar],
    zero: str,
    *,
    quantity: str = "held-out loss",
    unit: str = " (nats)",
    better: str = "left",
) -> Figure:
    """Differences, each a bar with a dot for every seed, in groups.

    `zero` names the baseline at 0, `quantity` what is compared, and `better` the side
    ("left" or "right") of better values.
    """
    groups: dict[str, list[Bar]] = {}
    for bar in bars:
        groups.setdefault(bar.group, []).append(bar)
    colours = {"better": COLOURS["series3"][0], "worse": COLOURS["series1"][0]}
    rows = len(bars) + len(groups)
    with style():
        figure, axes = canvas(1.1 + 0.23 * rows)
        ticks: list[tuple[int, str]] = []
        headings: list[int] = []
        place = 0
        for group, members in groups.items():
            ticks.append((place, plain(group)))
            headings.append(len(ticks) - 1)
            for bar in sorted(members, key=lambda bar: bar.mean):
                place += 1
                colour = colours.get(bar.verdict, COLOURS["soft"][0])
                axes.plot(
                    bar.values,
                    [place] * len(bar.values),
                    "o",
                    color=colour,
                    markersize=2.5,
                    alpha=0.45,
                )
                if bar.interval is not None:
                    axes.plot(bar.interval, [place, place], color=colour, linewidth=2.2)
                axes.plot(bar.mean, place, "o", color=colour, markersize=5.5)
                ticks.append((place, plain(bar.label)))
            place += 1
        axes.axvline(0, color=COLOURS["ink"][0], linewidth=1.0, zorder=0)
        axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        for index in headings:
            axes.get_yticklabels()[index].set_fontweight("bold")
        axes.set_ylim(place - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        label = f"{quantity} minus that of {plain(zero)}{unit}: {better} is better"
        axes.set_xlabel(textwrap.fill(label, 50, break_on_hyphens=False))
    return figure


def ends_figure(
    arms: Sequence[Arm],
    frontier: Sequence[tuple[float, float]],
    *,
    looks: Looks | None = None,
    edge: str = "frontier of fixed sizes",
) -> Figure:
    """Losses at the end against cost, with a dot for every seed; the frontier is a wide line of steps.

    Arms of one name at several budgets are joined by a line. `edge` names the frontier, which is given as
    pairs of cost and loss.
    """
    looks = looks_of(arms) if looks is None else looks
    divisor, name = unit_of(arms)
    budgets: dict[str, list[Arm]] = {}
    for arm in sorted(arms, key=lambda arm: arm.cost):
        budgets.setdefault(arm.name, []).append(arm)
    costs = sorted(arm.cost / divisor for arm in arms)
    losses = [loss for arm in arms for loss in arm.scores]
    with style():
        figure, axes = canvas(4.2)
        lines = []
        if frontier:
            # Extend the frontier to the largest cost: a loss reached for less is available for more
            last = max(costs[-1] * divisor, frontier[-1][0])
            x, y = zip(*[*frontier, (last, frontier[-1][1])], strict=True)
            (line,) = axes.step(
                [cost / divisor for cost in x],
                y,
                where="post",
                color=COLOURS["line"][0],
                linewidth=5,
                label=plain(edge),
                zorder=0,
            )
            lines.append((-np.inf, line))
        for arm, group in budgets.items():
            x = [at.cost / divisor for at in group]
            y = [at.loss for at in group]
            marks = {"marker": "o", "markersize": 4.5, "linewidth": 1.2}
            (line,) = axes.plot(x, y, label=plain(arm), **marks, **looks[arm])
            lines.append((y[-1], line))
            color = looks[arm]["color"]
            for at, cost in zip(group, x, strict=True):
                dots = [cost] * len(at.scores)
                axes.plot(dots, at.scores, "o", color=color, markersize=2, alpha=0.5)
        # The frontier begins far above all ends
        margin = 0.04 * (max(losses) - min(losses) or 1.0)
        axes.set_ylim(min(losses) - margin, max(losses) + margin)
        axes.set_xscale("log")
        axes.set_xlim(costs[0] / 1.3, costs[-1] * 1.15)
        # Ticks at the costs that are far enough apart for their numbers
        ticks = [x for n, x in enumerate(costs) if not n or x > 1.1 * costs[n - 1]]
        axes.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.set_ylabel("held-out loss at the end (nats)")
        legend(figure, lines, "arm")
    return figure


def legend(figure: Figure, ends: Sequence[tuple[float, Any]], title: str) -> None:
    """A legend next to a figure, in the order of the lines' ends from the top."""
    lines = [line for _, line in sorted(ends, key=lambda end: end[0], reverse=True)]
    figure.legend(
        handles=lines, loc="outside right upper", title=title, alignment="left", fontsize=9
    )


def plain(name: str) -> str:
    """A name for a figure's text: dollar signs in it are no formula."""
    return name.replace("$", r"\$")


def look(n: int) -> dict[str, Any]:
    """Colour and dashes of the nth line of a figure; colours repeat, with other dashes."""
    return {"color": _SERIES[n % len(_SERIES)], "linestyle": _DASHES[n % len(_DASHES)]}


def looks_of(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """The look of each arm by name: the same in every figure that is given these."""
    return {name: look(n) for n, name in enumerate(dict.fromkeys(arm.name for arm in arms))}


def unit_of(arms: Sequence[Arm]) -> tuple[float, str]:
    """What the costs of arms are divided by in a figure, and the name of the axis."""
    unit = arms[0].unit
    if unit != "FLOPs":
        return 1.0, "reference seconds" if unit == "seconds" else plain(unit)
    divisor, name = flops_unit(max(arm.cost for arm in arms))
    return divisor, f"training {name}"


def flops_unit(largest: float) -> tuple[float, str]:
    """The unit of FLOPs to write a number of this size in, and its name."""
    units = [(1e18, "exaFLOPs"), (1e15, "petaFLOPs"), (1e12, "teraFLOPs"), (1e9, "gigaFLOPs")]
    return next((u for u in units if largest >= u[0]), (1e6, "megaFLOPs"))
