"""The framework of all studies: cells of workload, budget, arm and seed; their summary; their page.

Each cell runs once and is kept as a line of JSON in `results/SIZE.jsonl`. A cell whose line is there is
not run again, so that a study of hours is run in pieces, by as many processes as there are seeds. From
the lines come the rows of `summary.json`, the page `report.html`, and the pictures that a README shows.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from growjax.budget import t_interval
from growjax.errors import DataError, raise_all
from growjax.report.figures import style
from growjax.report.page import Plot, Section, write_page
from growjax.report.rows import Answer, Row, write_summary
from growjax.runs.journal import mend


Key = tuple[str, str, str, int]
Line = dict[str, Any]
KEY = ("workload", "budget", "arm", "seed")
SIZES = ("smoke", "small", "paper")


class Cell:
    """One run of a study; its `key` is workload, budget, arm and seed.

    One that is `optional` runs only if its arm is named with `--only`.
    """

    key: Key
    optional = False

    def settings(self, shared: Any) -> Line:
        """Fields that its line must agree with, such as the digest of a model that it starts from."""
        return {}

    def run(self, shared: Any) -> Line:
        """Run it; returns the fields of its line besides the key and the settings."""
        raise NotImplementedError


Cells = Callable[[str, Any, int], Iterable[Cell]]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs that a command line names; None for those that it does not."""

    size: str
    out: Path
    text: Path | None = None
    also: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    model: Path | None = None
    examples: int | None = None

    @property
    def results(self) -> Path:
        """The file of the lines."""
        return self.out / f"{self.size}.jsonl"


@dataclasses.dataclass(frozen=True)
class Page:
    """The contents of a study's page; `pictures` are drawn as NAME.svg next to it, for a README."""

    title: str
    answer: Sequence[str]
    plots: Sequence[Plot] = ()
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()
    pictures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its arms, their measures, and how these are summarised and drawn.

    **Fields**

    - `name`: of its folder in `experiments`.
    - `workloads`: what the arms are compared on, such as kinds of model or tasks.
    - `seeds`: the number of seeds, by size.
    - `cells`: `(size, workload, seed)` to cells.
    - `open`: what all cells share, such as texts and compiled programs; called if a cell has to run.
    - `summarise`: the rows of a file of results, given its path and its lines. Their `command` is added.
    - `page`: the page of a file of results, given its path, its lines and its rows.
    - `trials`: cells of a tuning ledger, which are charged to nobody and compared with nothing.
    - `uses`: the flags of the command line that it takes; others are refused.
    - `flags`: the command line's flags that make some lines again, besides the size.
    """

    name: str
    workloads: tuple[str, ...]
    seeds: Mapping[str, int]
    cells: Cells
    open: Callable[[Inputs], Any]
    summarise: Callable[[Path, Sequence[Line]], Sequence[Row]]
    page: Callable[[Path, Sequence[Line], Sequence[Row]], Page]
    trials: Cells | None = None
    uses: tuple[str, ...] = ()
    flags: Callable[[Sequence[Line]], str] = lambda lines: ""

    def report(self, results: Path) -> list[Row]:
        """Write summary, page and pictures next to a file of results; returns the summary."""
        flags = self.flags(read(results))
        return write_report(self.name, results, self.summarise, self.page, flags)


def write_report(
    name: str,
    results: Path,
    summarise: Callable[[Path, Sequence[Line]], Sequence[Row]],
    page: Callable[[Path, Sequence[Line], Sequence[Row]], Page],
    flags: str = "",
) -> list[Row]:
    """Write summary, page and pictures of a study next to a file of results; returns the summary.

    Arguments are as the fields of `Study`; `flags` are added to the command of every row.
    """
    lines = read(results)
    command = f"python -m experiments.{name}.run --size {results.stem}{flags}"
    rows = [dataclasses.replace(row, command=command) for row in summarise(results, lines)]
    write_summary(results.parent / "summary.json", rows)
    shown = page(results, lines, rows)
    write_page(
        results.parent / "report.html",
        shown.title,
        shown.plots,
        answer=shown.answer,
        sections=shown.sections,
        notes=shown.notes,
    )
    for picture, figure in shown.pictures.items():
        # Where there is no page: on white, since the colours are those of a light page
        with style():
            path = results.parent / f"{picture}.svg"
            figure.savefig(path, facecolor="white", metadata={"Date": None})
    return rows


# Lines -------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """The lines of a file of results; none if it is not there. One that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def key_of(line: Line) -> Key:
    """Workload, budget, arm and seed of a line."""
    return line["workload"], line["budget"], line["arm"], line["seed"]


def by(lines: Iterable[Line], *names: str) -> dict[Any, list[Line]]:
    """Lines by some of their fields, in the order in which they come; trials of the ledger left out."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        if line["budget"] != "tuning":
            key = tuple(line[name] for name in names)
            groups.setdefault(key if len(names) > 1 else key[0], []).append(line)
    return groups


def run(
    cells: Sequence[Cell],
    shared: Any,
    results: Path,
    console: Console | None = None,
    *,
    again: Callable[[Cell], bool] | None = None,
) -> None:
    """Run the cells that have no line yet, and append their lines.

    `again` says which of the other cells run once more, without a new line. Raises `DataError` for
    lines that were made with other settings.
    """
    console = console or Console()
    lines = {key_of(line): line for line in read(results)}
    faults = []
    for cell in cells:
        if cell.key not in lines:
            continue
        saved = lines[cell.key].get("settings", {})
        for name, value in cell.settings(shared).items():
            if saved.get(name) != value:
                words = " ".join(map(str, cell.key))
                faults.append(f"{words}: {name} is {saved.get(name)} there, {value} here")
    headline = f"{results}: its lines are of another run; name another --out:"
    raise_all(DataError, headline, faults[:5])
    todo = [cell for cell in cells if cell.key not in lines or (again and again(cell))]
    results.parent.mkdir(parents=True, exist_ok=True)
    mend(results)
    for n, cell in enumerate(todo):
        start = time.perf_counter()
        line = dict(zip(KEY, cell.key, strict=True)) | _finite(cell.run(shared))
        seconds = time.perf_counter() - start
        line.setdefault("seconds", round(seconds, 1))
        settings = cell.settings(shared)
        if settings:
            line["settings"] = settings
        if cell.key not in lines:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        score = f"{line['score']:.4f}, " if "score" in line else ""
        words = " ".join(map(str, cell.key))
        console.print(f"{n + 1}/{len(todo)} {words}: {score}{seconds:.0f} s", markup=False)


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Questions with a yes or a no --------------------------------------------------------------------


def answer(
    workload: str,
    question: str,
    values: Sequence[float] | np.ndarray,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    verdict: bool | None = None,
) -> Answer:
    """Does the mean over seeds lie between two numbers, as far as its 95% t-interval can tell?

    `verdict` says yes or no by another rule. Where a network diverged there is no number, and the verdict
    says so.
    """
    where = {"workload": workload, "question": question, "seeds": len(values)}
    if not np.all(np.isfinite(np.asarray(values, float))):
        return Answer(estimate=None, interval=None, verdict="diverged", **where)
    mean = float(np.mean(values))
    least, most = t_interval([float(x) for x in values])
    inside = low < least and most < high
    outside = most <= low or high <= least
    if verdict is None:
        word = "yes" if inside else "no" if outside else "undecided"
    else:
        word = "yes" if verdict else "no"
    interval = round(least, 4), round(most, 4)
    return Answer(estimate=round(mean, 4), interval=interval, verdict=word, **where)


def answers_in_words(rows: Sequence[Row]) -> list[str]:
    """How many questions have which answer, for each workload; those answered by no in full, if few."""
    sentences = []
    for workload in dict.fromkeys(row.workload for row in rows):
        group = [row for row in rows if row.workload == workload]
        verdicts = [row.verdict for row in group]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted({*verdicts}, reverse=True))
        denied = [f"{row.question} No." for row in group if row.verdict == "no"]
        few = " ".join(denied) if len(denied) <= _FEW else ""
        sentences.append(f"{workload}, {len(group)} questions: {counts}. {few}".strip())
    return sentences


# More questions that are answered by no are counted, and not written out
_FEW = 3
