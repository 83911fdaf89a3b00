"""Layers between old ones: means, means of what was aligned first, and predictions."""

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
from growjax.axes import axes_of
from growjax.errors import GrowthError
from growjax.growth import between
from growjax.optim import carry
from growjax.values import from_dict, to_dict


KEY = jax.random.key(0)
GPT, GROUPED, POST, LLAMA = (testing.ARCHITECTURES[i] for i in (0, 3, 4, 7))
OPERATORS = [
    between(layers=3),
    between(layers=3, fill="transport"),
    between(layers=3, fill="transport", branch="open"),
]


@pytest.mark.parametrize("op", [*OPERATORS, between(layers=5, fill="lesa")], ids=str)
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


class Blocks(eqx.Module):
    """Gated hidden units in a stack, with a bias and a gain."""

    gain: Array = gj.param("layers: ~embed")
    up: Array = gj.param("layers: embed -> mlp")
    glu: Array = gj.param("layers: embed -> mlp")
    bias: Array = gj.param("layers: -> mlp")
    down: Array = gj.param("layers: mlp -> embed")
    scale: Array | None = gj.branch("layers")


def blocks(layers: int = 2, embed: int = 6, mlp: int = 7) -> Blocks:
    rng = np.random.default_rng(0)
    shapes = [(embed,), (embed, mlp), (embed, mlp), (mlp,), (mlp, embed)]
    with jax.enable_x64(True):
        return Blocks(*(jnp.asarray(rng.normal(size=(layers, *s))) for s in shapes))


def test_new_layers_stand_in_the_highest_gaps():
    (move,) = between(layers=6).maps(axes_of(blocks(layers=4)))
    assert move.source.tolist() == [0, 1, -1, 2, -1, 3]


def test_a_mean_lies_between_its_neighbours_and_its_branch_is_closed():
    small = blocks(layers=3)
    with jax.enable_x64(True):
        big = gj.grow(between(layers=4), small)
    for name in ("gain", "up", "glu", "bias"):
        old, new = np.asarray(getattr(small, name)), np.asarray(getattr(big, name))
        np.testing.assert_array_equal(new[[0, 1, 3]], old)
        np.testing.assert_allclose(new[2], (old[1] + old[2]) / 2, rtol=1e-15)
    assert not np.asarray(big.down)[2].any()


def test_units_are_aligned_before_their_mean_is_taken():
    """Where a layer is the one below in another order, the layer between is the one above."""
    small, order = blocks(), np.random.default_rng(1).permutation(7)
    with jax.enable_x64(True):
        turned = [x.at[1].set(x[0][..., order]) for x in (small.up, small.glu, small.bias)]
        turned.append(small.down.at[1].set(small.down[0][order]))
        small = eqx.tree_at(lambda m: (m.up, m.glu, m.bias, m.down), small, turned)
        aligned = gj.grow(between(layers=3, fill="transport", branch="open"), small)
    for name in ("up", "glu", "bias", "down"):
        new = np.asarray(getattr(aligned, name))
        # Entropy leaves a little of the other units; the plan keeps the size of what it moves
        assert np.abs(new[1] - new[2]).max() < 0.02 * np.abs(new[2]).max(), name
        assert np.abs((new[0] + new[2]) / 2 - new[2]).max() > 0.3, name


def test_heads_are_aligned_whole():
    with jax.enable_x64(True):
        model: Any = GROUPED.model()
        attention = model.blocks.block.attention
        swapped = {
            name: getattr(attention, name).at[1].set(np.flip(getattr(attention, name)[0], dim))
            for name, dim in [("q", 1), ("k", 1), ("v", 1)]
        }
        attention = eqx.tree_at(
            lambda a: [getattr(a, n) for n in swapped], attention, list(swapped.values())
        )
        model = eqx.tree_at(lambda m: m.blocks.block.attention, model, attention)
        big: Any = gj.grow(between(layers=3, fill="transport"), model)
    for name in ("q", "k", "v"):
        new = np.asarray(getattr(big.blocks.block.attention, name))
        assert np.abs(new[1] - new[2]).max() < 0.02 * np.abs(new[2]).max(), name


class Matrices(eqx.Module):
    """One matrix and one vector a layer."""

    up: Array = gj.param("layers: embed -> mlp")
    bias: Array = gj.param("layers: -> mlp")


def test_a_network_predicts_layers_from_their_neighbours():
    """Along a smooth path of layers it comes closer to the next one between than a copy does."""
    rng = np.random.default_rng(2)
    base, turn, bend = (rng.normal(size=(6, 64)) for _ in range(3))
    path = lambda t: base + t * turn + 0.3 * np.sin(t) * bend  # noqa: E731
    with jax.enable_x64(True):
        up = jnp.asarray([path(t) for t in np.linspace(0, 2, 9)])
        small = Matrices(up, jnp.asarray(rng.normal(size=(9, 64))))
        op = between(layers=10, fill="lesa", branch="open", stream="embed", epochs=100)
        big, other = (gj.grow(op, small, key=jax.random.key(n)) for n in range(2))
        with pytest.raises(GrowthError, match="pass key"):
            gj.grow(op, small)
        # As in a certificate, which computes in float64 besides
        half = jax.tree.map(lambda x: x.astype(jnp.float32), small)
        shapes: Any = eqx.filter_eval_shape(lambda m: op(m, key=jax.random.key(0)), half)
        assert shapes.up.dtype == jnp.float32
    new, true = np.asarray(big.up), path(2 - 1 / 8)
    np.testing.assert_allclose(new[[*range(8), 9]], up, rtol=1e-12)
    error = np.linalg.norm(new[8] - true) / np.linalg.norm(new[7] - true)
    assert 0 < error < 0.6
    assert not np.array_equal(new[8], np.asarray(other.up)[8])
    bias = np.asarray(small.bias)
    np.testing.assert_allclose(np.asarray(big.bias)[8], (bias[7] + bias[8]) / 2)


@pytest.mark.parametrize("fill, architecture", [("transport", GPT), ("mean", LLAMA)], ids=str)
def test_closed_layers_keep_the_function_with_what_they_are_filled_with(fill, architecture):
    op = between(layers=3, fill=fill)
    model, batch = architecture.model(), architecture.batch()
    certificate = gj.certify(op, model, batch, key=KEY)
    assert certificate.passed and certificate.gradient is not None
    testing.assert_independent(op, model, batch)


def test_new_layers_start_their_moments_anew():
    tx: Any = optax.scale_by_adam()
    small = blocks(layers=3)
    with jax.enable_x64(True):
        state: Any = tx.init(small)._replace(mu=small)
        carried: Any = carry(between(layers=4), state, small, optimizer=tx)
    for name in ("up", "down"):
        moment, old = np.asarray(getattr(carried.mu, name)), np.asarray(getattr(small, name))
        np.testing.assert_array_equal(moment[[0, 1, 3]], old)
        assert not moment[2].any()


@pytest.mark.parametrize(
    "op, architecture, message",
    [
        (between(layers=4), GPT, "2 layers have 1 gaps, too few for 2 more"),
        (between(layers=3, fill="lesa"), GPT, "learns from layers between two others"),
        (between(layers=3), POST, "post-LN"),
        (between(mlp=12), GPT, "not stacks of blocks"),
    ],
    ids=["gaps", "neighbours", "post-LN", "width"],
)
def test_what_does_not_fit_says_why(op, architecture, message):
    with pytest.raises(GrowthError, match=message):
        op.maps(axes_of(architecture.model()))
