"""Reference clocks, budgets, and the learning rates that follow them."""

import dataclasses
import hashlib
import itertools
import json
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from growjax.budget import (
    A100_T5,
    RTX3090_BERT,
    RTX3090_BERT_AS_RELEASED,
    DepthClock,
    FlopsClock,
    MeasuredClock,
    Op,
    Outcome,
    load_clock,
    recharge,
    recharged,
    save_clock,
)
from growjax.errors import BudgetError, PlanError
from growjax.plan.schedule import Schedule


DAY = 86_400
OPS = [
    Op("train", 16, 128, 128, 900),
    Op("train", 4, 128, 128, 300),
    Op("forward", 16, 128, 128, 300),
    Op("curvature", 16, 64, 128, 450),
]
MEASURED = MeasuredClock("here", tuple((op, 4007 - 1000 * n) for n, op in enumerate(OPS)))
CLOCKS = [FlopsClock(), RTX3090_BERT, MEASURED]


def train(depth: int, rows: int = 128) -> Op:
    return Op("train", depth, rows, 128, 0)


# Clocks ------------------------------------------------------------------------------------------


def test_the_published_tables_give_the_published_run_lengths():
    """Updates in 24 hours, and what methods save or cost, from the tables of No Train No Gain."""
    full = RTX3090_BERT.cost(train(16))
    micro = DAY * 10**9 // full
    assert (micro, micro // 12) == (383_488, 31_957)
    update = A100_T5.cost(Op("train", 12, 144, 512, 0))
    assert DAY * 10**9 // update == 83_802

    def stacked(clock, depths, rows):
        """Updates with 1/8, 7/40 and 7/10 of the budget at three depths, over those at the last alone."""
        ops = [Op("train", d, rows, 128, 0) for d in depths]
        shares = (0.125, 0.175, 0.7)
        return sum(
            s * clock.cost(ops[-1]) / clock.cost(op) for s, op in zip(shares, ops, strict=True)
        )

    assert stacked(RTX3090_BERT, (4, 8, 16), 128) == pytest.approx(1.46518, abs=1e-5)
    assert stacked(A100_T5, (3, 6, 12), 144) == pytest.approx(1.47823, abs=1e-5)
    look = RTX3090_BERT.cost(Op("forward", 16, 128, 128, 0))
    for offers, times in [(2, 1.82423), (3, 2.23635), (4, 2.64847), (10, 5.12117)]:
        assert 1 + offers * look / full == pytest.approx(times, abs=1e-5)


def test_a_table_is_checked_for_slips():
    assert RTX3090_BERT_AS_RELEASED.faults() == ["7 layers take 0.01052 s, and 6 took 0.09188 s"]
    assert RTX3090_BERT.faults() == A100_T5.faults() == []
    linear = dataclasses.replace(RTX3090_BERT, fit="linear")
    gaps = [linear.cost(train(d)) - RTX3090_BERT.cost(train(d)) for d in range(1, 17)]
    assert max(map(abs, gaps)) < 300_000  # nanoseconds
    assert linear.line == pytest.approx((0.01172, 0.013363), rel=1e-3)
    # Steps of no layers, and of more than were measured, are on the line
    assert linear.cost(train(0)) == pytest.approx(linear.line[0] * 1e9, abs=1)
    assert linear.cost(train(24)) == pytest.approx(
        (linear.line[0] + 24 * linear.line[1]) * 1e9, abs=1
    )
    with pytest.raises(BudgetError, match="its table has 1 to 16 layers, and 24 run"):
        RTX3090_BERT.cost(train(24))


def test_costs_go_by_the_rows():
    assert RTX3090_BERT.cost(train(16, 64)) * 2 == RTX3090_BERT.cost(train(16))
    half = RTX3090_BERT.cost(Op("curvature", 8, 64, 128, 0))
    assert half * 2 == RTX3090_BERT.cost(train(8))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seconds": (1.0,)}, "seconds: expected at least two positive numbers"),
        ({"seconds": (1.0, -1.0)}, r"seconds(\[1\])?: expected"),
        ({"rows": 0}, "rows: expected a positive integer"),
        ({"forward": -0.1}, "forward: expected 0 or more"),
        ({"curvature": -1.0}, "curvature: expected 0 or more"),
        ({"fit": "spline"}, "fit: expected one of 'table', 'linear'"),
    ],
)
def test_a_clock_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(BudgetError, match=message):
        dataclasses.replace(RTX3090_BERT, **change)


def test_a_path_and_a_small_model_have_prices_of_their_own():
    """They have the same depth, rows and FLOPs; what the optimizer goes over differs."""
    path, small = (Op("train", 4, 128, 128, 300, updated) for updated in (900, 300))
    clock = MeasuredClock("here", ((path, 50), (small, 30)))
    assert (clock.cost(path), clock.cost(small)) == (50, 30)
    message = r"updated=600\) was measured only with 900, 300 of updated parameters"
    with pytest.raises(BudgetError, match=message):
        clock.cost(path._replace(updated=600))
    with pytest.raises(BudgetError, match="updated=None.* was measured only with 900, 300"):
        clock.cost(path._replace(updated=None))


def test_a_clock_from_before_charges_what_was_recorded_before(tmp_path):
    """Operations had five fields. A look at examples updates nothing, and is the same then and now."""
    entries = [[["train", 4, 128, 128, 300], 50], [["forward", 4, 128, 128, 100], 20]]
    saved = {"is": "MeasuredClock", "name": "old", "entries": entries}
    (tmp_path / "clock.json").write_text(json.dumps(saved))
    clock = load_clock(tmp_path / "clock.json")
    assert clock.cost(Op("train", 4, 128, 128, 300)) == 50
    assert clock.cost(Op("forward", 4, 128, 128, 100)) == 20
    assert clock.cost(Op("forward", 4, 128, 128, 100, updated=0)) == 20
    with pytest.raises(BudgetError, match="was measured only with an unrecorded number of updated"):
        clock.cost(Op("train", 4, 128, 128, 300, updated=900))
    # And it is still the clock that results were charged on
    digest = hashlib.sha256(json.dumps([[*op, ns] for op, ns in entries]).encode()).hexdigest()
    assert clock.identity == f"old {digest[:8]}"
    save_clock(clock, tmp_path / "again.json")
    assert load_clock(tmp_path / "again.json").identity == clock.identity
    now = MeasuredClock("old", ((Op("train", 4, 128, 128, 300, 900), 50), clock.entries[1]))  # type: ignore
    assert now.identity != clock.identity


def test_a_cost_that_falls_with_depth_is_not_charged():
    """Seven layers of 31 ms and six of 36.2: one of the two is wrong, and which is not known."""
    times = {4: 25.0, 5: 25.0, 6: 36.2, 7: 31.0, 8: 40.7}
    ops = {d: Op("train", d, 32, 16, 100 * d) for d in times}
    clock = MeasuredClock("here", tuple((ops[d], round(ms * 1e6)) for d, ms in times.items()))
    told = "train of 7 layers took 31.000 ms, and of 6 layers 36.200 ms (32 x 16 tokens)"
    assert clock.faults() == [told]
    for depth in times:
        if depth in (6, 7):
            with pytest.raises(BudgetError, match="took 31.000 ms(.|\n)*measure both again"):
                clock.cost(ops[depth])
        else:
            assert clock.cost(ops[depth]) == times[depth] * 1e6
    with pytest.raises(BudgetError, match="measure both again"):
        recharge({ops[7]: 2, ops[4]: 1}, clock)


@pytest.mark.parametrize(
    "other",
    [
        Op("train", 7, 64, 16, 700),  # other rows
        Op("train", 7, 32, 8, 700),  # another length
        Op("forward", 7, 32, 16, 700),  # a look
        Op("train", 7, 32, 16, 500),  # deeper and thinner
        Op("train", 7, 32, 16, 700, 50),  # fewer parameters, once they are known
    ],
)
def test_what_differs_in_more_than_depth_may_cost_less(other):
    mine = Op("train", 6, 32, 16, 600, None if other.updated is None else 100)
    clock = MeasuredClock("here", ((mine, 36), (other, 31)))
    assert clock.faults() == [] and (clock.cost(mine), clock.cost(other)) == (36, 31)


def test_an_outcome_is_charged_by_another_clock_along_its_operations():
    """Small steps first, which are dearer there than their FLOPs say; between them on a straight line."""
    small, large = Op("train", 2, 16, 64, 100, 10), Op("train", 4, 16, 64, 300, 30)
    clock = MeasuredClock("here", ((small, 10**9), (large, 2 * 10**9)))
    curve = ((500.0, 4.0), (2500.0, 3.0), (4000.0, 2.0))
    run = Outcome("grown", 0, 1.0, "FLOPs", 4000.0, 2.0, True, curve)
    operations = [(small, 10), (large, 10)]
    charged = recharged(run, operations, clock, charged_on=FlopsClock())
    assert charged.curve == ((5.0, 4.0), (20.0, 3.0), (30.0, 2.0)) and charged.spent == 30.0
    assert charged.clock == clock.identity and (charged.score, charged.budget) == (2.0, 1.0)
    back = recharged(charged, operations, FlopsClock(), charged_on=clock)
    assert back == run
    # The same operation in two stages counts twice, and no sum is too large
    many = [(small._replace(flops=10**15), n) for n in (10_000, 20_000)]
    whole = dataclasses.replace(run, spent=3e19, curve=())
    assert recharged(whole, many, FlopsClock(), charged_on=FlopsClock()).spent == 3e19
    with pytest.raises(BudgetError, match="charged_on: it was charged on 'FLOPs', got 'here"):
        recharged(run, operations, clock, charged_on=clock)
    with pytest.raises(BudgetError, match="operations: they cost 1000, and it spent 4000"):
        recharged(run, operations[:1], clock, charged_on=FlopsClock())
    with pytest.raises(BudgetError, match="never measured"):
        recharged(run, [(small._replace(flops=400), 10)], clock, charged_on=FlopsClock())


def test_a_measured_clock_knows_what_was_measured_and_nothing_else():
    assert MEASURED.cost(OPS[2]) == 2007
    with pytest.raises(BudgetError, match=r"depth=5(.|\n)*never measured"):
        MEASURED.cost(train(5))


@pytest.mark.parametrize("clock", CLOCKS, ids=lambda c: type(c).__name__)
def test_clocks_survive_the_trip_through_a_file(clock, tmp_path):
    save_clock(clock, tmp_path / "clock.json")
    again = load_clock(tmp_path / "clock.json")
    assert again == clock and again.identity == clock.identity
    assert [again.cost(op) for op in OPS] == [clock.cost(op) for op in OPS]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "clock.json: not JSON"),
        ("[]", "expected a clock such as FlopsClock"),
        ('{"rows": 1}', "expected a clock such as FlopsClock"),
        ('{"is": "os"}', "'os' is a name of growjax 0.1"),
        ('{"is": "DepthClock"}', "DepthClock lacks name, seconds, rows, forward, curvature"),
        ('{"is": "growjax:Op"}', "expected a clock such as FlopsClock.*, and it is a growjax:Op"),
        ('{"is": "MeasuredClock", "name": "m", "entries": [[["train", 1], 2]]}', "entries"),
        ('{"is": "MeasuredClock", "name": "m", "entries": 7}', "entries: expected a tuple"),
    ],
)
def test_a_file_that_is_no_clock_is_refused(text, message, tmp_path):
    (tmp_path / "clock.json").write_text(text)
    with pytest.raises(BudgetError, match=message):
        load_clock(tmp_path / "clock.json")


def test_clocks_are_told_apart_by_what_they_charge():
    other = dataclasses.replace(MEASURED, entries=MEASURED.entries[:-1])
    known = [*CLOCKS, A100_T5, RTX3090_BERT_AS_RELEASED, other]
    assert len({clock.identity for clock in known}) == len(known)


# Costs -------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(0, 50), min_size=4, max_size=4), clock=st.sampled_from(CLOCKS))
def test_a_cost_depends_neither_on_order_nor_on_the_machine(counts, clock):
    counted = dict(zip(OPS, counts, strict=True))
    one_by_one = itertools.chain.from_iterable([op] * n for op, n in reversed(counted.items()))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("time", "perf_counter", "monotonic"):
            patch.setattr(time, name, lambda: pytest.fail("a clock read the time of this machine"))
        cost = recharge(counted, clock)
    assert isinstance(cost, int) and cost == sum(map(clock.cost, one_by_one))


# Schedules ---------------------------------------------------------------------------------------

TRIANGLE = Schedule(2.0, "linear", warmup=0.5)
COSINE_T5 = Schedule(2.0, "cosine", warmup=0.1526, start=0.5, final=1e-5)


def test_the_triangle_of_no_train_no_gain():
    at = [TRIANGLE.at(u) for u in np.linspace(0, 1, 101)]
    assert np.allclose(at, at[::-1]) and max(at) == at[50] == 2.0 and at[0] == at[-1] == 0.0
    assert np.trapezoid(at, dx=0.01) == pytest.approx(1.0)


def test_the_cosine_of_no_train_no_gain():
    assert COSINE_T5.at(0) == 1.0 and COSINE_T5.at(1) == pytest.approx(2e-5)
    assert COSINE_T5.at(0.1526 - 1e-9) == pytest.approx(COSINE_T5.at(0.1526 + 1e-9), rel=1e-6)
    assert COSINE_T5.at(0.0763) == pytest.approx(1.5)


@given(st.sampled_from([TRIANGLE, COSINE_T5, Schedule(1.0, "wsd"), Schedule(1.0, "inverse_sqrt")]))
def test_past_either_end_a_schedule_stays(schedule):
    assert schedule.at(1.7) == schedule.at(1.0) >= 0 and schedule.at(-0.5) == schedule.at(0.0)


def test_a_start_is_a_share():
    with pytest.raises(PlanError, match="start: expected a share"):
        Schedule(1.0, start=1.5)


def test_files_of_clocks_can_be_read_by_people(tmp_path):
    save_clock(RTX3090_BERT, tmp_path / "clock.json")
    saved = json.loads((tmp_path / "clock.json").read_text())
    assert "PyTorch 1.13" in saved["provenance"] and saved["seconds"][15] == 0.2253
    assert isinstance(load_clock(tmp_path / "clock.json"), DepthClock)
