"""Layers that a step leaves out stay as they were: for every rule of updates, and in the trainer."""

import dataclasses
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import optim
from growjax.errors import PlanError, StateError
from growjax.forecast.dryrun import work_label
from growjax.models import GPT
from growjax.optim.age import Ages
from growjax.optim.scale import scale_new
from growjax.parallel import Layout
from growjax.runs.checkpoint import load
from growjax.train import Optimizer, Options, load_plan, save_plan, train
from tests.runs import SMALL, feed, plan, programs_of, steps
from tests.test_subnet import KEYS, LAYERS, gpt, outputs


DEEP = dataclasses.replace(SMALL, layers=4)
TRAINED = {
    "path": gj.random_path(2, keep=()),
    "coins": gj.random_path(2, keep=(), mode="bernoulli"),
    "drop": gj.progressive_layer_drop(rate=1.0, floor=0.2),
}
SUBNETS = {
    "path": gj.random_path(3),
    "coins": gj.random_path(3, mode="bernoulli"),
    "drop": gj.progressive_layer_drop(rate=1.0, floor=0.2),
}
RULES = {
    "adamw": optim.adamw(1e-2, weight_decay=0.1),
    "optax.adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped lion": optax.chain(optax.clip_by_global_norm(0.1), optax.lion(1e-2)),
    "muon": optax.chain(optim.scale_by_muon(), optax.scale(-1e-2)),
}


@eqx.filter_jit
def gradient_of(subnet, model, key) -> Any:
    """The gradient of a fixed loss, of the trained half."""
    trained, rest = gj.partition(model)

    def loss(trained):
        return jnp.sum(jnp.sin(outputs(subnet(eqx.combine(trained, rest), key=key, step=3))))

    return jax.grad(loss)(trained)


def rows(tree: Any, layers: np.ndarray) -> list[np.ndarray]:
    """Those rows of every leaf of the blocks, in every part of the tree that is like the parameters."""
    like = lambda node: hasattr(node, "blocks")  # noqa: E731
    parts = [node for node in jax.tree.leaves(tree, is_leaf=like) if like(node)]
    assert parts
    return [np.asarray(x)[layers] for part in parts for x in jax.tree.leaves(part.blocks)]


def ages(state: Any) -> list[np.ndarray]:
    is_ages = lambda node: isinstance(node, Ages)  # noqa: E731
    counts = [x for x in jax.tree.leaves(state, is_leaf=is_ages) if is_ages(x)]
    return [np.asarray(x.of["layers"]) for x in counts]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def near(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SUBNETS)
def test_the_layers_that_run_are_those_with_a_gradient(name):
    subnet, model = SUBNETS[name], gpt()
    running = jax.jit(lambda key: subnet.running(model, key=key, step=3)["layers"])
    for key in KEYS[:3]:
        flags = np.asarray(running(key))
        gradient = gradient_of(subnet, model, key).blocks.block.mlp.up
        assert np.array_equal(flags, np.asarray(gradient).any((1, 2)))
        assert 0 < flags.sum() < LAYERS
    assert gj.random_path(LAYERS).running(gpt(), key=KEYS[0]) == {}
    assert gj.random_part(mlp=4).running(gpt(), key=KEYS[0]) == {}


@pytest.mark.parametrize("rule", RULES)
def test_what_did_not_run_is_bitwise_what_it_was_and_all_else_moves_as_usual(rule):
    tx, path = RULES[rule], SUBNETS["path"]
    trained = gj.partition(gpt())[0]
    # Moments that are not zero
    _, state = tx.update(
        gradient_of(gj.random_path(LAYERS), gpt(), KEYS[0]), tx.init(trained), trained
    )
    gradient = gradient_of(path, gpt(), KEYS[1])

    @jax.jit
    def step(state):
        updates, after = tx.update(gradient, state, trained)
        running = path.running(gpt(), key=KEYS[1])
        return (updates, after), optim.freeze(running, updates, after, state)

    (usual, usual_state), (updates, after) = step(state)
    ran = np.asarray(path.sample(LAYERS, key=KEYS[1]))
    left = np.setdiff1d(np.arange(LAYERS), ran)
    assert all(not row.any() for row in rows(updates, left))
    assert equal(rows(after, left), rows(state, left))
    # By default momentum and decay go on
    assert not equal(rows(usual_state, left), rows(state, left))
    assert any(row.any() for row in rows(usual, left))
    assert near(rows(after, ran), rows(usual_state, ran))
    assert near(rows(updates, ran), rows(usual, ran))
    outside = lambda tree: jax.tree.leaves(eqx.tree_at(lambda t: t.blocks, tree, None))  # noqa: E731
    assert near(outside(updates), outside(usual))
    assert all(np.asarray(x).any() for x in outside(updates))


def test_a_layer_is_as_old_as_the_steps_that_it_ran():
    tx, path, model = RULES["adamw"], SUBNETS["path"], gpt()
    trained, rest = gj.partition(model)
    state, seen = tx.init(trained), np.zeros(LAYERS, int)
    for key in KEYS[:4]:
        model = eqx.combine(trained, rest)
        updates, after = tx.update(gradient_of(path, model, key), state, trained)
        running = path.running(model, key=key)
        updates, state = optim.freeze(running, updates, after, state)
        trained, seen = optax.apply_updates(trained, updates), seen + np.asarray(running["layers"])
    assert np.array_equal(ages(state)[0], seen) and len(set(seen.tolist())) > 1


def test_layers_that_did_not_run_are_no_newer_than_they_were():
    tx, trained = scale_new(0.25, 10), gj.partition(gpt())[0]
    ones = jax.tree.map(jnp.ones_like, trained)
    before = tx.init(trained)
    for _ in range(2):
        updates, after = tx.update(ones, before)
        assert all(np.all(u == 1) for u in jax.tree.leaves(updates))
        left_out = {"layers": jnp.arange(LAYERS) > 0}
        _, before = optim.freeze(left_out, updates, after, before)


def test_moments_of_no_layer_are_refused():
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    trained = gj.partition(gpt())[0]
    before = tx.init(trained)
    updates, after = tx.update(trained, before, trained)
    running = {"layers": jnp.ones(LAYERS, bool)}
    with pytest.raises(StateError, match=re.escape("v_row.blocks.block.mlp.up: expected")) as error:
        optim.freeze(running, updates, after, before)
    assert "v_col.blocks.block.mlp.up" in str(error.value)


# In the trainer ----------------------------------------------------------------------------------


def trained_for(count: int, subnet: Any, inactive: Any, folder: Any, programs: Any) -> Any:
    """A plan over four layers, the model that it gives, and the optimizer's state at its end."""
    stage = steps(count, subnet=subnet, inactive=inactive)
    made = plan(stage, model=DEEP, optimizer=Optimizer(weight_decay=0.5))
    options = Options(save_every=count, keep_last=9)
    records = list(train(made, feed(made), run=folder, options=options, cache=programs))
    shapes = programs_of(made).shapes(made.spans[0].model)
    state = load(folder / "checkpoints" / f"{count:08}-00", shapes)
    return made, records[-1].model, state.optimizer  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_counts_a_layers_steps_by_the_paths_it_drew(name, programs, tmp_path):
    made, model, state = trained_for(5, TRAINED[name], "freeze", tmp_path, programs)
    draws = [TRAINED[name].running(model, key=gj.step_key(made.seed, n), step=n) for n in range(5)]
    seen = np.sum([running.get("layers", np.ones(4, bool)) for running in draws], axis=0)
    assert np.array_equal(ages(state)[0], seen) and seen.min() < 5


def test_a_layer_that_did_not_run_is_still_as_it_was_born(programs, tmp_path):
    path = TRAINED["path"]
    made, still, _ = trained_for(1, path, "freeze", tmp_path / "a", programs)
    _, usual, _ = trained_for(1, path, "zero_grad", tmp_path / "b", programs)
    born = eqx.filter_jit(GPT)(DEEP, key=made.key("model"))
    ran = np.asarray(path.sample(4, key=gj.step_key(made.seed, 0)))
    left = np.setdiff1d(np.arange(4), ran)
    for x, y, z in zip(rows(still, left), rows(usual, left), rows(born, left), strict=True):
        np.testing.assert_array_equal(x, z)
        # Matrices decay
        assert x.ndim < 3 or not x.any() or not np.array_equal(y, z)
    moved = zip(rows(still, ran), rows(born, ran), strict=True)
    assert not any(np.array_equal(x, z) for x, z in moved if z.ndim > 2 and z.any())


def test_what_cannot_be_left_alone_is_refused_before_the_first_step(tmp_path):
    faults = {
        "inactive: expected one of 'zero_grad', 'freeze', got 'drop'": {"inactive": "drop"},
        "leaves layers out, such as a path, got None": {"inactive": "freeze"},
        "leaves layers out, such as a path, got RandomPart": {
            "inactive": "freeze",
            "subnet": gj.random_part(mlp=8),
        },
    }
    for message, fields in faults.items():
        with pytest.raises(PlanError, match=re.escape(message)):
            plan(steps(1, **fields), model=DEEP)
    stage = steps(1, subnet=TRAINED["path"], inactive="freeze")
    with pytest.raises(PlanError, match="own_paths: a layer that one replica leaves out"):
        plan(stage, model=DEEP, layout=Layout(step="shard_map", own_paths=True))
    whole = plan(stage, model=DEEP)
    save_plan(whole, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").stages[0].inactive == "freeze"
    assert "freeze" in work_label(whole.spans[0].works[0])
