"""The summary of a study and its page: loss against cost, what its comparisons say, and every run."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.study import read
from experiments.summary import Group, Row, Study, by, command_for, summarise
from growjax.budget import load_clock
from growjax.report import Plot, Table, write_page
from growjax.report.figures import canvas, look, scale, style


Looks = dict[str, dict[str, Any]]
_NOTES = (
    "Held-out losses are of the whole model, in nats per predicted token (a byte), over windows that "
    "nobody trained on. Curves are means over seeds. Every arm's learning rate is decayed at its own "
    "end, unless it says otherwise; only ends compare with ends.",
    "At equal cost: differences are paired by seed (same birth, text and masks). Better and worse take "
    "a paired t-test adjusted by Holm's method and the flipping of signs to agree; fewer than six seeds "
    "decide nothing.",
    "A speed-up is what the baseline would need for the arm's loss, over what the arm was given: decayed "
    "reads it off the ends of baselines that were decayed within their own budgets, naive off the way of "
    "the largest baseline, whose learning rate was still high.",
    "Seconds are those of training on the machine at hand, which did other things as well.",
    "Nobody is charged for compiling, growing, evaluating, tuning, or the second model of RHO.",
)


def write_summary(results: Path, study: Study) -> list[Row]:
    """Write `summary.json` and `report.html` next to the lines of results, and return the summary.

    Each `clock*.json` there, of `growjax calibrate`, is one more clock to charge runs by.
    """
    runs = read(results)
    measured = map(load_clock, sorted(results.parent.glob("clock*.json")))
    clocks = {**study.clocks, **{clock.identity: clock for clock in measured}}
    study = dataclasses.replace(study, clocks=clocks)
    rows = summarise(study, runs, command_for(study, results.stem, runs))
    text = json.dumps(rows, indent=1) + "\n"
    (results.parent / "summary.json").write_text(text, encoding="utf-8")
    write_report(results.parent / "report.html", study, runs, rows)
    return rows


def write_report(path: Path, study: Study, runs: Group, rows: Sequence[Row]) -> None:
    """Write the page, and next to it what a README shows of each workload: `bert-loss.svg`, of the
    smallest budget, and `bert-ends.svg`, of all budgets, if there are more than one.
    """
    plots = []
    # An arm looks the same in every figure
    looks = {arm: look(n) for n, arm in enumerate(by(runs, "arm"))}
    for workload, group in sorted(by(runs, "workload").items()):
        budgets = sorted(by(group, "budget").items(), key=lambda at: min(r["spent"] for r in at[1]))
        losses = [_loss_plot(f"{workload}, {budget}", at, looks) for budget, at in budgets]
        lengths = [_length_plot(f"{workload}, {budget}", at, looks) for budget, at in budgets]
        ends = _frontier_plot(workload, group, study, looks)
        plots += [*losses, *itertools.chain(*lengths), *ends]
        for name, shown in (("loss", losses[:1]), ("ends", ends)):
            for plot in shown:
                _picture(path.parent / f"{workload}-{name}.svg", plot.figure)
    tables = [*_row_tables(rows), _runs_table(runs), *_downstream_table(runs), *_ledger(runs)]
    write_page(path, study.name, plots, tables, _NOTES)


def _picture(path: Path, figure: Figure) -> None:
    """For where there is no page: on white, since its colours are those of a light page."""
    with style():
        figure.savefig(path, facecolor="white", metadata={"Date": None})


# Plots -------------------------------------------------------------------------------------------


def _loss_plot(title: str, group: Group, looks: Looks) -> Plot:
    unit, label = _unit(group)
    with style():
        figure, axes = canvas(4.4)
        late, last = [], []
        for arm, runs in by(group, "arm").items():
            points = list(zip(*(r["curve"] for r in runs), strict=False))
            x = [statistics.fmean(p[0] for p in at) / unit for at in points]
            y = [statistics.fmean(p[1] for p in at) for at in points]
            (drawn,) = axes.plot(x, y, label=f"{arm}  {y[-1]:.3f}", **looks[arm])
            last.append((y[-1], drawn))
            axes.plot(x[-1], y[-1], "o", color=looks[arm]["color"], markersize=4)
            late += [value for at, value in zip(x, y, strict=True) if at > x[-1] / 4]
            for stage in runs[0]["stages"][1:]:
                at = stage["start"] / unit
                axes.plot(at, np.interp(at, x, y), "|", color=looks[arm]["color"], markersize=9)
        spread = max(late) - min(late)
        axes.set_ylim(min(late) - 0.05 * spread, max(late))
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss (nats)")
        _legend(figure, last, "arm, final loss")
    seeds = len({r["seed"] for r in group})
    caption = f"Means over at most {seeds} seeds. Bars across a line are where its stages begin."
    return Plot(f"{title}: loss against cost", figure, caption)


def _length_plot(title: str, group: Group, looks: Looks) -> list[Plot]:
    """A panel for each share of the cost at which models were run along shorter paths."""
    ends = [r for r in group if "by_length" in r]
    if not ends:
        return []
    shares = sorted({share for r in ends for share in r.get("midway", ())}, key=float)
    last = []
    with style():
        figure, panels = canvas(3.4, ncols=len(shares) + 1, sharey=True, squeeze=False)
        for axes, share in zip(panels[0], [*shares, None], strict=True):
            at = ends
            if share is not None:
                at = [r | r["midway"][share] for r in ends if share in r.get("midway", ())]
            for arm, runs in by(at, "arm").items():
                lengths = sorted(map(int, runs[0]["by_length"]))
                y = [statistics.fmean(r["by_length"][str(k)][0] for r in runs) for k in lengths]
                (drawn,) = axes.plot(lengths, y, marker="o", markersize=3, label=arm, **looks[arm])
                if share is None:
                    last.append((y[-1], drawn))
            axes.set_xlabel("layers of the path")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if shares:
                axes.set_title("the end" if share is None else f"{share} of the cost")
        panels[0][0].set_ylabel("held-out loss (nats)")
        _legend(figure, last, "arm")
    caption = "Along random paths of the model as it is by then; the last point is the whole model."
    return [Plot(f"{title}: loss against path length", figure, caption)]


def _frontier_plot(workload: str, group: Group, study: Study, looks: Looks) -> list[Plot]:
    """Ends of arms at more budgets than one: the baseline's are a line that others should be below."""
    budgets = {arm: by(runs, "budget") for arm, runs in by(group, "arm").items()}
    budgets = {arm: at for arm, at in budgets.items() if len(at) > 1}
    if not budgets:
        return []
    unit, label = _unit(group)
    marks: list[float] = []
    last = []
    with style():
        figure, axes = canvas(3.8)
        for arm, at in budgets.items():
            ends = sorted(
                (
                    statistics.fmean(r["spent"] for r in runs) / unit,
                    statistics.fmean(r["score"] for r in runs),
                )
                for runs in at.values()
            )
            width = 2.6 if arm == study.baseline else 1.2
            line = looks[arm] | {"linewidth": width}
            (drawn,) = axes.plot(
                *zip(*ends, strict=True), marker="o", markersize=3, label=arm, **line
            )
            last.append((ends[-1][1], drawn))
            if arm == study.baseline:
                marks = [x for x, _ in ends]
        axes.set_xscale("log")
        axes.set_xticks(marks, [f"{x:.3g}" for x in marks])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss at the end (nats)")
        _legend(figure, last, "arm")
    caption = (
        "Each point is the mean of runs that were decayed to their own ends, over the seeds that there "
        f"are; the thick line is {study.baseline}."
    )
    return [Plot(f"{workload}: ends at every budget", figure, caption)]


def _legend(figure: Figure, ends: Sequence[tuple[float, Line2D]], title: str) -> None:
    """Next to the figure, in the order of the lines' ends: arms are too many to lie between them."""
    lines = [line for _, line in sorted(ends, key=lambda end: end[0], reverse=True)]
    figure.legend(
        handles=lines, loc="outside right upper", title=title, alignment="left", fontsize=8
    )


def _unit(group: Group) -> tuple[float, str]:
    """What to divide costs by, and what they are then."""
    if group[0]["unit"] != "FLOPs":
        return 1.0, "reference seconds"
    unit, name = scale(max(r["spent"] for r in group))
    return unit, f"training {name}"


# Tables ------------------------------------------------------------------------------------------


def _row_tables(rows: Sequence[Row]) -> list[Table]:
    ranks = [row for row in rows if "order" in row]
    speeds = [row for row in rows if "naive" in row]
    said = [row for row in rows if "order" not in row and "naive" not in row]
    tables = [_said_table(said), *_clocks_table(rows)]
    if speeds:
        columns = ("arm", "speed-up", "95 %", "along the longest run", "seeds")
        cells = [
            [
                f"{row['workload']}, {row['budget']}: {row['question']}",
                _bounded(row),
                _interval(row["interval"], ".2f"),
                _number(row["naive"], ".2f"),
                str(row["seeds"]),
            ]
            for row in speeds
        ]
        note = (
            "What the baseline needs for the arm's loss, over what the arm was given: the least of all "
            "that was run of it, decayed or not. >= and <= are bounds: it never had such a loss."
        )
        tables.append(Table("Speed-ups", columns, cells, note))
    if ranks:
        columns = ("question", "arms", "order, best first")
        cells = [
            [
                f"{row['workload']}, {row['budget']}: {row['question']}",
                str(row["estimate"]),
                ", ".join(row["order"]) + _unknown(row["left_out"]),
            ]
            for row in ranks
        ]
        tables.append(Table("The same runs on other clocks", columns, cells))
    return tables


def _bounded(row: Row) -> str:
    """A speed-up, or the bound that is known of it."""
    sign = {"=": "", ">=": ">= ", "<=": "<= "}[row.get("bound", "=")]
    return "-" if row["estimate"] is None else f"{sign}{row['estimate']:.2f}"


def _unknown(arms: Sequence[str]) -> str:
    return f" (not known to it: {', '.join(arms)})" if arms else ""


def _said_table(rows: Sequence[Row]) -> Table:
    cells = [
        [
            f"{row['workload']}, {row['budget']}: {row['question']}",
            f"{row['estimate']:+.4f}",
            _interval(row["interval"], "+.4f"),
            _number(row.get("p_holm"), ".3f"),
            _number(row.get("cost_to_reach"), ".2f"),
            str(row["seeds"]),
            row["verdict"],
        ]
        for row in rows
    ]
    columns = ("question", "difference", "95 %", "p (Holm)", "cost to reach", "seeds", "verdict")
    return Table("What they say", columns, cells)


def _clocks_table(rows: Sequence[Row]) -> list[Table]:
    """What arms cost, of what the target does, on clocks other than their own."""
    cells = [
        [
            f"{row['workload']}, {row['budget']}: {row['question'].partition(',')[0]}",
            name,
            _number(found.get("cost"), ".2f"),
            _number(found.get("cost_to_reach"), ".2f"),
            f"{sum(x is not None for x in found.get('reached', ()))} of {row['seeds']}",
        ]
        for row in rows
        for name, found in row.get("clocks", {}).items()
    ]
    columns = ("arm", "clock", "cost", "cost to reach its loss", "seeds that did")
    return [Table("Charged by other clocks", columns, cells)] if cells else []


def _runs_table(runs: Group) -> Table:
    cells = []
    for key, found in by(runs, "workload", "budget", "arm").items():
        scores = [r["score"] for r in found]
        mean = statistics.fmean(scores)
        cells.append(
            [
                ", ".join(key),
                str(len(found)),
                f"{mean:.4f}",
                f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "-",
                f"{mean / math.log(2):.4f}",
                f"{statistics.fmean(r['spent'] for r in found):.4g}",
                f"{statistics.fmean(r['steps'] for r in found):.0f}",
                f"{statistics.fmean(r['seconds'] for r in found):.0f}",
            ]
        )
    columns = ("run", "seeds", "nats", "deviation", "bits", "cost", "steps", "seconds")
    return Table("Runs", columns, cells, "Bits are per predicted byte.")


def _downstream_table(runs: Group) -> list[Table]:
    found = [r | {"downstream": r.get("texts", {}) | r.get("downstream", {})} for r in runs]
    judged = [r for r in found if r["downstream"]]
    if not judged:
        return []
    names = list(dict.fromkeys(name for r in judged for name in r["downstream"]))
    cells = []
    for key, found in by(judged, "workload", "budget", "arm").items():
        values = [[r["downstream"][n] for r in found if n in r["downstream"]] for n in names]
        means = [_number(statistics.fmean(v) if v else None, ".4f") for v in values]
        cells.append([", ".join(key), str(len(found)), *means])
    caption = "Of the trained models, means over seeds; losses on other texts are nats per byte."
    return [Table("Downstream", ("run", "seeds", *names), cells, caption)]


def _ledger(runs: Group) -> list[Table]:
    trials = [r for r in runs if r["budget"] == "tuning"]
    if not trials:
        return []
    cells = [[f"{r['workload']}, {r['arm']}", f"{r['score']:.4f}"] for r in trials]
    caption = "As many trials for every method, at the smallest budget; charged to nobody."
    return [Table("Tuning ledger", ("trial", "nats"), cells, caption)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(value: Sequence[float | None] | None, form: str) -> str:
    """An interval; one that is open at an end (a bound) says so."""
    if value is None:
        return "-"
    low, high = value
    if low is None or high is None:
        return (
            f"at least {_number(low, form)}" if high is None else f"at most {_number(high, form)}"
        )
    return f"{low:{form}} to {high:{form}}"
