"""Operators as values, lists of source layers, and every trap that exact growth can fall into."""

import json
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import growth, testing
from growjax.axes import axes_of, get, put, sizes
from growjax.errors import FormatError, GrowjaxError, GrowthError
from growjax.gates import Gate
from growjax.growth import resolve
from growjax.models import BERT, GPT, BERTConfig, GPTConfig
from growjax.nn import Attention, Embedding, Norm, Rotary, logits
from growjax.values import from_dict, to_dict


def sevens(key, shape, dtype):
    """New weights that no closed side may let through."""
    return jnp.full(shape, 7, dtype)


@eqx.filter_jit
def run(model, x):
    return model(x)


grown = eqx.filter_jit(lambda op, model: op(model, key=jax.random.key(0)))


def change(model, other, x=None) -> float:
    """How far outputs are from those of `model`, relative to the largest."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 8))) if x is None else x
    before, after = np.asarray(run(model, x)), np.asarray(run(other, x))
    assert before.dtype == np.float64
    return np.abs(before - after).max() / np.abs(before).max()


# Requests ------------------------------------------------------------------------------------


def filled(make, eps: float = 1e-5):
    """What `make(key)` makes, every weight random: without compiling how it is drawn."""
    with jax.enable_x64(True):
        shapes = testing.randomise(eqx.filter_eval_shape(make, jax.random.key(0)))
        return jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.full(x.shape, eps), shapes)


SIZES: dict[str, Any] = dict(layers=2, embed=8, heads=2, head_dim=4, mlp=6, vocab=11, positions=8)


def gpt():
    return filled(lambda key: GPT(GPTConfig(**SIZES), key=key))


def heads(count: int, kv_heads: int, head_dim: int, **options):
    """Attention over a stream of 8."""
    return filled(lambda key: Attention(8, count, kv_heads, head_dim, key=key, **options))


@pytest.mark.parametrize(
    "old, asked, wanted",
    [
        ((4, 4), dict(heads=6), dict(kv_heads=6)),
        ((4, 4), dict(heads=8, kv_heads=4), dict(group=2)),
        ((4, 4), dict(heads=12, kv_heads=6), dict(kv_heads=6, group=2)),
        ((4, 2), dict(heads=8), dict(group=4)),
        ((4, 2), dict(heads=9, kv_heads=3), dict(kv_heads=3, group=3)),
        ((4, 2), dict(heads=6, kv_heads=3), dict(kv_heads=3)),
        ((4, 2), dict(kv_heads=4), dict(kv_heads=4)),
        ((4, 1), dict(heads=5), dict(group=5)),
        ((4, 2), dict(heads=4, embed=8), {}),
    ],
)
def test_heads_are_query_heads(old, asked, wanted):
    shapes = eqx.filter_eval_shape(
        lambda key: Attention(8, old[0], old[1], 2, key=key), jax.random.key(0)
    )
    assert resolve(axes_of(shapes), asked) == wanted


def test_requests_are_refused_all_at_once():
    shapes = eqx.filter_eval_shape(lambda key: Attention(8, 4, 2, 2, key=key), jax.random.key(0))
    with pytest.raises(GrowthError) as caught:
        resolve(axes_of(shapes), dict(heads=7, embed=4, head_dim=0))
    for line in ("heads=7 cannot be shared evenly by 2", "embed=4 is smaller than", "head_dim: "):
        assert line in str(caught.value)


# Operators as data ---------------------------------------------------------------------------

OPERATORS = [
    gj.msg(mlp=8),
    gj.msg(embed=12, layers=4, init="copy", order="top"),
    gj.copy(mlp=9, order="random", shares="random", seed=3),
    gj.copy(mlp=(0, 1, 2, 3, 4, 5, 5)),
    gj.zeros(mlp=10, init="matched"),
    gj.stack(layers=4, order="insert", branch="zero", stream="width"),
    gj.stack(layers=(0, 1, 1)),
    gj.stack(layers=(0, 1, 1), scale={"up": 0.9, "*.down": 0.0}),
    gj.msg(layers=4, init="born", opens="in turn"),
    gj.chain(gj.msg(mlp=8), gj.chain(gj.stack(layers=4), gj.copy(embed=16))),
    gj.chain(),
]


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_an_operator_survives_json(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_an_operator_prints_as_it_is_written(op):
    assert eval(repr(op), vars(growth).copy()) == op
    assert repr(gj.msg(mlp=8, init=sevens)) == "msg(mlp=8, init=sevens)"


def test_a_callable_is_saved_if_an_import_leads_to_it():
    local = gj.chain(gj.msg(mlp=8), gj.zeros(mlp=9, init=lambda key, shape, dtype: jnp.ones(shape)))
    with pytest.raises(
        FormatError, match=r"operators\[1\].init: .*no import leads to this function"
    ):
        to_dict(local)
    named = gj.zeros(mlp=9, init=sevens)
    assert from_dict(json.loads(json.dumps(to_dict(named)))) == named


def test_operators_differ_where_their_fields_do():
    assert gj.msg(mlp=8) != gj.msg(mlp=9) and gj.msg(mlp=8) != gj.zeros(mlp=8)
    assert gj.copy(mlp=8, seed=1) != gj.copy(mlp=8)


def test_a_chain_is_flat_and_promises_what_its_weakest_member_does():
    op = gj.chain(gj.msg(mlp=8), gj.chain(gj.copy(mlp=9), gj.msg(mlp=10)))
    assert len(op.operators) == 3 and op.exactness == "exact-given-init"
    assert gj.chain(gj.msg(mlp=8)).exactness == gj.chain().exactness == "exact"
    assert gj.chain(op, gj.stack(layers=4)).exactness == "approximate"
    assert gj.stack(layers=4, branch="zero").exactness == "exact-given-init"


# Growing -------------------------------------------------------------------------------------


class Tiny(eqx.Module):
    up: Array = gj.param("layers: embed -> mlp")
    down: Array = gj.param("layers: mlp -> embed")
    bias: Array = gj.param("-> embed")
    gate: Gate | None = gj.gate("mlp")


def tiny():
    rng = np.random.default_rng(0)
    shape = [(3, 4, 6), (3, 6, 4), (4,)]
    arrays: list[Any] = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shape]
    return Tiny(*arrays)


@pytest.mark.parametrize(
    "op",
    [
        gj.chain(),
        gj.msg(mlp=6, layers=3),
        gj.copy(mlp=6),
        gj.zeros(mlp=6),
        gj.stack(layers=3, branch="zero"),
        gj.stack(layers=(0, 1, 2)),
    ],
    ids=str,
)
def test_growth_to_the_same_size_is_the_identity(op):
    assert eqx.tree_equal(gj.grow(op, tiny()), tiny())


def test_a_list_of_the_same_length_is_still_applied():
    flipped = gj.grow(gj.copy(mlp=(5, 4, 3, 2, 1, 0)), tiny())
    np.testing.assert_array_equal(flipped.up, tiny().up[..., ::-1])


def test_growth_is_pure_and_the_same_under_jit_vmap_and_shapes(key):
    def bits(key, shape, dtype):
        return jax.random.bits(key, shape).astype(dtype)

    op, model = gj.msg(mlp=8, init=bits), tiny()
    keys = jnp.stack([jax.random.key(1), key])
    one = gj.grow(op, model, key=key)
    assert eqx.tree_equal(model, tiny())
    assert eqx.tree_equal(one, gj.grow(op, model, key=key))
    assert eqx.tree_equal(one, op(model, key=key))
    many = jax.vmap(lambda k: op(model, key=k))(keys)
    assert eqx.tree_equal(one, jax.tree.map(lambda x: x[1], many))
    assert not np.array_equal(many.up[0], many.up[1])
    shapes = eqx.filter_eval_shape(op, model, key=key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


@pytest.mark.parametrize("op", [gj.copy(mlp=12), gj.copy(mlp=6)], ids=str)
def test_donated_arrays_are_freed_and_grown_ones_are_not(op):
    model = tiny()
    after = gj.grow(op, model, donate=True)
    held = {id(leaf) for leaf in jax.tree.leaves(after)}
    assert all(leaf.is_deleted() == (id(leaf) not in held) for leaf in jax.tree.leaves(model))
    assert len(held) == len(jax.tree.leaves(model))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    owned = tiny()
    gj.grow(op, owned)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(owned))


class Biases(eqx.Module):
    down: Array = gj.param("mlp -> embed")
    mlp: Array = gj.param("-> mlp")
    embed: Array = gj.param("-> embed")


def test_an_array_at_two_places_is_not_freed_while_one_of_them_holds_it():
    zeros = jnp.zeros(4)
    after = gj.grow(gj.copy(mlp=8), Biases(jnp.ones((4, 4)), zeros, zeros), donate=True)
    assert after.embed is zeros and after.mlp.shape == (8,)
    assert not zeros.is_deleted()


@pytest.mark.parametrize("order", ["repeat", "interleave"])
def test_stacking_twice_is_stacking_once_by_the_product(order):
    twice = gj.chain(gj.stack(layers=6, order=order), gj.stack(layers=12, order=order))
    once = gj.stack(layers=12, order=order)
    assert eqx.tree_equal(gj.grow(twice, tiny()), gj.grow(once, tiny()))
    source = np.asarray([0, 1, 2] * 4 if order == "repeat" else np.repeat([0, 1, 2], 4))
    np.testing.assert_array_equal(gj.grow(once, tiny()).up, tiny().up[source])


def test_stacking_jumps_and_block_expansion_does_not():
    with jax.enable_x64(True):
        model = gpt().blocks
        stacked = grown(gj.stack(layers=4), model)
        expanded = grown(gj.stack(layers=4, order="insert", branch="zero"), model)
        assert change(model, stacked) > 1e-3
        assert change(model, expanded) < 1e-12
    old, new = model.block, expanded.block
    for name in ("o", "o_bias"):
        assert not get(new, ("attention", name))[1::2].any()
    assert not new.mlp.down[1::2].any() and not new.mlp.down_bias[1::2].any()
    np.testing.assert_array_equal(new.mlp.down[::2], old.mlp.down)
    np.testing.assert_array_equal(new.mlp.up, np.repeat(old.mlp.up, 2, axis=0))


# Traps ---------------------------------------------------------------------------------------


class ReadOut(eqx.Module):
    """An embedding, the last norm and a head: what is special about `embed`."""

    embedding: Embedding
    norm: Norm
    head: Array | None = gj.param("embed -> vocab")

    def __call__(self, tokens):
        x = self.norm(self.embedding(tokens))
        return self.embedding.attend(x) if self.head is None else logits(x, self.head)


TOKENS = np.asarray([3, 1, 4, 1])


def read_out(tied: bool, kind: Any = "rms", scale: float = 1.0):
    def make(key):
        norm = Norm(8, kind, side="consumed" if tied else "elementwise")
        return ReadOut(Embedding(7, 8, key=key), norm, None if tied else jnp.ones((8, 7)))

    with jax.enable_x64(True):
        model = filled(make)
        return put(model, {("embedding", "table"): model.embedding.table * scale})


@pytest.mark.parametrize("tied", [True, False])
def test_trap_the_epsilon_of_a_norm_counts_where_activations_are_small(tied):
    model = read_out(tied, scale=0.05)  # deviation 0.02, epsilon 1e-5
    with jax.enable_x64(True):
        after = grown(gj.zeros(embed=12, init=sevens), model)
        unscaled = put(after, {("norm", "eps"): model.norm.eps})
        assert change(model, after, TOKENS) < 1e-12
        assert change(model, unscaled, TOKENS) > 1e-3


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_trap_a_tied_head_reads_what_it_also_produces(tied, kind):
    model = read_out(tied, kind)
    with jax.enable_x64(True):
        after = grown(gj.copy(embed=24, shares="equal"), model)
        assert change(model, after, TOKENS) < 1e-12
        assert float(after.norm.weight[0] / model.norm.weight[0]) == (1 / 3 if tied else 1)


def test_trap_zeros_count_as_full_coordinates_in_a_norm_that_is_still_ramping():
    with jax.enable_x64(True):
        model = gj.ramp(grown(gj.msg(embed=12, init=sevens), read_out(tied=True)), 0.3)
        assert change(model, grown(gj.copy(embed=24), model), TOKENS) < 1e-12
        with pytest.raises(GrowjaxError, match="embed"):
            gj.zeros(embed=16, init=sevens)(model, key=jax.random.key(0))


class Turned(eqx.Module):
    rotary: Rotary
    attention: Attention

    def __call__(self, x):
        return self.attention(x, turn=self.rotary(jnp.arange(x.shape[0])))


@pytest.mark.parametrize(
    "op",
    [gj.copy(head_dim=8), gj.zeros(head_dim=6, init=sevens), gj.msg(head_dim=6, init=sevens)],
    ids=str,
)
def test_trap_rotary_pairs_keep_their_frequencies(op):
    with jax.enable_x64(True):
        model = Turned(Rotary(4), heads(2, 1, 4))
        after = grown(op, model)
        new = after.rotary.freqs.shape[0]
        assert change(model, after) < 1e-12
        np.testing.assert_array_equal(after.rotary.freqs, np.resize(model.rotary.freqs, new))
        assert change(model, put(after, {("rotary",): Rotary(new)})) > 1e-2


def test_trap_rotary_pairs_are_not_torn_by_random_copies():
    with jax.enable_x64(True), pytest.raises(GrowthError, match="head_dim: .*rotary"):
        gj.copy(head_dim=8, order="random")(Turned(Rotary(4), heads(2, 1, 4)))


@pytest.mark.parametrize(
    "op", [gj.copy(head_dim=8, shares="equal"), gj.msg(head_dim=6, init=sevens)], ids=str
)
def test_trap_a_norm_of_queries_and_keys_averages_over_head_dim(op):
    model = heads(2, 1, 4, qk_norm=True)
    with jax.enable_x64(True):
        after = grown(op, model)
        assert change(model, after) < 1e-12
        share = 0.5 if "copy" in str(op) else 1  # behind the norms only a gain can take it
        np.testing.assert_array_equal(after.k_norm.weight[:4], share * model.k_norm.weight)
        np.testing.assert_array_equal(after.q_norm.weight[:4], model.q_norm.weight)
        np.testing.assert_array_equal(after.k[..., :4], model.k)


@pytest.mark.parametrize("grow", ["queries", "keys", "both"])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_trap_heads_that_share_keys_grow_inside_their_group(shared, grow):
    kv = 4 // shared
    more = {
        "queries": dict(heads=8, kv_heads=kv),
        "keys": dict(kv_heads=2 * kv),
        "both": dict(heads=16, kv_heads=2 * kv),
    }[grow]
    expected = {
        "queries": (kv, 2 * shared), "keys": (2 * kv, shared), "both": (2 * kv, 2 * shared)
    }[grow]  # fmt: skip
    model = heads(4, kv, 2)
    with jax.enable_x64(True):
        for op in (gj.copy(**more), gj.msg(**more, init=sevens)):
            after = grown(op, model)
            assert (sizes(after)["kv_heads"], sizes(after)["group"]) == expected
            assert change(model, after) < 1e-12, op


@pytest.mark.parametrize(
    "axis", [dict(embed=12), dict(mlp=8), dict(heads=4), dict(layers=3)], ids=str
)
def test_trap_output_biases_survive_every_growth(axis):
    with jax.enable_x64(True):
        model = filled(lambda key: BERT(BERTConfig(**SIZES), key=key))
        after = grown(gj.msg(**axis, init=sevens), model)
    assert np.abs(model.mlm.decoder_bias).min() > 0 and sizes(after) != sizes(model)
    np.testing.assert_array_equal(after.mlm.decoder_bias, model.mlm.decoder_bias)
    np.testing.assert_array_equal(after.nsp_bias, model.nsp_bias)


@pytest.mark.parametrize("axis", ["vocab", "positions"])
@pytest.mark.parametrize("operator", [gj.msg, gj.copy, gj.zeros, gj.stack])
def test_trap_tables_that_are_indexed_do_not_grow_by_width(operator, axis):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=axis):
        operator(**{axis: 16})(gpt())


def test_what_no_map_touches_is_not_copied(key):
    small = testing.ARCHITECTURES[0].model(dtype=jnp.float32)
    big = gj.grow(gj.copy(mlp=9), small, key=key)
    shared = {
        path
        for path, slot in gj.axes_of(small).items()
        if slot.arrays() and gj.axes_of(big)[path].value is slot.value
    }
    arrays = {path for path, slot in gj.axes_of(small).items() if slot.arrays()}
    moved = {slot.path for slot in gj.axes_of(small).having("mlp") if slot.arrays()}
    assert moved and shared == arrays - moved


# As text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        gj.msg(mlp=32, init="zeros", order="interpolate"),
        gj.copy(mlp=(0, 1, 1), order="random", shares="random", seed=2),
        gj.stack(layers=(0, 1, 1), branch="split", stream="embed"),
        gj.stack(layers=4, order="insert", branch="zero"),
        gj.zeros(heads=8, init="matched"),
        gj.chain(gj.copy(embed=16), gj.stack(layers=4), gj.zeros(mlp=9)),
    ],
)
def test_an_operator_is_what_it_prints(op):
    assert gj.growth.parse(str(op)) == op


def test_words_need_no_quotes_and_solar_is_a_list():
    text = " stack(layers=solar(4, dropped=1), branch=zero)\n"
    assert gj.growth.parse(text) == gj.stack(layers=(0, 1, 2, 1, 2, 3), branch="zero")


@pytest.mark.parametrize(
    "text, message",
    [
        ("copy(mlp=9", "cannot be read"),
        ("copy", "expected an operator"),
        ("solar(4, 1)", "expected an operator"),
        ("__import__('os')", "expected one of aki, between, centred, chain"),
        ("copy.__init__(mlp=9)", "expected numbers, words, tuples and operators"),
        ("copy(mlp=open('x'))", "expected one of aki"),
        ("copy(9)", "copy: too many positional arguments"),
        ("copy(**{'mlp': 9})", "an argument without a name"),
        ("chain(copy(mlp=9), 3)", "op: expected an operator such as gj.msg"),
    ],
)
def test_a_text_that_is_no_operator_is_refused(text, message):
    with pytest.raises(GrowthError, match=re.escape(message)):
        gj.growth.parse(text)
