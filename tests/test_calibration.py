"""Clocks of this machine: every operation of a plan is in them. How long it takes is not tested."""

import dataclasses
import io
import json
import re
import time
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax.budget import MeasuredClock, Op, Timing, load_clock, save_clock
from growjax.cost import parameters
from growjax.data import Text
from growjax.errors import BudgetError, PlanError
from growjax.forecast import calibration
from growjax.select import RhoLoss
from growjax.train import Layout, Optimizer, Plan, Stage, calibrate, save_plan
from growjax.train.commands import calibrate_plans
from growjax.values import from_dict, to_dict
from tests.runs import SMALL, TEXT, feed, plan, steps


QUICK: dict[str, Any] = {"name": "here", "warmup": 1, "steps": 4, "blocks": 2}
COLD: dict[str, Any] = QUICK | {"warmup": 0}
EMPTY: dict[str, Any] = QUICK | {"blocks": 5}


def of_every_kind() -> Plan:
    """Second gradients, looks at more than is trained on, growth behind gates, and layers by coins."""
    return plan(
        steps(2, "small"),
        steps(2, "chosen", select=RhoLoss(offers=2)),
        steps(4, "wide", grow=gj.msg(mlp=24), ramp=2),
        steps(6, "coins", subnet=gj.progressive_layer_drop(floor=0.2, rate=1.0)),
        optimizer=Optimizer("sophia", refresh_every=2),
    )


def operations(of: Plan) -> set[Op]:
    return {op for span in of.spans for op, _ in span.ops}


@pytest.fixture(scope="module")
def measured():
    whole, seen = of_every_kind(), []
    other = plan(steps(3), optimizer=whole.optimizer)
    return whole, calibrate(other, whole, seen=lambda *both: seen.append(both), **QUICK), seen


def orderly(clock: MeasuredClock) -> MeasuredClock:
    """With costs that rise with depth, as four steps on a busy machine may not."""
    return dataclasses.replace(clock, entries=tuple((op, 3 * op.flops) for op, _ in clock.entries))


def test_the_clock_knows_every_operation_of_the_plan(measured):
    whole, clock, seen = measured
    known = [op for op, _ in clock.entries]
    # Each once, though both plans begin alike and every stage has some of those before it
    assert set(known) == operations(whole) and len(known) == len(set(known))
    assert {op.kind for op in known} == {"train", "forward", "curvature"}
    assert len({op.depth for op in known}) > 1  # coins
    assert seen == list(zip(known, clock.timings, strict=True))
    assert all(isinstance(ns, int) and ns >= 0 for _, ns in clock.entries)
    # Growth is another number of parameters, and a path of coins is not
    whole_model = {op.updated for op in known if op.kind != "forward"}
    assert whole_model == {parameters(span.model) for span in whole.spans} and len(whole_model) == 2
    assert {op.updated for op in known if op.kind == "forward"} == {0}
    assert all(ns > 0 for op, ns in clock.entries if op.kind != "curvature")
    assert all(t.steps == 4 and t.p5 <= t.median <= t.p95 for t in clock.timings)


def test_the_plan_that_was_measured_can_be_charged_by_the_clock(measured):
    whole, clock, _ = measured
    clock = orderly(clock)
    charged = dataclasses.replace(whole, clock=clock)
    counts = [(op, n) for span in whole.spans for op, n in span.ops]
    assert charged.cost == sum(n * clock.cost(op) for op, n in counts) != whole.cost
    assert [span.steps for span in charged.spans] == [span.steps for span in whole.spans]
    with pytest.raises(PlanError, match="was never measured; calibrate it with this plan as well"):
        dataclasses.replace(charged, batch=8)


def test_a_clock_and_a_plan_that_is_charged_by_it_survive_json(measured, tmp_path):
    whole, clock, _ = measured
    clock = orderly(clock)
    save_clock(clock, tmp_path / "here.json")
    again = load_clock(tmp_path / "here.json")
    assert again == clock and again.identity == clock.identity
    charged = dataclasses.replace(whole, clock=again)
    assert from_dict(json.loads(json.dumps(to_dict(charged)))) == charged
    for setting in ("4 steps in 2 blocks, after 1", "jaxlib", "XLA_FLAGS", "model.dtype: None"):
        assert setting in clock.provenance


def test_steps_are_timed_after_a_warmup_in_blocks_that_are_waited_for(monkeypatch):
    """A machine on which step n takes n milliseconds, and an hour when nobody waits for it."""
    now, calls, waits = [0], [0], []

    def step():
        calls[0] += 1
        now[0] += calls[0] * 10**6
        return calls[0]

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(calibration.jax, "block_until_ready", waits.append)
    timing = calibration._timed(step, warmup=3, steps=6, blocks=3)
    assert waits == [3, 5, 7, 9]  # after the warmup, and once a block
    assert timing.mean == np.mean([4, 5, 6, 7, 8, 9]) * 1e6 and timing.median == 6.5e6
    assert timing.p5 == pytest.approx(4.7e6) and timing.p95 == pytest.approx(8.3e6)


def test_steps_on_data_are_timed_in_turns_with_those_that_wait_for_nothing(monkeypatch):
    """A machine that takes 10 ms for a step, on which a batch takes 1 ms, and the first one an hour."""
    now, order = [0], []

    class Step:
        batch: Any = "the one that is there"

        def __call__(self):
            now[0] += 10 * 10**6
            order.append(self.batch)
            return 0

    def stream():
        for i in range(99):
            now[0] += 10**6 if i else 3600 * 10**9
            yield i, {"tokens": np.full((1,), i)}

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(calibration, "from_host", lambda rows, mesh: int(rows["tokens"][0]))
    step, batches = Step(), stream()
    ratio = calibration._ratio(lambda: calibration._fed(step, batches, None), step, 6, blocks=3)
    assert ratio == pytest.approx(1.1)
    # The last batch stays for the steps that wait for none
    assert order == [0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5]


def test_every_training_step_is_timed_on_its_data_as_well():
    half = gj.random_path(1, keep=())
    choosing = steps(2, "chosen", select=RhoLoss(offers=2), subnet=half)
    whole, asked = plan(steps(2), steps(2, "deep", grow=gj.stack(layers=4)), choosing), []

    class Asked:
        def stream(self, span: Any, first: int) -> Any:
            asked.append((span.index, first))
            return feed(whole).stream(span, first)

    feeds: Any = (None, Asked())
    clock = calibrate(plan(steps(1)), whole, feeds=feeds, **QUICK)
    fed = {op: timing.fed for (op, _), timing in zip(clock.entries, clock.timings, strict=True)}
    _, deep, chosen = ([op for op, _ in span.ops if op.kind == "train"] for span in whole.spans)
    # The first stage's was known from a plan without data, and the last one's steps are not all training
    assert {op for op in fed if fed[op]} == {*deep} and asked == [(1, 0)]
    assert {*chosen} < fed.keys()


def test_a_second_gradient_is_what_the_step_without_one_does_not_take(monkeypatch):
    times = iter([Timing(4, 100.0, 90.0, 80.0, 120.0), Timing(4, 170.0, 160.0, 150.0, 180.0)])
    monkeypatch.setattr(calibration, "_timed", lambda *_: next(times))
    whole = plan(steps(2), optimizer=Optimizer("sophia", refresh_every=2))
    clock = calibrate(whole, **QUICK)
    assert {op.kind: ns for op, ns in clock.entries} == {"train": 100, "curvature": 70}
    assert clock.timings[1] == Timing(4, 70.0, 60.0, 50.0, 80.0)


def test_uneven_steps_are_said():
    op = Op("train", 2, 4, 8, 1)
    even, uneven = Timing(9, 10.1, 10.0, 9.0, 12.0), Timing(9, 10.3, 10.0, 9.0, 12.0)
    assert MeasuredClock("a", ((op, 10),), "", (even,)).faults() == []
    (fault,) = MeasuredClock("a", ((op, 10),), "", (uneven,)).faults()
    assert "1.030 of the median" in fault and "depth=2" in fault
    assert MeasuredClock("by hand", ((op, 10),)).faults() == []
    (fault,) = MeasuredClock("a", ((op, 10),), "", (even._replace(fed=1.03),)).faults()
    assert "1.030 of its time with the run's data, expected at most 1.02" in fault
    assert MeasuredClock("a", ((op, 10),), "", (even._replace(fed=1.01),)).faults() == []
    with pytest.raises(BudgetError, match="timings: expected none or one for each of 1 operations"):
        MeasuredClock("a", ((op, 10),), "", (even, even))


BAD = {
    "plans: expected at least one": lambda: calibrate(**QUICK),
    "warmup: expected 1 step or more": lambda: calibrate(plan(steps(1)), **COLD),
    "blocks: expected from 1 to the 4": lambda: calibrate(plan(steps(1)), **EMPTY),
    "feeds: expected none, or one for each of 2 plans, got 1": lambda: calibrate(
        plan(steps(1)), plan(steps(2)), feeds=(None,), **QUICK
    ),
    "model.dtype: plans 'tiny' and 'tiny' share .* have None and 'bfloat16'": lambda: calibrate(
        plan(steps(1)),
        plan(steps(1), model=dataclasses.replace(SMALL, dtype="bfloat16")),
        **QUICK,
    ),
    "layout: plans": lambda: calibrate(
        plan(steps(1)), plan(steps(1), layout=Layout(step="shard_map")), **QUICK
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_measured_is_refused_before_anything_is(message, monkeypatch):
    monkeypatch.setattr(calibration, "_timed", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(BudgetError, match=message):
        BAD[message]()


def test_calibrate_from_the_command_line(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.replace(". ", "\n\n"))
    small = plan(steps(1), data=Text(str(tmp_path / "text.txt"), split="\n\n"))
    save_plan(small, tmp_path / "plan.json")
    shown, out = io.StringIO(), tmp_path / "clocks" / "here.json"
    how: dict[str, Any] = {"warmup": 1, "steps": 2, "blocks": 1, "cache": tmp_path / "cache"}
    console = Console(file=shown, width=200)
    # The second has no data to be timed on, and the same operations
    save_plan(plan(steps(1)), tmp_path / "no data.json")
    plans = [tmp_path / "plan.json", tmp_path / "no data.json"]
    clock = calibrate_plans(plans, out, console=console, **how)
    assert load_clock(out) == clock and clock.name == "here"
    assert {op for op, _ in clock.entries} == operations(small)
    assert "train of 2 layers, 4 x 8 tokens" in shown.getvalue() and str(out) in shown.getvalue()
    assert f"{parameters(small.spans[0].model):,} parameters" in shown.getvalue()
    assert re.search(r"times \d+\.\d{3} with the plan's data", shown.getvalue())
    with pytest.raises(BudgetError, match="exists already, and nothing is overwritten"):
        calibrate_plans([tmp_path / "plan.json"], out, console=console, **how)


def test_stages_say_which_step_does_what_first():
    whole = of_every_kind()
    for span in whole.spans:
        assert len(span.firsts) == len(span.ops) and span.firsts[0] == 0
    curvature = dict(
        zip([op.kind for op, _ in whole.spans[0].ops], whole.spans[0].firsts, strict=True)
    )
    assert curvature == {"train": 0, "curvature": 0}
    late = plan(steps(3), steps(3), optimizer=Optimizer("sophia", refresh_every=5)).spans[1]
    assert dict(zip([op.kind for op, _ in late.ops], late.firsts, strict=True)) == {
        "train": 0,
        "curvature": 2,
    }
    assert isinstance(whole.spans[3].stage, Stage)
