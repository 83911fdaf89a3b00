"""The advice of `growjax.advise` held against the ends of the frontier's runs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.frontier.analysis import Index
from experiments.frontier.calibration import calibration
from experiments.frontier.design import DESIGNS, Design, Shape, fixed_name, pilot_name
from experiments.frontier.report import page
from experiments.frontier.run import run
from experiments.frontier.summary import CALIBRATION, GROWN, LEFT, PICKED, PRIMARY, summarise
from experiments.frontier.tuning import settled
from experiments.study import Line, read
from growjax.advise import Law, Leg, Size, predicted
from growjax.report.rows import Answer, select
from tests.test_experiments_frontier import run_line


SMALL, ELSEWHERE = DESIGNS["small"], DESIGNS["elsewhere"]
RESULTS = Path(__file__).parents[1] / "experiments" / "frontier" / "results"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("experiments.frontier.calibration.DRAWS", 20)


@pytest.mark.parametrize("shift, least, most", [(0.0, 27, 36), (0.5, 0, 0)])
def test_advice_is_checked_at_four_times_its_pilots_on_other_seeds(shift, least, most):
    """Against ends of a law with an error of each run; `shift` is that of ends at the largest budget."""
    rng = np.random.default_rng(0)

    def end(shape: Shape, budget: float, seed: int) -> Line:
        tokens = SMALL.tokens(shape, budget)
        loss = 1.2 + 40 / SMALL.parameters(shape) ** 0.4 + 90 / tokens**0.35
        # Pilots are of 8x at most, so that nothing may depend on the ends at 16x
        loss += 3.0 * (budget == 16) + shift * (budget == 32) + 0.004 * rng.normal()
        return run_line(fixed_name(shape), budget, seed, loss, tokens)

    lines = [
        end(s, b, seed) for s in SMALL.shapes for b in SMALL.budgets_of(s) for seed in range(3)
    ]
    checked, grown, left_out = calibration(SMALL, Index(lines))
    assert not grown and not left_out  # nothing grew
    assert len(checked) == 36 and all(check.pilots != check.seed for check in checked)
    assert all(abs(check.seen - shift - check.forecast) < 0.06 for check in checked)
    held = sum(low <= c.seen <= high for c in checked for low, high in [c.interval])
    assert least <= held <= most
    rows = select(summarise(Path("nowhere/small.jsonl"), lines), Answer)
    (row,) = (row for row in rows if row.question == CALIBRATION)
    assert row.estimate == held / 36 and row.verdict.startswith(f"{held} of 36: pilots of one seed")
    (row,) = (row for row in rows if row.question == PICKED)
    assert row.estimate is not None and 0 <= row.estimate < 0.02 and "times of 6" in row.verdict
    assert not calibration(SMALL, Index(lines[:5])).fixed


LAW = Law(1.2, 40.0, 0.4, 90.0, 0.35)


def grown_lines(rho: dict[str, float]) -> Iterator[Line]:
    """The growths of the design at both budgets of pilots, with a token retention of each operator."""
    rng = np.random.default_rng(1)
    for growing in SMALL.growings:
        for time in SMALL.times:
            for budget in SMALL.pilots_at:
                legs = [
                    Leg(
                        Size(str(shape), SMALL.parameters(shape), 1.0),
                        share,
                        share * SMALL.tokens(shape, budget),
                    )
                    for shape, share in ((growing.small, time), (growing.large, 1 - time))
                ]
                loss = predicted(LAW, legs, rho[growing.kind])
                for seed in SMALL.seeds:
                    name = pilot_name(growing, time)
                    end = loss + 0.002 * rng.normal()
                    yield run_line(name, budget, seed, end, 1.0, fixed=False, piece="pilots")


def fixed_lines(design: Design = SMALL) -> Iterator[Line]:
    rng = np.random.default_rng(2)
    for shape in design.shapes:
        for budget in design.budgets_of(shape):
            tokens = design.tokens(shape, budget)
            loss = float(LAW.loss(design.parameters(shape), tokens))
            for seed in design.seeds:
                yield run_line(fixed_name(shape), budget, seed, loss + 0.002 * rng.normal(), tokens)


def test_plans_that_grow_are_forecast_by_the_retention_of_their_pilots():
    """All but those that kept less than nothing, whose ends are said to be higher."""
    lines = [*fixed_lines(), *grown_lines({"stack": 0.5, "copy": 0.9, "msg": -0.2})]
    found = calibration(SMALL, Index(lines))
    forecast = {growing for growing in SMALL.growings if growing.kind != "msg"}
    arms = {pilot_name(growing, time) for growing in forecast for time in SMALL.times}
    assert {check.arm for check in found.grown} == arms
    assert len(found.grown) == len(arms) * 6 and all(c.pilots != c.seed for c in found.grown)
    # The law is fitted again, and retention is not known exactly
    assert all(abs(check.forecast - check.seen) < 0.02 for check in found.grown)
    held = sum(low <= c.seen <= high for c in found.grown for low, high in [c.interval])
    assert held >= 0.75 * len(found.grown)
    msg = [str(growing) for growing in SMALL.growings if growing.kind == "msg"]
    assert sorted(found.left_out) == sorted(3 * msg)
    rows = select(summarise(Path("nowhere/small.jsonl"), lines), Answer)
    (row,) = (row for row in rows if row.question == GROWN)
    assert row.estimate == held / len(found.grown)
    assert row.verdict.startswith(f"{held} of {len(found.grown)}: pilots of one seed up to 8x")
    (row,) = (row for row in rows if row.question == LEFT)
    ends = [line for line in lines if line["budget"] == "32x" and line["arm"].startswith("msg")]
    fixed = [line for line in lines if line["budget"] == "32x" and line["fixed"]]
    lowest = {s: min(x["score"] for x in fixed if x["seed"] == s) for s in SMALL.seeds}
    above = [end["score"] - lowest[end["seed"]] for end in ends]
    assert row.estimate == pytest.approx(min(above))
    count = sum(x > 0 for x in above)
    assert row.verdict.startswith(f"{len(ends)} ends, {count} above the lowest fixed size: msg")
    assert "by the pilots of 3 seeds" in row.verdict


# Another text -------------------------------------------------------------------------------------


def test_the_settings_on_another_text_are_those_of_the_ledger():
    tuned = settled(SMALL, read(RESULTS / "small.jsonl"))
    given = settled(ELSEWHERE, [])
    assert given == {shape: tuned[shape] for shape in ELSEWHERE.shapes}


def test_another_text_has_no_ledger_and_no_primary_question(tmp_path, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr("experiments.frontier.run.load_texts", lambda *_: None)
    monkeypatch.setattr("experiments.frontier.run.report", lambda *_: [])
    monkeypatch.setattr(
        "experiments.study.run", lambda runs, *_: ran.extend(r.key[1] for r in runs)
    )
    run("elsewhere", out=tmp_path, seed=(0,))
    assert sorted(ran) == sorted(4 * ["1x", "4x", "16x"])
    lines = [*fixed_lines(ELSEWHERE)]
    rows = summarise(Path("nowhere/elsewhere.jsonl"), lines)
    asked = {row.question for row in select(rows, Answer)}
    assert {CALIBRATION, PICKED} < asked and PRIMARY not in asked
    answer = page(Path("nowhere/elsewhere.jsonl"), lines, rows).answer
    assert "of 24: pilots of one seed up to 4x, ends of the others" in answer[0]
    assert answer[-1] == "What is there: trunks: 36 of 36."
    (empty,) = page(
        Path("nowhere/elsewhere.jsonl"), [], summarise(Path("elsewhere.jsonl"), [])
    ).answer
    assert empty == "What is there: trunks: 0 of 36."
