"""Fewer keys for the same queries, and RMS norms in place of LayerNorms."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import growth, optim, testing
from growjax.axes import axes_of, partition
from growjax.errors import GrowthError, StateError
from growjax.growth.births import MIXED
from growjax.nn import Attention
from growjax.optim import carry
from growjax.values import from_dict, to_dict


KEY = jax.random.key(0)
GPT, UNTIED, RMS, POST = (testing.ARCHITECTURES[i] for i in (0, 1, 2, 4))
LAYERED = testing.Architecture("GPT", (("tied", False),))

OPERATORS = [gj.growth.pool(kv_heads=1), gj.growth.centred()]


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


EIGHT = testing.Architecture("GPT", (("heads", 8),))


def heads(count: int, kv_heads: int):
    with jax.enable_x64(True):
        make = lambda key: Attention(6, count, kv_heads, 2, key=key)  # noqa: E731
        return testing.randomise(eqx.filter_eval_shape(make, KEY))


def test_keys_and_values_become_means_and_queries_stay():
    small = heads(8, 4)
    with jax.enable_x64(True):
        after = gj.growth.pool(kv_heads=2)(small)
    assert (gj.sizes(after)["kv_heads"], gj.sizes(after)["group"]) == (2, 4)
    for name in ("k", "v"):
        old = np.asarray(getattr(small, name))
        mean = (old[:, 0::2] + old[:, 1::2]) / 2
        np.testing.assert_allclose(getattr(after, name), mean, rtol=1e-12)
    np.testing.assert_array_equal(after.q, np.asarray(small.q).reshape(6, 2, 4, 2))
    np.testing.assert_array_equal(after.o, np.asarray(small.o).reshape(2, 4, 2, 6))


def test_means_of_equal_keys_undo_regrouping_and_others_change_the_function():
    small = heads(4, 2)
    op = gj.growth.pool(kv_heads=2)
    with jax.enable_x64(True):
        back = gj.chain(gj.regroup(kv_heads=4), op)(small)
        x = jnp.asarray(np.random.default_rng(5).normal(size=(5, 6)))
        full = heads(4, 4)
        assert np.abs(np.asarray(op(full)(x) - full(x))).max() > 0.01
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    certificate = gj.certify(gj.growth.pool(kv_heads=1), GPT.model(), GPT.batch(), key=KEY)
    assert certificate.exactness == "approximate" and certificate.forward[0].relative > 1e-3


def test_queries_that_come_together_keep_their_births():
    shapes = eqx.filter_eval_shape(GPT.model)
    wide = eqx.filter_eval_shape(gj.copy(heads=4), shapes)
    births = gj.Births.original(shapes).grown(gj.copy(heads=4), shapes)
    assert births.of["kv_heads"].tolist() == [0, 0, 1, 1]
    after = births.grown(gj.growth.pool(kv_heads=2), wide)
    assert after.of["kv_heads"].tolist() == [0, 1] and after.of["group"].tolist() == [0, 0]
    merged = births.grown(gj.growth.pool(kv_heads=1), wide)
    assert merged.of["kv_heads"].tolist() == [MIXED]
    # In the state of parts(...) too
    model = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), wide)
    tx = optim.parts(optax.sgd(0.1))
    state = tx.init(partition(model)[0])._replace(births=births)
    pooled = carry(gj.growth.pool(kv_heads=1), state, model, optimizer=tx).births.of
    assert all(pooled[axis].tolist() == merged.of[axis].tolist() for axis in pooled)
    after.check(eqx.filter_eval_shape(gj.growth.pool(kv_heads=2), wide))


@pytest.mark.parametrize(
    "op, message",
    [
        (gj.growth.pool(kv_heads=3), "8 of them do not fall into 3"),
        (gj.growth.pool(kv_heads=16), "do not fall into 16"),
        (gj.growth.pool(kv_heads=2, head_dim=1), "one axis at a time"),
        (gj.growth.pool(layers=1), "layers are run or chosen one by one"),
        (gj.regroup(layers=4), "layers are run or chosen one by one"),
        (gj.regroup(embed=16), "blocks.block.mlp.up has no group, and would read every copy"),
        (gj.regroup(kv_heads=16, over="head_dim"), "attention.k is summed over head_dim"),
        (gj.regroup(head_dim=8, over="kv_heads"), "no array has head_dim without kv_heads"),
    ],
    ids=str,
)
def test_what_cannot_be_pooled_or_regrouped_says_why(op, message):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        op.maps(axes_of(eqx.filter_eval_shape(EIGHT.model)))


def test_state_of_means_is_refused():
    tx = optax.trace(0.9)
    for op, architecture in [(gj.growth.pool(kv_heads=1), GPT), (gj.growth.centred(), LAYERED)]:
        shapes = eqx.filter_eval_shape(lambda m: m, architecture.model())
        state = eqx.filter_eval_shape(lambda m: tx.init(partition(m)[0]), shapes)
        with pytest.raises(StateError, match="has no dual|sums"):
            carry(op, state, shapes, optimizer=tx, key=KEY)


# RMS norms -----------------------------------------------------------------------------------------


def test_without_a_mean_a_layer_norm_is_an_rms_norm():
    model, batch = LAYERED.model(), LAYERED.batch()
    op = gj.growth.centred()
    testing.assert_contract(op, model, batch)
    with jax.enable_x64(True):
        grown = op(model)
    norms = [slot for slot in axes_of(grown).of_kind("buffer") if "embed" in slot.spec.means]
    assert len(norms) == 3 and not any(s.spec.variances for s in axes_of(grown).of_kind("buffer"))


def test_the_stream_of_an_rms_norm_grows_by_zeros_which_a_layer_norm_refuses():
    plain = testing.Architecture("GPT", (("tied", False), ("bias", False)))
    op = gj.chain(gj.growth.centred(), gj.zeros(embed=12))
    with jax.enable_x64(True), pytest.raises(GrowthError, match="zeros on 'embed' change the stat"):
        gj.zeros(embed=12)(plain.model(), key=KEY)
    testing.assert_contract(op, plain.model(), plain.batch())
    # A norm that kept its bias would let new coordinates through
    with jax.enable_x64(True), pytest.raises(GrowthError, match="norm.bias would let new coord"):
        op(LAYERED.model(), key=KEY)


@pytest.mark.parametrize(
    "architecture, message",
    [(GPT, "tied to the table"), (POST, "post-LN"), (RMS, "does not subtract the mean")],
    ids=["tied", "post", "rms"],
)
def test_a_mean_that_is_needed_is_not_taken_out(architecture, message):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        gj.growth.centred()(architecture.model())
