"""One index map: what it does to every kind of leaf, against the rule written out in numpy."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

import growjax as gj
from growjax import testing
from growjax.algebra import FIRST, NONE, SECOND, WEIGHT, AxisMap, Law, Power, multiplied
from growjax.axes import axes_of, get, partition, put
from growjax.errors import AxisError, GrowthError, SubnetError
from growjax.gates import Gate
from growjax.maps import apply, carry_array
from growjax.models import GPT, T5, GPTConfig, T5Config


OLD = 4


class Leaves(eqx.Module):
    """One leaf for every role that an axis can play."""

    reads: Array = gj.param("mlp -> out")
    makes: Array = gj.param("embed -> mlp")
    bias: Array = gj.param("-> mlp")
    gain: Array = gj.param("mlp")
    rows: Array = gj.param("[mlp] -> out")
    square: Array = gj.param("mlp -> mlp")
    other: Array = gj.param("embed -> out")
    freqs: Array = gj.buffer("mlp")
    gate: Gate | None = gj.gate("mlp")


ROLES = {
    "reads": {0: "consumed"},
    "makes": {1: "produced"},
    "bias": {0: "produced"},
    "gain": {0: "elementwise"},
    "rows": {0: "lookup"},
    "square": {0: "consumed", 1: "produced"},
    "other": {},
}


def leaves(embed: int = 3):
    rng = np.random.default_rng(0)
    shape = [(OLD, 2), (embed, OLD), (OLD,), (OLD,), (OLD, 2), (OLD, OLD), (embed, 2), (OLD,)]
    arrays: list[Any] = [jnp.asarray(rng.normal(size=s)) for s in shape]
    return Leaves(*arrays)


def carried(move: AxisMap, model, tree, law: Law, **options):
    """A tree like the trained parameters after a map, every array by one law."""
    table = axes_of(model)
    slots = [slot for slot in table.having(move.axis, "param") if slot.arrays()]
    return put(
        tree,
        {
            slot.steps: carry_array(move, table, slot, get(tree, slot.steps), law, **options)
            for slot in slots
        },
    )


def sevens(key, shape, dtype):
    return jnp.full(shape, 7, dtype)


def names(key, shape, dtype):
    """A draw that shows its key, whatever the shape of the slice."""
    return jnp.full(shape, jax.random.bits(key), dtype)


def rule(x, roles, move: AxisMap, moment="weight"):
    """The definition: gather, fill what is new, and multiply by the share where it belongs."""
    moved: np.ndarray = np.asarray(x)
    fresh, power = {"weight": (7, 1), "first": (0, 1), "second": (0, 2)}[moment]
    for dim in roles:
        row = np.full_like(moved.take([0], dim), fresh)
        moved = np.concatenate([moved, row], dim).take(move.source, dim)
    share = np.asarray(move.share)
    for dim, role in roles.items() if move.share is not None else ():
        takes = (role == move.side) == (moment == "weight")
        if takes and role != "lookup":
            moved *= np.expand_dims(share**power, [d for d in range(moved.ndim) if d != dim])
    return moved


SHARES = [0.0, 0.25, 0.5, 1.0, 2.0]


@st.composite
def moves(draw, fresh=(0, 2)):
    """A map to few different sizes, with few different numbers of new coordinates."""
    new = draw(st.sampled_from([3, 6]))
    source = draw(st.lists(st.integers(0, OLD - 1), min_size=new, max_size=new))
    for place in draw(st.permutations(range(new)))[: draw(st.sampled_from(fresh))]:
        source[place] = NONE
    share = np.asarray(draw(st.lists(st.sampled_from(SHARES), min_size=new, max_size=new)))
    side = draw(st.sampled_from(["consumed", "produced"]))
    return AxisMap("mlp", source, share=share, side=side, init=sevens)


@given(moves())
def test_every_leaf_is_gathered_filled_and_shared_by_the_rule(move):
    with jax.enable_x64(True):
        before = leaves()
        after = apply(move, before, jax.random.key(0))
    for name, roles in ROLES.items():
        np.testing.assert_array_equal(
            getattr(after, name), rule(getattr(before, name), roles, move), name
        )


@given(moves())
def test_moments_follow_the_dual_of_the_map(move):
    with jax.enable_x64(True):
        before = leaves()
        trained = partition(before)[0]
        for moment, law in {"first": FIRST, "second": SECOND}.items():
            after = carried(move, before, trained, law)
            for name, roles in ROLES.items():
                expected = rule(getattr(before, name), roles, move, moment)
                np.testing.assert_array_equal(getattr(after, name), expected, f"{moment} {name}")


@given(moves(fresh=(0,)), st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_two_maps_are_the_map_of_the_composed_index(first, second):
    share = np.asarray([0.5, 2.0, 1.0, 0.25, 3.0])
    with jax.enable_x64(True):
        before = leaves()
        later = AxisMap("mlp", second, share=share, side=first.side)
        hops = apply(later, apply(first, before, None), None)
        both = share if first.share is None else first.share[second] * share
        once = AxisMap("mlp", first.source[second], share=both, side=first.side)
        assert eqx.tree_equal(hops, apply(once, before, None), rtol=1e-15)


@pytest.mark.parametrize("source", [[0, 1, NONE, 2, 3], [0, 1, 2, 3, NONE], [NONE, 3, 2, 1, 0]])
def test_new_coordinates_stand_where_the_map_has_them(source):
    after = apply(AxisMap("mlp", source, init=sevens), leaves(), jax.random.key(0))
    fresh = np.asarray(source) == NONE
    assert (np.asarray(after.makes) == 7).all(0).tolist() == fresh.tolist()
    crossing = fresh[:, None] | fresh[None, :]
    assert ((np.asarray(after.square) == 7) == crossing).all()


def test_a_buffer_is_never_drawn_but_repeats():
    before = leaves()
    after = apply(AxisMap("mlp", [0, 1, 2, 3, NONE, NONE], init=sevens), before, jax.random.key(0))
    np.testing.assert_array_equal(after.freqs, np.asarray(before.freqs)[[0, 1, 2, 3, 0, 1]])


def test_a_leaf_without_the_axis_is_left_as_it_is():
    before = leaves()
    assert apply(AxisMap("mlp", [0, 0]), before, None).other is before.other


# Norms, stacks, gates ------------------------------------------------------------------------


class Normed(eqx.Module):
    weight: Array = gj.param("~mlp")
    eps: Array = gj.buffer("<mlp>")
    makes: Array = gj.param("embed -> mlp")


class NormedRead(Normed):
    reads: Array = gj.param("mlp -> out")


def test_a_norm_over_zeros_has_its_gain_and_epsilon_rescaled():
    move = AxisMap("mlp", [0, 1, 2, 3, NONE, NONE], np.array([1, 1, 1, 1, 0, 0]), side="produced")
    move = dataclasses.replace(move, init=sevens)
    with jax.enable_x64(True):
        model = Normed(jnp.arange(1.0, 5), jnp.asarray(1e-3), jnp.ones((2, OLD)))
        after = apply(move, model, jax.random.key(0))
        first, second = (carried(move, model, partition(model)[0], law) for law in (FIRST, SECOND))
    scale = np.sqrt(4 / 6)
    np.testing.assert_allclose(after.weight, scale * np.array([1, 2, 3, 4, 7, 7]), rtol=1e-15)
    np.testing.assert_allclose(after.eps, 1e-3 * scale**2, rtol=1e-15)
    np.testing.assert_array_equal(after.makes[:, 4:], 0)
    np.testing.assert_allclose(first.weight[:4], np.arange(1, 5) / scale, rtol=1e-15)
    np.testing.assert_allclose(second.weight[:4], np.arange(1, 5) / scale**2, rtol=1e-15)
    assert not first.weight[4:].any() and not second.weight[4:].any()


def test_copies_leave_a_norm_as_it_is():
    model = NormedRead(jnp.arange(1.0, 5), jnp.asarray(1e-3), *jnp.ones((2, OLD, OLD)))
    after = apply(AxisMap("mlp", np.arange(8) % 4, share=np.full(8, 0.5)), model, None)
    np.testing.assert_array_equal(after.weight, np.tile(model.weight, 2))
    assert after.eps == model.eps


class Deep(eqx.Module):
    out: Array = gj.param("layers: mlp -> embed")
    bias: Array = gj.param("layers: -> embed")
    up: Array = gj.param("layers: embed -> mlp")
    gain: Array = gj.param("layers: embed")
    gate: Gate | None = gj.gate("layers: mlp")
    depth: Gate | None = gj.gate("layers")


def deep():
    rng = np.random.default_rng(1)
    shape = [(2, 4, 3), (2, 3), (2, 3, 4), (2, 3)]
    arrays: list[Any] = [jnp.asarray(rng.normal(size=s)) for s in shape]
    return Deep(*arrays)


def test_on_a_stack_axis_what_produces_the_stream_takes_the_share():
    share, source = np.asarray([0.5, 0.0, 2.0]), np.asarray([0, 1, 1])
    move = AxisMap("layers", source, share=share, via="embed")
    with jax.enable_x64(True):
        model = deep()
        after, dual = (
            apply(move, model, None),
            carried(move, model, partition(model)[0], FIRST),
        )
    for name in ("out", "bias", "up", "gain"):
        old = np.asarray(getattr(model, name))[source]
        shared = old * share.reshape(-1, *[1] * (old.ndim - 1))
        weight, moment = (shared, old) if name in ("out", "bias") else (old, shared)
        np.testing.assert_array_equal(getattr(after, name), weight, name)
        np.testing.assert_array_equal(getattr(dual, name), moment, name)


@pytest.mark.parametrize("source", [[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 0, 1, 0]])
def test_layers_are_copied_in_turn_and_in_any_other_order(source):
    model = deep()
    after = apply(AxisMap("layers", source), model, None)
    for name in ("out", "bias", "up", "gain"):
        expected = np.asarray(getattr(model, name))[np.array(source)]
        np.testing.assert_array_equal(getattr(after, name), expected, name)


def test_a_gate_is_zero_on_what_is_not_the_first_home_of_an_old_coordinate():
    move = AxisMap("mlp", [0, 0, 1, NONE, 2, 3, 3], gated=True, init=sevens)
    new = [False, True, False, True, False, False, True]
    assert move.is_new().tolist() == new
    gate = apply(move, deep(), jax.random.key(0)).gate
    np.testing.assert_array_equal(gate.new, [new] * 2)
    np.testing.assert_array_equal(gate.value, 1.0 - np.asarray([new] * 2))


def test_an_open_gate_moves_with_other_axes_and_new_layers_are_not_hidden_by_it():
    wide = apply(
        AxisMap("mlp", [0, 1, 2, 3, NONE], gated=True, init=sevens), deep(), jax.random.key(0)
    )
    tall = apply(
        AxisMap("layers", [1, 0, NONE], init=sevens), gj.ramp(wide, 0.25), jax.random.key(0)
    )
    np.testing.assert_array_equal(tall.gate.value[:, 4], [0.25, 0.25, 1])
    assert tall.depth is None


# Draws ---------------------------------------------------------------------------------------


def grown(source, model, key, axis="mlp", init=names):
    return apply(AxisMap(axis, source, init=init), model, key)


class More(eqx.Module):
    first: Array = gj.param("-> mlp")
    makes: Array = gj.param("embed -> mlp")


def test_a_draw_depends_on_key_leaf_axis_and_index_and_on_nothing_else(key):
    four, five = [0, 1, 2, 3, NONE], [0, 1, 2, 3, NONE, NONE]
    one = grown(five, leaves(), key)
    assert one.makes[0, 4] == grown(four, leaves(), key).makes[0, 4]  # not on how many are new
    more = grown(five, More(jnp.ones(OLD), jnp.ones((3, OLD))), key)  # nor on other leaves
    assert one.makes[0, 4] == more.makes[0, 4]
    same = grown(five, leaves(embed=OLD), key)  # nor on an axis of equal size
    assert one.makes[0, 4] == same.makes[0, 4] and same.makes.shape == (OLD, 6)
    moved = grown([NONE, 0, 1, 2, NONE], leaves(), key)  # nor on where the old ones are
    assert one.makes[0, 4] == moved.makes[0, 4]


def test_draws_differ_between_keys_leaves_axes_and_indices(key):
    five = [0, 1, 2, 3, NONE, NONE]
    one, two = grown(five, leaves(), key), grown(five, leaves(), jax.random.key(1))
    wide = grown(five, leaves(embed=OLD), key, axis="embed")
    drawn = [
        *one.makes[0, 4:],
        *two.makes[0, 4:],
        *one.reads[4:, 0],
        *one.bias[4:],
        *wide.makes[4:, 0],
    ]
    drawn += [*one.square[4], *one.square[:4, 4]]
    assert len(set(map(float, drawn))) == len(drawn)


def test_draws_are_the_same_under_jit_and_vmap(key):
    source, model = [0, 1, 2, 3, NONE], More(jnp.ones(OLD), jnp.zeros((3, OLD)))

    def bits(key, shape, dtype):
        return jax.random.bits(key, shape).astype(dtype)

    def draw(key):
        return grown(source, model, key, init=bits).makes

    eager, keys = draw(key), jnp.stack([jax.random.key(1), key])
    assert len(set(map(float, eager[:, 4]))) == 3
    np.testing.assert_array_equal(eager, jax.jit(draw)(key))
    np.testing.assert_array_equal(eager, jax.vmap(draw)(keys)[1])


def test_matched_draws_have_the_mean_and_deviation_of_the_old_tensor_layer_by_layer(key):
    def normal(key, shape, dtype):
        return jax.random.normal(key, shape, dtype)

    with jax.enable_x64(True):
        model, source = deep(), [0, 1, 2, 3, NONE]
        z = grown(source, model, key, init=normal).up[:, :, 4]
        drawn = grown(source, model, key, init="matched").up[:, :, 4]
        total = lambda m: grown(source, m, key, init="matched").up.sum()  # noqa: E731
        slope = jax.grad(total)(jax.tree.map(jnp.zeros_like, model))
    up = np.asarray(model.up)
    mean, std = up.mean((1, 2)), up.std((1, 2))
    np.testing.assert_allclose(drawn, mean[:, None] + std[:, None] * np.asarray(z), rtol=1e-12)
    # The slope of the deviation of zeros would be no number
    assert np.array_equal(slope.up, np.ones_like(up))


# Sub-networks, transposes, refusals ----------------------------------------------------------


def test_coordinates_can_be_chosen_layer_by_layer():
    source, model = np.asarray([[0, 2], [1, 3]]), deep()
    after = jax.jit(lambda s: apply(AxisMap("mlp", s), model, None))(jnp.asarray(source))
    for layer, chosen in enumerate(source):
        np.testing.assert_array_equal(after.up[layer], model.up[layer][:, chosen])
        np.testing.assert_array_equal(after.out[layer], model.out[layer][chosen])
    with pytest.raises(SubnetError, match="reads: coordinates of 'mlp' differ layer by layer"):
        apply(AxisMap("mlp", jnp.asarray(source)), leaves(), None)


def test_the_transpose_of_a_map_is_the_transposed_matrix():
    move = AxisMap("mlp", [0, 1, 1, NONE, 3], share=np.asarray([1, 0.25, 0.75, 1, 2]), init=sevens)
    gather = np.eye(OLD + 1)[move.source][:, :OLD]  # NONE is -1: a row of zeros
    shared = gather * move.share[:, None]
    with jax.enable_x64(True):
        model = leaves()
        rng = np.random.default_rng(2)
        _, transpose = jax.vjp(lambda m: apply(move, m, jax.random.key(0)).square, model)
        (back,) = transpose(jnp.asarray(y := rng.normal(size=(5, 5))))
    np.testing.assert_allclose(back.square, shared.T @ y @ gather, rtol=1e-14, atol=1e-14)
    assert not back.reads.any()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(source=[0, 9, -3]), r"source \[-3, 9\] is not among the 4 old coordinates"),
        (dict(source=[0, 1], share=np.ones(3)), r"share has shape \(3,\), expected \(2,\)"),
        (dict(source=[0, NONE], init="bogus"), "init must be .* got 'bogus'"),
    ],
)
def test_a_map_that_does_not_fit_says_why(fields, message):
    with pytest.raises(AxisError, match=f"axis 'mlp': {message}"):
        apply(AxisMap("mlp", **fields), leaves(), jax.random.key(0))


def test_a_fresh_coordinate_needs_a_key():
    move = AxisMap("mlp", [0, 1, 2, 3, NONE])
    with pytest.raises(GrowthError, match="pass key="):
        apply(move, leaves(), None)


# Laws of optimizer state ---------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0.0, 1 / 3, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("odd", [True, False])
def test_a_power_keeps_the_sign_if_it_is_odd_and_zero_at_zero(degree, odd):
    x = np.array([-2.0, -0.5, 0.0, 0.25, 3.0])
    with jax.enable_x64(True):
        powers = Power(degree, odd).of(jnp.asarray(x))
    expected = np.where(x == 0, 0, np.abs(x) ** degree * (np.sign(x) if odd else 1))
    np.testing.assert_allclose(powers, expected, rtol=1e-15)


def test_state_scales_from_its_origin_by_the_powers_of_both_sides():
    move = AxisMap("mlp", [0, 1, 1, 2, 3], share=np.array([1, 0.25, 0.75, 2, -1]))
    law = Law(gradient=Power(2), weight=Power(1, odd=True), origin=0.5)
    with jax.enable_x64(True):
        model = leaves()
        after = carried(move, model, partition(model)[0], law)
    share = move.share
    old = {name: np.asarray(getattr(model, name)) - 0.5 for name in ("reads", "bias", "square")}
    np.testing.assert_allclose(
        after.reads, 0.5 + old["reads"][move.source] * share[:, None], rtol=1e-14
    )
    np.testing.assert_allclose(after.bias, 0.5 + old["bias"][move.source] * share**2, rtol=1e-14)
    both = old["square"][move.source][:, move.source] * share[:, None] * share**2
    np.testing.assert_allclose(after.square, 0.5 + both, rtol=1e-14)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("fresh", [0.25, "own"])
def test_what_starts_anew_holds_what_it_starts_from(copies, fresh):
    move = AxisMap("mlp", [0, 1, 2, 3, 0, NONE], share=np.array([0.5, 1, 1, 1, 0.5, 0]))
    model = leaves()
    table, old = axes_of(model), np.asarray(model.square)
    own = jnp.arange(36.0).reshape(6, 6) if fresh == "own" else fresh
    slot = table["square"]
    moment = carry_array(move, table, slot, model.square, FIRST, fresh=own, copies=copies)
    anew = np.array([False] * 4 + [not copies, True])
    crossing = anew[:, None] | anew[None, :]
    follows = old[move.source][:, move.source] * np.asarray(move.share)
    np.testing.assert_allclose(moment, np.where(crossing, own, follows), rtol=1e-6)


def test_what_a_map_multiplies_is_told_by_side_and_by_sign():
    table = axes_of(leaves())
    sides = lambda slot, share, source=(0, 1, 1, 2, 3), **more: multiplied(  # noqa: E731
        AxisMap("mlp", source, share=None if share is None else np.array(share)),
        table,
        table[slot],
        **more,
    )
    assert sides("reads", [1, 0.5, 0.5, 1, 1]) == {"weight": "positive"}
    assert sides("bias", [1, 0.5, 0.5, 1, 1]) == {"gradient": "positive"}
    assert sides("gain", [1, 1.5, -0.5, 1, 1]) == {"gradient": "any"}
    assert sides("square", [1, 0.5, 0.5, 1, 1]) == {"weight": "positive", "gradient": "positive"}
    assert sides("rows", [1, 0.5, 0.5, 1, 1]) == {} == sides("bias", None)
    # Of fresh coordinates, and of copies that start anew, nothing is multiplied
    assert sides("bias", [1, 1, 0, 1, 1], (0, 1, NONE, 2, 3)) == {}
    assert sides("bias", [1, 1, 0.5, 1, 1], copies=False) == {}
    assert sides("bias", [1, 1, 0.5, 1, 1]) == {"gradient": "positive"}


def test_an_average_of_the_weights_is_gathered_with_them():
    average = carried(AxisMap("mlp", [0, 0, 1]), leaves(), partition(leaves())[0], WEIGHT)
    assert eqx.tree_equal(average.reads, leaves().reads[jnp.asarray([0, 0, 1])])


# Whole models --------------------------------------------------------------------------------


def filled(make):
    """What `make(key)` makes, every weight random: without compiling how it is drawn."""
    shapes = testing.randomise(eqx.filter_eval_shape(make, jax.random.key(0)))
    return jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.full(x.shape, 0.25), shapes)


SIZES: dict[str, Any] = dict(embed=8, heads=2, head_dim=4, mlp=6, vocab=11)


def test_a_tied_head_leaves_its_share_to_the_final_norm_whose_moments_stay():
    with jax.enable_x64(True):
        config = GPTConfig(layers=2, positions=8, **SIZES)
        model = filled(lambda key: GPT(config, key=key))
        op = gj.copy(embed=16, shares="equal")
        (move,) = op.maps(axes_of(model))
        after = jax.jit(lambda m: apply(move, m, None))(model)
        dual = jax.jit(lambda m: carried(move, m, partition(m)[0], FIRST))(model)
    inner = ("blocks", "block", "mlp_norm", "weight")
    for steps, weight, moment in [
        (("norm", "weight"), 0.5, 1),
        (("norm", "bias"), 0.5, 1),
        (("embedding", "table"), 1, 0.5),
        (inner, 1, 0.5),
    ]:
        old = np.concatenate([get(model, steps)] * 2, axis=-1)
        np.testing.assert_array_equal(get(after, steps), weight * old, str(steps))
        np.testing.assert_array_equal(get(dual, steps), moment * old, str(steps))


@pytest.mark.parametrize(
    "op", [gj.copy(embed=16, shares="equal"), gj.zeros(embed=12, init=sevens)], ids=str
)
def test_the_scale_before_the_head_of_t5_does_not_follow_embed(op, key):
    with jax.enable_x64(True):
        config = T5Config(encoder_layers=1, decoder_layers=1, **SIZES)
        model = filled(lambda key: T5(config, key=key))
        after = eqx.filter_jit(op)(model, key=key)
        assert after.output_scale == model.output_scale
        assert after.decoder_norm.eps == 0.25 * (1 if "copy" in str(op) else 8 / 12)
