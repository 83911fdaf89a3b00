"""Stages that end by themselves: the run, the plan that it becomes, and how both go on after a kill."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import values
from growjax.errors import CheckpointError, PlanError
from growjax.forecast.dryrun import dry_run
from growjax.plan import Mixing, Plateau, Trigger, mixing, plateau
from growjax.plan.prefix import fork_faults, shared_steps
from growjax.runs.checkpoint import read_lineage
from growjax.runs.journal import as_row
from growjax.runs.records import Begin, End, Ended, Step
from growjax.runs.run import Run
from growjax.train import Fork, Options, Probe, Schedule, Stage, Warmup, train, watch
from growjax.train.session import Session
from growjax.train.stop import Stopped
from tests.runs import feed, losses, plan, same, steps


UNTIL = Plateau(2, 0.05)
PLAN = plan(steps(8, "small", until=UNTIL), steps(5, "end"))
OPTIONS = Options(save_minutes=None, held_out_end=0, held_out=8, save_every=2, keep_last=100)


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that its trigger has shortened: its folder, its records, and what was printed."""
    folder, text = tmp_path_factory.mktemp("whole"), io.StringIO()
    console = Console(file=text, width=200)
    records = train(PLAN, feed(PLAN), run=folder, options=OPTIONS, cache=cache)
    rows = list(watch(records, PLAN, run=folder, console=console))
    return folder, rows, text.getvalue()


def the_end(records: Any) -> Ended:
    (record,) = [r for r in records if isinstance(r, Ended)]
    return record


def test_a_second_trigger_may_fire_before_anything_is_saved(tmp_path, cache):
    """The last checkpoint is then of the stage before; and no stage ends while its rate rises."""
    until = Plateau(1, 0.9)
    two = plan(steps(8, "a", until=until), steps(8, "b", until=until, rewarm=0.5), steps(3, "c"))
    options = Options(save_minutes=None, held_out_end=0, held_out=8)
    records = train(two, feed(two), run=tmp_path, options=options, cache=cache)
    ends = []
    for record in records:
        ends += [record] if isinstance(record, Ended) else []
        if len(ends) == 2:
            records.close()
    assert ends[0].steps == 3 and ends[1].steps == 4
    assert [c.name for c in Run(tmp_path).checkpoints()] == ["00000003-00"]
    again = list(train(two, feed(two), run=tmp_path, options=options, cache=cache))
    assert isinstance(again[-1], End) and len(losses(again)) == 4 + 3


def test_a_run_that_its_trigger_ends_is_evaluated_however_often_it_saves(tmp_path, cache):
    short = plan(steps(8, until=Plateau(1, 0.9)))
    options = dataclasses.replace(OPTIONS, save_every=1)
    *_, last = (
        r
        for r in train(short, feed(short), run=tmp_path, options=options, cache=cache)
        if isinstance(r, Step)
    )
    assert last.step == 2 and last.held_out is not None


def test_a_stage_ends_one_step_after_the_loss_that_its_trigger_reads(whole):
    folder, records, text = whole
    end, seen = the_end(records), losses(records)
    first = plateau([seen[n] for n in range(8)], window=2, least=0.05)
    assert first is not None and end.steps == first + 1 < 8 and end.step == end.steps - 1
    window = [seen[n] for n in range(first - 4, first)]
    assert end.numbers == {"before": np.mean(window[:2]), "after": np.mean(window[2:])}
    assert len(seen) == end.steps + 5
    (row,) = [row for row in Run(folder).rows() if row["kind"] == "ended"]
    assert row["numbers"] == end.numbers and row["trigger"] == str(UNTIL)
    assert f"{UNTIL} ended the stage" in text and f"finished: {len(seen)} steps" in text
    last = read_lineage(Run(folder).checkpoints()[-1])
    assert last["ended"] == [[0, end.steps]] and last["step"] == len(seen)


def test_the_run_becomes_that_of_an_ordinary_plan(whole, cache):
    folder, records, _ = whole
    outcome = PLAN.ended(0, the_end(records).steps)
    assert Run(folder).plan() == outcome and outcome.ends == ((0, 5),)
    alone = list(train(outcome, feed(outcome), options=OPTIONS, cache=cache))
    assert losses(alone) == losses(records) and same(alone, records)

    def numbers(rows: Any) -> list[Any]:
        kept = ("rate", "spent", "tokens", "flops", "held_out")
        return [[getattr(r, name) for name in kept] for r in rows if isinstance(r, Step)]

    assert numbers(alone) == numbers(records)
    assert numbers(records)[-1][1] == outcome.cost < PLAN.cost


def test_a_run_that_is_killed_as_its_stage_ends_goes_on_to_the_same_bits(whole, cache, tmp_path):
    """The plan says already that the stage is over, and the last checkpoint is older."""
    _, records, _ = whole
    killed = train(PLAN, feed(PLAN), run=tmp_path, options=OPTIONS, cache=cache)
    for record in watch(killed, PLAN, run=tmp_path):
        if isinstance(record, Step) and record.step == 4:
            break
    killed.close()
    assert Run(tmp_path).plan().ends == ((0, 5),)
    rest = list(
        watch(
            train(PLAN, feed(PLAN), run=tmp_path, options=OPTIONS, cache=cache), PLAN, run=tmp_path
        )
    )
    assert isinstance(rest[0], Begin) and (rest[0].step, rest[0].ended) == (4, ((0, 5),))
    assert losses(rest) == {n: x for n, x in losses(records).items() if n >= 4}
    assert same(rest, records) and the_end(rest) == the_end(records)
    assert [row["kind"] for row in Run(tmp_path).rows()].count("ended") == 1


def interrupted(monkeypatch, step: int) -> None:
    """Be asked to stop while the evaluation after a step compiles, once."""
    real, calls = Session._held_out, []

    def held_out(self, *args):
        if self.step == step and not calls:
            calls.append(step)
            raise Stopped
        return real(self, *args)

    monkeypatch.setattr(Session, "_held_out", held_out)


def test_an_end_is_recorded_by_the_session_after_the_one_that_was_killed(
    whole, cache, tmp_path, monkeypatch
):
    """Saved before the step at which its trigger fires, and killed once that is in the plan."""
    _, records, _ = whole
    interrupted(monkeypatch, 5)
    options = dataclasses.replace(OPTIONS, evaluate_at=(5,))

    def running() -> Any:
        return train(PLAN, feed(PLAN), run=tmp_path, options=options, cache=cache)

    *_, last = watch(running(), PLAN, run=tmp_path)
    assert (
        isinstance(last, End)
        and not last.finished
        and Run(tmp_path).checkpoints()[-1].name == "00000005-00"
    )
    assert Run(tmp_path).plan() == PLAN
    # Killed before anybody has its record, and again when it is in the journal
    for journaled in (False, True):
        session = running()
        for record in watch(session, PLAN, run=tmp_path) if journaled else session:
            if isinstance(record, Ended):
                break
        session.close()
        assert Run(tmp_path).plan().ends == ((0, 5),)
    rest = list(watch(running(), PLAN, run=tmp_path))
    assert same(rest, records)
    (row,) = [row for row in Run(tmp_path).rows() if row["kind"] == "ended"]
    assert row["numbers"] == the_end(records).numbers and row["steps"] == 5


def test_a_run_that_stops_at_the_end_of_its_last_stage_records_that(cache, tmp_path, monkeypatch):
    interrupted(monkeypatch, 3)
    short = plan(steps(8, until=Plateau(1, 0.9)))
    ends = []
    for _ in range(3):
        records = train(short, feed(short), run=tmp_path, options=OPTIONS, cache=cache)
        rows = list(watch(records, short, run=tmp_path))
        last = rows[-1]
        assert isinstance(last, End)
        ends.append((len([r for r in rows if isinstance(r, Ended)]), last.finished))
    assert ends == [(1, False), (0, True), (0, True)]
    assert [row["kind"] for row in Run(tmp_path).rows()].count("ended") == 1


def test_without_its_plan_a_run_is_refused_that_a_trigger_has_ended(whole, cache, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "plan.json").unlink()
    with pytest.raises(CheckpointError, match=r"\[\[0, 5\]\].*Stage\(ended=...\)"):
        next(train(PLAN, feed(PLAN), run=tmp_path / "run", options=OPTIONS, cache=cache))


def test_a_fork_within_a_stage_ends_it_as_its_trunk_did(whole, cache, tmp_path):
    """Its trigger reads losses from before the fork, which the checkpoint has kept."""
    folder, records, _ = whole
    forked = dataclasses.replace(PLAN, fork=Fork(str(folder), 4))
    assert not dry_run(forked).refusals
    rest = list(train(forked, feed(forked), options=OPTIONS, cache=cache))
    assert losses(rest) == {n: x for n, x in losses(records).items() if n >= 4}
    assert same(rest, records) and the_end(rest).steps == 5
    # After it, the fork's journal begins with what its trunk has recorded
    later = dataclasses.replace(PLAN, fork=Fork(str(folder), 6))
    rest = list(
        watch(
            train(later, feed(later), run=tmp_path, options=OPTIONS, cache=cache),
            later,
            run=tmp_path,
        )
    )
    assert not any(isinstance(record, Ended) for record in rest)
    (row,) = [row for row in Run(tmp_path).rows() if row["kind"] == "ended"]
    assert row["inherited"] == str(folder) and row["steps"] == 5


def test_forks_take_the_ends_that_came_before_them():
    trunk = PLAN.ended(0, 5)
    assert PLAN.following(trunk) == PLAN.following(trunk, 5) == trunk
    assert PLAN.following(trunk, 4) == PLAN and trunk.following(PLAN) == trunk
    other = plan(steps(8, "small", until=Plateau(3, 0.05)), PLAN.stages[1])
    assert other.following(trunk) == other
    assert shared_steps(PLAN, dataclasses.replace(PLAN, name="again")) == (0, 0)
    assert shared_steps(trunk, dataclasses.replace(trunk, name="again"))[0] == trunk.steps
    later = dataclasses.replace(PLAN, name="later", fork=Fork("nowhere", 5))
    assert list(fork_faults(trunk, later, 5, 0)) == []


def test_a_run_that_ends_early_is_evaluated_after_its_last_step(cache, whole):
    last = plan(steps(8, "small", until=UNTIL), rate=PLAN.rate)
    records = list(train(last, feed(last), options=OPTIONS, cache=cache))
    done = [r for r in records if isinstance(r, Step)]
    assert the_end(records).steps == len(done) < 8
    assert [r.held_out is not None for r in done] == [False] * (len(done) - 1) + [True]


# Plans -------------------------------------------------------------------------------------------


def test_the_next_stage_has_what_a_trigger_leaves_of_the_budget():
    cost = PLAN.spans[0].costs[0]
    shares = plan(
        Stage(share=0.5, until=UNTIL), Stage(share=0.5), budget=20.0 * cost, rate=Schedule(1e-2)
    )
    early = shares.ended(0, 4)
    assert [s.steps for s in shares.spans] == [10, 10] and [s.steps for s in early.spans] == [4, 16]
    assert early.cost == shares.cost
    with pytest.raises(PlanError, match="after 11 steps, and it has at most 10"):
        shares.ended(0, 11)


@pytest.mark.parametrize("shape", ["linear", "wsd"])
def test_the_rate_goes_on_from_where_it_is_to_the_end_of_the_schedule(shape):
    long = plan(
        steps(40, until=UNTIL), steps(40, until=UNTIL), steps(40), rate=Schedule(1e-2, shape)
    )
    once = long.ended(0, 10)
    twice = once.ended(1, 20)
    fired = [twice.spans[n].spent for n in (1, 2)]
    for spent in np.linspace(0, fired[0], 7):
        assert twice.learning_rate(spent) == long.learning_rate(spent)
    for spent in np.linspace(fired[0], fired[1], 7)[1:]:
        assert twice.learning_rate(spent) == once.learning_rate(spent)
    assert twice.learning_rate(twice.cost) == pytest.approx(0, abs=1e-15)
    for at in fired:
        assert twice.learning_rate(at + 1) == pytest.approx(twice.learning_rate(at), rel=1e-4)


def test_a_plan_with_a_trigger_is_a_value_and_says_that_it_may_be_shorter():
    ended = PLAN.ended(0, 5)
    for one in (PLAN, ended):
        assert values.from_dict(json.loads(json.dumps(values.to_dict(one)))) == one
    text = io.StringIO()
    Console(file=text, width=200).print(dry_run(PLAN))
    assert f"stage 0: at most this long: {UNTIL} may end it" in text.getvalue()
    mixed = plan(steps(3), steps(3, until=Mixing((1.0,) * 3, window=2, close=0.1)))
    assert "2511.04981" in gj.cite(mixed)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stage(tokens=64, ended=2), "ended: it is of a stage that a trigger ends"),
        (
            lambda: steps(8, grow=gj.msg(mlp=24), ramp=4, until=UNTIL, ended=3),
            "the ramp of 4 is not",
        ),
        (lambda: Probe(PLAN, 1, (steps(4), steps(5)), 2), "a trigger may end a stage before"),
        (lambda: Plateau(0, 0.1), "window: expected a positive integer"),
        (lambda: Mixing((1.0,), window=2, close=0.1), "at least the 2 losses"),
    ],
    ids=["no trigger", "ramp", "probe", "window", "losses"],
)
def test_what_cannot_end_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


# Triggers ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Always(Trigger):
    reads = 1

    def fires(self, losses, done):
        return {"losses": np.float32(len(losses))}


def test_the_numbers_of_a_trigger_may_be_those_of_numpy():
    whole = plan(steps(8, until=Always())).ended(0, 3)
    session: Any = SimpleNamespace(
        span=whole.spans[0], recorded=set(), losses=[2.0, 1.5, 1.0], step=3
    )
    (record,) = Session.ended(session)
    assert json.loads(json.dumps(as_row(record, {})))["numbers"] == {"losses": 1.0}


@pytest.mark.parametrize(
    "fields, first",
    [
        ({"grow": gj.stack(layers=4)}, 2),
        ({"grow": gj.msg(mlp=24), "ramp": 4}, 4),
        ({"grow": gj.growth.ligo(mlp=24, batches=5), "carry": "reset"}, 5),
        ({"rewarm": 0.375}, 3),
    ],
    ids=["growth", "ramp", "fit", "rewarm"],
)
def test_a_trigger_waits_for_the_ramp_the_fit_and_the_rate(fields, first):
    whole = plan(steps(1), steps(8, until=Always(), **fields))
    span = whole.spans[1]
    ends = []
    for i in range(7):
        spent = span.spent + sum(span.costs[:i])
        session: Any = SimpleNamespace(plan=whole, span=span, spent=spent, losses=[1.0], late=None)
        ends.append(Session.over(session, i))
    assert ends == [i >= first for i in range(7)]


@pytest.mark.parametrize("warmup", [Warmup(steps=4), 0.5], ids=["steps", "share"])
def test_a_trigger_waits_for_the_warmup_of_the_plan(warmup):
    whole = plan(steps(8, until=Always()), rate=Schedule(1e-2, warmup=warmup))
    costs = np.cumsum([0, *whole.spans[0].costs])
    assert [whole.rises(float(spent), 0) for spent in costs[:6]] == [i < 4 for i in range(6)]


def test_mixing_compares_the_same_steps():
    whole = tuple(2.0 - 0.05 * i for i in range(20))
    grown = [x + 0.8**i for i, x in enumerate(whole)]
    trigger = Mixing(whole, window=3, close=0.02)
    fired = mixing(grown, whole, window=3, close=0.02)
    assert fired is not None
    numbers = trigger.fires(grown[fired - 3 : fired], fired)
    assert numbers == {
        "grown": np.mean(grown[fired - 3 : fired]),
        "whole": np.mean(whole[fired - 3 : fired]),
    }
    assert trigger.fires(grown[fired - 4 : fired - 1], fired - 1) is None
    # There is nothing to compare with after the last loss of the other run
    assert trigger.fires([0.0] * 3, 21) is None and trigger.fires([0.0] * 2, 2) is None
