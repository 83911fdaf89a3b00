"""What happens to a network when layers are removed, and what paths of growing length can learn.

`python -m experiments.theory.run --size smoke --workload stability`; see the README next to this file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.study import Line, Page, Study, answers_in_words
from experiments.text import LIBRARY
from experiments.theory import blocks, polynomials, stability, trained
from experiments.theory.experiment import Cell, Experiment, Shared
from growjax.report.page import Plot, Section
from growjax.report.rows import Answer, Row, select
from growjax.report.tables import answer_table


EXPERIMENTS: dict[str, Experiment] = {
    "stability": stability.STABILITY,
    "removed": stability.REMOVED,
    "trained": trained.EXPERIMENT,
    "polynomials": polynomials.EXPERIMENT,
    "blocks": blocks.EXPERIMENT,
}


def cells(size: str, workload: str, seed: int) -> Iterator[Cell]:
    """The networks of one experiment and seed; experiments have different numbers of seeds."""
    about = EXPERIMENTS[workload]
    if seed < about.sizes[size].seeds:
        for budget, arm, arguments in about.networks(about.sizes[size]):
            yield Cell((workload, budget, arm, seed), about, about.sizes[size], arguments)


def _groups(results: Path, lines: Sequence[Line]) -> Iterator[tuple[str, Experiment, list[Line]]]:
    """The lines of each experiment whose networks are all there."""
    size = results.stem
    for name, about in EXPERIMENTS.items():
        group = [line for line in lines if line["workload"] == name]
        wanted = sum(1 for n in range(about.sizes[size].seeds) for _ in cells(size, name, n))
        if len(group) == wanted:
            yield name, about, group


def summarise(results: Path, lines: Sequence[Line]) -> list[Row]:
    """The answers of every experiment that has run whole."""
    rows: list[Row] = []
    for _, about, group in _groups(results, lines):
        rows += about.answers(about.sizes[results.stem], group)
    return rows


def page(results: Path, lines: Sequence[Line], rows: Sequence[Row]) -> Page:
    """Of each experiment its figure and its answers; a picture NAME.svg for the README."""
    sections, pictures = [], {}
    for name, about, group in _groups(results, lines):
        figure = about.draw(about.sizes[results.stem], group)
        answers = [row for row in select(rows, Answer) if row.workload == name]
        plot = Plot(about.title, figure, about.caption)
        sections.append(Section(name, [plot, answer_table(answers, "Answers")]))
        pictures[name] = figure
    title = "What happens to a network when a layer is removed?"
    notes = (
        "Estimates are means over seeds with 95% t-intervals. A question is answered if the whole "
        "interval is on one side of its threshold, and undecided otherwise.",
    )
    return Page(title, answers_in_words(rows), (), sections, notes, pictures)


def flags(lines: Sequence[Line]) -> str:
    """The text that networks learned, if it was not Python's library."""
    texts = {line["settings"]["text"] for line in lines if "settings" in line} - {LIBRARY}
    return "".join(f" --text {name}" for name in sorted(texts))


STUDY = Study(
    "theory",
    tuple(EXPERIMENTS),
    {
        size: max(about.sizes[size].seeds for about in EXPERIMENTS.values())
        for size in ("smoke", "small", "paper")
    },
    cells,
    Shared,
    summarise,
    page,
    uses=("text",),
    flags=flags,
)


if __name__ == "__main__":
    from experiments.main import main

    main(STUDY)
