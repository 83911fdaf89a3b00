"""The frontier of a baseline, and how much faster than it an arm is."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growjax.budget import Outcome, compare, frontier, speed_up, t_interval
from growjax.errors import BudgetError, UndecayedError


def runs(arm, budget, score, curve=(), seeds: Any = range(6), noise=0.0, decayed=True):
    """Runs of one arm, whose losses on the way and at the end grow with the seed by `noise`."""
    return [
        Outcome(
            arm,
            s,
            budget,
            "clock",
            spent=budget,
            score=score + noise * s,
            decayed=decayed,
            curve=tuple((x, y + noise * s) for x, y in curve),
        )
        for s in seeds
    ]


# A small model is ahead at first, a large one in the end; the large one's short run has decayed too soon
SMALL = runs("small", 4.0, 2.0, [(1.0, 2.6), (2.0, 2.2), (3.0, 2.1)], noise=0.01)
LARGE = runs("large", 16.0, 1.5, [(4.0, 2.4), (8.0, 1.9), (12.0, 1.7)], noise=0.01)
SHORT = runs("large", 8.0, 1.95, [(2.0, 2.9), (4.0, 2.5), (6.0, 2.2)], noise=0.01)
FIXED = [*SMALL, *LARGE, *SHORT]


# The envelope -------------------------------------------------------------------------------------


def test_at_every_cost_it_is_the_lowest_that_was_seen_for_no_more():
    best = frontier(FIXED)
    wanted = {
        1.0: ("small", 4.0, 2.6, False),
        1.9: ("small", 4.0, 2.6, False),
        2.0: ("small", 4.0, 2.2, False),
        5.0: ("small", 4.0, 2.0, True),
        # The way of the longer run is lower than the decayed end of the shorter one
        8.0: ("large", 16.0, 1.9, False),
        9.0: ("large", 16.0, 1.9, False),
        40.0: ("large", 16.0, 1.5, True),
    }
    for cost, (arm, budget, loss, end) in wanted.items():
        point = best.at(cost)
        assert point is not None and (point.arm, point.budget, point.end) == (arm, budget, end)
        assert point.loss == pytest.approx(loss + 0.025)
        assert point.scores == pytest.approx({s: loss + 0.01 * s for s in range(6)})
    assert best.at(0.9) is None
    assert str(best.at(8.0)) == "large, undecayed, 50% of the way"
    assert str(best.at(40.0)) == "large, at its decayed end"
    assert [(p.cost, p.loss) for p in best.envelope()] == [
        (x, pytest.approx(y + 0.025))
        for x, y in [(1, 2.6), (2, 2.2), (3, 2.1), (4, 2.0), (8, 1.9), (12, 1.7), (16, 1.5)]
    ]
    ends = frontier(FIXED, use="ends")
    assert [p.cost for p in ends.envelope()] == [4, 8, 16]


def test_a_step_more_is_the_same_cost():
    best = frontier(SMALL)
    assert best.at(3.97).end and not best.at(3.95).end  # type: ignore[union-attr]
    assert not best.at(3.97, slack=0.0).end  # type: ignore[union-attr]
    # Late marks of a decayed run are its end, and those of another one are not
    late = [dataclasses.replace(o, curve=(*o.curve, (3.7, o.score - 0.001))) for o in SMALL]
    assert frontier(late).at(4.0).end  # type: ignore[union-attr]
    loose = [dataclasses.replace(o, decayed=False) for o in late]
    assert not frontier(loose).at(4.0).end  # type: ignore[union-attr]


def test_which_arm_is_lowest_is_decided_by_means_and_not_seed_by_seed():
    """The lower of two arms in every seed is lower than either; it is not a model that anybody has."""
    one = [dataclasses.replace(o, score=2.0 + 0.2 * (o.seed % 2)) for o in runs("one", 1.0, 0.0)]
    two = [dataclasses.replace(o, score=2.21 - 0.2 * (o.seed % 2)) for o in runs("two", 1.0, 0.0)]
    point = frontier([*one, *two]).at(1.0)
    assert point is not None and point.arm == "one" and point.loss == pytest.approx(2.1)


def test_arms_with_few_seeds_are_left_out_and_named():
    few = runs("few", 4.0, 1.0, seeds=range(2))
    some = runs("some", 4.0, 1.5, seeds=range(1, 4), noise=0.01)
    best = frontier([*FIXED, *few, *some])
    assert best.at(4.0).arm == "some"  # type: ignore[union-attr]
    # It is held against those who have its seeds, over the seeds that they share
    (row,) = compare(runs("mine", 4.0, 1.8), best)
    assert row.seeds == (1, 2, 3) and row.baseline == "some, at its decayed end"
    assert row.verdict == "too few seeds" and row.left_out == ("few at 4 (seeds [0, 1])",)
    # An arm of two seeds can be held against all
    assert compare(runs("mine", 4.0, 1.8, seeds=range(2)), best)[0].point.arm == "few"  # type: ignore
    with pytest.raises(BudgetError, match=r"no arm shares 1 of the seeds \[9\]"):
        best.at(4.0, [9])


NUMBERS = st.floats(1.0, 4.0).map(lambda x: round(x, 3))


@st.composite
def arms(draw):
    """A few arms of two seeds with curves of their own."""
    outcomes = []
    for n in range(draw(st.integers(1, 4))):
        budget = draw(st.sampled_from([2.0, 4.0, 8.0]))
        ys = draw(st.lists(NUMBERS, min_size=4, max_size=4))
        curve = [(budget * k / 4, y) for k, y in enumerate(ys[:3], start=1)]
        outcomes += runs(f"arm {n}", budget, ys[3], curve, seeds=range(2), noise=0.1)
    return outcomes


@given(arms(), arms())
def test_more_runs_and_more_cost_never_raise_it(some, others):
    others = [dataclasses.replace(o, arm=f"other {o.arm}") for o in others]
    small, large = frontier(some), frontier([*some, *others])
    losses = []
    for cost in (0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 100.0):
        one, more = small.at(cost), large.at(cost)
        if one is None:
            continue
        assert more is not None and more.loss <= one.loss
        losses.append(one.loss)
        seen = [
            np.mean(
                [
                    y
                    for x, y in ((x, y) for o in some if o.arm == arm for x, y in o.curve)
                    if x == at
                ]
            )
            for arm in {o.arm for o in some}
            for at in {x for o in some if o.arm == arm for x, _ in o.curve if x <= cost}
        ]
        assert one.loss <= min(seen, default=math.inf) + 1e-9
    assert losses == sorted(losses, reverse=True)
    for loss in (1.0, 2.0, 3.0):
        one, more = (best.cost_of([loss], 0) for best in (small, large))
        assert more.high <= one.high
        for costs in (one, more):
            assert costs.low <= costs.cost <= costs.high


def test_what_makes_no_frontier():
    with pytest.raises(BudgetError, match="at least one fixed size"):
        frontier([])
    with pytest.raises(BudgetError, match="clocks differ: 'another', 'clock'"):
        frontier([*SMALL, dataclasses.replace(SMALL[0], clock="another")])
    with pytest.raises(BudgetError, match="'small' has two runs of seed 0"):
        frontier([*SMALL, SMALL[0]])
    loose = runs("loose", 1.0, 2.0, decayed=False)
    with pytest.raises(UndecayedError, match="learning rate of loose"):
        frontier(loose, use="ends")
    assert frontier(loose).at(1.0).decayed is False  # type: ignore[union-attr]
    assert str(frontier(loose).at(1.0)) == "loose, at the undecayed end"


# At equal cost ------------------------------------------------------------------------------------


def test_every_arm_is_held_against_the_lowest_at_its_own_cost():
    mine = [*runs("mine", 4.0, 2.3, noise=0.011), *runs("mine", 16.0, 1.4, noise=0.011)]
    early, late = compare(mine, frontier(FIXED), margin=0.5)
    assert (early.budget, early.baseline) == (4.0, "small, at its decayed end")
    assert early.mean == pytest.approx(0.3025) and early.verdict == "worse"
    assert early.reason == "but by less than the margin of 0.5"
    assert (late.budget, late.baseline) == (16.0, "large, at its decayed end")
    assert late.mean == pytest.approx(-0.0975) and late.verdict == "better"
    assert early.family == late.family == ("mine at 4", "mine at 16")
    assert late.differences == pytest.approx([-0.1 + 0.001 * s for s in range(6)])
    # Undecayed rates are forgiven to the frontier alone
    (way,) = compare(runs("mine", 8.0, 1.8), frontier(FIXED))
    assert way.baseline == "large, undecayed, 50% of the way" and way.undecayed == ()
    loose = runs("mine", 8.0, 1.8, decayed=False)
    with pytest.raises(UndecayedError, match="learning rate of mine"):
        compare(loose, frontier(FIXED))
    assert compare(loose, frontier(FIXED), allow_undecayed=True)[0].undecayed == ("mine",)


def test_what_cannot_be_held_against_a_frontier():
    mine = [*runs("mine", 0.5, 2.0), *runs("other", 4.0, 2.0, seeds=[9])]
    with pytest.raises(BudgetError) as error:
        compare(mine, frontier(FIXED))
    assert "'mine' at 0.5: every run of the frontier costs more" in str(error.value)
    assert "'other' at 4: frontier: no arm shares 1 of the seeds [9]" in str(error.value)
    with pytest.raises(BudgetError, match="clocks differ"):
        compare([dataclasses.replace(mine[0], clock="another")], frontier(FIXED))


# Speed-ups ----------------------------------------------------------------------------------------


def test_a_speed_up_is_the_least_cost_that_any_run_shows():
    best = frontier([*LARGE, *SHORT])
    (speedup,) = speed_up(runs("mine", 4.0, 2.15, noise=0.01), "mine", best)
    # The long run falls from 2.4 at 4 to 1.9 at 8 and passes 2.15 at 6, as does the short one's at 6.2
    assert speedup.estimate == pytest.approx(6 / 4) and speedup.bound == "="
    assert speedup.bracket == pytest.approx((4 / 4, 8 / 4))
    assert speedup.values == pytest.approx([1.5] * 6) and speedup.over == "seeds"
    assert speedup.verdict == "faster" and str(speedup).startswith("1.50 (1.50 to 1.50)")
    # A frontier with another size in it needs less
    (less,) = speed_up(runs("mine", 4.0, 2.15, noise=0.01), "mine", frontier(FIXED))
    assert less.estimate == pytest.approx(2.5 / 4) and less.verdict == "slower"
    assert less.bracket == pytest.approx((2 / 4, 3 / 4))


def test_between_decayed_ends_it_is_a_line_in_the_logarithm():
    base = [o for b in (1.0, 2.0, 4.0, 8.0) for o in runs("base", b, 4.0 - math.log2(b))]
    (speedup,) = speed_up([*base, *runs("arm", 2.0, 2.75)], "arm", "base")
    assert speedup.estimate == pytest.approx(2**0.25)
    assert speedup.bracket == pytest.approx((1.0, 2.0)) and speedup.verdict == "faster"
    # The baseline itself is as fast as itself
    assert [s.estimate for s in speed_up(base, "base", "base")] == pytest.approx([1.0] * 4)
    # Undecayed ends make no line: between them there is what was seen
    loose = [dataclasses.replace(o, decayed=False) for o in base]
    (speedup,) = speed_up(runs("arm", 2.0, 2.75), "arm", frontier(loose))
    assert speedup.estimate == pytest.approx(2.0)


def test_the_naive_reading_is_a_frontier_as_well():
    """The way of the largest run alone, whose rate was high: it is above the decayed ends."""
    way = [(b, 4.5 - math.log2(b)) for b in (1.0, 2.0, 4.0)]
    base = [o for b in (1.0, 2.0, 4.0, 8.0) for o in runs("base", b, 4.0 - math.log2(b))]
    long = [dataclasses.replace(o, curve=tuple(way)) for o in base if o.budget == 8.0]
    arm = runs("arm", 2.0, 2.75)
    honest = speed_up(arm, "arm", frontier(base, use="ends"))[0].estimate
    naive = speed_up(arm, "arm", frontier(long))[0].estimate
    # On its way it falls from 3.5 at 2 to 2.5 at 4, and passes 2.75 at 3.5
    assert (honest, naive) == pytest.approx((2**0.25, 3.5 / 2))


def test_what_the_baseline_never_reached_is_a_bound():
    base = [*runs("base", 1.0, 3.0, [(0.5, 3.5)]), *runs("base", 8.0, 2.0, [(4.0, 2.5)])]
    arm = runs("arm", 2.0, 1.9)
    (speedup,) = speed_up(arm, "arm", frontier(base))
    assert (speedup.bound, speedup.estimate, speedup.verdict) == (">=", 4.0, "faster")
    assert speedup.interval == (4.0, math.inf) and str(speedup) == ">= 4.00"
    assert speedup.reason == "6 of 6 seeds have a loss that the baseline never reached"
    # Twice as much was not run of it as this arm had
    (speedup,) = speed_up(runs("arm", 16.0, 1.9), "arm", frontier(base))
    assert (speedup.bound, speedup.estimate, speedup.verdict) == (">=", 0.5, "open")
    # Some seeds reach it: the mean is still a bound
    mixed = [dataclasses.replace(o, score=1.9 if o.seed < 3 else 2.25) for o in arm]
    (speedup,) = speed_up(mixed, "arm", frontier(base))
    assert speedup.values == pytest.approx([4.0] * 3 + [8**0.75 / 2] * 3) and speedup.bound == ">="
    assert speedup.interval == (pytest.approx(t_interval(speedup.values)[0]), math.inf)
    # The first evaluation is as low: it may have been there earlier
    (speedup,) = speed_up(runs("arm", 2.0, 3.6), "arm", frontier(base))
    assert (speedup.bound, speedup.estimate, speedup.interval) == ("<=", 0.25, (0.0, 0.25))
    assert speedup.verdict == "slower" and "worse than its first evaluation" in speedup.reason
    both = [dataclasses.replace(o, score=1.9 if o.seed else 3.6) for o in arm]
    (speedup,) = speed_up(both, "arm", frontier(base))
    assert speedup.bound == ">=" and speedup.values == (0.0, 4.0, 4.0, 4.0, 4.0, 4.0)
    (one,) = speed_up(arm[:1], "arm", frontier(base))
    assert (one.estimate, one.interval, one.verdict) == (4.0, (0.0, math.inf), "too few seeds")


def test_a_loss_between_the_seeds_of_the_baseline_decides_nothing():
    base = runs("base", 4.0, 2.0, [(1.0, 3.0), (2.0, 2.5)])
    arm = [dataclasses.replace(o, score=2.5 + 0.2 * (o.seed % 2)) for o in runs("arm", 1.8, 0.0)]
    (speedup,) = speed_up(arm, "arm", frontier(base))
    assert speedup.verdict == "no difference found" and speedup.interval is not None
    assert speedup.interval == pytest.approx(t_interval(speedup.values))
    # Student's t over two seeds reaches below 0, where no speed-up is
    (two,) = speed_up(arm[:2], "arm", frontier(base))
    assert two.interval == (0.0, pytest.approx(t_interval(two.values)[1]))
    assert t_interval(two.values)[0] < 0
    # The interval of this one is above 1, and evaluations leave open what is below
    near = runs("arm", 1.1, 2.95)
    (speedup,) = speed_up(near, "arm", frontier(base))
    assert speedup.estimate == pytest.approx(1.0) and speedup.verdict == "no difference found"
    sure = [dataclasses.replace(o, score=2.8, spent=1.2) for o in near]
    (speedup,) = speed_up(sure, "arm", frontier(base))
    assert speedup.interval is not None and speedup.interval[0] > 1 > speedup.bracket[0]
    assert speedup.verdict == "no difference found"


def test_an_arm_that_changes_nothing_takes_no_seeds_away():
    """A fixed size that was run with few seeds, and far from here."""
    base = runs("base", 4.0, 2.0, [(1.0, 3.0), (2.0, 2.5)])
    far = runs("far", 64.0, 1.0, [(32.0, 1.5)], seeds=range(3))
    (speedup,) = speed_up(runs("arm", 2.0, 2.25), "arm", frontier([*base, *far]))
    assert speedup.seeds == tuple(range(6)) and speedup.left_out == ()
    near = runs("near", 1.0, 2.2, seeds=range(3))
    (speedup,) = speed_up(runs("arm", 2.0, 2.25), "arm", frontier([*base, *near]))
    assert speedup.seeds == (0, 1, 2) and speedup.values == (0.5, 0.5, 0.5)


def test_what_has_no_speed_up():
    with pytest.raises(BudgetError, match="arm: 'nobody' has no run"):
        speed_up(SMALL, "nobody", frontier(FIXED))
    loose = runs("loose", 4.0, 2.0, decayed=False)
    with pytest.raises(UndecayedError):
        speed_up(loose, "loose", frontier(FIXED))
    (speedup,) = speed_up(loose, "loose", frontier(FIXED), allow_undecayed=True)
    assert speedup.reason == "its learning rate had not fallen"


def test_windows_move_the_loss_that_is_to_be_reached():
    """The interval is wider by as much as the held-out difference is uncertain."""
    rng = np.random.default_rng(0)
    weights = np.full(40, 10.0)
    text = rng.normal(20, 3, 40)

    def windowed(outcomes, each):
        """With windows whose mean is the score, `each` of them off by what the arm is about."""
        rows = []
        for o in outcomes:
            sums = text + each
            sums = sums + (o.score - sums.sum() / weights.sum()) * weights
            rows.append(dataclasses.replace(o, windows=np.stack([sums, weights], axis=1)))
        return rows

    curve = [(x, 4.0 - math.log2(x)) for x in (0.5, 1.0, 2.0, 3.0)]
    base = windowed(runs("base", 4.0, 2.0, curve, noise=0.01), 0.0)
    arm = windowed(runs("arm", 4.0, 2.2, noise=0.012), rng.normal(0, 3, 40))
    (speedup,) = speed_up(arm, "arm", frontier(base))
    (alone,) = speed_up([dataclasses.replace(o, windows=None) for o in arm], "arm", frontier(base))
    assert (speedup.over, alone.over) == ("seeds and windows", "seeds")
    assert speedup.estimate == pytest.approx(alone.estimate) and speedup.interval and alone.interval
    # What one standard error of the difference is worth: 2.2 is passed at a slope of 1 by 1.415
    pairs = compare(arm, frontier(base))[0]
    assert pairs.over == "seeds and windows"
    half = (pairs.interval[1] - pairs.interval[0]) / 2
    at = [float(frontier(base).cost_of([2.2 + x], 0).cost[0]) / 4 for x in (half, -half)]
    assert speedup.interval == pytest.approx(at, abs=0.03)
    assert alone.interval[1] - alone.interval[0] < 0.3 * (speedup.interval[1] - speedup.interval[0])
    # The loss to reach is what the windows say, and not the score of fewer of them
    off = [dataclasses.replace(o, score=o.score + 0.1) for o in arm]
    assert speed_up(off, "arm", frontier(base))[0] == speedup
    # Windows that are alike for both move nothing
    (same,) = speed_up(windowed(arm, 0.0), "arm", frontier(base))
    assert same.interval == pytest.approx(alone.interval, abs=0.01)
