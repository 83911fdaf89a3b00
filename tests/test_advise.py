"""Whether to grow: the law of the loss, the search over plans, and what it says of committed runs."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

import growjax as gj
from experiments.study import read
from growjax.advise import (
    FACTOR,
    Ending,
    Law,
    Leg,
    Size,
    advise,
    counted,
    drawn,
    fit,
    predicted,
    retained,
    search,
)
from growjax.errors import BudgetError
from growjax.plan.files import load_plan, save_plan
from growjax.train import Schedule
from tests.runs import SMALL, plan, steps


LAW = Law(1.2, 60.0, 0.5, 400.0, 0.45)
SIZES = [Size(f"{n}k", 1000 * n, 6000.0 * n) for n in (40, 120, 360)]
LINES = Path(__file__).parents[1] / "experiments" / "msg" / "results" / "small.jsonl"


def endings(law: Law = LAW, noise: float = 0.0, seeds: int = 3) -> list[Ending]:
    rng = np.random.default_rng(0)
    return [
        Ending(size.parameters, tokens, float(law.loss(size.parameters, tokens)) * factor, seed)
        for size in SIZES
        for tokens in (1e5, 4e5, 1.6e6, 6.4e6)
        for seed in range(seeds)
        for factor in [float(np.exp(noise * rng.normal()))]
    ]


def test_a_law_is_found_again():
    fitted = fit(endings())
    for n, d in itertools.product((40_000, 360_000), (1e5, 3e7)):
        assert fitted.loss(n, d) == pytest.approx(float(LAW.loss(n, d)), rel=1e-3)
    assert LAW.tokens(40_000, LAW.loss(40_000, 1e6)) == pytest.approx(1e6)
    assert LAW.tokens(40_000, LAW.least(40_000)) == np.inf


def test_draws_of_a_law_spread_as_its_ends_do():
    goal = 360_000, 2e7
    quiet, loud = (
        [float(law.loss(*goal)) for law in drawn(some, fit(some), 12)]
        for some in (endings(noise=0.002), endings(noise=0.02))
    )
    assert 0 < np.std(quiet) < np.std(loud) < 0.2
    assert min(quiet) < float(LAW.loss(*goal)) + 0.02 and max(quiet) > float(LAW.loss(*goal)) - 0.02


def test_a_grown_model_counts_what_retention_says():
    legs = (Leg(SIZES[0], 0.5, 4e6), Leg(SIZES[1], 0.5, 1e6))
    fresh = float(LAW.tokens(120_000, LAW.loss(40_000, 4e6)))
    assert 0 < fresh < 4e6
    assert counted(LAW, legs, 0.0) == pytest.approx(fresh + 1e6)
    assert counted(LAW, legs, 1.0) == pytest.approx(5e6)
    assert predicted(LAW, legs, 0.5) == pytest.approx(
        float(LAW.loss(120_000, 1e6 + (fresh + 4e6) / 2))
    )


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_the_retention_of_a_pilot_is_the_one_that_predicts_its_end(rho):
    legs = (Leg(SIZES[0], 0.5, 4e6), Leg(SIZES[1], 0.5, 1e6))
    assert retained(LAW, legs, predicted(LAW, legs, rho)) == pytest.approx(rho, abs=1e-9)
    assert retained(LAW, legs, 0.9 * LAW.least(120_000)) is None
    # Without a term of the size, all sizes are one
    assert retained(dataclasses.replace(LAW, a=0.0), legs, 1.9) is None


def every_plan(budget: float) -> list[tuple[Leg, ...]]:
    """Plans of one to three sizes with growths at twentieths of the cost, none after 0.6 of it."""
    plans = []
    for count in (1, 2, 3):
        for sizes in itertools.combinations(SIZES, count):
            if any(b.parameters > FACTOR * a.parameters for a, b in itertools.pairwise(sizes)):
                continue
            for cuts in itertools.combinations(range(1, 13), count - 1):
                ends = [0, *cuts, 20]
                shares = [(b - a) / 20 for a, b in itertools.pairwise(ends)]
                plans.append(
                    tuple(
                        Leg(size, share, share * budget / size.token_cost)
                        for size, share in zip(sizes, shares, strict=True)
                    )
                )
    return plans


@pytest.mark.parametrize("retention", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [1e11, 1e13])
def test_the_search_finds_the_best_of_all_plans(budget, retention):
    legs = search(LAW, SIZES, budget, retention)
    lowest = min(predicted(LAW, some, retention) for some in every_plan(budget))
    assert predicted(LAW, legs, retention) == pytest.approx(lowest, rel=1e-9)
    assert sum(leg.share for leg in legs) == pytest.approx(1)
    assert sum(leg.tokens * leg.size.token_cost for leg in legs) == pytest.approx(budget)


def test_a_growth_is_no_later_and_no_larger_than_it_may_be():
    legs = search(LAW, SIZES, 1e13, 1.0, latest=0.3, factor=3.0)
    assert len(legs) > 1 and sum(leg.share for leg in legs[:-1]) <= 0.3
    assert len(search(LAW, SIZES, 1e13, 1.0, factor=2.0)) == 1
    assert len(search(LAW, SIZES, 1e13, 1.0, latest=0.0)) == 1


def test_sizes_that_do_not_grow_into_each_other_are_no_stages():
    assert len(search(LAW, SIZES, 1e13, 1.0, growable=lambda small, large: False)) == 1
    legs = search(LAW, SIZES, 1e13, 1.0, growable=lambda small, large: large is SIZES[1])
    assert [leg.size for leg in legs] in ([SIZES[0], SIZES[1]], [SIZES[1]], [SIZES[2]])


def test_growth_is_advised_for_kept_tokens_alone():
    some = endings(noise=0.002)
    stay = advise(some, SIZES, 1e13, draws=20)
    assert not stay.grow and str(stay).startswith("Do not grow: train ")
    grow = advise(some, SIZES, 1e13, retention=(0.7, 0.9), draws=20)
    assert grow.grow and grow.sure >= 0.9 and str(grow).startswith("Grow: ")
    assert grow.loss < grow.control_loss == stay.control_loss
    assert grow.gain_interval[1] < 0 and grow.control == stay.control
    # A gain that is not worth it
    assert not advise(some, SIZES, 1e13, retention=(0.7, 0.9), margin=0.5, draws=20).grow


def test_advice_is_written_as_two_plans(tmp_path):
    fixed = {
        size.name: plan(
            steps(1), model=dataclasses.replace(SMALL, layers=n), rate=Schedule(n * 1e-3)
        )
        for size, n in zip(SIZES, (1, 2, 3), strict=True)
    }

    def operator(small: str, large: str) -> gj.Operator:
        return gj.stack(layers=fixed[large].model.layers)  # type: ignore[attr-defined]

    advice = advise(endings(), SIZES, 1e13, retention=(1.0,), draws=5)
    # Scaled down to what a tiny model does in some steps
    advice = dataclasses.replace(advice, budget=1e9)
    assert len(advice.legs) > 1
    plans = advice.plans(fixed, operator)
    for number, each in enumerate(plans):
        save_plan(each, tmp_path / f"{number}.json")
        assert load_plan(tmp_path / f"{number}.json") == each
        assert each.cost == pytest.approx(1e9, rel=0.05)
    assert [s.name for s in plans[0].stages] == [leg.size.name for leg in advice.legs]
    assert len(plans[1].stages) == 1 and plans[1].stages[0].grow is None
    # Born as the first size, and trained as the last one
    assert plans[0].model == dataclasses.replace(SMALL, layers=1)
    assert plans[0].stages[1].grow == operator("", SIZES[1].name)
    assert plans[0].rate == fixed[advice.legs[-1].size.name].rate
    with pytest.raises(BudgetError, match="these sizes have no plan"):
        advice.plans({}, operator)


@pytest.mark.parametrize("budget, best", [(1, 40_032), (16, 178_752)])
def test_on_the_committed_runs_it_says_not_to_grow(budget, best):
    lines = [x for x in read(LINES) if x["workload"] == "gpt" and x["budget"] != "tuning"]
    some = [
        Ending(x["parameters"], x["tokens"], x["score"], x["seed"]) for x in lines if x["fixed"]
    ]
    costs = {x["parameters"]: x["flops"] / x["tokens"] for x in lines if x["fixed"]}
    sizes = [Size(str(n), n, cost) for n, cost in sorted(costs.items())]
    cost = next(x["flops"] for x in lines if x["arm"] == "msg" and x["budget"] == "1x")
    advice = advise(some, sizes, budget * cost, draws=10)
    assert not advice.grow and advice.control[0].size.parameters == best


def test_faults_are_listed():
    with pytest.raises(BudgetError, match=r"(?s)sizes: two.*budget: .*retention: .*latest: "):
        advise(endings(), [SIZES[0]] * 2, -1.0, retention=(1.5,), latest=2.0)
    with pytest.raises(BudgetError, match=r"(?s)draws: .*confidence: .*sizes: .*cost of a token"):
        advise(endings(), [Size("free", 1000, 0.0)], 1.0, draws=0, confidence=1.5)
    with pytest.raises(BudgetError, match="two sizes or more"):
        fit(endings()[:12])
    with pytest.raises(BudgetError, match="positive, finite"):
        fit([*endings(), Ending(1, 1.0, float("nan"))])
