"""Growth by linear maps: regrouped heads, dense maps, and the state of optimizers through them."""

import dataclasses
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import growth, testing
from growjax.algebra import MEAN, NONE, SECOND, AxisMap, undetermined
from growjax.axes import axes_of, partition
from growjax.errors import GrowthError, PlanError, StateError
from growjax.growth.births import MIXED
from growjax.maps import apply, carry_array
from growjax.nn import Attention, RelativeBias, Rotary
from growjax.optim import carry
from growjax.values import from_dict, to_dict
from tests.runs import SMALL, plan, steps
from tests.test_algebra import OLD, leaves, same, sevens


KEY = jax.random.key(0)
GPT, GROUPED = testing.ARCHITECTURES[0], testing.ARCHITECTURES[3]


OPERATORS = [
    gj.regroup(kv_heads=4, over="queries"),
    gj.dense(head_dim=((0.1, 2), (-1, 1 / 3)), dual={"head_dim": ((1, 0), (0, 1))}, exact=True),
]


@pytest.mark.parametrize("op", OPERATORS, ids=["regroup", "dense"])
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


# Products of axes ----------------------------------------------------------------------------


def heads(count: int, kv_heads: int, **options):
    with jax.enable_x64(True):
        make = lambda key: Attention(6, count, kv_heads, 2, key=key, **options)  # noqa: E731
        return testing.randomise(eqx.filter_eval_shape(make, KEY))


@pytest.mark.parametrize("kv_heads, new", [(1, 2), (1, 4), (2, 4)])
def test_keys_are_repeated_and_queries_dealt_out_to_them(kv_heads, new):
    model = heads(4, kv_heads)
    op = gj.regroup(kv_heads=new)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(5).normal(size=(5, 6)))
        grown: Any = jax.vjp(op, model)
        after, transpose = grown
        same(after(x), model(x))
        loss = lambda model: jnp.sum(jnp.sin(model(x)))  # noqa: E731
        (back,) = transpose(jax.grad(loss)(after))
        expected = jax.grad(loss)(model)
    for name in ("q", "k", "v", "o", "q_bias", "v_bias"):
        same(getattr(back, name), getattr(expected, name), name)
    n = new // kv_heads
    assert gj.sizes(after)["kv_heads"] == new and gj.sizes(after)["group"] == 4 // new
    same(after.q, np.asarray(model.q).reshape(6, new, 4 // new, 2))
    same(after.o, np.asarray(model.o).reshape(new, 4 // new, 2, 6))
    same(after.k, np.repeat(model.k, n, axis=1))
    same(after.v_bias, np.repeat(model.v_bias, n, axis=0))
    table = axes_of(model)
    (move,) = op.maps(table)
    assert "each copy of kv_heads is read by a part of group" in undetermined(
        move, table, table["k"]
    )
    assert undetermined(move, table, table["q"]) == ""
    same(carry_array(move, table, table["o"], model.o, SECOND), after.o)


class Fused(eqx.Module):
    """Queries, keys and values in one array."""

    qkv: Array = gj.param(
        "embed -> (kv_heads group head_dim + kv_heads head_dim + kv_heads head_dim)"
    )
    o: Array = gj.param("kv_heads group head_dim -> embed")
    groups: Array = gj.param("[groups] -> kv_heads")
    heads: Array = gj.param("[heads] -> kv_heads group")


def test_keys_are_repeated_next_to_their_queries_in_one_array():
    rng = np.random.default_rng(6)
    shapes = [(3, 16), (2, 2, 2, 3), (1, 2), (1, 2, 2)]
    with jax.enable_x64(True):
        model = Fused(*(jnp.asarray(rng.normal(size=s)) for s in shapes))
        assert gj.sizes(model)["head_dim"] == 2
        after = gj.regroup(kv_heads=4)(model)
    q, k, v = np.split(np.asarray(model.qkv), [8, 12], axis=1)
    k, v = (np.repeat(x.reshape(3, 2, 2), 2, axis=1).reshape(3, 8) for x in (k, v))
    same(after.qkv, np.concatenate([q, k, v], axis=1))
    same(after.o, np.asarray(model.o).reshape(4, 1, 2, 3))


def test_a_bias_of_all_heads_is_regrouped_too():
    with jax.enable_x64(True):
        make = lambda key: RelativeBias(3, 2, 4, bidirectional=False, key=key)  # noqa: E731
        model = testing.randomise(eqx.filter_eval_shape(make, KEY))
        after = gj.regroup(kv_heads=4)(model)
    same(after.table, np.asarray(model.table).reshape(3, 4, 2))


@pytest.mark.parametrize(
    "op, message",
    [
        (gj.regroup(kv_heads=3), "2 kv_heads of 2 group each cannot become 3"),
        (gj.regroup(kv_heads=8), "cannot become 8"),
        (gj.regroup(kv_heads=1), "growth never shrinks"),
        (gj.regroup(kv_heads=4, head_dim=4), "the copies of one axis at a time"),
        (gj.regroup(kv_heads=4, over="embed"), "q is summed over embed"),
    ],
    ids=["uneven", "too many", "fewer", "two axes", "another axis"],
)
def test_what_cannot_be_regrouped_says_why(op, message):
    model = heads(4, 2)
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        op(model)


def test_regrouping_to_the_same_number_is_the_identity():
    model = heads(4, 2)
    assert eqx.tree_equal(gj.regroup(kv_heads=2)(model), model)


# Averages and births -------------------------------------------------------------------------


class Means(gj.Operator):
    """Two fresh hidden units, then one that is the mean of all."""

    exactness = "approximate"

    def maps(self, axes):
        old = axes.size("mlp")
        return [
            AxisMap("mlp", [*range(old), *([MEAN] if old > OLD else [NONE, NONE])], init=sevens)
        ]


@pytest.mark.parametrize(
    "op",
    [
        gj.dense(mlp=np.random.default_rng(8).normal(size=(5, OLD))),
        gj.chain(Means(), Means()),
    ],
    ids=["dense", "means"],
)
def test_an_average_of_the_weights_is_summed_as_they_are(op):
    """The average of a constant walk is the weights themselves, drawn or summed."""
    with jax.enable_x64(True):
        model = leaves()
        half = jax.tree.map(lambda x: 0.5 * x, partition(model)[0])
        grown = gj.grow(op, gj.State(model, None, average=(model, half)), key=KEY)
        whole, halved = grown.average
        assert eqx.tree_equal(partition(whole)[0], partition(grown.model)[0], rtol=1e-12)
        # What is drawn starts as its own weight, and all else is half of what the model has
        drawn = np.asarray(grown.model.reads) == 7
        expected = np.where(drawn, 1.0, 0.5) * np.asarray(grown.model.reads)
        same(halved.reads, expected)
        same(halved.makes[:, :, :4], 0.5 * np.asarray(grown.model.makes)[:, :, :4])
    assert drawn.any() == ("chain" in str(op))


def test_queries_are_dealt_out_with_the_growth_they_were_born_in():
    shapes = eqx.filter_eval_shape(GROUPED.model)
    births = gj.Births.original(shapes).grown(gj.copy(heads=8), shapes)
    wide = eqx.filter_eval_shape(gj.copy(heads=8), shapes)
    assert births.of["group"].tolist() == [0, 0, 1, 1]
    after = births.grown(gj.regroup(kv_heads=4), wide)
    # Keys that are repeated for old queries are old too, or these would count as new
    assert after.of["kv_heads"].tolist() == [0, 0, 0, 0]
    regrouped = eqx.filter_eval_shape(gj.regroup(kv_heads=4), wide)
    after.check(regrouped)
    # Old and new queries share a coordinate now, so nobody may train one of them alone
    assert after.of["group"].tolist() == [MIXED, MIXED]
    for part in ("new", "old", 0):
        with pytest.raises(StateError, match="heads of several growths were merged"):
            after.masks(regrouped, part)
    stages = [
        steps(1),
        steps(1, grow=gj.copy(heads=8)),
        steps(1, grow=gj.regroup(kv_heads=4), carry="reset", train="new"),
    ]
    grouped = dataclasses.replace(SMALL, heads=4, kv_heads=2)
    with pytest.raises(PlanError, match="train: .*regroup before heads grow"):
        plan(*stages, model=grouped)
    assert gj.Births.original(shapes).grown(gj.regroup(kv_heads=4), shapes).of[
        "group"
    ].tolist() == [0]


# What does not fit ---------------------------------------------------------------------------


class Turned(eqx.Module):
    rotary: Rotary
    attention: Attention


def test_what_is_more_than_linear_in_an_axis_is_not_mixed():
    with jax.enable_x64(True):
        turned = Turned(Rotary(2), heads(2, 2))
        with pytest.raises(GrowthError, match="rotary.freqs ties its coordinates together"):
            gj.dense(head_dim=np.eye(2) + 1)(turned)
        hidden = apply(AxisMap("mlp", [0, 1, 2, 3, NONE], gated=True), leaves(), KEY)
        with pytest.raises(GrowthError, match="gate is still ramping"):
            gj.dense(mlp=np.eye(5) + 1)(hidden)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: gj.dense(head_dim=((1.0, 0.0), (0.0,))), "head_dim: expected a matrix"),
        (lambda: gj.dense(head_dim=3), "head_dim: expected a matrix"),
        (lambda: gj.dense(head_dim=((np.inf, 1.0),)), "head_dim: expected finite numbers"),
        (lambda: gj.dense(head_dim=np.eye(3)), r"expected a matrix \[new, 2\], got \(3, 3\)"),
        (
            lambda: gj.dense(head_dim=np.eye(2), dual={"embed": np.eye(2)}),
            "dual: embed has no matrix",
        ),
    ],
    ids=["ragged", "number", "infinite", "other size", "dual of another"],
)
def test_a_dense_operator_that_does_not_fit_says_why(make, message):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        make()(heads(2, 2))


# Optimizer state -----------------------------------------------------------------------------


TALL = np.random.default_rng(7).normal(size=(6, 4))
SINGLE = np.asarray([[0, 0, 0, 1], [0, 2, 0, 0], [-1, 0, 0, 0], [0, 0, 0.5, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize(
    "op, tx",
    [
        (gj.dense(head_dim=TALL, exact=True), optax.trace(0.9)),
        (gj.dense(head_dim=SINGLE, exact=True), optax.scale_by_adam()),
    ],
    ids=["sums follow a dense map", "squares follow one source a row"],
)
def test_moments_follow_the_dual_through_attention(op, tx):
    testing.assert_carries(op, GPT.model(), GPT.batch(), tx)


class Aside(gj.Operator):
    """AKI on hidden units: new rows from the next layer."""

    exactness = "approximate"

    def maps(self, axes):
        source = np.asarray([*range(axes.size("mlp")), 0, 1])
        share = 1 / np.bincount(source)[source]
        return [AxisMap("mlp", source, share=share, above=True)]


class UnreadMeans(gj.Operator):
    """Two new hidden units that are the mean of all old ones, and that nothing reads."""

    exactness = "exact-given-init"

    def maps(self, axes):
        old = axes.size("mlp")
        share = [1.0] * old + [0.0, 0.0]
        return [AxisMap("mlp", [*range(old), MEAN, MEAN], share=np.asarray(share), init="zeros")]


def squares() -> optax.GradientTransformation:
    """An average of squared weights, from zero on."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda s, w: 0.9 * s + 0.1 * w**2, state, params)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    "op, architecture, tx, message",
    [
        (
            gj.dense(head_dim=TALL, exact=True),
            GPT,
            optax.scale_by_adam(),
            r"nu.*attention.q, .* is not linear in .* the map of head_dim sums gradients",
        ),
        (
            gj.regroup(kv_heads=4),
            GROUPED,
            optax.trace(0.9),
            r"trace.*attention.k, .* each copy of kv_heads is read by a part of group alone",
        ),
        (gj.copy(embed=16, shares="random"), GPT, optax.trace(0.9), "norms over embed mix"),
        (Aside(), GPT, optax.trace(0.9), "new mlp come from the next layer"),
        (
            UnreadMeans(),
            GPT,
            squares(),
            r"mlp.up.* is not linear in .* the map of mlp sums weights",
        ),
    ],
    ids=["dense squares", "regrouped", "unequal shares under norms", "next layer", "means"],
)
def test_moments_that_do_not_follow_are_refused(op, architecture, tx, message):
    shapes = eqx.filter_eval_shape(architecture.model)
    state = eqx.filter_eval_shape(lambda m: tx.init(partition(m)[0]), shapes)
    with pytest.raises(StateError, match=message):
        carry(op, state, shapes, optimizer=tx, key=KEY)


def test_moments_of_means_start_anew():
    tx = optax.scale_by_adam()
    with jax.enable_x64(True):
        model = GPT.model()
        ones = jax.tree.map(jnp.ones_like, partition(model)[0])
        empty: Any = tx.init(ones)
        carried: Any = carry(
            Means(), empty._replace(mu=ones, nu=ones), model, optimizer=tx, key=KEY
        )
    for moment in (carried.mu, carried.nu):
        up = np.asarray(moment.blocks.block.mlp.up)
        assert np.all(up[..., :6] == 1) and not up[..., 6:].any()


class Heated(eqx.Module):
    """A hidden axis, and a number by which everything is multiplied."""

    up: Array = gj.param("features -> mlp")
    down: Array = gj.param("mlp -> out")
    heat: Array = gj.param("")


@pytest.mark.parametrize("tx", [optax.adam(1e-3), optax.lion(1e-3)], ids=["adam", "lion"])
def test_the_state_of_a_scalar_stays_as_it_is(tx):
    model = Heated(jnp.ones((3, 4)), jnp.ones((4, 2)), jnp.float32(2.0))
    state = jax.tree.map(lambda x: x + 3, tx.init(model))
    copy = gj.copy(mlp=8, shares="equal")
    before, after = state[0], carry(copy, state, model, optimizer=tx, key=KEY)[0]
    assert float(after.mu.heat) == float(before.mu.heat) == 3
    np.testing.assert_array_equal(after.mu.up, np.full((3, 8), 1.5, np.float32))
    np.testing.assert_array_equal(after.mu.down, np.full((8, 2), 3.0, np.float32))


def test_new_rows_from_the_next_layer_can_start_anew():
    tx = optax.trace(0.9)
    with jax.enable_x64(True):
        model = GPT.model()
        trained = partition(model)[0]
        empty: Any = tx.init(trained)
        before = empty._replace(trace=trained)
        state = carry(Aside(), before, model, optimizer=tx, copies="zero")
    trace, old = (t.blocks.block.mlp.up for t in (state.trace, trained))
    assert not np.asarray(trace)[..., 6:].any()
    same(trace[..., :6], np.asarray(old) * np.asarray([0.5, 0.5, 1, 1, 1, 1]))
