"""The figures of a page, in the light theme's colours.

Each colour is unique, so that the page can turn it into a CSS variable, and the same SVG is readable in a
light and in a dark browser.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler


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
            "font.size": 9.5,
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
    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.subplots(**kwargs)


# The figures of a comparison ---------------------------------------------------------------------


def arms_figure(
    arms: Sequence[Mapping[str, Any]], target: str | None = None, *, per: str = "token"
) -> Figure:
    """Held-out loss against training FLOPs, over a strip that names the stages of every arm.

    Each arm has a `name`, a `held_out` list of [FLOPs, loss], a `final` loss and `stages`, each with
    its `label`, `start` and `stop` in FLOPs. A line marks the final loss of the arm called `target`.
    `per` is what a loss is counted per.
    """
    with style():
        figure, (loss, strip) = canvas(
            4.2 + 0.28 * len(arms),
            nrows=2,
            sharex=True,
            height_ratios=[4.2, 0.12 + 0.28 * len(arms)],
        )
        unit, name = scale(max(arm["stages"][-1]["stop"] for arm in arms))
        for n, arm in enumerate(arms):
            line = look(n)
            x, y = zip(*arm["held_out"], strict=True)
            loss.plot(
                [f / unit for f in x], y, label=f"{plain(arm['name'])}  {arm['final']:.3f}", **line
            )
            loss.plot(x[-1] / unit, y[-1], "o", color=line["color"], markersize=5)
            for stage in arm["stages"][1:]:
                at, height = stage["start"] / unit, np.interp(stage["start"], x, y)
                loss.plot(at, height, "|", color=line["color"], markersize=13)
            _stages(strip, arm, n, unit)
        for arm in arms:
            if arm["name"] == target:
                loss.axhline(arm["final"], color=COLOURS["soft"][0], linewidth=0.8, zorder=0)
        # The first tenth is the same steep fall for everybody and would flatten the rest.
        late = [
            p for arm in arms for f, p in arm["held_out"] if f >= arm["stages"][-1]["stop"] / 10
        ]
        low, high = min(late), max(late)
        loss.set_ylim(low - 0.06 * (high - low), high + 0.03 * (high - low))
        loss.set_ylabel(f"held-out loss (nats per {per})")
        loss.legend(loc="upper right", title="arm, final loss", alignment="left")
        strip.set_yticks(range(len(arms)), [plain(arm["name"]) for arm in arms])
        strip.set_ylim(len(arms) - 0.5, -0.5)
        strip.tick_params(length=0)
        strip.grid(False)
        strip.spines["left"].set_visible(False)
        strip.set_xlabel(f"training {name}")
        strip.set_xlim(0, None)
    return figure


def cost_figure(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """FLOPs of each step along the run; `costs` is each arm's list of [first step, FLOPs of a step]."""
    with style():
        figure, axes = canvas(2.9)
        unit, name = scale(max(cost for arm in arms for _, cost in arm["costs"]))
        for n, arm in enumerate(arms):
            starts, costs = zip(*[*arm["costs"], (arm["steps"], arm["costs"][-1][1])], strict=True)
            # Apart by less than a line's width, so that arms of equal cost can be told apart.
            shown = [cost / unit * (1 + 0.012 * ((len(arms) - 1) / 2 - n)) for cost in costs]
            axes.step(starts, shown, where="post", label=plain(arm["name"]), **look(n))
        axes.set_xlabel("step")
        axes.set_ylabel(f"{name} per step")
        axes.set_ylim(0, None)
        axes.set_xlim(0, None)
        axes.legend(loc="lower right", ncols=len(arms))
    return figure


class Bar(NamedTuple):
    """One difference of a figure of differences: its mean, 95% interval and values, and the verdict."""

    group: str
    label: str
    mean: float
    interval: tuple[float, float]
    values: Sequence[float]
    verdict: str


def differences_figure(bars: Sequence[Bar], zero: str) -> Figure:
    """Differences in nats, each a bar with a dot for every seed, in groups; `zero` names the 0."""
    groups: dict[str, list[Bar]] = {}
    for bar in bars:
        groups.setdefault(bar.group, []).append(bar)
    colours = {"better": COLOURS["series3"][0], "worse": COLOURS["series1"][0]}
    rows = len(bars) + len(groups)
    with style():
        figure, axes = canvas(0.9 + 0.23 * rows)
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
                # The interval of one seed is not a number, and no line
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
        axes.set_xlabel(f"held-out loss minus that of {plain(zero)} (nats): left is better")
    return figure


class Curve(NamedTuple):
    """Mean losses of an arm on its way: pairs of cost and loss, and at which costs its stages begin."""

    name: str
    points: Sequence[tuple[float, float]]
    stages: Sequence[float]
    look: Mapping[str, Any]


def curves_figure(curves: Sequence[Curve], unit: tuple[float, str]) -> Figure:
    """Loss against cost, an arm a line, with a bar where a stage begins.

    `unit` is what costs are divided by, and its name.
    """
    divisor, name = unit
    with style():
        figure, axes = canvas(4.4)
        late, ends = [], []
        for curve in curves:
            x = [cost / divisor for cost, _ in curve.points]
            y = [loss for _, loss in curve.points]
            (line,) = axes.plot(x, y, label=f"{plain(curve.name)}  {y[-1]:.3f}", **curve.look)
            ends.append((y[-1], line))
            axes.plot(x[-1], y[-1], "o", color=curve.look["color"], markersize=4)
            # The first quarter is the same steep fall for everybody and would flatten the rest
            late += [loss for cost, loss in zip(x, y, strict=True) if cost > x[-1] / 4]
            for start in curve.stages:
                place = start / divisor
                axes.plot(
                    place, np.interp(place, x, y), "|", color=curve.look["color"], markersize=9
                )
        spread = max(late) - min(late)
        axes.set_ylim(min(late) - 0.05 * spread, max(late))
        axes.set_xlabel(name)
        axes.set_ylabel("held-out loss (nats)")
        legend(figure, ends, "arm, final loss")
    return figure


class Ends(NamedTuple):
    """Where an arm's runs ended: at each of its costs the losses of its seeds; and how it is drawn."""

    name: str
    points: Sequence[tuple[float, Sequence[float]]]
    look: Mapping[str, Any]


def ends_figure(
    arms: Sequence[Ends], frontier: Sequence[tuple[float, float]], unit: tuple[float, str]
) -> Figure:
    """Losses at the end against cost, with a dot for every seed; the frontier is a wide line of steps.

    `unit` is what costs are divided by, and its name.
    """
    divisor, name = unit
    with style():
        figure, axes = canvas(4.2)
        # To the dearest end: what was reached for less is there for more
        most = max(x for arm in arms for x, _ in arm.points)
        steps = [*frontier, (max(most, frontier[-1][0]), frontier[-1][1])]
        (edge,) = axes.step(
            [x / divisor for x, _ in steps],
            [y for _, y in steps],
            where="post",
            color=COLOURS["line"][0],
            linewidth=5,
            label="frontier of fixed sizes",
            zorder=0,
        )
        drawn = []
        for arm in arms:
            points = sorted(arm.points)
            means = [(x / divisor, float(np.mean(ys))) for x, ys in points]
            (line,) = axes.plot(
                *zip(*means, strict=True),
                marker="o",
                markersize=4.5,
                linewidth=1.2,
                label=plain(arm.name),
                **arm.look,
            )
            drawn.append((means[-1][1], line))
            for x, ys in points:
                axes.plot(
                    [x / divisor] * len(ys),
                    ys,
                    "o",
                    color=arm.look["color"],
                    markersize=2,
                    alpha=0.5,
                )
        ends = [y for arm in arms for _, ys in arm.points for y in ys]
        spread = max(ends) - min(ends)
        # The frontier begins far above what anybody ends with
        axes.set_ylim(min(ends) - 0.04 * spread, max(ends) + 0.04 * spread)
        costs = sorted({x / divisor for arm in arms for x, _ in arm.points})
        axes.set_xscale("log")
        axes.set_xlim(costs[0] / 1.3, costs[-1] * 1.15)
        marks = [x for n, x in enumerate(costs) if not n or x > 1.1 * costs[n - 1]]
        axes.set_xticks(marks, [f"{x:.3g}" for x in marks])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.set_ylabel("held-out loss at the end (nats)")
        legend(figure, [*drawn, (-np.inf, edge)], "arm")
    return figure


def legend(figure: Figure, ends: Sequence[tuple[float, Any]], title: str) -> None:
    """A legend next to a figure, in the order of the lines' ends from the top."""
    lines = [line for _, line in sorted(ends, key=lambda end: end[0], reverse=True)]
    figure.legend(
        handles=lines, loc="outside right upper", title=title, alignment="left", fontsize=8
    )


def plain(name: str) -> str:
    """A name for a figure's text: dollar signs in it are no formula."""
    return name.replace("$", r"\$")


def look(n: int) -> dict[str, Any]:
    """Colour and dashes of the nth line of a figure; colours come again, with dashes of their own."""
    return {"color": _SERIES[n % len(_SERIES)], "linestyle": _DASHES[n % len(_DASHES)]}


def _stages(strip: Axes, arm: Mapping[str, Any], row: int, unit: float) -> None:
    colour = look(row)["color"]
    for stage in arm["stages"]:
        start, stop = stage["start"] / unit, stage["stop"] / unit
        strip.barh(row, stop - start, 0.78, start, color=colour, alpha=0.22, linewidth=0)
        strip.plot([start, start], [row - 0.39, row + 0.39], color=colour, linewidth=1.6)
        strip.annotate(
            plain(stage["label"]),
            (start, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=8,
        )


def scale(largest: float) -> tuple[float, str]:
    """The unit of FLOPs to write a number of this size in, and its name."""
    units = [(1e18, "exaFLOPs"), (1e15, "petaFLOPs"), (1e12, "teraFLOPs"), (1e9, "gigaFLOPs")]
    return next((u for u in units if largest >= u[0]), (1e6, "megaFLOPs"))
