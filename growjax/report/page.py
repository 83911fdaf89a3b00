"""One self-contained HTML page: plots as inline SVG, tables and notes; nothing is fetched from anywhere.

Figures are drawn in the light theme's colours. Each of those is unique, so that the page can turn it
into a CSS variable, and the same SVG is readable in a light and in a dark browser.
"""

import contextlib
import dataclasses
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler


# name -> (light, dark)
_COLOURS = {
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
_SERIES = [light for name, (light, _) in _COLOURS.items() if name.startswith("series")]
_DASHES = ["-", "-", (0, (5, 2)), (0, (5, 1.5, 1, 1.5)), "-", (0, (1, 1.5))]
_DASHES += [(0, (3, 1, 1, 1, 1, 1))] * len(_SERIES) + [(0, (8, 1.5))] * len(_SERIES)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with its heading and a sentence that says what to see in it."""

    title: str
    figure: Figure
    caption: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under column heads. The first column is the row's name; the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def write_page(
    path: str | Path,
    title: str,
    plots: Sequence[Plot] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page and return its path: tables first, then plots, then notes as a list.

    **Example**

        with style():
            figure, axes = canvas()
            axes.plot(x, y)
        write_page("report.html", "Growth", [Plot("Loss", figure, "Lower is better.")])
    """
    body = [f"<h1>{html.escape(title)}</h1>", *map(_table, tables)]
    body += [_plot(plot, n) for n, plot in enumerate(plots)]
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(f"<h2>How each number was made</h2><ul>{items}</ul>")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{_css()}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n",
        encoding="utf-8",
    )
    return path


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw a page's figures inside this: its colours, no frame, text that stays text."""
    ink, soft, line = (_COLOURS[name][0] for name in ("ink", "soft", "line"))
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
                loss.axhline(arm["final"], color=_COLOURS["soft"][0], linewidth=0.8, zorder=0)
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


# HTML --------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    caption = f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    rows = "".join(row(cells, "td") for cells in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2><div class=wide><table><thead>{row(table.columns, 'th')}"
        f"</thead><tbody>{rows}</tbody></table></div>{caption}"
    )


def _plot(plot: Plot, n: int) -> str:
    out = io.StringIO()
    with style():
        plot.figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Matplotlib numbers its parts alike in every figure; the page needs ids that are unique.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{n}-", svg)
    label = html.escape(f"{plot.title}. {plot.caption}", quote=True)
    svg = re.sub(
        r'<svg (.*?) width="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', svg, count=1
    )
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for name, (light, _) in _COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    caption = html.escape(plot.caption)
    return (
        f"<h2>{html.escape(plot.title)}</h2>"
        f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    )


def _css() -> str:
    light = "".join(f"--{name}:{light};" for name, (light, _) in _COLOURS.items())
    dark = "".join(f"--{name}:{dark};" for name, (_, dark) in _COLOURS.items())
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "body{background:var(--paper);color:var(--ink);margin:0;"
        "font:16px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}"
        "main{max-width:54rem;margin:0 auto;padding:1.5rem 1rem 4rem}"
        "h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.1rem;margin:2.2rem 0 .5rem}"
        "p,figcaption,li{color:var(--soft);font-size:.92rem}figure{margin:0}"
        "svg{display:block;width:100%;height:auto}"
        "svg text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif!important}"
        ".wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}"
        "th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--line);"
        "font-variant-numeric:tabular-nums;white-space:nowrap}"
        "th{font-weight:600;white-space:normal;vertical-align:bottom}"
        "th:first-child,td:first-child{text-align:left;padding-left:0}td:first-child{font-weight:600}"
    )
