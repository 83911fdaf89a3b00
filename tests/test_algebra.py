"""Linear maps: matrices, means, two sides at once, shifts and regroupings, each written out in numpy."""

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
from growjax.algebra import FIRST, MEAN, NONE, SECOND, WEIGHT, AxisMap, linear, undetermined
from growjax.axes import axes_of, partition, put
from growjax.errors import AxisError, GrowthError
from growjax.gates import Gate
from growjax.maps import apply, carry_array


OLD, LAYERS = 4, 3
KEY = jax.random.key(0)


class Leaves(eqx.Module):
    """One leaf for every role that an axis can play, in a stack of layers."""

    reads: Array = gj.param("layers: mlp -> out")
    makes: Array = gj.param("layers: embed -> mlp")
    bias: Array = gj.param("layers: -> mlp")
    gain: Array = gj.param("layers: mlp")
    rows: Array = gj.param("[mlp] -> out")
    square: Array = gj.param("mlp -> mlp")
    gate: Gate | None = gj.gate("mlp")

    def __call__(self, x):
        """Linear in what the axis holds."""
        for layer in range(self.makes.shape[0]):
            x = x + (x @ self.makes[layer] + self.bias[layer]) @ self.reads[layer]
        return x


SHAPES = dict(
    reads=(LAYERS, OLD, 2),
    makes=(LAYERS, 2, OLD),
    bias=(LAYERS, OLD),
    gain=(LAYERS, OLD),
    rows=(OLD, 2),
    square=(OLD, OLD),
)


def leaves() -> Leaves:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {n: jnp.asarray(rng.normal(size=s)) for n, s in SHAPES.items()}
    return Leaves(**arrays)


def sevens(key, shape, dtype):
    return jnp.full(shape, 7, dtype)


def carried(move: AxisMap, model, law, **options):
    """Every trained array of a model, as if it were optimizer state of one law."""
    table = axes_of(model)
    slots = [slot for slot in table.having(move.axis, "param") if slot.arrays()]
    return put(
        partition(model)[0],
        {s.steps: carry_array(move, table, s, s.value, law, **options) for s in slots},
    )


def same(ours, expected, label: str = "") -> None:
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12, err_msg=label)


def by_hand(model, p, c, e=None) -> dict[str, np.ndarray]:
    """What every leaf becomes: producers by `p`, consumers by `c`, the others by `e`."""
    m = {name: np.asarray(getattr(model, name)) for name in SHAPES}
    e = p if e is None else e
    return {
        "reads": np.einsum("no,lox->lnx", c, m["reads"]),
        "makes": np.einsum("no,lxo->lxn", p, m["makes"]),
        "bias": m["bias"] @ p.T,
        "gain": m["gain"] @ e.T,
        "rows": e @ m["rows"],
        "square": c @ m["square"] @ p.T,
    }


# Matrices ------------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    """A matrix of full rank, and a dual that is not that of least squares."""
    new = draw(st.sampled_from([4, 6]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    p = rng.normal(size=(new, OLD))
    least = np.linalg.pinv(p).T
    q, _ = np.linalg.qr(p)
    free = rng.normal(size=(new, OLD))
    return p, least + free - q @ (q.T @ free)


@given(matrices(), st.booleans())
def test_a_matrix_multiplies_what_produces_the_axis_and_its_dual_what_consumes_it(pair, given_dual):
    p, dual = pair
    c = dual if given_dual else np.linalg.pinv(p).T
    move = linear("mlp", p, dual if given_dual else None)
    with jax.enable_x64(True):
        before = leaves()
        after, moments = apply(move, before, None), carried(move, before, FIRST)
    for name, expected in by_hand(before, p, c).items():
        same(getattr(after, name), expected, name)
    dual_way = by_hand(before, c, p)
    for name in ("reads", "makes", "bias", "square"):
        same(getattr(moments, name), dual_way[name], f"moment of {name}")


@pytest.mark.parametrize("new", [4, 6])
def test_the_gradient_of_a_grown_linear_axis_is_what_the_dual_says(new):
    p = np.random.default_rng(new).normal(size=(new, OLD))
    move = linear("mlp", p)
    x = np.random.default_rng(9).normal(size=(5, 2))
    loss = lambda model: jnp.sum(jnp.sin(model(x)))  # noqa: E731
    with jax.enable_x64(True):
        small = leaves()
        grow = lambda model: apply(move, model, None)  # noqa: E731
        big, transpose = jax.vjp(grow, small)
        gradient, expected = jax.grad(loss)(big), jax.grad(loss)(small)
        (back,) = transpose(gradient)
        predicted = carried(move, put(small, {(n,): getattr(expected, n) for n in SHAPES}), FIRST)
        same(loss(big), loss(small))
    for name in ("reads", "makes", "bias"):
        same(getattr(back, name), getattr(expected, name), name)
        same(getattr(predicted, name), getattr(gradient, name), name)


def test_rows_with_one_entry_are_sources_and_multipliers():
    move = linear("mlp", [[0, 2, 0], [1, 0, 0], [0, 0, -1], [0, 2, 0]])
    assert move.source.tolist() == [1, 0, 2, 1] and not move.mixes
    np.testing.assert_array_equal(move.produced, [2, 1, -1, 2])
    np.testing.assert_array_equal(move.consumed, [0.25, 1, -1, 0.25])
    plain = linear("mlp", np.eye(3)[[2, 0, 1]])
    assert plain.produced is None and plain.consumed is None


@pytest.mark.parametrize(
    "matrix, dual, message",
    [
        (np.ones((5, 4)), None, "has rank 1, so 4 old coordinates cannot be told apart"),
        (np.eye(4)[:3], None, "has rank 3, so 4"),
        (np.eye(4), 2 * np.eye(4), r"differs from the identity by 1.0e\+00 at \[0, 0\]"),
        (np.eye(4), np.eye(5), r"dual: expected finite .* got shape \(5, 5\)"),
        (np.full((4, 4), np.nan), None, "matrix: expected finite numbers"),
        (np.ones(4), None, r"matrix: expected .* got shape \(4,\)"),
    ],
    ids=["low rank", "shrinks", "wrong dual", "dual's shape", "not finite", "no matrix"],
)
def test_a_matrix_without_a_dual_is_refused(matrix, dual, message):
    with pytest.raises(AxisError, match=message):
        linear("mlp", matrix, dual)


def test_a_matrix_may_be_learned():
    """LiGO: the loss of the grown model is a function of the matrix, under jit."""
    p = np.random.default_rng(1).normal(size=(6, OLD))
    x = np.random.default_rng(9).normal(size=(5, 2))

    def loss(p):
        grown = apply(AxisMap("mlp", np.full(6, NONE), produced=p, consumed=p), leaves(), None)
        return jnp.sum(jnp.sin(grown(x)))

    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(loss))(jnp.asarray(p))
        step = 1e-6 * np.random.default_rng(2).normal(size=p.shape)
        change = loss(jnp.asarray(p + step)) - loss(jnp.asarray(p - step))
        np.testing.assert_allclose(change / 2, np.sum(np.asarray(slope) * step), rtol=1e-5)


def test_one_side_alone_may_be_a_matrix():
    """LEMON's consumers: rows that sum to the old one, and no two of them equal."""
    source = np.asarray([0, 1, 2, 3, 0, 1, 2, 3])
    noise = np.random.default_rng(3).normal(size=(4, OLD))
    c = np.concatenate([0.5 * np.eye(OLD) + noise, 0.5 * np.eye(OLD) - noise])
    move = AxisMap("mlp", source, consumed=c)
    p = np.eye(OLD)[source]
    with jax.enable_x64(True):
        before = leaves()
        after, moments = apply(move, before, None), carried(move, before, FIRST)
        x = np.random.default_rng(9).normal(size=(5, 2))
        same(after(x), before(x))
    for name, expected in by_hand(before, p, c).items():
        same(getattr(after, name), expected, name)
    for name in ("makes", "reads", "bias"):
        same(getattr(moments, name), by_hand(before, c, p)[name], name)


# Multipliers on both sides, and means --------------------------------------------------------


def test_both_sides_and_elementwise_leaves_take_multipliers_of_their_own():
    source = np.asarray([0, 1, 2, 3, 1])
    p, c, e = (np.asarray(v) for v in ([1, 2, 1, 3, 0.5], [1, 0.4, 1, 5, 0.2], [1, 1, 2, 1, 1]))
    move = AxisMap("mlp", source, produced=p, consumed=c, elementwise=e)
    s = np.eye(OLD)[source]
    with jax.enable_x64(True):
        before = leaves()
        after = apply(move, before, None)
        first, second = (carried(move, before, law) for law in (FIRST, SECOND))
    for name, expected in by_hand(before, p[:, None] * s, c[:, None] * s).items():
        if name != "gain":
            same(getattr(after, name), expected, name)
    same(after.gain, np.asarray(before.gain)[:, source] * e)
    same(first.gain, np.asarray(before.gain)[:, source] * p * c)
    for name in ("reads", "makes", "bias"):
        same(getattr(first, name), by_hand(before, c[:, None] * s, p[:, None] * s)[name], name)
    squares = by_hand(before, c[:, None] ** 2 * s, p[:, None] ** 2 * s)
    for name in ("reads", "makes", "bias"):
        same(getattr(second, name), squares[name], name)


def test_mean_rows_are_means_in_what_produces_the_axis_and_fresh_elsewhere():
    move = AxisMap("mlp", [0, 1, 2, 3, MEAN], init=sevens)
    mean = np.concatenate([np.eye(OLD), np.full((1, OLD), 0.25)])
    with jax.enable_x64(True):
        before = leaves()
        after = apply(move, before, KEY)
        first, average = (carried(move, before, law) for law in (FIRST, WEIGHT))
    zero = np.concatenate([np.eye(OLD), np.zeros((1, OLD))])
    expected = by_hand(before, mean, zero)
    for name in ("makes", "bias", "rows"):
        same(getattr(after, name), expected[name], name)
        same(getattr(average, name), expected[name], f"average of {name}")
    same(after.reads[:, 4], np.full((LAYERS, 2), 7.0))
    same(after.gain[:, 4], np.full(LAYERS, 7.0))
    same(after.square[:4], np.asarray(before.square) @ mean.T)
    for name, dim in dict(makes=2, bias=1, reads=1, gain=1, rows=0).items():
        assert not np.take(np.asarray(getattr(first, name)), 4, axis=dim).any(), name


def normed(kind: str, old: int = 4):
    """A producer, a norm with its epsilon as data, and a consumer."""

    class Model(eqx.Module):
        makes: Array = gj.param("input -> embed")
        weight: Array = gj.param("~embed")
        bias: Array = gj.param("embed", init="zeros")
        reads: Array = gj.param("embed -> out")
        eps: Array = gj.buffer("<~embed>" if kind == "layer" else "<embed>")

        def __call__(self, x):
            h = x @ self.makes
            if kind == "layer":
                h = h - h.mean(-1, keepdims=True)
            h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + self.eps)
            return (h * self.weight + self.bias) @ self.reads

    rng = np.random.default_rng(4)
    shapes = [(3, old), (old,), (old,), (old, 2)]
    arrays = [jnp.asarray(rng.normal(size=s)) for s in shapes]
    if kind == "rms":
        arrays[2] = jnp.zeros(old)
    return Model(*arrays, eps=jnp.asarray(0.3))


def lemon(kind: str, old: int, new: int, init: Any = "normal") -> AxisMap:
    """LEMON: whole turns of copies, and a rest that is the mean (LayerNorm) or zero (RMSNorm)."""
    turns = new // old
    rest = new - turns * old
    source = np.asarray([*range(old)] * turns + [MEAN if kind == "layer" else NONE] * rest)
    copies = np.arange(new) < turns * old
    consumed = np.where(copies, 1 / turns, 1.0)
    produced = np.where(copies, 1.0, 0.0) if kind == "rms" else None
    return AxisMap("embed", source, produced=produced, consumed=consumed, init=init)


@pytest.mark.parametrize("new", [6, 10])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_lemon_rows_keep_what_a_norm_computes_at_any_size(kind, new):
    x = np.random.default_rng(5).normal(size=(6, 3))
    move = lemon(kind, 4, new)
    with jax.enable_x64(True):
        small = normed(kind)
        big, transpose = jax.vjp(lambda m: apply(move, m, KEY), small)
        loss = lambda model: jnp.sum(jnp.sin(model(x)))  # noqa: E731
        same(big(x), small(x))
        (back,) = transpose(jax.grad(loss)(big))
        expected = jax.grad(loss)(small)
    turns = new // 4
    same(big.eps, 0.3 * turns * 4 / new)
    same(big.weight[:4], np.asarray(small.weight) * np.sqrt(turns * 4 / new))
    rest = np.asarray(big.makes)[:, turns * 4 :]
    same(rest, np.asarray(small.makes).mean(1, keepdims=True) * (kind == "layer") + 0 * rest)
    assert np.abs(np.asarray(big.reads)[turns * 4 :]).min() > 0  # free: what they read is zero
    for name in ("makes", "weight", "bias", "reads"):
        same(getattr(back, name), getattr(expected, name), name)


def test_moments_of_what_feeds_a_norm_follow_where_they_can_and_say_so_where_not():
    table = axes_of(normed("layer"))
    even = AxisMap("embed", np.arange(8) % 4, share=np.full(8, 0.5))
    uneven = AxisMap("embed", np.arange(8) % 4, share=np.repeat([0.25, 0.75], 4))
    for name in ("makes", "weight", "reads"):
        assert undetermined(even, table, table[name]) == ""
        reason = undetermined(uneven, table, table[name])
        assert ("norms over embed mix" in reason) == (name == "makes")
        reason = undetermined(lemon("layer", 4, 6), table, table[name])
        assert ("norms over embed mix" in reason) == (name == "makes")
    rms = axes_of(normed("rms"))
    assert undetermined(lemon("rms", 4, 10), rms, rms["makes"]) == ""


@pytest.mark.parametrize("new", [6, 10])
def test_the_gradient_before_an_rms_norm_is_what_the_dual_of_lemon_rows_says(new):
    x = np.random.default_rng(5).normal(size=(6, 3))
    move = lemon("rms", 4, new)
    loss = lambda model: jnp.sum(jnp.sin(model(x)))  # noqa: E731
    with jax.enable_x64(True):
        small = normed("rms")
        gradient = jax.grad(loss)(apply(move, small, KEY))
        old = jax.grad(loss)(small)
        fields = ("makes", "weight", "reads")
        predicted = carried(move, put(small, {(n,): getattr(old, n) for n in fields}), FIRST)
    copies = 4 * (new // 4)
    same(predicted.makes[:, :copies], gradient.makes[:, :copies])
    same(predicted.weight[:copies], gradient.weight[:copies])
    same(predicted.reads, gradient.reads)


@pytest.mark.parametrize(
    "kind, source, produced, message",
    [
        ("rms", [0, 1, 2, 3, MEAN], None, "means on 'embed' change the statistics"),
        ("layer", [0, 1, 2, 3, NONE], [1, 1, 1, 1, 0], "zeros on 'embed' change the statistics"),
        ("layer", [0, 1, 2, 3, 0, MEAN], None, "old coordinates count 1 to 2 times"),
    ],
)
def test_rows_that_a_norm_would_see_are_refused(kind, source, produced, message):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        apply(AxisMap("embed", source, produced=produced), normed(kind), KEY)


def test_what_producers_are_scaled_by_a_norm_takes_out_again():
    x = np.random.default_rng(5).normal(size=(6, 3))
    for kind in ("layer", "rms"):
        with jax.enable_x64(True):
            small = normed(kind)
            small = put(small, {("bias",): 0 * small.bias})
            move = AxisMap("embed", range(4), produced=np.full(4, 0.5), consumed=np.full(4, 2.0))
            same(apply(move, small, None)(x), small(x), kind)


# The next layer ------------------------------------------------------------------------------


def test_new_rows_come_from_the_next_layer_where_the_axis_is_produced():
    source = np.asarray([0, 1, 2, 3, 1, 3])
    share = np.asarray([1, 0.5, 1, 0.5, 0.5, 0.5])
    move = AxisMap("mlp", source, share=share, above=True)
    with jax.enable_x64(True):
        before = leaves()
        after = apply(move, before, None)
        young = carried(move, before, FIRST, copies=False)
    own = by_hand(before, np.eye(OLD)[source], share[:, None] * np.eye(OLD)[source])
    for name in ("reads", "gain", "rows", "square"):
        same(getattr(after, name), own[name], name)
    for name in ("makes", "bias"):
        for layer in range(LAYERS):
            above = min(layer + 1, LAYERS - 1)
            same(getattr(after, name)[layer][..., :4], own[name][layer][..., :4], name)
            same(getattr(after, name)[layer][..., 4:], own[name][above][..., 4:], name)
        assert not np.asarray(getattr(young, name))[..., 4:].any()
        same(getattr(young, name)[..., :4], np.asarray(getattr(before, name)) * share[:4])
    table = axes_of(before)
    assert "come from the next layer" in undetermined(move, table, table["makes"])
    assert undetermined(move, table, table["makes"], copies=False) == ""
    assert undetermined(move, table, table["reads"]) == ""


# An axis of size one -------------------------------------------------------------------------


class Experts(eqx.Module):
    """One expert, that a router will choose among several of."""

    router: Array = gj.param("embed -> experts")
    up: Array = gj.param("[experts] embed -> mlp")


def test_an_axis_is_born_from_size_one():
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        small = Experts(
            jnp.asarray(rng.normal(size=(3, 1))), jnp.asarray(rng.normal(size=(1, 3, 2)))
        )
        move = AxisMap("experts", np.zeros(4, int))
        after, moments = apply(move, small, None), carried(move, small, FIRST)
    same(after.up, np.repeat(small.up, 4, axis=0))
    same(after.router, np.repeat(small.router, 4, axis=1))
    same(moments.up, after.up)


# What does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(produced=np.ones(3)), r"produced has shape \(3,\), expected \(4,\) .* \(4, 4\)"),
        (dict(consumed=np.ones((4, 3))), r"consumed has shape \(4, 3\)"),
        (dict(elementwise=np.ones((3, 4))), r"elementwise has shape \(3, 4\)"),
        (dict(share=np.ones(4), consumed=np.ones(4)), "share and consumed are two multipliers"),
        (dict(produced=np.eye(4), gated=True), "gated: a gate hides fresh"),
    ],
    ids=["vector", "matrix", "elementwise", "twice", "gated"],
)
def test_sides_that_do_not_fit_say_why(fields, message):
    with pytest.raises(AxisError, match=f"axis 'mlp': {message}"):
        apply(AxisMap("mlp", range(4), **fields), leaves(), KEY)


class Masked(eqx.Module):
    mask: Array = gj.param("mlp -> embed")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_], ids=["numbers", "flags"])
def test_whole_numbers_and_flags_are_not_rounded(dtype):
    before, ones = Masked(jnp.ones((2, 3), dtype)), np.ones(2)
    for move, change in [
        (AxisMap("mlp", [0, 1, 0], share=[0.5, 1, 0.5]), "multiplied"),
        (AxisMap("mlp", [0, 1, NONE]), "drawn"),
        (AxisMap("embed", [0, 1, 2, MEAN]), "averaged"),
    ]:
        with pytest.raises(GrowthError, match=f"mask: entries would be {change}, and .* gj.buffer"):
            apply(move, before, KEY)
    for move in (AxisMap("mlp", [0, 1, 1], share=[*ones, 1]), AxisMap("mlp", [1], share=[1])):
        assert apply(move, before, None).mask.dtype == dtype
