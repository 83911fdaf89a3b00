"""`growjax advise`: the sizes of a plan, pilots of them and of growths, the advice, page and plans."""

import dataclasses
import functools
import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

import growjax as gj
from growjax.advise import Law, Leg, predicted
from growjax.axes import sizes
from growjax.cost import parameters
from growjax.errors import BudgetError
from growjax.plan.files import load_plan, save_plan
from growjax.report import advised as page
from growjax.report.pilots import Advised, Family, Pilot, family, pilots, read_advice
from growjax.report.runs import read_run
from growjax.train import Options
from tests.runs import SMALL, plan, plan_file, steps


OVER = ["model.layers=1,2"]
ONE, TWO = "model.layers=1", "model.layers=2"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_file(tmp_path_factory.mktemp("advise"))


def spent(folder: Path) -> float:
    return read_run(folder).last["spent"]


def cost(file: Path, count: int) -> float:
    """What so many steps of the larger size cost."""
    return float(dataclasses.replace(load_plan(file), stages=(steps(count),)).flops)


def test_a_family_knows_its_sizes_and_what_grows_into_what(file):
    of = family(file, ["model.layers=2,1", "model.mlp=16,32"])
    names = [f"model.layers={n},model.mlp={m}" for n, m in ((1, 16), (1, 32), (2, 16), (2, 32))]
    assert list(of.fixed) == names
    assert of.growths == {
        (names[0], names[1]): gj.copy(mlp=32),
        (names[0], names[2]): gj.stack(layers=2),
        (names[0], names[3]): of.growths[names[0], names[3]],
        (names[1], names[3]): gj.stack(layers=2),
        (names[2], names[3]): gj.copy(mlp=32),
    }
    assert "takes away from an axis, or adds one: mlp" in of.reasons[names[1], names[2]]
    grown = pilots(of, [cost(file, 8)], [0.5], [0])
    for pilot in grown:
        assert sizes(pilot.plan.spans[-1].model) == sizes(of.fixed[pilot.sizes[-1]].spans[0].model)
    # Each size with the next one that it grows into
    assert [p.sizes for p in grown if len(p.sizes) > 1] == [
        (names[0], names[1]),
        (names[1], names[3]),
        (names[2], names[3]),
    ]


def test_pilots_are_trained_and_answer(file, tmp_path):
    budget, shown = cost(file, 128), io.StringIO()
    console = Console(file=shown, width=160)
    options = Options(held_out=8, held_out_end=16)

    status, answer = page.advise(
        file, OVER, budget, tmp_path, options, seeds=1, evaluations=2, draws=5, console=console
    )
    assert status == 0 and answer is not None
    folders = [p for p in sorted(tmp_path.iterdir()) if (p / "plan.json").exists()]
    assert len(folders) == 7
    # The run of the largest budget comes last of each size
    runs = {folder.name.split(",")[0]: read_run(folder) for folder in sorted(folders, key=spent)}
    # Steps that runs share are charged once
    whole = sum(map(spent, folders))
    own = sum(
        row["spent"] - before["spent"]
        for run in map(read_run, folders)
        for before, row in zip([{"spent": 0.0}, *run.steps], run.steps, strict=False)
        if not row.get("inherited")
    )
    assert answer.cost == pytest.approx(own) and own < 0.95 * whole
    assert {name: len(ends) for name, ends in answer.ends.items()} == {ONE: 3, TWO: 3}
    for name in (ONE, TWO):
        last = max(answer.ends[name], key=lambda end: end.tokens)
        assert last.loss == runs[name].last["held_out"]
        assert last.tokens == runs[name].plan.tokens
        assert last.parameters == parameters(runs[name].plan.spans[0].model)
    (growth,) = answer.growths
    grown = runs[f"{ONE}-{TWO}-0.5"]
    assert (growth.small, growth.large, growth.time) == (ONE, TWO, 0.5)
    assert growth.losses == (grown.last["held_out"],)
    assert grown.plan.stages[1].grow == gj.stack(layers=2)
    plans = [load_plan(tmp_path / "control.json")]
    assert plans[0].cost == pytest.approx(budget, rel=0.02)
    best = answer.advice.control[0].size.name
    assert plans[0].model == dataclasses.replace(SMALL, layers={ONE: 1, TWO: 2}[best])
    text = " ".join(shown.getvalue().split())
    assert str(answer.advice) in text and "growjax train" in text
    assert f"{answer.cost:.4g} FLOPs" in text
    html = (tmp_path / "advice.html").read_text()
    assert "Does growing pay?" in html and "Pilots that grow" in html


def test_pilots_say_what_their_ends_do(file, tmp_path):
    """Retention from ends that a law with a known one made."""
    of = family(file, OVER)
    budget = cost(file, 10**4)
    made = pilots(of, [budget / n for n in (16, 8, 4)], [0.3, 0.6], [0, 1])
    law = Law(1.2, 3000.0, 0.9, 400.0, 0.45)
    answers = {}
    for rho in (0.0, 0.5, 3.0):
        runs = [Ended(pilot, law, of, rho) for pilot in made]
        answers[rho] = read_advice(of, made, runs, budget, draws=5)  # type: ignore[arg-type]
        for growth in answers[rho].growths:
            assert len(growth.retentions) == 2
            assert growth.retentions == pytest.approx([rho, rho], abs=0.05)
    assert [g.time for g in answers[0.0].growths] == [0.3, 0.6]
    losses = [answer.advice.loss for answer in answers.values()]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3
    # More than all tokens counts as all of them
    whole = answers[3.0].advice
    assert len(whole.legs) == 2 and whole.loss == pytest.approx(
        predicted(law, whole.legs, 1.0), rel=1e-3
    )
    assert whole.legs[0].share <= 0.6


def test_a_growth_that_loses_more_than_all_tokens_is_in_no_plan(file, tmp_path):
    """It ends above what is forecast of a retention of 0, by as much as nothing measures."""
    of = family(file, ["model.layers=1,2,4"])
    four = "model.layers=4"
    budget = cost(file, 10**4)
    made = pilots(of, [budget / n for n in (16, 8, 4)], [0.5], [0, 1])
    law = Law(1.2, 3000.0, 0.9, 400.0, 0.45)

    def answer(first: float, second: float) -> Advised:
        kept = {(ONE, TWO): first, (TWO, four): second}
        runs = [Ended(pilot, law, of, kept.get(pilot.sizes, 0.0)) for pilot in made]  # type: ignore[call-overload]
        return read_advice(of, made, runs, budget, draws=5)  # type: ignore[arg-type]

    def names(advised: Advised) -> list[str]:
        return [leg.size.name for leg in advised.advice.legs]

    assert names(answer(0.9, 0.9))[:2] == [ONE, TWO] and not answer(0.9, 0.9).left_out
    lost = answer(-0.3, 0.9)
    assert lost.left_out == {(ONE, TWO): pytest.approx(-0.3, abs=0.05)}
    # Its pilots say nothing of the other growth
    assert lost.retention == pytest.approx((0.9, 0.9), abs=0.05) and names(lost) == [TWO, four]
    sentences = page._answer(lost, "FLOPs", tmp_path)
    assert "lost more than all tokens" in sentences[1] and "kept -0.3" in sentences[1]
    assert "kept 0.9" in sentences[2] and "in 2 of 2 pilots" in sentences[2]
    none = answer(-0.3, -0.3)
    assert len(none.left_out) == 2 and none.retention == (0.0,) and len(names(none)) == 1
    assert not any("0 was assumed" in text for text in page._answer(none, "FLOPs", tmp_path))


class Ended:
    """What `read_advice` asks of a run, which ends as a law says."""

    def __init__(self, pilot: Pilot, law: Law, of: Family, rho: float):
        shares = [stage.share or 0.0 for stage in pilot.plan.stages]
        starts = [*(span.tokens for span in pilot.plan.spans), pilot.plan.tokens]
        legs = [
            Leg(of.size(name), share, b - a)
            for name, share, (a, b) in zip(
                pilot.sizes, shares, itertools.pairwise(starts), strict=True
            )
        ]
        self.score = predicted(law, legs, rho)
        self.steps = [self.last] = [{"spent": pilot.budget}]

    def outcome(self, name: str) -> "Ended":
        return self


def test_what_cannot_be_advised_of_is_said_at_once(file, tmp_path):
    ask = functools.partial(
        page.advise, run=tmp_path, options=Options(), console=Console(quiet=True)
    )
    with pytest.raises(BudgetError, match=r"(?s)budget: .*budgets: .*times: .*seeds: "):
        ask(file, OVER, -1.0, budgets=(1.0, 1.0, 2.0), times=(1.5,), seeds=0)
    with pytest.raises(BudgetError, match="over: expected two sizes or more"):
        ask(file, ["model.layers=2"], 1e9)
    with pytest.raises(BudgetError, match="over: expected two sizes or more, each of its own"):
        ask(file, ["rate.peak=1e-3,2e-3"], 1e9)
    with pytest.raises(BudgetError, match="by 'zeros', no size grows into another"):
        ask(file, ["model.layers=0,1"], 1e9, by="zeros")
    grows = tmp_path / "grows.json"
    save_plan(plan(steps(4), steps(4, grow=gj.stack(layers=4))), grows)
    with pytest.raises(BudgetError, match="expected a plan of one stage"):
        ask(grows, ["model.mlp=16,32"], 1e9)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
