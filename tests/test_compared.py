"""`growjax compare`: folders of runs to a verdict, a table and a page."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax.errors import BudgetError
from growjax.plan import Plateau
from growjax.report import figures
from growjax.report.compared import compare_runs
from growjax.runs.records import HeldOut
from growjax.train import Run, Schedule, save_plan
from tests.own import Rows
from tests.runs import plan, steps


GROWN = dataclasses.replace(plan(steps(4), steps(8, grow=gj.stack(layers=4))), name="grown")
SMALL = dataclasses.replace(plan(steps(12)), name="small")


def written(folder, of, loss: float, *, finished=True, windows=None, data="abc", held_out=8):
    """The folder that a run leaves behind, with losses of one's own."""
    folder.mkdir(parents=True)
    save_plan(of, folder / "plan.json")
    rows: list[dict[str, Any]] = [{"kind": "begin", "step": 0, "stage": 0, "held_out": held_out}]
    spent = 0
    costs = [cost for span in of.spans for cost in span.costs]
    for n, cost in enumerate(costs):
        spent += cost
        mark = (
            loss + (0.0 if n + 1 == len(costs) else 1.0)
            if n % 4 == 3 or n + 1 == len(costs)
            else None
        )
        rows.append(
            {
                "kind": "step",
                "step": n,
                "stage": 0,
                "spent": spent / of.clock.per_unit,
                "flops": spent,
                "held_out": mark,
                "rate": of.learning_rate(spent - cost / 2),
                "seconds": 1.0 + n,
            }
        )
    rows.append({"kind": "end", "finished": finished})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = np.full(6, 5 * loss) if windows is None else windows
    Run(folder).save_held_out(HeldOut(sums, np.full(len(sums), 5.0)), {"data": data})
    return folder


def six(tmp_path, of, loss: float, noise=0.01, **changes):
    return [
        written(
            tmp_path / f"{of.name}-{s}",
            dataclasses.replace(of, seed=s),
            loss + noise * s,
            **changes,
        )
        for s in range(6)
    ]


def test_runs_that_grow_are_held_against_those_of_one_size(tmp_path):
    folders = [*six(tmp_path, GROWN, 2.2, 0.011), *six(tmp_path, SMALL, 2.0)]
    shown = io.StringIO()
    out = tmp_path / "page.html"
    comparison = compare_runs(folders, out=out, console=Console(file=shown, width=220))
    assert [(arm.name, arm.fixed, len(arm.outcomes)) for arm in comparison.arms] == [
        ("grown", False, 6),
        ("small", True, 6),
    ]
    (row,) = comparison.rows
    assert row.verdict == "worse" and row.over == "seeds and windows"
    assert row.estimate == pytest.approx(0.2025) and not row.undecayed
    sentence = "Worse than the best fixed size at equal cost: grown by 0.20"
    assert sentence in " ".join(shown.getvalue().split()) and str(out) in shown.getvalue()
    page = out.read_text()
    assert page.index("Worse than the best") < page.index("<svg") < page.index("<table")
    # Another baseline is one arm that is named
    other = compare_runs(folders, baseline="grown")
    assert [(row.arm, row.verdict) for row in other.rows] == [("small", "better")]
    with pytest.raises(BudgetError, match="baseline: 'nobody' is no arm; there are grown, small"):
        compare_runs(folders, baseline="nobody")


def test_runs_that_triggers_end_are_one_arm_and_one_window_is_enough(tmp_path):
    first = dataclasses.replace(GROWN.stages[0], until=Plateau(2, 0.01))
    of = dataclasses.replace(GROWN, stages=(first, GROWN.stages[1]))
    one: dict[str, Any] = {"windows": np.full(1, 10.0)}
    folders = [
        written(
            tmp_path / str(seed),
            dataclasses.replace(of, seed=seed).ended(0, 3 + seed % 2),
            2.2 + 0.01 * seed,
            **one,
        )
        for seed in range(6)
    ]
    compared = compare_runs([*folders, *six(tmp_path, SMALL, 2.0, **one)])
    assert [(arm.name, len(arm.outcomes)) for arm in compared.arms] == [("grown", 6), ("small", 6)]
    (row,) = compared.rows
    assert row.verdict == "worse" and row.over == "seeds"


def test_costs_are_shown_in_the_clocks_own_unit(tmp_path):
    folders = six(tmp_path, dataclasses.replace(SMALL, clock=Rows()), 2.0)
    out = tmp_path / "page.html"
    (arm,) = compare_runs(folders, out=out).arms
    assert arm.cost == 12 * 4 and figures.unit_of([arm]) == (1.0, "sequences")
    assert figures.unit_of([dataclasses.replace(arm, unit="$")]) == (1.0, r"\$")
    assert "Costs are sequences as charged by rows" in out.read_text()


def test_decayed_is_read_off_the_run(tmp_path):
    loose = dataclasses.replace(SMALL, name="loose", rate=Schedule(1e-2, "constant"))
    grown = dataclasses.replace(GROWN, rate=Schedule(1e-2, "constant"))
    folders = [*six(tmp_path, grown, 2.2), *six(tmp_path, loose, 2.0)]
    (row,) = compare_runs(folders).rows
    assert row.undecayed == ("grown",) and row.baseline == "loose, at the undecayed end"


def test_what_cannot_be_compared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("growjax.values.names._allowed", {"my_pkg"})
    a = written(tmp_path / "a", SMALL, 2.0)
    b = written(tmp_path / "b", dataclasses.replace(SMALL, seed=1), 2.0, data="another")
    c = written(tmp_path / "c", dataclasses.replace(SMALL, seed=2), 2.0, finished=False)
    d = written(tmp_path / "d", dataclasses.replace(SMALL, seed=3), 2.0, held_out=16)
    e = written(tmp_path / "e", SMALL, 2.0)
    with pytest.raises(BudgetError) as error:
        compare_runs([a, b, c, d, e])
    message = str(error.value)
    assert f"{c}: it has done 12 of 12 steps" in message and "data differ: abc" in message
    assert f"--run {c} --allow my_pkg` goes on with it" in message
    assert f"another ({b})" in message and "held-out windows on the way differ: 8" in message
    assert f"two runs of one plan and of seed 0: {a}, {e}" in message
    with pytest.raises(BudgetError, match="expected the folders of at least one"):
        compare_runs([])
    # Nothing of one size: nothing is said of growing
    alone = compare_runs([written(tmp_path / "f", GROWN, 2.0)])
    assert alone.frontier is None and alone.rows == ()
