"""When and how much to grow: laws, triggers, charges, and probes that choose among stages."""

import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import values
from growjax.errors import PlanError, TrainingError
from growjax.plan import mixing, plateau, proportional_shares, stacking_tokens
from growjax.train import (
    Begin,
    Decision,
    Options,
    Plan,
    Probe,
    Saved,
    Schedule,
    Stage,
    Warmup,
    choose,
    choosing,
    commands,
    read_journal,
    train,
    watch,
)
from tests.runs import feed, losses, plan, same, steps


# Laws and triggers -------------------------------------------------------------------------------


def test_g_stacks_law_gives_the_papers_number():
    assert stacking_tokens(7e9, 6 * 7e9 * 2e12) == pytest.approx(11.113e9, rel=1e-4)
    assert stacking_tokens(1e9, 1e21) < stacking_tokens(2e9, 1e21)
    assert stacking_tokens(1e9, 1e22) < stacking_tokens(1e9, 1e21)
    with pytest.raises(PlanError, match="(?s)parameters.*flops"):
        stacking_tokens(0, 1)


def test_proportional_shares_follow_the_power():
    assert proportional_shares(4, 0) == (0.25,) * 4
    np.testing.assert_allclose(proportional_shares(3, 2), np.array([1, 4, 9]) / 14)
    # Six stages of 1 to 6 blocks: the share of the whole model's cost
    for alpha, cost in ((1, 0.7222), (2, 0.8077), (3, 0.8598)):
        shares = proportional_shares(6, alpha)
        assert sum(shares) == pytest.approx(1)
        assert np.dot(shares, np.arange(1, 7) / 6) == pytest.approx(cost, abs=1e-4)
    with pytest.raises(PlanError, match="stages: expected a positive integer"):
        proportional_shares(0)
    for alpha in (2e3, -2e3):  # beyond the range of numbers
        with pytest.raises(PlanError, match="alpha: expected a power that leaves every stage"):
            proportional_shares(3, alpha)


def test_a_plateau_is_where_two_windows_have_the_same_mean():
    falling = [4.0 - 0.1 * i for i in range(20)]
    assert plateau(falling, window=3, least=0.01) is None
    flat = [*falling, *[2.1] * 10]
    # The first window that is less than 1% below the one before it: both are nearly flat
    first = plateau(flat, window=3, least=0.01)
    assert first is not None
    means = [np.mean(flat[end - 3 : end]) for end in range(3, 31)]
    falls = [bool(new <= old * 0.99) for old, new in zip(means, means[3:], strict=False)]
    assert first == 6 + falls.index(False)
    assert plateau(flat[: first - 1], window=3, least=0.01) is None
    # What falls slowly for ever stands still as well
    assert plateau([2.0 - 1e-4 * i for i in range(9)], window=3, least=0.01) == 6
    with pytest.raises(PlanError, match="a positive integer"):
        plateau(flat, window=0, least=0.01)


def test_mixing_time_is_where_the_grown_loss_meets_the_other():
    whole = [2.0] * 30
    grown = [2.0 + 0.8**i for i in range(30)]
    steps = mixing(grown, whole, window=2, close=0.01)
    assert steps is not None
    assert np.mean(grown[steps - 2 : steps]) <= 2.02 < np.mean(grown[steps - 3 : steps - 1])
    assert mixing([3.0] * 30, whole, window=2, close=0.01) is None
    with pytest.raises(PlanError, match="same steps"):
        mixing(grown, whole[1:], window=2, close=0.01)


# Charges -----------------------------------------------------------------------------------------

# Up to its decay it does not depend on the cost of the plan
RATE = Schedule(1e-2, "wsd", warmup=Warmup(steps=2), decay=0.25)


def test_a_charge_is_spent_before_the_stage_and_moves_the_schedule():
    free = plan(steps(3), steps(4), rate=RATE)
    cost = sum(free.spans[0].costs)
    paid = plan(steps(3), dataclasses.replace(steps(4), charge=float(cost)), rate=RATE)
    assert paid.cost == free.cost + cost and paid.flops == free.flops
    assert [s.spent for s in paid.spans] == [0, 2 * cost]
    assert paid.spans[1].costs == free.spans[1].costs
    eras = paid.timeline()
    assert [e.spent for e in eras] == [(0, cost), (2 * cost, paid.cost)]
    # The schedule is a share of all that is paid, so the decay begins later in the steps
    share = Schedule(1e-2, "linear", warmup=0.0)
    falling = dataclasses.replace(paid, rate=share)
    assert falling.learning_rate(2 * cost) == share.at(2 * cost / paid.cost)
    warm = dataclasses.replace(paid, rate=Schedule(1e-2, warmup=Warmup(steps=4)))
    later = 2 * cost + free.spans[1].costs[0]
    assert warm.learning_rate(later) == 1e-2 > warm.learning_rate(later - 1)
    shares = {"budget": 2.0 * free.cost, "rate": RATE}
    half = plan(Stage(share=0.5), Stage(share=0.5), **shares)
    late = plan(Stage(share=0.5), Stage(share=0.5, charge=float(cost)), **shares)
    assert late.spans[1].steps == half.spans[1].steps - 3
    with pytest.raises(PlanError, match="leaves nothing"):
        plan(Stage(share=0.5), Stage(share=0.5, charge=2.0 * free.cost), **shares)
    with pytest.raises(PlanError, match="charge"):
        Stage(tokens=32, charge=-1.0)


# Probes ------------------------------------------------------------------------------------------

CANDIDATES = (
    steps(6, "copies", grow=gj.stack(layers=4)),
    steps(6, "wider", grow=gj.msg(mlp=24), ramp=2),
    steps(6, "as it is"),
)


def probe_of(**changes: Any) -> Probe:
    base = plan(steps(3, "small"), CANDIDATES[0], steps(2, "end"), rate=RATE)
    return Probe(**{"plan": base, "stage": 1, "candidates": CANDIDATES, "steps": 2} | changes)


def test_every_outcome_pays_for_the_trials_of_the_others():
    probe = probe_of()
    trials = [sum(p.spans[1].costs[:2]) for p in probe.plans]
    assert probe.costs == tuple(trials) and len(set(trials)) > 1
    for n, outcome in enumerate(probe.plans):
        free = dataclasses.replace(
            outcome,
            stages=(outcome.stages[0], CANDIDATES[n], outcome.stages[2]),
        )
        assert outcome.cost == free.cost + sum(trials) - trials[n]
    assert values.from_dict(values.to_dict(probe), Probe) == probe
    assert "2406.02469" in gj.cite(probe) and "2405.15319" in gj.cite(probe)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": 3}, "none with number 3"),
        ({"candidates": CANDIDATES[:1] * 2}, "two different"),
        ({"steps": 7}, "fewer than the 7"),
    ],
    ids=str,
)
def test_a_probe_that_cannot_be_run_is_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        probe_of(**changes)


OPTIONS = Options(save_minutes=None, held_out_end=0, held_out=8, keep_last=1)


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


PROBE = probe_of(candidates=CANDIDATES[:0:-1])


@pytest.fixture(scope="module")
def decided(tmp_path_factory, cache) -> tuple[Path, Decision]:
    folder = tmp_path_factory.mktemp("probe")
    return folder, choose(PROBE, folder, feed, options=OPTIONS, cache=cache)


def test_a_probe_keeps_the_best_candidate_and_its_run_goes_on_exactly(decided, cache):
    probe, (folder, decision) = PROBE, decided
    assert decision.chosen == 1, decision.losses

    # Every candidate started from the same state, with the same batches
    rows = [read_journal(folder / str(n)) for n in range(2)]
    first = [[r["loss"] for r in some if r["kind"] == "step" and r["step"] < 3] for some in rows]
    assert first[0] == first[1] and len(first[0]) == 3
    assert all(max(r["step"] for r in some if r["kind"] == "step") == 4 for some in rows)
    measured = [[r for r in some if r["kind"] == "step" and r["step"] == 4][-1] for some in rows]
    assert decision.losses == tuple(row["held_out"] for row in measured)
    assert decision.losses[1] == min(row["held_out"] for row in measured)
    assert len(set(decision.losses)) == 2

    # The kept run's journal has the decision with its numbers, and the clock has paid for the others
    winner = decision.run
    (logged,) = [row for row in read_journal(winner) if row["kind"] == "decided"]
    assert logged["losses"] == list(decision.losses) and logged["chosen"] == decision.chosen
    assert logged["candidates"] == ["as it is", "wider"]
    assert logged["costs"] == [float(cost) for cost in probe.costs]
    spent = measured[decision.chosen]["spent"]
    assert spent == sum(probe.plans[0].spans[0].costs) + sum(probe.costs)

    # Again: nothing is trained, and the decision is the same
    def nothing(_: Plan) -> Any:
        raise AssertionError("the decision is taken already")

    assert choose(probe, folder, nothing, options=OPTIONS) == decision
    with pytest.raises(PlanError, match="another probe"):
        choose(probe_of(steps=3), folder, nothing)

    # The rest of the run, which resumes at the end of the trial, is that of the plan by itself
    records = train(decision.plan, feed(decision.plan), run=winner, options=OPTIONS, cache=cache)
    tail = list(watch(records, decision.plan, run=winner))
    alone = probe.plans[decision.chosen]
    by_itself = list(train(alone, feed(alone), options=OPTIONS, cache=cache))
    assert losses(tail) == {n: x for n, x in losses(by_itself).items() if n >= 5}
    assert same(tail, by_itself)
    assert [row["kind"] for row in read_journal(winner)].count("decided") == 1


def test_a_candidate_without_a_finite_loss_is_not_chosen(tmp_path):
    def nothing(_: Plan) -> Any:
        raise AssertionError("every trial is over")

    for folder, ends in (("one", (float("nan"), 2.5)), ("none", (float("nan"), float("inf")))):
        for n, loss in enumerate(ends):
            run = tmp_path / folder / str(n)
            run.mkdir(parents=True)
            row = {"kind": "step", "step": 4, "held_out": loss}
            (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    decision = choose(PROBE, tmp_path / "one", nothing, options=OPTIONS)
    assert decision.chosen == 1 and decision.losses == (None, 2.5)
    assert choose(PROBE, tmp_path / "one", nothing, options=OPTIONS) == decision
    with pytest.raises(TrainingError, match="of no candidate is finite"):
        choose(PROBE, tmp_path / "none", nothing, options=OPTIONS)


@pytest.mark.parametrize("at", [Begin, Saved], ids=["as it begins", "as it ends"])
def test_a_signal_stops_a_probe_with_the_status_of_a_run(tmp_path, cache, monkeypatch, at):
    """Also one that comes when the trial is over, and nothing of it is left to stop."""
    watched = choosing.watch

    def signalled(*args: Any, **more: Any) -> Any:
        for record in watched(*args, **more):
            if isinstance(record, at) and record.step in (0, 5):
                os.kill(os.getpid(), signal.SIGTERM)
            yield record

    monkeypatch.setattr(choosing, "watch", signalled)
    monkeypatch.setattr(
        commands, "choose", lambda probe, run, **more: choose(probe, run, feed, **more)
    )
    shown = io.StringIO()
    to = Console(file=shown, width=200)
    assert commands.choose_and_train(PROBE, tmp_path, OPTIONS, console=to) == commands.STOPPED
    assert "stopped by SIGTERM during the trials" in shown.getvalue()
    assert not (tmp_path / "1").exists() and not (tmp_path / "decision.json").exists()


def test_a_trial_that_was_interrupted_goes_on_to_the_same_decision(tmp_path, decided, cache):
    probe, (_, whole) = PROBE, decided

    class Killed(Exception):
        pass

    def cut(of: Plan) -> Any:
        if of.fork is not None:
            raise Killed
        return feed(of)

    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        choose(probe, folder, cut, options=OPTIONS, cache=cache)
    # The first trial is done, and is not trained again
    before = (folder / "0" / "metrics.jsonl").read_text()
    decision = choose(probe, folder, feed, options=OPTIONS, cache=cache)
    assert decision.losses == whole.losses and decision.chosen == whole.chosen
    after = (folder / "0" / "metrics.jsonl").read_text()
    assert after.startswith(before) and after.count('"begin"') == 1
    saved = values.read(folder / "decision.json", Decision)
    assert saved == decision
    with pytest.raises(PlanError, match="lowest loss"):
        dataclasses.replace(decision, chosen=1 - decision.chosen)
