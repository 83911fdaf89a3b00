"""Width in some layers only: the others keep their weights, and what is new in them never moves."""

import json
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import growth, optim, testing
from growjax.axes import axes_of, partition
from growjax.errors import GrowthError
from growjax.growth import within
from growjax.values import from_dict, to_dict


KEY = jax.random.key(0)
GPT = testing.ARCHITECTURES[0]
OPERATORS = [
    within(gj.copy(mlp=9, heads=4, shares="equal", noise=0.1), layers=(1,)),
    within(gj.zeros(mlp=10), layers=(0,)),
    within(gj.msg(mlp=10), layers=(1,)),
]


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_growth_of_some_layers_keeps_its_promise(op):
    testing.assert_contract(op, GPT.model(), GPT.batch())


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_other_layers_keep_their_weights_and_what_is_new_in_them_is_zero(op):
    (chosen,) = op.layers
    with jax.enable_x64(True):
        small: Any = GPT.model()
        old, big = small.blocks.block.mlp, gj.grow(op, small, key=KEY).blocks.block.mlp
    for name, dim in [("up", 1), ("up_bias", 0), ("down", 0)]:
        before, after = (np.asarray(getattr(mlp, name))[1 - chosen] for mlp in (old, big))
        first, rest = np.split(after, [6], axis=dim)
        np.testing.assert_array_equal(first, before)
        assert rest.size and not rest.any()
    assert np.asarray(big.up)[chosen, :, 6:].any()


def test_zeros_on_both_sides_stay_and_the_chosen_layer_learns():
    """Ten steps of AdamW: no gradient reaches new units of the layer that did not grow."""
    tx = optax.adamw(1e-2, weight_decay=0.1)
    op = within(gj.copy(mlp=9, shares="random"), layers=(1,))
    model: Any = op(GPT.model(dtype=np.float32))
    trained, rest = partition(model)
    state = tx.init(trained)
    batch = GPT.batch()

    @jax.jit
    def step(trained, state):
        loss = lambda t: (jax.vmap(eqx.combine(t, rest))(batch) ** 2).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    start = trained
    for _ in range(10):
        trained, state = step(trained, state)
    before, after = (np.asarray(t.blocks.block.mlp.down) for t in (start, trained))
    assert not after[0, 6:].any() and (after[1] != before[1]).all()


def test_moments_of_other_layers_stay_whole():
    """Copies halve what their producers' moments are, in the layers that have copies alone."""
    op = within(gj.copy(mlp=12, shares="random", seed=3), layers=(1,))
    testing.assert_carries(op, GPT.model(), GPT.batch(), optax.scale_by_adam())


def test_the_new_part_of_some_layers_trains_alone():
    """Grow, Don't Overwrite: old weights stay bit by bit."""
    tx = optim.parts(optax.adam(1e-2), old=0.0)
    op = within(gj.zeros(mlp=10), layers=(1,))
    small = GPT.model(dtype=np.float32)
    state = gj.carry(op, tx.init(partition(small)[0]), small, optimizer=tx, key=KEY)
    big: Any = gj.grow(op, small, key=KEY)
    trained = partition(big)[0]
    updates, _ = tx.update(jax.tree.map(np.ones_like, trained), state, trained)
    down = np.asarray(updates.blocks.block.mlp.down)
    assert not down[:, :6].any() and down[:, 6:].all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: within(gj.copy(mlp=12), layers=(5,)), "5 is not among the 2 layers"),
        (lambda: within(gj.copy(embed=16), layers=(0,)), "is shared by all layers"),
        (lambda: within(gj.aki(mlp=9), layers=()), "expected the numbers of some layers"),
        (lambda: within(gj.copy(mlp=9), layers=(0, 0)), "each layer once"),
        (lambda: within(gj.lemon(embed=12), layers=(0,)), "no map of copies and new rows"),
        (lambda: within(gj.chain(gj.copy(mlp=9)), layers=(0,)), "expected one operator"),
        (lambda: within(gj.upcycle(experts=2), layers=(0,)), "no map of copies and new rows"),
        (lambda: within(gj.msg(layers=3), layers=(0,)), "it grows layers themselves"),
    ],
    ids=["no such layer", "stream", "no layer", "twice", "means", "chain", "experts", "depth"],
)
def test_what_does_not_fit_says_why(make, message):
    with pytest.raises(GrowthError, match=message):
        make()(GPT.model())


class Normed(eqx.Module):
    up: Any = gj.param("layers: embed -> mlp")
    gain: Any = gj.param("layers: ~mlp")
    down: Any = gj.param("layers: mlp -> embed")


@pytest.mark.parametrize("make", [gj.copy, gj.msg], ids=["copy", "msg"])
def test_layers_whose_norm_would_average_over_zeros_are_refused(make):
    """Zeros in a layer that does not grow would shrink the mean square of its norm."""
    normed = Normed(np.ones((2, 3, 4)), np.ones((2, 4)), np.ones((2, 4, 3)))
    with pytest.raises(GrowthError, match="gain averages over mlp"):
        within(make(mlp=8), layers=(0,)).maps(axes_of(normed))
    model = eqx.filter_eval_shape(testing.Architecture("GPT", (("qk_norm", True),)).model)
    with pytest.raises(GrowthError, match="k_norm.* averages over head_dim"):
        within(make(head_dim=8), layers=(0,)).maps(axes_of(model))
    within(make(mlp=8), layers=(0,)).maps(axes_of(model))
