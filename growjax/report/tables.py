"""Rows and arms as the tables and bars of a page."""

from collections.abc import Sequence

from rich.table import Table as RichTable

from growjax.report.arms import Arm
from growjax.report.figures import Bar
from growjax.report.page import Table
from growjax.report.rows import (
    AgainstFrontier,
    Answer,
    EqualCost,
    OwnCost,
    Ranking,
    SpeedUp,
)
from growjax.report.words import bounded, interval_text


def bars(rows: Sequence[EqualCost], group: str = "") -> list[Bar]:
    """Differences for `differences_figure`; rows without an estimate are left out."""
    return [
        Bar(group, row.arm, row.estimate, row.interval, row.differences, row.verdict)
        for row in rows
        if row.estimate is not None
    ]


def frontier_table(rows: Sequence[AgainstFrontier], title: str) -> Table:
    """Arms of one place against the best fixed size at their cost, from the best to the worst."""
    columns = (
        "arm",
        "seeds",
        "loss (nats)",
        "cost",
        "best fixed size at its cost",
        "arm minus that (95%)",
        "verdict",
        "speed-up over the frontier",
    )
    cells = [
        [
            row.arm + (" (undecayed)" if row.undecayed else ""),
            str(row.seeds),
            f"{row.loss:.4f}",
            f"{row.cost:.4g}",
            row.baseline,
            interval_text(row.estimate, row.interval),
            row.verdict,
            bounded(row.speed_up, row.bound, row.speed_up_interval),
        ]
        for row in _sorted(rows)
    ]
    over = sorted({row.over for row in rows})
    caption = (
        f"Intervals are over {' or '.join(over)}. Better and worse take a t-test adjusted by Holm's "
        f"method, flipping signs, and six seeds; the family is this table, {rows[0].family} in number."
    )
    left_out = sorted({name for row in rows for name in row.left_out})
    if left_out:
        caption += f" Left out of the frontier, with too few seeds: {', '.join(left_out)}."
    return Table(title, columns, cells, caption)


def equal_cost_table(rows: Sequence[EqualCost], title: str) -> Table:
    """Arms of one place against one baseline at its cost, one measure, from the best to the worst."""
    columns = ("arm", "difference (95%)", "p (Holm)", "seeds", "verdict")
    cells = [
        [
            row.arm,
            interval_text(row.estimate, row.interval, "+.4f"),
            number(row.p_holm, ".3f"),
            str(row.seeds),
            row.verdict,
        ]
        for row in _sorted(rows)
    ]
    return Table(title, columns, cells)


def own_cost_table(rows: Sequence[OwnCost], title: str) -> Table:
    """Arms of one place against the target, each at its own cost."""
    columns = (
        "arm",
        "difference (95%)",
        "its cost",
        "its seconds",
        "cost to reach the loss",
        "seeds that did",
        "verdict",
    )
    cells = [
        [
            row.arm,
            interval_text(row.estimate, row.interval, "+.4f"),
            number(row.cost, ".2f"),
            number(row.seconds, ".2f"),
            number(row.cost_to_reach, ".2f"),
            _reached(row.reached),
            row.verdict,
        ]
        for row in rows
    ]
    return Table(title, columns, cells, "Costs and seconds are shares of the target's.")


def clocks_table(rows: Sequence[OwnCost], title: str) -> Table:
    """What arms cost, as a share of the target's cost, on clocks other than their own."""
    cells = [
        [
            row.arm,
            clock,
            number(shares.get("cost"), ".2f"),
            number(shares.get("cost_to_reach"), ".2f"),
            _reached(shares.get("reached", ())),
        ]
        for row in rows
        for clock, shares in row.clocks.items()
    ]
    columns = ("arm", "clock", "cost", "cost to reach the loss", "seeds that did")
    return Table(title, columns, cells)


def speed_up_table(rows: Sequence[SpeedUp], title: str) -> Table:
    """Speed-ups over one baseline."""
    columns = ("arm", "budget", "clock", "speed-up (95%)", "along the longest run", "seeds")
    cells = [
        [
            row.arm,
            row.budget,
            row.clock or "its own",
            bounded(row.estimate, row.bound, row.interval),
            number(row.naive, ".2f"),
            str(row.seeds),
        ]
        for row in rows
    ]
    caption = (
        "How many times an arm's cost the baseline needs for the arm's loss: the least of all that was "
        "run of it, decayed or not. >= and <= are bounds, where it never had that loss."
    )
    return Table(title, columns, cells, caption)


def ranking_table(rows: Sequence[Ranking], title: str) -> Table:
    """The order of the arms on other clocks."""
    cells = [
        [
            f"{row.budget}, {row.clock}",
            number(row.estimate, ".0f"),
            ", ".join(row.order) + _unknown(row.left_out),
        ]
        for row in rows
    ]
    return Table(title, ("budget, clock", "arms that move", "order, best first"), cells)


def answer_table(
    rows: Sequence[Answer], title: str, estimate: str = "estimate (95%)", form: str = ".4f"
) -> Table:
    """Questions with their estimates, whose column is called `estimate`, and verdicts."""
    cells = [
        [row.question, interval_text(row.estimate, row.interval, form), str(row.seeds), row.verdict]
        for row in rows
    ]
    return Table(title, ("question", estimate, "seeds", "answer"), cells)


def arms_table(arms: Sequence[Arm], title: str) -> Table:
    """Arms as they ended, from the cheapest to the dearest."""
    columns = ("arm", "parameters", "seeds", "loss (nats)", "spread of seeds", "cost", "decayed")
    cells = [
        [
            arm.name,
            f"{arm.parameters:,}",
            str(len(arm.outcomes)),
            f"{arm.loss:.4f}",
            number(arm.spread, ".4f"),
            f"{arm.cost:.4g}",
            "yes" if arm.decayed else "no",
        ]
        for arm in sorted(arms, key=lambda arm: arm.cost)
    ]
    return Table(title, columns, cells)


def rich_table(table: Table) -> RichTable:
    """A table for the terminal."""
    shown = RichTable(title=table.title, caption=table.caption or None)
    for n, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if n else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    return shown


def number(value: float | None, form: str) -> str:
    """A number in the format `form`, or a dash for an unknown one."""
    return "-" if value is None else format(value, form)


def _sorted(rows: Sequence[EqualCost]) -> list:
    return sorted(rows, key=lambda row: (row.estimate is None, row.estimate))


def _reached(shares: Sequence[float | None]) -> str:
    return f"{sum(share is not None for share in shares)} of {len(shares)}" if shares else "-"


def _unknown(arms: Sequence[str]) -> str:
    return f" (with operations that it does not know: {', '.join(arms)})" if arms else ""
