"""Operators that are learned: LiGO starts near the small model, learns, and says what it has cost."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import growth, testing
from growjax.axes import partition
from growjax.cost import flops
from growjax.errors import GrowthError, StateError
from growjax.fitting import Fitted, fit
from growjax.growth import learned, ligo
from growjax.values import from_dict, to_dict


KEY = jax.random.key(0)
GPT, ROTARY = (testing.ARCHITECTURES[i] for i in (0, 2))
SIZES: dict[str, Any] = dict(embed=13, mlp=9, heads=3, layers=3)


def loss(model, batch):
    """The mean distance of the logits from fixed ones."""
    logits = jax.vmap(model)(batch)
    return jnp.mean((logits - jnp.cos(jnp.arange(logits.shape[-1], dtype=logits.dtype))) ** 2)


def of(op: Any, model) -> Fitted:
    return fit(op, model, [], loss, key=KEY)


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        model, batch = GPT.model(), GPT.batch()
        op = ligo(batches=30, rate=1e-2, **SIZES)
        return model, batch, fit(op, model, [batch] * 30, loss, key=KEY)


def test_a_fit_learns_and_its_operator_makes_the_model_that_it_learned(fitted):
    model, batch, result = fitted
    assert result.losses.shape == (30,) and result.losses[-1] < 0.8 * result.losses[0]
    with jax.enable_x64(True):
        big = gj.grow(result.operator, model)
        assert float(loss(big, batch)) < result.losses[-1] * 1.05
    after = gj.sizes(big)
    assert (after["embed"], after["mlp"], after["kv_heads"], after["layers"]) == (13, 9, 3, 3)
    assert result.operator.exactness == "approximate"


def test_a_learned_operator_survives_json_and_is_what_it_prints(fitted):
    op = fitted[2].operator
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


def test_a_fit_starts_near_the_small_model():
    """Even copies with their shares are the function itself, but for the noise."""
    with jax.enable_x64(True):
        model, batch = GPT.model(), GPT.batch()
        op = ligo(batches=1, noise=0.0, embed=16, mlp=12)
        losses = fit(op, model, [batch], loss, key=KEY).losses
        assert losses[0] == pytest.approx(float(loss(model, batch)), rel=1e-12)


def test_every_step_is_charged(fitted):
    """At least three times the forward pass of the large model a step, and the same for each."""
    model, batch, result = fitted
    with jax.enable_x64(True):
        big = gj.grow(result.operator, model)
        forward = flops(lambda m, b: jax.vmap(m)(b), big, batch)
    assert result.flops % 30 == 0 and result.flops // 30 > 3 * forward


class Fused(eqx.Module):
    qkv: jax.Array = gj.param("layers: embed -> (a + a)")


def test_layers_of_an_array_of_several_blocks_are_mixed_whole():
    with jax.enable_x64(True):
        small = Fused(jnp.arange(16.0).reshape(2, 2, 4))
        rows = ((1.0, 0.0), (0.0, 1.0), (0.5, -0.25))
        big = gj.grow(learned(depth={"qkv": rows}), small)
        mixed = np.einsum("nl,lio->nio", np.asarray(rows), np.asarray(small.qkv))
        np.testing.assert_array_equal(big.qkv, mixed)


def test_state_does_not_follow_what_was_learned(fitted):
    model, _, result = fitted
    tx = optax.trace(0.9)
    with jax.enable_x64(True):
        state = tx.init(partition(model)[0])
        with pytest.raises(StateError, match="has no dual|are sums of old ones"):
            gj.carry(result.operator, state, model, optimizer=tx)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: of(ligo(mlp=9), m), "fitted to 100 batches, got 0"),
        (lambda m: of(ligo(vocab=20), m), "no matrix grows these axes"),
        (lambda m: of(ligo(mlp=4), m), "growth never shrinks"),
        (lambda m: of(gj.copy(mlp=12), m), "expected an operator that is fitted"),
        (lambda m: ligo(mlp=9)(m), "is fitted to batches before it grows"),
        (lambda m: gj.grow(ligo(mlp=9), m), "is fitted to batches before it grows"),
        (lambda m: gj.certify(ligo(mlp=9), m, GPT.batch()), "is fitted to batches before it grows"),
        (lambda m: growth.chain(gj.stack(layers=3), ligo(mlp=9)), "is fitted to batches before"),
        (lambda m: growth.Chain((ligo(mlp=9),)), "is fitted to batches before"),
        (lambda m: growth.within(ligo(mlp=9), layers=(0,)), "is fitted to batches before"),
        (lambda m: learned(produced={"mlp": np.eye(6)})(m), "for what consumes it too"),
        (lambda m: learned(consumed={"mlp": np.eye(6)})(m), "for what produces it too"),
        (lambda m: learned(depth={"nothing": np.eye(2)})(m), "no array of layers has this path"),
        (
            lambda m: learned(depth={"blocks.block.mlp.up": np.eye(3)})(m),
            r"expected a matrix \[new, 2\]",
        ),
    ],
    ids=[
        "no batch",
        "table",
        "shrinks",
        "ready",
        "call",
        "grow",
        "certify",
        "chain",
        "chained",
        "within",
    ]
    + ["one side", "other side", "path", "layers"],
)
def test_what_does_not_fit_says_why(make, message):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        make(GPT.model())


def test_rotary_pairs_are_not_mixed():
    with jax.enable_x64(True), pytest.raises(GrowthError, match="ties its coordinates together"):
        fit(ligo(batches=1, head_dim=6), ROTARY.model(), [ROTARY.batch()], loss, key=KEY)
