"""Plans under every rule: as data, as runs that learn, and as runs that were killed.

AdamW's are in `test_train`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import growjax as gj
from growjax.data import held_out_batch
from growjax.runs.checkpoint import load
from growjax.runs.lineage import load_model, model_of
from growjax.train import (
    Optimizer,
    Options,
    Schedule,
    Step,
    cross_entropy,
    load_plan,
    save_plan,
    train,
)
from tests.runs import SMALL, feed, losses, plan, programs_of, same, steps


RATES = {"nadamw": 1e-2, "ademamix": 1e-2, "lion": 3e-3, "sgd": 0.3}
# Those whose state is not just moments, through a growth as well
GROWN = {"sophia": 3e-3, "muon": 1e-2, "schedule_free": 3e-2}


@pytest.mark.parametrize("name", [*RATES, *GROWN])
def test_a_run_learns_and_goes_on_bitwise(name, programs, tmp_path):
    stages = [steps(6), *([steps(6, grow=gj.msg(mlp=24), ramp=3)] if name in GROWN else [])]
    whole = plan(
        *stages,
        optimizer=Optimizer(name, weight_decay=0.1),
        rate=Schedule((RATES | GROWN)[name]),
    )
    options = Options(evaluate_every=whole.flops / 4, held_out=4, save_every=3, keep_last=9)

    def records(run: str) -> list[Any]:
        folder = tmp_path / run
        return list(train(whole, feed(whole), run=folder, options=options, cache=programs))

    first = records("first")
    marks = [r.held_out for r in first if isinstance(r, Step) and r.held_out is not None]
    curve = losses(first)
    assert marks[-1] < marks[0] - 0.1 and curve[max(curve)] < curve[0] - 0.1
    for saved in ["00000003-00", *(["00000009-01"] if name in GROWN else [])]:
        (tmp_path / saved / "checkpoints").mkdir(parents=True)
        checkpoint = tmp_path / "first" / "checkpoints" / saved
        checkpoint.rename(tmp_path / saved / "checkpoints" / saved)
        again = records(saved)
        assert again[0].resumed and same(again, first)
        assert losses(again) == {n: x for n, x in curve.items() if n >= int(saved[:8])}


def test_what_is_handed_out_is_what_was_judged(programs, tmp_path):
    """An average, where the rule averages: at the end of a run, and in its checkpoints."""
    made = plan(
        steps(4),
        optimizer=Optimizer("schedule_free"),
        rate=Schedule(3e-2, "constant", warmup=0.0),
    )
    options = Options(evaluate_every=made.flops / 2, held_out=4, save_every=4, keep_last=9)
    data = feed(made)
    records: Any = list(train(made, data, run=tmp_path, options=options, cache=programs))
    last, end = records[-3], records[-1]
    rows = held_out_batch(data.validation, made.objective, 4)

    def loss(model: Any) -> float:
        by_row, counts = jax.vmap(lambda row: cross_entropy(model, row))(rows)
        return float((by_row * counts).sum() / counts.sum())

    saved = tmp_path / "checkpoints" / "00000004-00"
    loaded, lineage = load_model(saved)
    shapes = programs_of(made).shapes(model_of(lineage))
    training = load(saved, shapes).model
    assert loss(end.model) == pytest.approx(last.held_out, rel=1e-5)
    assert abs(loss(training) - last.held_out) > 1e-3
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(end.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_sophia_sees_the_curvature_of_the_head_and_of_all_below_it(tmp_path):
    """In the first step already: the loss is that of the words, not of hidden states."""
    model = dataclasses.replace(SMALL, tied=False)
    made = plan(steps(1), model=model, optimizer=Optimizer("sophia"))
    list(train(made, feed(made), run=tmp_path, options=Options(held_out=4, keep_last=9)))
    trained = gj.partition(made.spans[0].model)[0]
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(made.optimizer.build().init, trained),
    )
    path = tmp_path / "checkpoints" / "00000001-00"
    _, (_, sophia, *_) = load(path, {"optimizer": shapes}, only=("optimizer",)).popitem()
    assert np.all(np.asarray(sophia.h.head) > 0)
    for h in jax.tree.leaves(sophia.h):
        assert np.any(np.asarray(h) > 0) and np.all(np.asarray(h) >= 0)


def test_every_field_survives_the_trip_through_json(tmp_path):
    optimizer = Optimizer(
        "muon", 0.8, 0.9, 1e-6, 0.1, "weights", True, None, 2.0, 5, 0.99, 4.0, 0.1, 7, 0.9
    )
    plain = Optimizer()
    for field in dataclasses.fields(Optimizer):
        assert getattr(optimizer, field.name) != getattr(plain, field.name)
    whole = plan(steps(2), optimizer=optimizer)
    save_plan(whole, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").optimizer == optimizer
