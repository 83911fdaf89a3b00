"""Comparisons of arms: statistics against SciPy and by hand, and what may not be compared at all."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from growjax.budget import Outcome, compare, cost_to_reach, speed_up, t_interval
from growjax.budget.paired import bca_interval, detectable, holm, sign_flip, t_test
from growjax.errors import BudgetError, UndecayedError


SEEDS = st.integers(0, 10_000)
SIZES = st.sampled_from([3, 6, 9])


def draws(seed: int, n: int) -> list[float]:
    return np.random.default_rng(seed).normal(size=n).tolist()


def runs(arm: str, scores, budget: float = 1.0, **changes) -> list[Outcome]:
    return [
        Outcome(arm, n, budget, "clock", budget, score, True, **changes)
        for n, score in enumerate(scores)
    ]


# Statistics --------------------------------------------------------------------------------------


@given(SEEDS, SIZES)
def test_the_t_test_and_its_interval_are_those_of_scipy(seed, n):
    x = draws(seed, n)
    found: Any = stats.ttest_1samp(x, 0.0)
    assert t_test(x) == pytest.approx(found.pvalue, rel=1e-10)
    for level in (0.9, 0.95):
        assert t_interval(x, level) == pytest.approx(tuple(found.confidence_interval(level)))


@given(SEEDS, SIZES)
def test_flipping_signs_is_the_exact_test(seed, n):
    x = np.array(draws(seed, n))
    patterns = [np.array(s) for s in itertools.product((1, -1), repeat=n)]
    far = [abs((s * x).sum()) >= abs(x.sum()) - 1e-12 for s in patterns]
    assert sign_flip(x.tolist()) == pytest.approx(np.mean(far))
    assert sign_flip((5 * x).tolist()) == sign_flip(x.tolist()) == sign_flip((-x).tolist())


def test_the_smallest_p_of_flipping_signs():
    """Three seeds can never reach 0.05, and five cannot either; six can."""
    found = [sign_flip([1.0 + 0.1 * i for i in range(n)]) for n in (3, 5, 6)]
    assert found == [0.25, 0.0625, 0.03125]


def test_many_values_are_drawn():
    x = [0.1 * v + 0.05 for v in draws(0, 40)]
    p = sign_flip(x)
    assert p == sign_flip(x)
    assert p == pytest.approx(t_test(x), abs=0.02)


@given(SEEDS)
def test_holm_is_that_of_the_textbook(seed):
    p = np.random.default_rng(seed).uniform(size=5).tolist()
    order = np.argsort(p)
    steps = [min(1.0, (5 - k) * p[i]) for k, i in enumerate(order)]
    expected = dict(zip(order.tolist(), np.maximum.accumulate(steps), strict=True))
    assert holm(p) == pytest.approx([expected[i] for i in range(5)])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_bootstrap_is_near_t_and_always_the_same():
    x = [v + 3 for v in draws(1, 30)]
    assert bca_interval(x) == bca_interval(x)
    assert bca_interval(x) == pytest.approx(t_interval(x), abs=0.1)
    assert bca_interval([2.0, 2.0]) == (2.0, 2.0)
    assert all(map(math.isnan, (*bca_interval([1.0]), *t_interval([1.0]), detectable([1.0]))))


def test_what_can_be_detected_is_found_in_four_cases_of_five():
    n, rng = 6, np.random.default_rng(0)
    # The mean over draws of the spread is what the formula is for
    size = np.mean([detectable(rng.normal(size=n).tolist()) for _ in range(400)])
    found = np.mean([t_test((rng.normal(size=n) + size).tolist()) < 0.05 for _ in range(400)])
    assert found == pytest.approx(0.8, abs=0.07)


# Verdicts ----------------------------------------------------------------------------------------


BASE = [2.00, 2.10, 1.90, 2.05, 1.95, 2.02]
NOISE = np.array([0.010, -0.006, 0.004, -0.009, 0.002, 0.007])


def verdict(shift: float, noise=NOISE, n: int = 6, **kwargs) -> str:
    scores = np.array(BASE) + shift + noise
    outcomes = [*runs("base", BASE[:n]), *runs("arm", scores[:n])]
    (found,) = compare(outcomes, "base", **kwargs)
    assert found.mean == pytest.approx(shift + noise[:n].mean())
    assert found.differences == pytest.approx(tuple((shift + noise)[:n]))
    return found.verdict


def test_verdicts():
    assert verdict(-0.3) == "better" and verdict(0.3) == "worse"
    assert verdict(0.0, margin=0.02) == "equivalent"
    assert verdict(0.0, margin=0.005) == "undecided"
    assert verdict(-0.3, n=5) == verdict(0.0, margin=0.02, n=5) == "undecided"
    # The default margin is the baseline's own spread
    (found,) = compare([*runs("base", BASE), *runs("arm", np.add(BASE, NOISE))], "base")
    assert found.margin == pytest.approx(np.std(BASE, ddof=1)) and found.verdict == "equivalent"


def test_small_but_sure_is_said_to_be_small():
    (found,) = compare([*runs("base", BASE), *runs("arm", np.array(BASE) + 0.02 + NOISE)], "base")
    assert found.verdict == "worse" and "spread" in found.reason


def test_the_two_tests_have_to_agree():
    """One seed that is far off: flipping signs sees six of one sign, t sees a wide spread."""
    noise = np.array([0.01, 0.02, 0.01, 0.03, 0.02, 2.0])
    outcomes = [*runs("base", BASE), *runs("arm", np.array(BASE) + noise)]
    (found,) = compare(outcomes, "base", margin=0.001)
    assert found.p <= 0.05 < found.p_t and found.verdict == "undecided"


def test_more_arms_take_more_to_decide():
    # Alone it is found; among ten others that do nothing it is not
    shift = np.array([-0.03, -0.01, -0.05, -0.02, -0.06, -0.01])
    alone = [*runs("base", BASE), *runs("arm", np.array(BASE) + shift)]
    others = [
        r
        for n in range(10)
        for r in runs(f"other {n}", np.array(BASE) + 0.03 * np.array(draws(n, 6)))
    ]
    verdicts = []
    for outcomes in (alone, alone + others):
        row = compare(outcomes, "base", margin=1e-4)[0]
        assert row.arm == "arm" and row.p_t == pytest.approx(t_test(shift.tolist()))
        verdicts.append(row.verdict)
    assert verdicts == ["better", "undecided"]


def test_only_seeds_that_both_have_are_paired():
    outcomes = [*runs("base", BASE), *runs("arm", np.array(BASE) - 1)[2:5]]
    (found,) = compare(outcomes, "base")
    assert found.seeds == (2, 3, 4) and found.verdict == "undecided"


def test_what_may_not_be_compared():
    good = [*runs("base", BASE), *runs("arm", BASE)]
    for change, said in [
        ({"clock": "another"}, "clocks differ: 'another', 'clock'"),
        ({"budget": 2.0}, "budgets differ: 1, 2"),
        ({"seed": 1}, "'arm' has two runs of seed 1"),
        ({"arm": "third", "seed": 77}, "'third' shares no seed with 'base'"),
    ]:
        bad = [*good[:-1], dataclasses.replace(good[-1], **change)]
        with pytest.raises(BudgetError, match=said):
            compare(bad, "base")
    with pytest.raises(BudgetError, match="'bass' has no run; there are 'base', 'arm'"):
        compare(good, "bass")
    early = [*good[:-1], dataclasses.replace(good[-1], decayed=False)]
    with pytest.raises(UndecayedError, match="the learning rate of arm had not fallen"):
        compare(early, "base")
    (found,) = compare(early, "base", allow_undecayed=True)
    assert found.undecayed == ("arm",)


# Cost to a loss ----------------------------------------------------------------------------------


def test_cost_to_reach_is_the_last_crossing():
    curve = ((0.0, 4.0), (1.0, 2.0), (2.0, 3.5), (4.0, 1.5), (5.0, 1.0))
    outcomes = [
        *runs("target", [2.5, 2.5], budget=10.0),
        *runs("arm", [1.0, 1.0], budget=5.0, curve=curve),
        *runs("never", [1.0, 3.0], budget=5.0, curve=((0.0, 4.0), (5.0, 3.0))),
        *runs("left", [3.0, 3.0], budget=5.0, curve=((0.0, 4.0), (1.0, 2.0), (5.0, 3.0))),
    ]
    arm, never, left = cost_to_reach(outcomes, "arm", "never", "left", target="target")
    # From 3.5 at 2 to 1.5 at 4 it passes 2.5 at 3, and 3 of 10 is the share
    assert arm.shares == pytest.approx((0.3, 0.3)) and arm.mean == pytest.approx(0.3)
    assert left.shares == (None, None) and left.mean is None
    assert never.mean is None and never.reason == "0 of 2 seeds reached the loss of target"
    with pytest.raises(BudgetError, match="no runs"):
        cost_to_reach(outcomes, "nobody", target="target")


def test_a_speed_up_is_read_off_decayed_ends_and_the_naive_one_off_the_way():
    """On the way the baseline is 0.5 worse than decayed, so the arm seems faster than it is."""

    def decayed(b: float) -> float:
        return 4.0 - math.log2(b)

    outcomes = []
    for b in (1.0, 2.0, 4.0, 8.0):
        way = tuple((x, decayed(x) + 0.5) for x in (0.5, 1.0, 2.0, 4.0)) if b == 8.0 else ()
        outcomes += runs("base", [decayed(b)] * 2, budget=b, curve=(*way, (b, decayed(b))))
    outcomes += runs("arm", [decayed(2.0) - 0.25] * 2, budget=2.0)
    (found,) = speed_up(outcomes, "arm", "base")
    assert found.decayed == pytest.approx(2**0.25)
    # On its way it falls from 3.5 at 2 to 2.5 at 4, and passes 2.75 at 3.5
    assert found.naive == pytest.approx(3.5 / 2) and found.seeds == (0, 1)
    # The baseline itself is as fast as itself
    itself = [s.decayed for s in speed_up(outcomes, "base", "base")]
    assert itself == pytest.approx([1.0] * 4)
    # Outside of what the baselines reached nothing is known
    for score in (0.5, 5.0):
        (unknown,) = speed_up([*outcomes[:-2], *runs("arm", [score] * 2, 2.0)], "arm", "base")
        assert unknown.decayed is None and "outside" in unknown.reason
    with pytest.raises(BudgetError, match="two budgets or more"):
        speed_up(runs("base", [1.0]) + runs("arm", [1.0]), "arm", "base")
    with pytest.raises(UndecayedError):
        speed_up([dataclasses.replace(o, decayed=False) for o in outcomes], "arm", "base")
