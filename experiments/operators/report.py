"""The page of the contest: the answers, a figure of each, and a table of each direction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.frontier.design import fixed_name
from experiments.operators.design import DESIGNS, DIRECTIONS, REFERENCE, Contest, Direction
from experiments.operators.summary import (
    AFTER,
    ALIVE,
    ALL,
    BEFORE,
    END,
    PREDICTS,
    RANDOM,
    RECOVERY,
    REGRET,
    RUNS,
)
from experiments.study import Line, Page
from growjax.report.figures import COLOURS, canvas, differences_figure, style
from growjax.report.page import Plot, Section, Table
from growjax.report.rows import AgainstFrontier, Answer, EqualCost, Row, select
from growjax.report.tables import bars, equal_cost_table, frontier_table
from growjax.report.words import interval_text


TITLE = "Which operator? A contest at equal cost"
_NOTES = (
    "Held-out losses are in nats per byte of text that nobody trained on: 4,096 windows at the end, and "
    "1,024 on the way.",
    "Operators of a seed fork from one trunk, with its whole state, at 0.6 of the cost. Rates are "
    "constant until they fall over the last fifth of the cost.",
    "Differences are paired by seed. Better and worse take a t-test adjusted by Holm's method for all "
    "arms of a direction, flipping signs, and all seeds.",
    "The setting of the smallest size was not tuned, and no size between was run.",
)


def page(
    results: Path, lines: Sequence[Line], rows: Sequence[Row], design: Contest | None = None
) -> Page:
    """What the page shows; `ends`, `after` and `prediction` are drawn for the README as well."""
    del lines
    design = design or DESIGNS[results.stem]
    against = select(rows, AgainstFrontier)
    answers = {(row.workload, row.question): row for row in select(rows, Answer)}
    plots, pictures, sections = [], {}, []
    if against:
        for name, title, figure, caption in (
            (
                "ends",
                "Against the best fixed size",
                _ends_figure(against),
                "Each end minus the lowest of the fixed sizes at this cost; a small dot is a seed. "
                + "".join(
                    f"{row.workload}, {row.arm} is beyond, at {row.estimate:+.2f}. "
                    for row in _far(against)
                ),
            ),
            (
                "after",
                "After the growth",
                _after_figure(design, answers),
                "Mean loss of each operator, from the loss before the growth (dashed) to the end. Losses "
                "far above are cut off, and controls are dotted.",
            ),
            (
                "prediction",
                "Does an early loss predict the end?",
                _prediction_figure(design, answers),
                "Rank correlation over operators with 95% intervals over seeds, and how far the end of "
                "the operator that is lowest at n lies above the best end.",
            ),
        ):
            plots.append(Plot(title, figure, caption))
            pictures[name] = figure
        for direction in DIRECTIONS:
            sections.append(_section(design, direction, rows, answers))
        sections.append(Section("Fixed sizes", [_fixed_table(answers)]))
    return Page(TITLE, sentences(design, rows), plots, sections, _NOTES, pictures)


# Answers ------------------------------------------------------------------------------------------


def sentences(design: Contest, rows: Sequence[Row]) -> list[str]:
    """The answers to the four questions, as far as they were run."""
    answers = {(row.workload, row.question): row for row in select(rows, Answer)}
    sentences = []
    for direction in DIRECTIONS:
        against = of_direction(select(rows, AgainstFrontier), direction)
        if not against:
            continue
        name = direction.capitalize()
        best = min(against, key=lambda row: row.loss)
        size = size_of(against)
        sentences.append(
            f"{name}: {_count(against, 'better')} of {len(against)} arms end below the best fixed size "
            f"({size}), {_count(against, 'worse')} above it; the lowest is {best.arm}, "
            f"{interval_text(best.estimate, best.interval)}."
        )
        reference = versus(rows, direction, REFERENCE[direction])
        sentences.append(
            f"{name}, against {REFERENCE[direction]}. Better: {_names(reference, 'better')}. Worse: "
            f"{_names(reference, 'worse')}. No difference found: "
            f"{_names(reference, 'no difference found')}."
        )
        large = fixed_name(design.large[direction])
        scratch = versus(rows, direction, large)
        sentences.append(
            f"{name}, against {large} from scratch: {_count(scratch, 'better')} of {len(scratch)} arms "
            f"are better, {_count(scratch, 'worse')} worse."
        )
        words = "; ".join(
            f"{n} steps: {correlation(answers[direction, PREDICTS.format(n, ALIVE)])}"
            for n in design.after
        )
        sentences.append(
            f"{name}, does the loss n steps after the growth predict the end? {words}."
        )
    if not sentences:
        row = answers["", RUNS]
        sentences.append(f"Not answered yet: {row.verdict} runs are there.")
    return sentences


def correlation(row: Answer) -> str:
    """A correlation with its interval and its answer."""
    if row.estimate is None or row.interval is None:
        return row.verdict
    low, high = row.interval
    return f"{row.estimate:+.2f} ({low:.2f} to {high:.2f}), {row.verdict}"


def of_direction(rows: Sequence, direction: Direction) -> list:
    """The rows of a direction."""
    return [row for row in rows if row.workload == direction]


def size_of(rows: Sequence[AgainstFrontier]) -> str:
    """The fixed size that ends lowest."""
    return rows[0].baseline.partition(",")[0]


def versus(rows: Sequence[Row], direction: Direction, baseline: str) -> list[EqualCost]:
    """The arms of a direction against one arm."""
    equal = of_direction(select(rows, EqualCost), direction)
    return [row for row in equal if row.baseline == baseline]


def _count(rows: Sequence[EqualCost], verdict: str) -> int:
    return sum(row.verdict == verdict for row in rows)


def _names(rows: Sequence[EqualCost], verdict: str) -> str:
    """Arms with a verdict, from the lowest loss."""
    group = [row for row in rows if row.verdict == verdict and row.estimate is not None]
    ordered = sorted(group, key=lambda row: row.estimate or 0.0)
    # Some arms have commas in their names
    return "; ".join(row.arm for row in ordered) or "none"


# The figure of ends leaves out arms that are further above the best fixed size, in nats
_BEYOND = 0.15
# How far above the loss before the growth the figure shows losses, in nats
_ABOVE = 0.35

# Figures ------------------------------------------------------------------------------------------


def _ends_figure(rows: Sequence[AgainstFrontier]) -> Figure:
    """Differences from the frontier; those far above would make one dot of all others."""
    near = [row for row in rows if row not in _far(rows)]
    shown = [bar for d in DIRECTIONS for bar in bars(of_direction(near, d), d)]
    return differences_figure(shown, f"the best fixed size ({size_of(rows)})")


def _far(rows: Sequence[AgainstFrontier]) -> list[AgainstFrontier]:
    """The arms that the figure of ends leaves out."""
    return [row for row in rows if row.estimate is not None and row.estimate > _BEYOND]


def _after_figure(design: Contest, answers: dict) -> Figure:
    """The loss of each operator over the steps after its growth, and at its end."""
    with style():
        figure, panels = canvas(5.6, ncols=2)
        for direction, axes in zip(DIRECTIONS, panels, strict=True):
            before = answers[direction, BEFORE].estimate
            places = [*range(len(design.after)), len(design.after)]
            ends = []
            for n, entry in enumerate(design.entries(direction)):
                y = [answers[direction, AFTER.format(entry.name, k)].estimate for k in design.after]
                y.append(answers[direction, END.format(entry.name)].estimate)
                colour = COLOURS[f"series{n % 6}"][0]
                dash = ":" if entry.floor else ("-", "--", "-.")[n // 6]
                axes.plot(
                    places, y, dash, color=colour, linewidth=1.2, marker="o", markersize=2.5,
                    label=entry.name,
                )  # fmt: skip
                ends.append(y)
            axes.axhline(before, color=COLOURS["soft"][0], linestyle=(0, (4, 3)), linewidth=1)
            # Controls and operators that forget are far above: the others would be one line
            low, high = min(map(min, ends)), before + _ABOVE
            axes.set_ylim(low - 0.02, high)
            axes.set_xticks(places, [*map(str, design.after), "end"])
            axes.set_title(direction, fontsize=10)
            axes.set_xlabel("steps after the growth")
            axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        panels[0].set_ylabel("held-out loss (nats)")
    return figure


def _prediction_figure(design: Contest, answers: dict) -> Figure:
    """Correlations and regrets over the steps after the growth."""
    with style():
        figure, (left, right) = canvas(4.0, ncols=2)
        for n, direction in enumerate(DIRECTIONS):
            colour = COLOURS[f"series{n + 1}"][0]
            for words, dash, shift in ((ALL, ":", -0.06), (ALIVE, "-", 0.06)):
                rows = [answers.get((direction, PREDICTS.format(k, words))) for k in design.after]
                points = [
                    (i, r) for i, r in enumerate(rows) if r is not None and r.estimate is not None
                ]
                x = [i + shift + 0.03 * n for i, _ in points]
                left.plot(
                    x, [r.estimate for _, r in points], dash, color=colour, marker="o", markersize=3.5,
                    label=f"{direction}, {words}",
                )  # fmt: skip
                for at, (_, row) in zip(x, points, strict=True):
                    if row.interval is not None:
                        left.plot([at, at], row.interval, color=colour, linewidth=1)
            regrets = [answers[direction, REGRET.format(k)].estimate for k in design.after]
            right.plot(regrets, "-", color=colour, marker="o", markersize=3.5, label=direction)
            chance = answers[direction, RANDOM].estimate
            right.axhline(
                chance, color=colour, linestyle=":", linewidth=1, label=f"{direction}, at random"
            )
        left.axhline(0, color=COLOURS["ink"][0], linewidth=0.8)
        left.set_ylabel("rank correlation with the end")
        right.set_ylabel("regret (nats)")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xticks(range(len(design.after)), [*map(str, design.after)])
            axes.set_xlabel("steps after the growth")
            axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


# Tables -------------------------------------------------------------------------------------------


def tables_of(design: Contest, direction: Direction, rows: Sequence[Row]) -> list[Table]:
    """A line for each operator of a direction, from the lowest end; the README shows the same.

    One table of those whose growth left the loss where it was, and one of the others.
    """
    answers: Any = {(row.workload, row.question): row for row in select(rows, Answer)}
    reference, large = REFERENCE[direction], fixed_name(design.large[direction])
    columns = (
        "arm",
        "right after",
        f"{design.after[-1]} steps after",
        "recovered (steps)",
        "end",
        "minus the best fixed size",
        f"minus {reference}",
        f"minus {large}",
    )
    against = {row.arm: row for row in of_direction(select(rows, AgainstFrontier), direction)}
    others = [{r.arm: r for r in versus(rows, direction, name)} for name in (reference, large)]
    before = answers[direction, BEFORE].estimate
    kept, changed = [], []
    for entry in sorted(design.entries(direction), key=lambda e: against[e.name].loss):
        early, late = (
            answers[direction, AFTER.format(entry.name, n)].estimate
            for n in (design.after[0], design.after[-1])
        )
        steps = answers[direction, RECOVERY.format(entry.name)].estimate
        compared = [against[entry.name], *(other.get(entry.name) for other in others)]
        cells = [
            entry.name,
            f"{early:.3f}",
            f"{late:.3f}",
            "-" if steps is None else f"{steps:g}",
            f"{against[entry.name].loss:.3f}",
            *("-" if row is None else difference(row) for row in compared),
        ]
        (kept if abs(early - before) < KEPT else changed).append(cells)
    caption = f"The loss before the growth is {before:.3f}."
    name = direction.capitalize()
    return [
        Table(f"{name}: {words}", columns, cells, caption)
        for words, cells in (
            ("operators that keep the function", kept),
            ("operators that change the function", changed),
        )
        if cells
    ]


# The largest change of the mean loss, in nats, of a growth that keeps the function
KEPT = 1e-3
MARKS = {"better": "better", "worse": "worse", "no difference found": "no difference"}


def difference(row: EqualCost) -> str:
    """A difference as the table shows it: with its interval, and its verdict."""
    assert row.estimate is not None and row.interval is not None
    low, high = row.interval
    return f"{row.estimate:+.3f} ({low:.3f} to {high:.3f}), {MARKS.get(row.verdict, row.verdict)}"


def prediction_table(design: Contest, direction: Direction, answers: dict) -> Table:
    """Correlations and regrets of a direction, by the steps after the growth."""
    cells = []
    for n in design.after:
        regret = answers[direction, REGRET.format(n)]
        cell = [str(n)]
        for words in (ALL, ALIVE):
            row = answers[direction, PREDICTS.format(n, words)]
            cell.append(correlation(row))
        cells.append([*cell, interval_text(regret.estimate, regret.interval)])
    chance = answers[direction, RANDOM].estimate
    return Table(
        f"{direction.capitalize()}: what the loss n steps after the growth says of the end",
        ("n", ALL, ALIVE, "regret (nats)"),
        cells,
        f"Choosing at random (without the controls) has a regret of {chance:.3f}.",
    )


def _section(design: Contest, direction: Direction, rows: Sequence[Row], answers: dict) -> Section:
    against = of_direction(select(rows, AgainstFrontier), direction)
    blocks = [
        *tables_of(design, direction, rows),
        prediction_table(design, direction, answers),
        frontier_table(against, f"{direction}: against the best fixed size at equal cost"),
    ]
    for name in (REFERENCE[direction], fixed_name(design.large[direction])):
        compared = versus(rows, direction, name)
        blocks.append(equal_cost_table(compared, f"{direction}: against {name} at equal cost"))
    return Section(f"{direction.capitalize()}: every number", blocks)


def _fixed_table(answers: dict) -> Table:
    cells = [
        [
            question.removeprefix("held-out nats of ").removesuffix(" at its end"),
            row.verdict,
            interval_text(row.estimate, row.interval),
        ]
        for (workload, question), row in answers.items()
        if workload == "fixed"
    ]
    return Table("Fixed sizes at their ends", ("size", "parameters", "loss (95%)"), cells)
