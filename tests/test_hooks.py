"""Hooks: what is asked of a model while it trains changes nothing, and is kept where losses are."""

import math
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest

import growjax as gj
from growjax import train as trainer
from growjax.errors import TrainingError
from growjax.gates import is_gated
from growjax.report.runs import write_report
from growjax.runs import watch as watching
from growjax.train import (
    Optimizer,
    Options,
    Schedule,
    Step,
    cross_entropy,
    read_journal,
    stopwatch,
    watch,
)
from tests.runs import every_kind, feed, losses, plan, same, steps


train: Any = trainer.train
EVERY = every_kind().flops / 6


def scored(records: Any) -> dict[int, dict[str, float]]:
    return {r.step: r.scores for r in records if isinstance(r, Step) and r.scores is not None}


def loss_of(data: Any, objective: Any):
    """A hook that finds the held-out loss once more, by itself."""
    rows = data.held_out(objective, 4)

    def again(model: Any, step: Step) -> dict[str, float]:
        by_row, counts = jax.vmap(lambda row: cross_entropy(model, row))(rows)
        gates = [s.value.value for s in gj.axes_of(model).of_kind("gate") if s.arrays()]
        return {
            "loss": float((by_row * counts).sum() / counts.sum()),
            "said": step.held_out or math.nan,
            "gates": float(min((np.min(g) for g in gates), default=-1.0)),
        }

    return again


@pytest.fixture(scope="module")
def asked(run, programs, tmp_path_factory):
    """The run of every kind with two hooks, its journal, and what a tracker was told."""
    whole, folder, told = run[0], tmp_path_factory.mktemp("hooks") / "run", []

    class Tracker:
        has = 0

        def __init__(self, *_: Any):
            pass

        def write(self, step: int, numbers: dict[str, float]) -> None:
            told.append((step, numbers))

        def close(self) -> None:
            pass

    data = feed(whole)
    hooks = (
        loss_of(data, whole.objective),
        lambda model, step: {"layers": gj.sizes(model)["layers"]},
    )
    options = Options(evaluate_every=EVERY, held_out=4, hooks=hooks, save_every=2, keep_last=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(watching.TRACKERS, "wandb", Tracker)
        records = train(whole, data, run=folder, options=options, cache=programs)
        records = list(watch(records, whole, run=folder, trackers=["wandb"]))
    return records, folder, options, told


def test_hooks_change_nothing_and_are_called_where_the_loss_is_looked_at(run, asked):
    records, _, _, _ = asked
    assert losses(records) == losses(run[1]) and same(records, run[1])
    marks = [r.step for r in run[1] if isinstance(r, Step) and r.held_out is not None]
    assert list(scored(records)) == marks and len(marks) > 4


def test_a_hook_sees_the_model_that_is_judged(asked):
    """With its gates as open as they are, and the record with the loss that was found."""
    records, _, _, _ = asked
    levels = {r.step: r.level for r in records if isinstance(r, Step)}
    for step, scores in scored(records).items():
        assert scores["loss"] == pytest.approx(scores["said"], rel=1e-5)
        if scores["gates"] >= 0:
            assert scores["gates"] == pytest.approx(levels[step])
        assert scores["layers"] == (2 if step < 9 else 4)
    assert any(0 < levels[n] < 1 for n in scored(records))
    assert not is_gated(records[-1].model)


def test_an_average_is_judged_where_the_optimizer_averages(programs):
    rate = Schedule(3e-2, "constant", warmup=0.0)
    p = plan(steps(4), optimizer=Optimizer("schedule_free"), rate=rate)
    data = feed(p)
    options = Options(held_out=4, hooks=[loss_of(data, p.objective)])
    (scores,) = scored(train(p, data, options=options, cache=programs)).values()
    assert scores["loss"] == pytest.approx(scores["said"], rel=1e-5)


def test_a_resumed_run_gives_the_same_scores(run, asked, programs, tmp_path):
    records, folder, options, _ = asked
    for name in ("00000006-01", "00000009-02"):
        shutil.copytree(folder / "checkpoints" / name, tmp_path / name / "checkpoints" / name)
        again = list(
            train(run[0], feed(run[0]), run=tmp_path / name, options=options, cache=programs)
        )
        expected = {
            n: numbers_of for n, numbers_of in scored(records).items() if n >= again[0].step
        }
        assert scored(again) == expected and expected


def test_scores_are_in_the_journal_the_trackers_and_the_report(asked, tmp_path):
    records, folder, _, told = asked
    rows = {row["step"]: row for row in read_journal(folder) if row["kind"] == "step"}
    assert {n: row["scores"] for n, row in rows.items() if row["scores"]} == scored(records)
    sent = {n: numbers for n, numbers in told if "scores/loss" in numbers}
    assert {n: numbers["scores/loss"] for n, numbers in sent.items()} == {
        n: numbers_of["loss"] for n, numbers_of in scored(records).items()
    }
    page = write_report([folder], tmp_path / "page.html").read_text()
    last = scored(records)[17]
    assert "Scores" in page and ">layers<" in page and f">{last['loss']:.4g}<" in page


def test_the_time_of_hooks_is_not_that_of_training(programs, monkeypatch):
    """On a machine where nothing takes any time, but for the hook."""
    now = [0.0]

    def slow(model: Any, step: Step) -> dict[str, float]:
        now[0] += 1000.0
        return {}

    counter = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(stopwatch, "time", counter)
    p = plan(steps(3))
    options = Options(evaluate_every=p.flops / 3, held_out=4, hooks=[slow])
    records = list(train(p, feed(p), options=options, cache=programs))
    assert records[-1].hook_seconds == 3000.0 and records[-1].held_out_seconds == 0.0
    assert all(r.took == r.seconds == 0.0 for r in records if isinstance(r, Step))
    assert scored(records) == {0: {}, 1: {}, 2: {}}


def test_the_time_before_the_first_step_is_not_that_of_training(programs, monkeypatch):
    """The optimizer's check, and a tracker that starts after the first record."""
    now, doing = [0.0], []

    def slow(plan: Any) -> list[str]:
        now[0] += 1000.0
        doing.append(running.doing.now)
        return []

    monkeypatch.setattr(stopwatch, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("growjax.train.session.carry_faults", slow)
    p = plan(steps(2))
    running = train(p, feed(p), options=Options(held_out=4), cache=programs)
    next(running)
    now[0] += 1000.0
    assert [r.seconds for r in running if isinstance(r, Step)] == [0.0, 0.0]
    assert doing == ["checking the optimizer"]


def broken(model: Any, step: Step) -> Any:
    raise KeyError("a word")


BAD = {
    "hook broken, after step 1: expected numbers by name, got KeyError: 'a word'": [broken],
    "expected numbers by name, got ValueError": [lambda model, step: {"a": "words"}],
    "another hook returns these names as well:\n  - a": [lambda model, step: {"a": 1}] * 2,
}


@pytest.mark.parametrize("message", BAD)
def test_a_hook_that_fails_is_named_and_loses_nothing(programs, message, tmp_path):
    p = plan(steps(2))
    options = Options(held_out=4, hooks=BAD[message], save_every=1)
    with pytest.raises(TrainingError, match=message):
        list(train(p, feed(p), run=tmp_path, options=options, cache=programs))
    assert next(train(p, feed(p), run=tmp_path, cache=programs)).step == 1


def test_runs_of_one_name_in_two_folders_are_two_runs_of_a_tracker(tmp_path, monkeypatch):
    told: list[dict[str, Any]] = []
    wandb_run = types.SimpleNamespace(step=0)
    library = types.SimpleNamespace(init=lambda **options: told.append(options) or wandb_run)
    monkeypatch.setattr(watching, "_library", lambda _: library)
    for folder in ("a/run", "b/run", "a/run", "lr:1,wd#2"):
        watching.WandB(tmp_path / folder, plan(steps(1)))
    first, second, again, odd = (options["id"] for options in told)
    assert first == again != second and first.startswith("run-")
    # W&B refuses some characters
    assert odd.startswith("lr-1-wd-2-")
