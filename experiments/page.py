"""The page of a training study: the verdicts, then each workload's figures and tables."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.study import Line, Page, by
from experiments.summary import Question, arms_of, measured
from experiments.windows import WindowFile
from growjax.report.arms import Arm, by_place, place
from growjax.report.comparisons import LOSS, frontier_of
from growjax.report.figures import (
    Looks,
    canvas,
    differences_figure,
    ends_figure,
    legend,
    looks_of,
    loss_figure,
    style,
)
from growjax.report.page import Plot, Section, Table
from growjax.report.rows import (
    AgainstFrontier,
    EqualCost,
    OwnCost,
    Ranking,
    Row,
    SpeedUp,
    select,
)
from growjax.report.tables import (
    bars,
    clocks_table,
    equal_cost_table,
    frontier_table,
    number,
    own_cost_table,
    ranking_table,
    speed_up_table,
)
from growjax.report.words import answer, verdicts


_NOTES = (
    "Held-out losses are of the whole model, in nats per predicted token (a byte), over windows that "
    "nobody trained on. Curves are means over seeds. Every arm's learning rate is decayed at its own "
    "end, unless it says otherwise; only ends compare with ends.",
    "At equal cost: differences are paired by seed (same birth, text and masks). Better and worse take "
    "a paired t-test adjusted by Holm's method and the flipping of signs to agree; fewer than six seeds "
    "decide nothing.",
    "A speed-up is how many times an arm's cost the baseline needs for the arm's loss, read off all "
    "that was run of the baseline, decayed or not; along the longest run it is read off the way of the "
    "largest baseline alone, whose learning rate was still high. The frontier is the same of all fixed "
    "sizes: the lowest loss that any of them was seen at for no more cost.",
    "Fixed sizes were not tuned one by one, and intervals over seeds leave out the error of the held-out "
    "text, which all arms share.",
    "Seconds are those of training on the machine at hand, which did other things as well.",
    "Nobody is charged for compiling, growing, evaluating, tuning, or the second model of RHO.",
)


def page(question: Question, results: Path, lines: Sequence[Line], rows: Sequence[Row]) -> Page:
    """The page of a training study, with the pictures of its README.

    The pictures of a workload `gpt` are `gpt-loss`, the curves of its smallest budget, and, with several
    budgets, `gpt-ends`, the losses at the end of each.
    """
    arms = arms_of(lines, WindowFile(results).read())
    # An arm looks the same in every figure
    looks = looks_of(arms)
    sentences, plots, sections, pictures = [], [], [], {}
    for workload in sorted({arm.workload for arm in arms}):
        group = [arm for arm in arms if arm.workload == workload]
        of_workload = [row for row in rows if row.workload == workload]
        sentences += _answer(group, of_workload, question)
        plots += _differences(workload, of_workload, question)
        budgets = sorted(by_place(group).items(), key=lambda item: min(a.cost for a in item[1]))
        losses = [_loss_plot(place(*at), members, looks) for at, members in budgets]
        ends = _ends_plot(workload, group, question, looks)
        lengths = [_length_plot(place(*at), _lines(lines, *at), looks) for at, _ in budgets]
        pictures[f"{workload}-loss"] = losses[0].figure
        pictures |= {f"{workload}-ends": plot.figure for plot in ends}
        tables = [
            frontier_table(against, f"{place(*at)}: against the best fixed size at equal cost")
            for at, _ in budgets
            if (against := _of_budget(select(of_workload, AgainstFrontier), at[1]))
        ]
        sections.append(Section(workload, [*losses, *ends, *tables]))
        for at, _ in budgets:
            name = place(*at)
            compared = [row for row in of_workload if row.budget == at[1]]
            blocks = [*_tables(compared), *_run_tables(_lines(lines, *at))]
            sections.append(Section(f"{name}: every comparison and run", blocks, folded=True))
        details = [*(plot for plot in lengths if plot is not None), *_last_tables(of_workload)]
        details += _ledger([line for line in lines if line["workload"] == workload])
        if details:
            heading = f"{workload}: speed-ups, other clocks, learning rates"
            sections.append(Section(heading, details, folded=True))
    return Page(question.title, sentences, plots, sections, _NOTES, pictures)


def _lines(lines: Sequence[Line], workload: str, budget: str) -> list[Line]:
    return [x for x in lines if (x["workload"], x["budget"]) == (workload, budget)]


def _of_budget(rows: Sequence[AgainstFrontier], budget: str) -> list[AgainstFrontier]:
    return [row for row in rows if row.budget == budget]


def _against_baseline(rows: Sequence[Row], question: Question) -> list[EqualCost]:
    """The held-out losses against the baseline at its cost."""
    equal = select(rows, EqualCost)
    return [row for row in equal if row.baseline == question.baseline and row.measure == LOSS]


# The answer --------------------------------------------------------------------------------------


def _answer(arms: Sequence[Arm], rows: Sequence[Row], question: Question) -> list[str]:
    """Sentences: arms against the frontier, or against the baseline if no other fixed size was run."""
    against = select(rows, AgainstFrontier)
    if against:
        return answer(arms, against)
    sentences = []
    equal = _against_baseline(rows, question)
    for budget in dict.fromkeys(row.budget for row in equal):
        group = [row for row in equal if row.budget == budget]
        sentences.append(verdicts(group, f"{question.baseline} at equal cost"))
    return [*sentences[:-1], f"{sentences[-1]} {_ONE_SIZE}"] if sentences else []


_ONE_SIZE = "No smaller fixed size was run, so whether a smaller model is better here is not known."


def _differences(workload: str, rows: Sequence[Row], question: Question) -> list[Plot]:
    """The differences that `_answer` states, as a figure; empty without any."""
    shown: list[EqualCost] = list(select(rows, AgainstFrontier))
    zero = "the best fixed size at its cost"
    if not shown:
        shown, zero = _against_baseline(rows, question), f"{question.baseline} at its cost"
    grouped = [bar for row in shown for bar in bars([row], place(row.workload, row.budget))]
    if not grouped:
        return []
    caption = (
        "Means with 95% intervals; a small dot is a seed. Green is better, orange is worse; grey is "
        "neither."
    )
    title = f"{workload}: arms minus {zero}"
    return [Plot(title, differences_figure(grouped, zero), caption)]


# Plots -------------------------------------------------------------------------------------------


def _loss_plot(name: str, arms: Sequence[Arm], looks: Looks) -> Plot:
    seeds = max(len(arm.outcomes) for arm in arms)
    caption = f"Means over at most {seeds} seeds. Bars across a line are where its stages begin."
    figure = loss_figure(arms, looks=looks, strip=False)
    return Plot(f"{name}: held-out loss against cost", figure, caption)


def _ends_plot(workload: str, arms: Sequence[Arm], question: Question, looks: Looks) -> list[Plot]:
    """The losses of fixed sizes, and of arms at several budgets; empty if all have one budget."""
    names = [arm.name for arm in arms if not arm.free]
    if not any(names.count(name) > 1 for name in names):
        return []
    shown = [a for a in arms if names.count(a.name) > 1 or (a.fixed and not a.free)]
    best = frontier_of(arms)
    envelope = [] if best is None else [(point.cost, point.loss) for point in best.envelope()]
    several = len({arm.parameters for arm in arms if arm.fixed}) > 1
    edge = "frontier of fixed sizes" if several else f"frontier of {question.baseline}"
    caption = (
        "A dot is a mean, a small dot a seed. The wide line is the lowest loss that was seen for no more "
        f"cost, decayed or not: the {edge}."
    )
    figure = ends_figure(shown, envelope, looks=looks, edge=edge)
    return [Plot(f"{workload}: ends at every budget", figure, caption)]


def _length_plot(name: str, lines: Sequence[Line], looks: Looks) -> Plot | None:
    """A panel for each share of the cost at which models were run along shorter paths."""
    ends = [line for line in lines if "by_length" in line]
    if not ends:
        return None
    shares = sorted({share for line in ends for share in line.get("midway", ())}, key=float)
    last = []
    with style():
        figure, panels = canvas(3.4, ncols=len(shares) + 1, sharey=True, squeeze=False)
        for axes, share in zip(panels[0], [*shares, None], strict=True):
            at = ends
            if share is not None:
                at = [x | x["midway"][share] for x in ends if share in x.get("midway", ())]
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
        legend(figure, last, "arm")
    caption = "Along random paths of the model as it is by then; the last point is the whole model."
    return Plot(f"{name}: loss against path length", figure, caption)


# Tables ------------------------------------------------------------------------------------------


def _tables(rows: Sequence[Row]) -> list[Table]:
    """The comparisons of one workload and budget: a table for each baseline and measure."""
    tables = []
    equal = select(rows, EqualCost)
    for baseline, measure in dict.fromkeys((row.baseline, row.measure) for row in equal):
        group = [row for row in equal if (row.baseline, row.measure) == (baseline, measure)]
        tables.append(equal_cost_table(group, f"Against {baseline} at equal cost: {measure}"))
    own = select(rows, OwnCost)
    if own:
        target = own[0].baseline
        tables.append(own_cost_table(own, f"Against {target}, each at its own cost"))
    if any(row.clocks for row in own):
        tables.append(clocks_table(own, "The same costs on other clocks"))
    return tables


def _last_tables(rows: Sequence[Row]) -> list[Table]:
    """Speed-ups and rankings of one workload."""
    tables = []
    speeds, rankings = select(rows, SpeedUp), select(rows, Ranking)
    if speeds:
        title = f"Speed-ups over all that was run of {speeds[0].baseline}"
        tables.append(speed_up_table(speeds, title))
    if rankings:
        tables.append(ranking_table(rankings, "The same runs on other clocks"))
    return tables


def _run_tables(lines: Sequence[Line]) -> list[Table]:
    """The runs of one workload and budget, and their other measures."""
    cells = []
    for arm, runs in by(lines, "arm").items():
        scores = [r["score"] for r in runs]
        mean = statistics.fmean(scores)
        cells.append(
            [
                arm,
                str(len(runs)),
                f"{mean:.4f}",
                number(statistics.stdev(scores) if len(scores) > 1 else None, ".4f"),
                f"{mean / math.log(2):.4f}",
                f"{statistics.fmean(r['spent'] for r in runs):.4g}",
                f"{statistics.fmean(r['steps'] for r in runs):.0f}",
                f"{statistics.fmean(r['seconds'] for r in runs):.0f}",
            ]
        )
    columns = ("arm", "seeds", "nats", "deviation", "bits", "cost", "steps", "seconds")
    tables = [Table("Runs", columns, cells, "Bits are per predicted byte.")]
    names = list(
        dict.fromkeys(n for r in lines for n in (*r.get("texts", ()), *r.get("downstream", ())))
    )
    if names:
        caption = (
            "Of the trained models, means over seeds; losses on other texts are nats per byte."
        )
        judged = [
            [arm, *(_mean([measured(r, name) for r in runs]) for name in names)]
            for arm, runs in by(lines, "arm").items()
        ]
        tables.append(Table("Other texts and tasks", ("arm", *names), judged, caption))
    return tables


def _mean(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    return number(statistics.fmean(known) if known else None, ".4f")


def _ledger(lines: Sequence[Line]) -> list[Table]:
    trials = [line for line in lines if line["budget"] == "tuning"]
    if not trials:
        return []
    cells = [[line["arm"], f"{line['score']:.4f}"] for line in trials]
    caption = "As many trials for every method, at the smallest budget; charged to nobody."
    return [Table("Tuning ledger", ("trial", "nats"), cells, caption)]
