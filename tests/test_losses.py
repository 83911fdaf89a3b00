"""How an example of an objective meets a model: who sees whom, and what counts."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax.models import GPT, T5, Llama, LlamaConfig, T5Config
from growjax.models.protocol import predictions
from growjax.plan.optimizer import Optimizer
from growjax.train import cross_entropy
from tests.runs import SMALL


LLAMA = LlamaConfig(layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=384)
T5_SMALL = T5Config(
    encoder_layers=1, decoder_layers=1, embed=16, heads=2, head_dim=8, mlp=16, vocab=384
)
DECODERS = {"GPT": lambda key: GPT(SMALL, key=key), "Llama": lambda key: Llama(LLAMA, key=key)}


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_do_not_see_each_other(name, key):
    """Two documents in one row score as they do alone, positions and all."""
    model = DECODERS[name](key)
    first, second = jnp.arange(5), jnp.arange(40, 43)
    packed = {
        "tokens": jnp.concatenate([first, second]),
        "segments": jnp.array([0] * 5 + [1] * 3),
        "positions": jnp.array([0, 1, 2, 3, 4, 0, 1, 2]),
    }
    alone = jnp.concatenate([predictions(model, {"tokens": t}) for t in (first, second)])
    np.testing.assert_allclose(predictions(model, packed), alone, atol=2e-5)
    blind = predictions(model, {k: v for k, v in packed.items() if k != "segments"})
    assert np.abs(blind - alone).max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_is_seen_by_all_and_the_rest_by_those_after_it(name, key):
    model = DECODERS[name](key)
    tokens, prefix = jnp.arange(8), jnp.arange(8) < 4

    def moved(place, **how):
        other = tokens.at[place].set(99)
        pair = (predictions(model, {"tokens": t, **how}) for t in (tokens, other))
        a, b = pair
        return [bool(x) for x in np.abs(a - b).max(-1) > 1e-6]

    assert moved(3, prefix=prefix) == [True] * 8
    assert moved(3) == [False] * 3 + [True] * 5
    assert moved(6, prefix=prefix) == [False] * 6 + [True] * 2


def test_a_loss_is_that_of_its_targets_and_weights(key):
    model = T5(T5_SMALL, key=key)
    example = {
        "encoder_tokens": jnp.arange(6),
        "encoder_mask": jnp.arange(6) < 4,
        "decoder_tokens": jnp.arange(5),
        "decoder_mask": jnp.arange(5) < 3,
        "targets": jnp.arange(1, 6),
        "weights": jnp.array([1, 1, 1, 0, 0.0]),
    }
    losses, weights = cross_entropy(model, example)
    masks = {k: example[k] for k in ("encoder_mask", "decoder_mask")}
    scores = model(example["encoder_tokens"], example["decoder_tokens"], **masks)
    by_hand = optax.softmax_cross_entropy_with_integer_labels(scores, example["targets"])
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
    assert np.array_equal(weights, example["weights"])


# Optimizers as data ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [gj.zeros(mlp=20), gj.copy(mlp=20)], ids=str)
def test_what_growth_added_moves_at_a_rate_of_its_own_for_a_while(key, op):
    """Signs of gradients (lion) make every update 1, so the factor can be read off.

    Copies keep the age of their source, and are new all the same.
    """
    small = GPT(dataclasses.replace(SMALL, layers=1), key=key)
    tx = Optimizer("lion", clip=None, new_rate=3.0, new_steps=2).build()
    trained = gj.partition(small)[0]
    update = eqx.filter_jit(lambda g, s: tx.update(g, s, g, rate=-1.0))
    updates, state = update(jax.tree.map(jnp.ones_like, trained), tx.init(trained))
    assert all(np.all(u == 1) for u in jax.tree.leaves(updates))  # nothing is new at birth

    state = gj.carry(op, state, small, optimizer=tx, key=key)
    ones = jax.tree.map(jnp.ones_like, gj.partition(gj.grow(op, small, key=key))[0])
    for expected in (3.0, 3.0, 1.0):
        updates, state = update(ones, state)
        mlp, attention = updates.blocks.block.mlp, updates.blocks.block.attention
        for new, old in [
            (mlp.up[..., 16:], mlp.up[..., :16]),
            (mlp.down[:, 16:], mlp.down[:, :16]),
        ]:
            assert np.all(new == expected) and np.all(old == 1)
        assert np.all(attention.q == 1)
