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

from growjax.budget import Outcome, compare, cost_to_reach, statistics, t_interval, words
from growjax.budget.statistics import (
    bca_interval,
    crossed,
    detectable,
    holm,
    resampled,
    sign_flip,
    spread,
)
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
    reference: Any = stats.ttest_1samp(x, 0.0)
    assert spread(x).p() == pytest.approx(reference.pvalue, rel=1e-10)
    for level in (0.9, 0.95):
        assert t_interval(x, level) == pytest.approx(tuple(reference.confidence_interval(level)))


@given(SEEDS, SIZES)
def test_flipping_signs_is_the_exact_test(seed, n):
    x = np.array(draws(seed, n))
    patterns = [np.array(s) for s in itertools.product((1, -1), repeat=n)]
    far = [abs((s * x).sum()) >= abs(x.sum()) - 1e-12 for s in patterns]
    assert sign_flip(x.tolist()) == pytest.approx(np.mean(far))
    assert sign_flip((5 * x).tolist()) == sign_flip(x.tolist()) == sign_flip((-x).tolist())


def test_the_smallest_p_of_flipping_signs():
    """Three seeds can never reach 0.05, and five cannot either; six can."""
    smallest = [sign_flip([1.0 + 0.1 * i for i in range(n)]) for n in (3, 5, 6)]
    assert smallest == [0.25, 0.0625, 0.03125]


def test_many_values_are_drawn():
    x = [0.1 * v + 0.05 for v in draws(0, 40)]
    p = sign_flip(x)
    assert p == sign_flip(x)
    assert p == pytest.approx(spread(x).p(), abs=0.02)


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
    share = np.mean([spread((rng.normal(size=n) + size).tolist()).p() < 0.05 for _ in range(400)])
    assert share == pytest.approx(0.8, abs=0.07)


# Seeds and windows --------------------------------------------------------------------------------


@given(SEEDS, SIZES, st.floats(0.01, 2))
def test_equivalence_is_two_one_sided_tests(seed, n, margin):
    x = draws(seed, n)
    sides: list[Any] = [
        stats.ttest_1samp(x, -margin, alternative="greater"),
        stats.ttest_1samp(x, margin, alternative="less"),
    ]
    p = spread(x).p_equivalent(margin)
    assert p == pytest.approx(max(side.pvalue for side in sides), rel=1e-9)
    low, high = t_interval(x, 0.9)
    assert (p < 0.05) == (-margin < low and high < margin)


def crossed_draws(rng, seeds: int, windows: int, of_seeds: float, of_windows: float):
    """Sums and weights of a difference of 0 in truth, with an error of each kind."""
    weights = rng.integers(1, 9, windows).astype(float)
    noise = rng.normal(size=(seeds, windows)) * 0.5
    each = of_seeds * rng.normal(size=(seeds, 1)) + of_windows * rng.normal(size=windows) + noise
    return each * weights, weights


def test_without_windows_that_differ_the_error_is_that_of_the_seeds():
    x = np.array(draws(3, 6))
    sums = np.tile(x[:, None], (1, 40))
    estimate, plain = crossed(sums, np.ones(40)), spread(x.tolist())
    assert (estimate.mean, estimate.error) == pytest.approx((plain.mean, plain.error))
    assert estimate.degrees == pytest.approx(5)
    assert resampled(sums, np.ones(40)) == pytest.approx(t_interval(x.tolist()), abs=0.15)


def test_without_seeds_that_differ_the_error_is_that_of_a_ratio_over_windows():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 9, 300).astype(float)
    each = rng.normal(size=300) * weights
    estimate = crossed(np.tile(each, (6, 1)), weights)
    ratio = each.sum() / weights.sum()
    error = (300 * np.var(each - ratio * weights, ddof=1)) ** 0.5 / weights.sum()
    assert (estimate.mean, estimate.error) == pytest.approx((ratio, error))
    assert estimate.degrees == pytest.approx(299)
    low, high = resampled(np.tile(each, (6, 1)), weights)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)


@pytest.mark.parametrize("of_seeds, of_windows", [(1.0, 0.0), (0.0, 0.8), (0.1, 0.8)])
def test_intervals_over_both_hold_the_truth_in_19_of_20_cases(of_seeds, of_windows):
    """And those over seeds alone do not, once windows differ: all seeds are judged on the same ones."""
    rng = np.random.default_rng(1)
    cases, hits = 300, {"t": 0, "bootstrap": 0, "seeds": 0}
    estimates = []
    for _ in range(cases):
        sums, weights = crossed_draws(rng, 6, 80, of_seeds, of_windows)
        estimates.append(crossed(sums, weights))
        for name, (low, high) in {
            "t": estimates[-1].interval(),
            "bootstrap": resampled(sums, weights, draws=400),
            "seeds": t_interval((sums.sum(1) / weights.sum()).tolist()),
        }.items():
            hits[name] += low <= 0 <= high
    assert hits["t"] / cases > 0.92 and hits["bootstrap"] / cases > 0.92
    assert (hits["seeds"] / cases < 0.85) == (of_windows > 0)
    # The error is what means are apart by, and a little more for what is counted twice
    error = float(np.mean([spread.error**2 for spread in estimates]) ** 0.5)
    assert 0.9 < error / np.std([spread.mean for spread in estimates]) < 1.3


def test_a_bootstrap_is_the_same_at_every_call_and_in_any_number_of_chunks(monkeypatch):
    sums, weights = crossed_draws(np.random.default_rng(2), 6, 50, 0.1, 0.3)
    whole = resampled(sums, weights)
    monkeypatch.setattr(statistics, "_CHUNK", 77)
    assert resampled(sums, weights) == pytest.approx(whole, rel=1e-12)
    assert resampled(2 * sums, weights) == pytest.approx(np.multiply(2, resampled(sums, weights)))


def windowed(arm: str, sums: np.ndarray, weights: np.ndarray, **changes) -> list[Outcome]:
    return [
        Outcome(
            arm,
            seed,
            1.0,
            "clock",
            1.0,
            float(row.sum() / weights.sum()),
            True,
            windows=np.stack([row, weights], axis=1),
            **changes,
        )
        for seed, row in enumerate(sums)
    ]


def test_windows_that_were_kept_are_in_the_interval_and_the_verdict():
    """All seeds agree on a gain that is one window's luck: better over seeds, not over both."""
    rng = np.random.default_rng(0)
    weights = np.full(20, 10.0)
    base = rng.normal(30, 1, size=(6, 20))
    lucky = base + 0.02 * rng.normal(size=(6, 20))
    lucky[:, 0] -= 40.0
    outcomes = [*windowed("base", base, weights), *windowed("arm", lucky, weights)]
    (both,) = compare(outcomes, "base")
    alone = [dataclasses.replace(o, windows=None) for o in outcomes]
    (seeds,) = compare(alone, "base")
    assert (seeds.verdict, seeds.over) == ("better", "seeds")
    assert (both.verdict, both.over) == ("no difference found", "seeds and windows")
    assert both.mean == pytest.approx(seeds.mean) and both.p_t > 0.05 > seeds.p_t
    assert both.interval[0] < seeds.interval[0] < seeds.interval[1] < 0 < both.interval[1]
    assert both.t_interval == pytest.approx(seeds.t_interval)
    # Where one run did not keep them the seeds are all there is, and that is said
    (mixed,) = compare([alone[0], *outcomes[1:]], "base")
    assert mixed.over == "seeds" and mixed.interval == pytest.approx(seeds.interval)
    # Spread over all windows the same gain is one
    even = base - 2.0 + 0.02 * rng.normal(size=(6, 20))
    (comparison,) = compare([*outcomes[:6], *windowed("arm", even, weights)], "base")
    assert (comparison.verdict, comparison.over) == ("better", "seeds and windows")


def test_differences_are_of_the_windows_where_there_are_some():
    """Scores are of fewer windows, with an error of their own."""
    rng = np.random.default_rng(0)
    weights = np.full(30, 5.0)
    base = rng.normal(10, 1, size=(6, 30))
    both = [*windowed("base", base, weights), *windowed("arm", base - 1.0, weights)]
    noisy = [dataclasses.replace(o, score=o.score + 0.3 * rng.normal()) for o in both]
    (comparison,) = compare(noisy, "base")
    assert comparison.differences == pytest.approx([-0.2] * 6) and comparison.verdict == "better"
    (alone,) = compare([dataclasses.replace(o, windows=None) for o in noisy], "base")
    assert alone.mean != pytest.approx(-0.2, abs=1e-3)


def test_windows_that_cannot_be():
    weights = np.ones(5)
    (good, other) = windowed("arm", np.ones((2, 5)), weights)
    for windows, message in [
        (np.ones(5), r"array of shape \(5,\)"),
        (np.ones((1, 2)), "two or more pairs"),
        (np.full((5, 2), np.nan), "finite losses"),
    ]:
        with pytest.raises(BudgetError, match=message):
            dataclasses.replace(good, windows=windows)
    with pytest.raises(BudgetError, match="score: expected a finite number(.|\n)*spent: expected"):
        dataclasses.replace(good, score=float("nan"), spent=0.0, windows=None)
    fewer = windowed("base", np.ones((2, 4)), np.ones(4))
    with pytest.raises(BudgetError, match="'base', seed 0: 4 windows of 4 predictions"):
        compare([good, other, *fewer], "base")


# Verdicts ----------------------------------------------------------------------------------------


BASE = [2.00, 2.10, 1.90, 2.05, 1.95, 2.02]
NOISE = np.array([0.010, -0.006, 0.004, -0.009, 0.002, 0.007])


def verdict(shift: float, noise=NOISE, n: int = 6, **kwargs) -> str:
    scores = np.array(BASE) + shift + noise
    outcomes = [*runs("base", BASE[:n]), *runs("arm", scores[:n])]
    (comparison,) = compare(outcomes, "base", **kwargs)
    assert comparison.mean == pytest.approx(shift + noise[:n].mean())
    assert comparison.differences == pytest.approx(tuple((shift + noise)[:n]))
    return comparison.verdict


def test_verdicts():
    assert verdict(-0.3) == "better" and verdict(0.3) == "worse"
    assert verdict(0.0, margin=0.02) == "equivalent"
    assert verdict(0.0, margin=0.005) == verdict(0.0) == "no difference found"
    assert verdict(-0.3, n=5) == verdict(0.0, margin=0.02, n=5) == "too few seeds"


def test_small_but_sure_is_said_to_be_small():
    outcomes = [*runs("base", BASE), *runs("arm", np.array(BASE) + 0.02 + NOISE)]
    (comparison,) = compare(outcomes, "base", margin=0.1)
    assert (
        comparison.verdict == "worse" and comparison.reason == "but by less than the margin of 0.1"
    )


def test_equivalence_is_adjusted_for_all_that_are_tested():
    """Alone it is shown; among nineteen others that differ it is not."""
    noise = 2.2 * NOISE
    (alone,) = compare(
        [*runs("base", BASE), *runs("arm", np.add(BASE, noise))], "base", margin=0.02
    )
    others = [r for n in range(19) for r in runs(f"far {n}", np.add(BASE, 1 + noise))]
    outcomes = [*runs("base", BASE), *runs("arm", np.add(BASE, noise)), *others]
    among = compare(outcomes, "base", margin=0.02)[0]
    assert alone.verdict == "equivalent" and among.verdict == "no difference found"
    assert among.p_equivalent == pytest.approx(20 * alone.p_equivalent)
    assert len(among.family) == 20 and among.family[:2] == ("arm at 1", "far 0 at 1")
    assert alone.family == ("arm at 1",)


def test_verdicts_in_words():
    outcomes = [*runs("base", BASE), *runs("arm", np.array(BASE) - 0.3 + NOISE)]
    (comparison,) = compare(outcomes, "base")
    low, high = comparison.interval
    assert str(comparison) == f"better by 0.299 ({-high:.3f} to {-low:.3f})"
    assert (
        words("no difference found", 0.01, (-0.02, 0.04)) == "no difference found (-0.020 to 0.040)"
    )
    assert (
        words("equivalent", 0.0, (-0.01, 0.01), 0.05) == "equivalent within 0.05 (-0.010 to 0.010)"
    )
    nan = (math.nan, math.nan)
    assert words("too few seeds", 0.1, nan) == "too few seeds to say (+0.100)"
    assert words("too few seeds", 0.1, (-0.1, 0.3)) == "too few seeds to say (-0.100 to 0.300)"
    assert words("worse", 0.1, (0.05, 0.15)) == "worse by 0.100 (0.050 to 0.150)"


def test_the_two_tests_have_to_agree():
    """One seed that is far off: flipping signs sees six of one sign, t sees a wide spread."""
    noise = np.array([0.01, 0.02, 0.01, 0.03, 0.02, 2.0])
    outcomes = [*runs("base", BASE), *runs("arm", np.array(BASE) + noise)]
    (comparison,) = compare(outcomes, "base", margin=0.001)
    assert comparison.p <= 0.05 < comparison.p_t and comparison.verdict == "no difference found"
    # One seed that is level: t sees a gain, and signs could have fallen so
    noise = np.array([-0.30, -0.31, -0.29, -0.30, -0.31, 0.01])
    (comparison,) = compare([*runs("base", BASE), *runs("arm", np.array(BASE) + noise)], "base")
    assert comparison.p_holm <= 0.05 < comparison.p and comparison.verdict == "no difference found"


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
        assert row.arm == "arm" and row.p_t == pytest.approx(spread(shift.tolist()).p())
        verdicts.append(row.verdict)
    assert verdicts == ["better", "no difference found"]
    assert "of 11 tested together" in row.reason


def test_only_seeds_that_both_have_are_paired():
    outcomes = [*runs("base", BASE), *runs("arm", np.array(BASE) - 1)[2:5]]
    (comparison,) = compare(outcomes, "base")
    assert comparison.seeds == (2, 3, 4) and comparison.verdict == "too few seeds"


def test_what_may_not_be_compared():
    good = [*runs("base", BASE), *runs("arm", BASE)]
    for change, message in [
        ({"clock": "another"}, "clocks differ: 'another', 'clock'"),
        ({"budget": 2.0}, "budgets differ: 1, 2"),
        ({"seed": 1}, "'arm' has two runs of seed 1"),
        ({"arm": "third", "seed": 77}, "'third' shares no seed with 'base'"),
    ]:
        bad = [*good[:-1], dataclasses.replace(good[-1], **change)]
        with pytest.raises(BudgetError, match=message):
            compare(bad, "base")
    with pytest.raises(BudgetError, match="'bass' has no run; expected one of 'base', 'arm'"):
        compare(good, "bass")
    early = [*good[:-1], dataclasses.replace(good[-1], decayed=False)]
    with pytest.raises(UndecayedError, match="the learning rate of arm had not fallen"):
        compare(early, "base")
    (comparison,) = compare(early, "base", allow_undecayed=True)
    assert comparison.undecayed == ("arm",)


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
