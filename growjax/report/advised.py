"""Advice from pilots: which plan to train with a budget, and whether to grow, as a page and as plans."""

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from growjax.advise import MARGIN, Advice, Ending
from growjax.errors import BudgetError, raise_all
from growjax.plan.files import save_plan
from growjax.plan.prefix import branches
from growjax.report.compared import read_finished
from growjax.report.figures import COLOURS, canvas, legend, look, plain, style
from growjax.report.page import Plot, Table, write_page
from growjax.report.pilots import Advised, Family, family, pilots, read_advice
from growjax.report.tables import rich_table
from growjax.train.commands import train_tree
from growjax.train.options import Options
from growjax.values import allow_option


# The budgets of the pilots as shares of the one that is asked about, and where they grow
BUDGETS, TIMES = (1 / 16, 1 / 8, 1 / 4), (0.5,)


def advise(
    path: str | Path,
    over: Sequence[str],
    budget: float,
    run: str | Path,
    options: Options,
    *,
    budgets: Sequence[float] = (),
    times: Sequence[float] = TIMES,
    seeds: int = 2,
    by: str = "copy+stack",
    margin: float = MARGIN,
    draws: int = 200,
    evaluations: int = 10,
    out: str | Path | None = None,
    console: Console,
) -> tuple[int, Advised | None]:
    """Train pilots in folders of `run`, and say which plan to train with a budget, and whether to grow.

    What is trained already is not trained again. Writes a page, and the plans to train: `control.json`,
    and `grown.json` if a plan that grows is forecast to end lowest. Returns the exit status of the first
    pilot that was stopped (0 if all are finished), and what the pilots say.

    **Arguments**

    - `path`, `over`, `by`: see `family`.
    - `budget`: what the plan may cost, in the unit of the plan's clock.
    - `budgets`: those of the pilots; by default a sixteenth, an eighth and a quarter of `budget`.
    - `times`: the shares of the cost at which pilots grow.
    - `seeds`: how many; they begin with the plan's own.
    - `margin`, `draws`: see `growjax.advise`.
    - `out`: where to write the page; by default `advice.html` in `run`.

    Raises `BudgetError` that lists faults of the arguments, and as `family` does, before anything is
    trained.
    """
    chosen = [share * budget for share in BUDGETS] if not budgets else sorted(budgets)
    faults = []
    if not (math.isfinite(budget) and budget > 0):
        faults.append(f"budget: expected a positive number, got {budget!r}")
    if len(set(chosen)) < 3 or not all(math.isfinite(b) and b > 0 for b in chosen):
        faults.append(f"budgets: expected three different, positive numbers, got {tuple(budgets)}")
    if not times or not all(0 < time < 1 for time in times):
        faults.append(f"times: expected shares between 0 and 1, got {tuple(times)}")
    if seeds < 1:
        faults.append(f"seeds: expected one or more, got {seeds}")
    raise_all(BudgetError, "no pilots can be trained:", faults)
    choices = family(path, over, by)
    first = next(iter(choices.fixed.values())).seed
    designed = pilots(choices, chosen, times, range(first, first + seeds))
    tree = branches([p.plan for p in designed], run, [p.folder for p in designed])
    status = train_tree(tree, options, evaluations=evaluations, console=console)
    if status:
        return status, None
    advised = read_advice(
        choices, designed, [read_finished(b.run) for b in tree], budget, margin=margin, draws=draws
    )
    unit = next(iter(choices.fixed.values())).clock.unit
    sentences = _answer(advised, unit, _save_plans(choices, advised.advice, Path(run)))
    tables = _tables(advised)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    for table in tables:
        console.print(rich_table(table))
    page = Path(run) / "advice.html" if out is None else Path(out)
    write_page(
        page,
        "Does growing pay?",
        [Plot("Ends of the fixed sizes, and their law", _figure(advised, unit), _CAPTION)],
        tables,
        _notes(choices),
        answer=sentences,
    )
    console.print(f"page: {page}", markup=False)
    return 0, advised


def _save_plans(choices: Family, advice: Advice, folder: Path) -> Path:
    """Write the best fixed size and the plan that grows, if one ends lowest; returns the advised one."""
    control, grown = folder / "control.json", folder / "grown.json"
    best, fixed = advice.plans(choices.fixed, choices.operator)
    save_plan(fixed, control)
    # Advice for another budget may have been written here before
    grown.unlink(missing_ok=True)
    if len(advice.legs) > 1:
        save_plan(best, grown)
    return grown if advice.grow else control


# The page -----------------------------------------------------------------------------------------

_CAPTION = (
    "Dots are decayed ends, a seed each; lines are the law fitted to all of them. At the right, the best "
    "fixed size with its 90% interval, and the plan that grows if one is forecast to end lower."
)


def _answer(advised: Advised, unit: str, plan: Path) -> list[str]:
    """The advice, the retentions and cost it rests on, and the command that trains the plan."""
    advice = advised.advice
    every = [
        rho
        for growth in advised.growths
        if (growth.small, growth.large) not in advised.left_out
        for rho in growth.retentions
    ]
    known = [rho for rho in every if rho is not None]
    retained = [
        f"Growing {small} into {large} lost more than all tokens of the smaller size in its pilots "
        f"(it kept {mean:.2f} of them on average), and no plan has it."
        for (small, large), mean in advised.left_out.items()
    ]
    if known:
        retained.append(
            f"Pilots that grew kept {statistics.fmean(advised.retention):.2f} of the tokens of their "
            f"smaller size ({min(known):.2f} to {max(known):.2f} in {len(known)} of {len(every)} pilots)."
        )
    elif every:
        retained.append(
            f"Token retention is unknown of all {len(every)} pilots that grew, and 0 was assumed."
        )
    share = advised.cost / advice.budget
    return [
        f"{advice}.",
        *retained,
        f"The pilots cost {advised.cost:.4g} {unit}, {share:.2f} of the budget of {advice.budget:.4g}.",
        f"To train it: growjax train {shlex.quote(str(plan))} --run RUN{allow_option()}",
    ]


def _tables(advised: Advised) -> list[Table]:
    budget = advised.advice.budget
    cells = []
    for size in advised.sizes:
        forecast = float(advised.law.loss(size.parameters, budget / size.token_cost))
        losses = " ".join(f"{loss:.4f}" for _, loss in _by_tokens(advised.ends[size.name]))
        cells.append(
            [size.name, f"{size.parameters:,}", f"{size.token_cost:.4g}", losses, f"{forecast:.4f}"]
        )
    fixed = Table(
        "Fixed sizes",
        ("size", "parameters", "cost of a token", "losses, by budget", "forecast at the budget"),
        cells,
        "Losses are held-out nats, means over seeds.",
    )
    cells = []
    for growth in advised.growths:
        _, alone = _by_tokens(advised.ends[growth.large])[-1]
        cells.append(
            [
                f"{growth.small} to {growth.large}",
                f"{growth.time:g}",
                f"{statistics.fmean(growth.losses):.4f}",
                f"{alone:.4f}",
                " ".join("unknown" if r is None else f"{r:.2f}" for r in growth.retentions),
            ]
        )
    columns = ("growth", "at", "loss (nats)", "the large size alone", "token retention")
    caption = (
        "All cost the same, and grow at a share of it. Token retention is given for each seed; what is "
        "outside of 0 to 1 is taken as 0 or 1, and a growth that is below 0 on average is left out."
    )
    tables = [fixed, Table("Pilots that grow", columns, cells, caption)]
    if len(advised.advice.legs) > 1:
        cells = [
            [leg.size.name, f"{leg.share:.0%}", f"{leg.tokens:.4g}"] for leg in advised.advice.legs
        ]
        columns = ("stage", "share of the cost", "tokens")
        tables.append(Table("The plan that grows", columns, cells))
    return tables


def _by_tokens(ends: Sequence[Ending]) -> list[tuple[float, float]]:
    """Tokens and mean loss over seeds of each budget, the smallest first."""
    groups: dict[float, list[float]] = {}
    for end in ends:
        groups.setdefault(end.tokens, []).append(end.loss)
    return [(tokens, statistics.fmean(groups[tokens])) for tokens in sorted(groups)]


def _notes(choices: Family) -> list[str]:
    notes = [
        "The law is E + A / N**alpha + B / D**beta, N parameters, D tokens (Hoffmann et al. 2022).",
        "Intervals are over draws of the law (a bootstrap over seeds and residuals) and of the "
        "measured retentions.",
        "A plan that grows is advised where it is better by the margin in at least 90% of the draws.",
    ]
    notes += [
        f"{small} does not grow into {large}: {reason}"
        for (small, large), reason in choices.reasons.items()
    ]
    return notes


def _figure(advised: Advised, unit: str) -> Figure:
    """Ends and law of every size against cost, and the forecast at the budget."""
    advice = advised.advice
    with style():
        figure, axes = canvas(4.2)
        lines = []
        for n, size in enumerate(advised.sizes):
            ends = advised.ends[size.name]
            color = look(n)["color"]
            costs = [e.tokens * size.token_cost for e in ends]
            x = np.geomspace(min(costs), advice.budget, 60)
            y = advised.law.loss(size.parameters, x / size.token_cost)
            (line,) = axes.plot(x, y, label=plain(size.name), linewidth=1.2, **look(n))
            axes.plot(costs, [e.loss for e in ends], "o", color=color, markersize=3, alpha=0.7)
            lines.append((float(y[-1]), line))
        marks = [(advice.control_loss, advice.control_interval, "o", "best fixed size")]
        if len(advice.legs) > 1:
            marks.append((advice.loss, advice.interval, "^", "plan that grows"))
        for place, (loss, (low, high), marker, label) in enumerate(marks):
            bar = axes.errorbar(
                advice.budget * (1.05 + 0.06 * place),
                loss,
                [[max(loss - low, 0)], [max(high - loss, 0)]],
                fmt=marker,
                color=COLOURS["ink" if place else "soft"][0],
                capsize=3,
                label=label,
            )
            lines.append((loss, bar))
        axes.set_xscale("log")
        ticks = [*(tokens * size.token_cost for tokens, _ in _by_tokens(ends)), advice.budget]
        axes.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"cost ({plain(unit)})")
        axes.set_ylabel("held-out loss at the end (nats)")
        legend(figure, lines, "size")
    return figure
