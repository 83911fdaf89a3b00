"""Which examples are trained on: selective backprop and RHO, and the published pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growjax.errors import SelectError
from growjax.select import RhoLoss, SelectiveBackprop, percentiles


SIZES = st.sampled_from([4, 12])
SEEDS = st.integers(0, 10_000)


def losses(seed: int, n: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=n), jnp.float32)


@given(SEEDS, SIZES)
def test_percentiles_rank_losses_and_nothing_else(seed, n):
    x = losses(seed, n)
    q = percentiles(x, x)
    assert q.min() == pytest.approx(1 / n) and q.max() == 1.0
    assert np.array_equal(np.argsort(q), np.argsort(x))
    assert np.array_equal(q, percentiles(jnp.exp(3 * x), jnp.exp(3 * x)))
    assert q.mean() == pytest.approx((n + 1) / (2 * n))  # the share that is kept on average


def test_percentiles_of_ties_and_of_strangers():
    same = jnp.ones(4)
    assert np.allclose(percentiles(same, same), (4 + 1) / 8)
    assert np.allclose(percentiles(jnp.array([9.0, -9.0]), same), [1.0, 1 / 8])


@given(SEEDS, SIZES)
def test_rho_takes_what_can_still_be_learned(seed, n):
    mine, theirs, keep = losses(seed, n), losses(seed + 1, n), n // 2
    rule, key = RhoLoss(offers=2), jax.random.key(0)
    chosen = rule.choose(mine, theirs, keep, key=key)
    assert len(set(chosen.tolist())) == keep and list(chosen) == sorted(chosen.tolist())
    left = np.setdiff1d(np.arange(n), chosen)
    score = mine - theirs
    assert score[chosen].min() >= score[left].max()
    assert np.array_equal(chosen, rule.choose(mine, theirs + 3.0, keep, key=key))
    by_loss = rule.choose(mine, jnp.zeros(n), keep, key=key)
    assert mine[by_loss].min() >= np.delete(mine, by_loss).max()
    never = theirs.at[0].set(jnp.inf)
    assert 0 not in rule.choose(mine, never, keep, key=key)
    assert np.array_equal(rule.choose(mine, theirs, n, key=key), np.arange(n))


def test_ties_go_to_the_earlier_example():
    chosen = RhoLoss().choose(jnp.ones(6), jnp.zeros(6), 3, key=jax.random.key(0))
    assert chosen.tolist() == [0, 1, 2]


def test_rho_without_a_second_model_is_refused():
    with pytest.raises(SelectError, match="reference: RhoLoss compares"):
        RhoLoss().choose(jnp.ones(2), None, 1, key=jax.random.key(0))


def test_selective_backprop_favours_hard_examples():
    """How often each is drawn rises with its loss, and more so with beta."""
    x, keys = losses(0, 8), jax.random.split(jax.random.key(1), 4000)

    def often(beta):
        rule = SelectiveBackprop(beta, offers=2)
        drawn = jax.vmap(lambda k: rule.choose(x, None, 4, key=k))(keys)
        assert drawn.shape == (4000, 4) and np.all(np.diff(drawn, axis=1) > 0)
        return np.bincount(np.ravel(drawn), minlength=8)[np.argsort(x)] / 4000

    flat, once, twice = often(0.0), often(1.0), often(2.0)
    assert np.abs(flat - 0.5).max() < 5 * (0.25 / 4000) ** 0.5
    assert np.all(np.diff(once) > 0) and twice[-1] > once[-1] > 0.7 and twice[0] < once[0] < 0.25
    # The first draw of each has odds q: check the closed form where one is kept
    single = jax.vmap(lambda k: SelectiveBackprop(1.0).choose(x, None, 1, key=k))(keys)
    share = np.bincount(np.ravel(single), minlength=8)[np.argsort(x)] / 4000
    expected = np.arange(1, 9) / 36
    assert np.abs(share - expected).max() < 5 * (0.25 / 4000) ** 0.5


def test_a_draw_is_its_key():
    x, rule = losses(3, 12), SelectiveBackprop()
    a, b, c = (rule.choose(x, None, 6, key=jax.random.key(k)).tolist() for k in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("beta, offers", [(0.0, 1), (1.0, 2), (1.5, 3), (3.0, 4)])
def test_it_looks_at_as_many_as_the_published_rule_would(beta, offers):
    assert SelectiveBackprop(beta).offers == offers


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RhoLoss(offers=0), "offers: expected a number of batches from 1 to 1000, got 0"),
        (lambda: SelectiveBackprop(offers=0), "offers: expected a number of batches"),
        (lambda: SelectiveBackprop(-1.0), "beta: expected a number from 0 to 1000"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(SelectError, match=message):
        make()
