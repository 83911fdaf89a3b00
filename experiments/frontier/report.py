"""The page of the study: what is there, the frontier, growths, token retention and forecasts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.frontier.design import DESIGNS, Design, fixed_name
from experiments.frontier.summary import (
    CALIBRATION,
    FAMILY,
    FORECAST,
    GROWN,
    LEFT,
    PICKED,
    PIECES,
    PRIMARY,
)
from experiments.study import Line, Page
from experiments.summary import arms_of
from growjax.report.figures import ends_figure
from growjax.report.page import Plot, Section, Table
from growjax.report.rows import AgainstFrontier, Answer, Row, select
from growjax.report.tables import frontier_table
from growjax.report.words import interval_text


TITLE = "Does growing pay? The frontier of fixed sizes, and what a grown model keeps"
_NOTES = (
    "Held-out losses at the end are of 4,096 windows of text that nobody trained on, in nats per byte; "
    "those on the way are of 256.",
    "Every rate is constant after its warm-up and falls over the last fifth of the cost. Runs of one "
    "size and seed share their first steps.",
    "Intervals are Student's t over seeds; those against the frontier say what they are over.",
)


def page(
    results: Path, lines: Sequence[Line], rows: Sequence[Row], design: Design | None = None
) -> Page:
    """What the page shows; `ends` is drawn for the README as well."""
    design = design or DESIGNS[results.stem]
    answers = select(rows, Answer)
    arms = [arm for arm in arms_of(lines) if arm.budget != "tuning"]
    fixed = [arm for arm in arms if arm.fixed]
    plots, pictures = [], {}
    if fixed:
        figure = ends_figure(fixed, _steps(fixed))
        plots.append(
            Plot("Fixed sizes", figure, "Decayed ends of each size; a small dot is a seed.")
        )
        pictures["ends"] = figure
    sections = [Section("How much of the study is there", [_table(answers, "", PIECES[:8])])]
    for budget, group in _by_budget(select(rows, AgainstFrontier)).items():
        sections.append(
            Section(
                f"Growths at {budget}", [frontier_table(group, f"Against the frontier, {budget}")]
            )
        )
    for title, start in (
        ("Settings of the ledger", "setting"),
        ("Token retention", "token retention"),
        ("The family", FAMILY[:18]),
        ("Forecasts at the held-out budget", "forecast"),
        ("The calibration of growjax.advise", CALIBRATION),
        ("The calibration of growjax.advise for plans that grow", GROWN),
        ("The growths that growjax.advise leaves out", LEFT),
        ("The size that growjax.advise picks", PICKED),
        ("All ends", "held-out nats"),
    ):
        table = _table(answers, "", start)
        if table.rows:
            sections.append(Section(title, [table]))
    answer = [*_answer(answers), *_beyond(answers, design)]
    return Page(TITLE, answer, plots, sections, _NOTES, pictures)


def _answer(rows: Sequence[Answer]) -> list[str]:
    """The primary question, or the calibration where none is asked, and how much is there."""
    pieces = [row for row in rows if row.question.startswith(PIECES[:8])]
    counts = "; ".join(f"{row.question[8:-15]}: {row.verdict}" for row in pieces)
    asked = [row for row in rows if row.question == PRIMARY] or [
        row for row in rows if row.question in (CALIBRATION, PICKED)
    ]
    answers = []
    for row in asked:
        # A question ends in its mark, and what was measured is a title
        question = (
            row.question[0].upper() + row.question[1:] + ("" if row.question == PRIMARY else ":")
        )
        known = row.question == PRIMARY and row.estimate is not None
        number = f" ({interval_text(row.estimate, row.interval)})" if known else ""
        answers.append(f"{question} {row.verdict.capitalize()}{number}.")
    return [*answers, f"What is there: {counts}."]


def _beyond(rows: Sequence[Answer], design: Design) -> Iterator[str]:
    """That a larger size is missing, where the largest is forecast best at the held-out budget."""
    losses = {row.question: row.estimate for row in rows}
    fixed = [
        (loss, shape)
        for shape in design.shapes
        if (loss := losses.get(FORECAST.format(fixed_name(shape)))) is not None
    ]
    largest = max(design.shapes, key=design.parameters)
    if len(fixed) == len(design.shapes) and min(fixed)[1] == largest:
        yield f"The largest size, {largest}, is forecast best, so that a larger one is missing."


def _steps(fixed: Sequence) -> list[tuple[float, float]]:
    """The frontier of means: cost and the lowest loss that it buys."""
    steps: list[tuple[float, float]] = []
    for arm in sorted(fixed, key=lambda arm: arm.cost):
        if not steps or arm.loss < steps[-1][1]:
            steps.append((arm.cost, arm.loss))
    return steps


def _by_budget(rows: Sequence[AgainstFrontier]) -> dict[str, list[AgainstFrontier]]:
    groups: dict[str, list[AgainstFrontier]] = {}
    for row in rows:
        groups.setdefault(row.budget, []).append(row)
    return groups


def _table(rows: Sequence[Answer], title: str, start: str) -> Table:
    """Answers whose question begins in some way."""
    columns = ("question", "budget", "mean (95%)", "seeds", "what is said")
    cells = [
        [
            row.question,
            row.budget or "-",
            "-" if row.estimate is None else interval_text(row.estimate, row.interval),
            str(row.seeds),
            row.verdict,
        ]
        for row in rows
        if row.question.startswith(start)
    ]
    return Table(title, columns, cells)
