"""A sweep: one plan with some of its fields changed, every combination trained, and the results."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from growjax.errors import PlanError, raise_all
from growjax.plan.plan import Plan
from growjax.plan.prefix import branches
from growjax.report.arms import Arm
from growjax.report.compared import Compared, compare_runs
from growjax.report.page import Table
from growjax.report.tables import number, rich_table
from growjax.train.commands import train_tree
from growjax.train.options import Options
from growjax.train.planfile import json_or_text, read_plan


class Combination(NamedTuple):
    """One choice of values: the folder of its run, the values by field, and the plan."""

    folder: str
    values: Mapping[str, Any]
    plan: Plan


def combinations(path: str | Path, over: Sequence[str]) -> list[Combination]:
    """A plan for every combination of values; those that differ in the seed alone have one name.

    `over` are fields and their values, such as `rate.peak=1e-3,2e-3` or `rate=[{...}, {...}]` in JSON.
    Raises `PlanError` that lists every field without values, every value that the plan refuses, and two
    combinations of one folder.

    **Example**

        combinations("plan.py", ["rate.peak=1e-3,2e-3", "seed=0,1,2"])      # six plans
    """
    ranges, faults = {}, []
    for text in over:
        name, equals, values = text.partition("=")
        if not equals or not values or name in ranges:
            faults.append(
                f"{text!r}: expected a field once, with its values, as rate.peak=1e-3,2e-3"
            )
            continue
        ranges[name] = _values(values)
    combined = []
    for chosen in itertools.product(*ranges.values()) if not faults else ():
        values = dict(zip(ranges, chosen, strict=True))
        arm = [f"{name}={_text(x)}" for name, x in values.items() if name != "seed"]
        label = json.dumps(" ".join([read_plan(path).name, *arm]))
        changes = [f"name={label}", *(f"{name}={json.dumps(x)}" for name, x in values.items())]
        try:
            plan = read_plan(path, changes)
        except PlanError as error:
            faults.append(f"{' '.join(changes[1:])}: {error}")
            continue
        folder = ",".join(f"{name}={_text(x)}" for name, x in values.items())
        # Brackets, stars and blanks have no place in a path of checkpoints
        combined.append(Combination(re.sub(r"[^\w.,=+-]+", "_", folder), values, plan))
    folders = [combination.folder for combination in combined]
    for folder in sorted({f for f in folders if folders.count(f) > 1}):
        faults.append(f"{folder}: two combinations would have this folder")
    raise_all(PlanError, f"{path} cannot be swept:", faults)
    return combined


def sweep(
    path: str | Path,
    over: Sequence[str],
    run: str | Path,
    options: Options,
    *,
    evaluations: int = 20,
    out: str | Path | None = None,
    margin: float | None = None,
    console: Console,
) -> tuple[int, Compared | None]:
    """Train every combination in a folder of `run`, one after the other, and say which ended lowest.

    What is trained already is not trained again, and first steps that combinations have in common are
    trained once. Returns the exit status of the first run that was stopped (0 if all are finished), and
    the comparison of all, as `compare_runs` makes it.

    **Arguments**

    - `over`: fields and values; see `combinations`.
    - `out`: where to write the page of the comparison; by default in `run`.
    - `margin`: as for `compare_runs`.

    Raises `PlanError` for fields that cannot be swept, before it trains a run.
    """
    combined = combinations(path, over)
    tree = branches([c.plan for c in combined], run, [c.folder for c in combined])
    status = train_tree(tree, options, evaluations=evaluations, console=console)
    if status:
        return status, None
    page = Path(run) / "sweep.html" if out is None else out
    compared = compare_runs([b.run for b in tree], out=page, margin=margin, console=console)
    for sentence in _best(compared.arms, combined):
        console.print(sentence, markup=False, highlight=False)
    console.print(rich_table(ends(compared.arms)))
    return 0, compared


def ends(arms: Sequence[Arm]) -> Table:
    """The arms of a sweep from the lowest loss to the highest."""
    cells = [
        [
            arm.name,
            str(len(arm.outcomes)),
            f"{arm.loss:.4f}",
            number(arm.spread, ".4f"),
            f"{arm.cost:.4g}",
        ]
        for arm in sorted(arms, key=lambda arm: arm.loss)
    ]
    columns = ("arm", "seeds", "loss (nats)", "spread of seeds", "cost")
    return Table("Every combination, the lowest loss first", columns, cells)


def _best(arms: Sequence[Arm], combined: Sequence[Combination]) -> list[str]:
    """Which combination ended lowest, and of which fields it has the first or the last of the values."""
    best = min(arms, key=lambda arm: arm.loss)
    seeds = len(best.outcomes)
    sentences = [
        f"Lowest: {best.name}, {best.loss:.4f} nats over {seeds} seed{'s' if seeds > 1 else ''}."
    ]
    chosen = next(c for c in combined if c.plan.name == best.name)
    for name, value in chosen.values.items():
        numbers = sorted({c.values[name] for c in combined if _is_number(c.values[name])})
        if name != "seed" and len(numbers) > 1 and value in (numbers[0], numbers[-1]):
            where = "lowest" if value == numbers[0] else "highest"
            tried = f"{name}={_text(value)} is the {where} value that was tried"
            sentences.append(f"{tried}: the optimum may lie beyond it.")
    return sentences


def _values(text: str) -> list[Any]:
    """A JSON list, or values between commas: JSON each, or words."""
    whole = json_or_text(text)
    return whole if isinstance(whole, list) else list(map(json_or_text, text.split(",")))


def _text(value: Any) -> str:
    """A value in the name of an arm."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
