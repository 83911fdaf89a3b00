"""Words and positions: bounds on the loss of old text, gates on logits, padding, and longer contexts."""

import dataclasses
import json
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growjax as gj
from growjax import growth, testing
from growjax.axes import axes_of, partition
from growjax.certificate import call
from growjax.errors import AxisError, DataError, GrowthError
from growjax.nn import Readout, cross_entropies
from growjax.optim import carry
from growjax.values import from_dict, to_dict
from tests.runs import SMALL, feed, plan, steps


KEY = jax.random.key(0)
OLD = testing.VOCAB
TIED, UNTIED, BERT, T5 = (testing.ARCHITECTURES[i] for i in (0, 1, 5, 9))


def logits(model, batch) -> Any:
    """The logits of words, `[sequences, tokens, words]`."""
    outputs = run(model, batch)
    return outputs if eqx.is_array(outputs) else outputs.mlm_logits


run = eqx.filter_jit(call)


def losses(model, batch) -> np.ndarray:
    """The loss of every old word in every context, `[contexts, old words]`."""
    scores = np.asarray(logits(model, batch), np.float64)
    scores = scores.reshape(-1, scores.shape[-1])
    largest = scores.max(-1, keepdims=True)
    total = largest + np.log(np.exp(scores - largest).sum(-1, keepdims=True))
    return (total - scores)[:, :OLD]


@given(
    architecture=st.sampled_from([TIED, UNTIED, BERT, T5]),
    new=st.sampled_from([1, 9]),
    init=st.sampled_from(["mean", "covariance"]),
    seed=st.integers(0, 2**16),
)
def test_no_old_word_loses_more_than_the_logarithm(architecture, new, init, seed):
    """Jensen: a mean of logits is at most their log-mean-exp, whatever the weights and the context."""
    op = gj.vocabulary(OLD + new, init=init)
    model, batch = architecture.model(seed), architecture.batch(seed)
    with jax.enable_x64(True):
        grown = op(model, key=KEY)
        rise = losses(grown, batch) - losses(model, batch)
    assert 0 < rise.max() <= math.log(1 + new / OLD) + (1e-12 if init == "mean" else 1e-4)
    if init == "mean":
        assert op.bound(axes_of(model)) == math.log((OLD + new) / OLD)


def test_the_whole_covariance_breaks_the_bound_and_a_small_one_does_not():
    """Why transformers multiplies it by 1e-9. The weights are those of a model with varied logits."""
    model, batch = UNTIED.model(3), UNTIED.batch()
    rises = {}
    with jax.enable_x64(True):
        model = eqx.tree_at(lambda m: m.head, model, 8 * model.head)
        before = losses(model, batch)
        for spread in (0.0, 1e-9, 1.0):
            op = gj.vocabulary(OLD + 9, init="covariance", spread=spread)
            rises[spread] = (losses(op(model, key=KEY), batch) - before).max()
    bound = math.log(20 / 11)
    assert rises[0.0] <= bound and abs(rises[1e-9] - rises[0.0]) < 1e-3
    assert rises[1.0] > bound + 1


def test_draws_have_the_covariance_of_the_old_rows():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        model = Table(jnp.asarray(rng.normal(size=(6, 3)) * [1, 2, 3] + 5))
        big = gj.vocabulary(20_006, init="covariance", spread=0.25)(model, key=KEY)
        again = gj.vocabulary(40_006, init="covariance", spread=0.25)(model, key=KEY)
    old, new = np.asarray(model.rows), np.asarray(big.rows)[6:]
    np.testing.assert_allclose(new.mean(0), old.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(new.T), 0.25 * np.cov(old.T, bias=True), atol=0.1)
    # Each row has a key of its own, so more of them change none
    np.testing.assert_allclose(np.asarray(again.rows)[:20_006], big.rows, rtol=1e-12)


class Table(eqx.Module):
    rows: jax.Array = gj.param("[vocab] -> embed")


@pytest.mark.parametrize("architecture", [TIED, UNTIED, BERT, T5], ids=str)
def test_new_rows_are_means_in_the_table_the_head_and_the_bias(architecture):
    model = architecture.model()
    with jax.enable_x64(True):
        grown = gj.vocabulary(OLD + 2)(model)
    counted = 0
    for slot in axes_of(model).having("vocab", "param"):
        if not slot.arrays():
            continue
        (dim,) = slot.positions("vocab")
        old = np.moveaxis(np.asarray(slot.value), dim, 0)
        new = np.moveaxis(np.asarray(axes_of(grown)[slot.path].value), dim, 0)
        np.testing.assert_array_equal(new[:OLD], old)
        np.testing.assert_allclose(new[OLD:], np.stack([old.mean(0)] * 2), rtol=1e-12)
        counted += 1
    assert counted == {TIED: 1, UNTIED: 2, BERT: 2, T5: 1}[architecture]


def test_padding_is_taken_first_and_counts_in_no_mean():
    model = UNTIED.model()
    with jax.enable_x64(True):
        inside = gj.vocabulary(9, used=7)(model)
        beyond = gj.vocabulary(13, used=7)(model)
    assert gj.sizes(inside)["vocab"] == 11 and gj.sizes(beyond)["vocab"] == 13
    head = np.asarray(model.head)
    mean = head[:, :7].mean(1, keepdims=True)
    taken = np.concatenate([head[:, :7], mean, mean, head[:, 9:]], axis=1)
    np.testing.assert_allclose(inside.head, taken, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(beyond.head)[:, 7:], np.repeat(mean, 6, 1), rtol=1e-12)
    births = gj.Births.original(model).grown(gj.vocabulary(9, used=7), model)
    assert births.of["vocab"].tolist() == [0] * 7 + [1, 1] + [0, 0]


@pytest.mark.parametrize("architecture", [TIED, UNTIED, BERT, T5], ids=str)
def test_behind_a_gate_old_text_is_what_it_was_whatever_new_rows_hold(architecture):
    model, batch = architecture.model(), architecture.batch()
    op = gj.vocabulary(OLD + 3, gate=True)
    testing.assert_contract(op, model, batch)
    with jax.enable_x64(True):
        before, plain = losses(model, batch), gj.vocabulary(OLD + 3)(model)
        gated = op(model)
        np.testing.assert_allclose(losses(gated, batch), before, rtol=1e-12)
        # Level l multiplies the probability of a new word, before all are normalised
        half = np.asarray(jax.nn.softmax(logits(gj.ramp(gated, 0.5), batch)))
        odds = np.array(jax.nn.softmax(logits(plain, batch)))
        odds[..., OLD:] *= 0.5
        np.testing.assert_allclose(half, odds / odds.sum(-1, keepdims=True), rtol=1e-12)
        open_ = gj.settle(gj.ramp(gated, 1.0), axes=["vocab"])
        np.testing.assert_allclose(logits(open_, batch), logits(plain, batch), rtol=1e-12)


def test_losses_behind_a_gate_have_finite_gradients():
    """Also read chunk by chunk: a logit of minus infinity is a word of no probability."""
    with jax.enable_x64(True):
        model = gj.vocabulary(OLD + 3, gate=True)(UNTIED.model())
        trained, rest = partition(model)
        tokens = UNTIED.batch()[0]

        def loss(trained):
            readout = eqx.combine(trained, rest).readout({"tokens": tokens})
            chunks = gj.nn.per_token(cross_entropies, readout, tokens, chunk=2)
            return jnp.mean(chunks), jnp.mean(cross_entropies(readout.logits(), tokens))

        (chunked, whole), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
    assert np.isfinite(chunked) and chunked == pytest.approx(float(whole), rel=1e-12)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.asarray(gradient.head)[:, :OLD].any()
    assert not np.asarray(gradient.head)[:, OLD:].any()


def test_a_certificate_holds_the_bound_against_the_users_own_loss():
    def loss(model, batch):
        return jnp.mean(jax.vmap(cross_entropies)(call(model, batch), batch))

    op = gj.vocabulary(OLD + 9)
    model = TIED.model()
    certificate = gj.certify(op, model, TIED.batch(), key=KEY, loss=loss)
    rise = certificate.forward[-1].loss
    bound = op.bound(axes_of(model))
    assert rise is not None and bound is not None and 0 < rise <= bound
    assert certificate.axes == {"vocab": (11, 20)} and certificate.dead["vocab"][0] == 0


def test_new_words_start_their_moments_anew_and_old_ones_keep_theirs():
    """Behind a gate they are those of a fresh run, for every optimizer that a map can be carried by."""
    testing.assert_carries(
        gj.vocabulary(OLD + 2, gate=True), UNTIED.model(), UNTIED.batch(), optax.scale_by_adam()
    )
    tx = optax.trace(0.9)
    with jax.enable_x64(True):
        model = UNTIED.model()
        trained = partition(model)[0]
        state: Any = tx.init(trained)
        state = state._replace(trace=trained)
        moved = carry(gj.vocabulary(9, used=7), state, model, optimizer=tx).trace.head
    expected = np.asarray(model.head).copy()
    expected[:, 7:9] = 0
    np.testing.assert_array_equal(moved, expected)


def test_a_corpus_needs_its_words_from_the_first_stage_on():
    """An id beyond a table would read its last row without a word."""
    few = dataclasses.replace(SMALL, vocab=200)
    late = plan(steps(1), steps(1, grow=gj.vocabulary(384)), model=few)
    with pytest.raises(DataError, match="the model 200; give .* from its first stage on"):
        feed(late)
    assert feed(plan(steps(1), steps(1, grow=gj.vocabulary(400)))).training.vocabulary.size <= 384


@pytest.mark.parametrize(
    "op, message",
    [
        (gj.vocabulary(9), "9 words are fewer than the 11 in use"),
        (gj.vocabulary(12, used=12), "expected at most the model's 11 rows, got 12"),
        (gj.vocabulary(12, axis="mlp"), "no table is looked up along 'mlp'"),
        (gj.positions(4), "growth never shrinks"),
        (gj.positions(9, axis="mlp"), "no table is looked up along 'mlp'"),
        (gj.positions(9, axis="places"), "gj.growth.context stretches rotary positions"),
    ],
    ids=str,
)
def test_what_does_not_fit_says_why(op, message):
    shapes = eqx.filter_eval_shape(TIED.model)
    with pytest.raises(GrowthError, match=message):
        op.maps(axes_of(shapes))


class Capped(eqx.Module):
    """A head whose logits have a cap."""

    table: jax.Array = gj.param("[vocab] -> embed")
    head: jax.Array = gj.param("embed -> vocab")

    def losses(self):
        logits = Readout(jnp.eye(2), self.head, cap=3.0).logits()
        return -np.asarray(jax.nn.log_softmax(logits))


def test_under_a_cap_the_mean_of_the_rows_is_bounded_by_the_largest():
    """The cap bends a large logit more than the mean of a large one and a small one."""
    with jax.enable_x64(True):
        model = Capped(jnp.zeros((2, 2)), jnp.asarray([[40.0, -2.0], [2.0, 40.0]]))
        op = gj.vocabulary(12)
        rise = (op(model).losses()[:, :2] - model.losses()).max()
    assert op.bound(axes_of(model)) < rise < op.bound(axes_of(model), capped=True) == math.log(11)


# Positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["continue", "tile"])
@pytest.mark.parametrize("architecture", [TIED, BERT], ids=str)
def test_more_positions_change_no_sequence_that_fitted(architecture, how):
    op, model = gj.positions(19, how=how), architecture.model()
    testing.assert_contract(op, model, architecture.batch())
    with jax.enable_x64(True):
        grown = op(model, key=KEY)
        long = np.arange(19)[None] % OLD
        assert np.isfinite(np.asarray(logits(grown, long))).all()
    table, old = np.asarray(grown.position.table), np.asarray(model.position.table)
    if how == "tile":
        np.testing.assert_array_equal(table, old[np.arange(19) % 8])
    else:
        # Drawn with the statistics of the old ones, and each of them another
        assert abs(table[8:].std() / old.std() - 1) < 0.4
        assert len(np.unique(table.round(9), axis=0)) == 19


def test_interpolated_positions_lie_on_lines_between_the_old_ones():
    model = TIED.model()
    with jax.enable_x64(True):
        grown = gj.positions(15, how="interpolate")(model)
    table, old = np.asarray(grown.position.table), np.asarray(model.position.table)
    np.testing.assert_allclose(table[::2], old, rtol=1e-12)
    np.testing.assert_allclose(table[1::2], (old[1:] + old[:-1]) / 2, rtol=1e-12)
    assert gj.positions(15, how="interpolate").exactness == "approximate"


def test_one_position_is_stretched_to_itself():
    with jax.enable_x64(True):
        model = Places(jnp.ones((1, 3)))
        grown = gj.positions(3, how="interpolate")(model)
    np.testing.assert_array_equal(grown.rows, np.ones((3, 3)))


@pytest.mark.parametrize(
    "how, expected",
    [("tile", [7, 8, 1, 2, 3, 1, 2, 3]), ("interpolate", [7, 8, 1, 1.4, 1.8, 2.2, 2.6, 3])],
)
def test_rows_before_the_first_position_are_no_positions(how, expected):
    """As in RoBERTa, whose tokens are counted from the row behind that of the padding."""
    op = gj.positions(8, how=how, first=2)
    with jax.enable_x64(True):
        grown = op(Places(jnp.asarray([[7.0], [8.0], [1.0], [2.0], [3.0]])))
    np.testing.assert_allclose(grown.rows[:, 0], expected, rtol=1e-12)
    with pytest.raises(GrowthError, match="expected one of the model's 2 rows, got 2"):
        op.maps(axes_of(Places(jnp.ones((2, 1)))))


class Places(eqx.Module):
    rows: jax.Array = gj.param("[positions] -> embed")


def test_tiled_positions_have_no_moments():
    """A sequence that fitted never read them."""
    for how in ("tile", "continue"):
        op = gj.positions(19, how=how)
        testing.assert_carries(op, TIED.model(), TIED.batch(), optax.scale_by_adam())


# Rotary positions ----------------------------------------------------------------------------------

LLAMA = testing.Architecture("Llama", (("head_dim", 8), ("heads", 2)))


@pytest.mark.parametrize("how", ["interpolate", "ntk", "yarn"])
def test_frequencies_are_lowered_as_the_papers_say(how):
    model, factor, length = LLAMA.model(), 4.0, 6000
    op = gj.growth.context(factor, how=how, length=length)
    with jax.enable_x64(True):
        grown = op(model)
        built = grown.rotary
        expected = {
            "interpolate": lambda f: f / factor,
            # theta' = theta s^(d / (d - 2))
            "ntk": lambda f: (10000.0 * factor ** (8 / 6)) ** -(np.arange(0, 8, 2) / 8),
            "yarn": lambda f: (
                f * (g := np.clip((length * f / (2 * np.pi) - 1) / 31, 0, 1)) + f / factor * (1 - g)
            ),
        }[how](10000.0 ** -(np.arange(0, 8, 2) / 8))
        np.testing.assert_allclose(built.freqs[::2], expected, rtol=1e-6)
        np.testing.assert_array_equal(built.freqs[1::2], built.freqs[::2])
        # The record says the same, for a file
        again = gj.nn.Rotary(8, built.theta, built.scaling)
        np.testing.assert_allclose(again.freqs, built.freqs, rtol=1e-6)
        # Queries and keys are each multiplied by .1 ln s + 1, here the keys by its square
        before, after = model.blocks.block.attention, grown.blocks.block.attention
        colder = (0.1 * np.log(factor) + 1) ** 2 if how == "yarn" else 1.0
        np.testing.assert_allclose(after.k, colder * before.k, rtol=1e-12)
        np.testing.assert_array_equal(after.q, before.q)
        np.testing.assert_array_equal(after.o, before.o)


def test_interpolated_places_are_turned_like_those_in_between():
    """A context of twice the length at every second place is the old one, exactly."""
    model, tokens = LLAMA.model(), LLAMA.batch()[0]
    with jax.enable_x64(True):
        stretched = gj.growth.context(2, how="interpolate")(model)
        outputs = stretched(tokens, positions=2 * jnp.arange(len(tokens)))
        np.testing.assert_allclose(outputs, model(tokens), rtol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: gj.growth.context(4), "YaRN needs the context"),
        (lambda: gj.growth.context(4, length=8, low=2, high=2), "a low below the high"),
        (lambda: gj.growth.context(0.5, length=8), "factor: expected 1 or more"),
        (lambda: gj.growth.context(4, length=8)(TIED.model()), "gj.positions grows a learned"),
        (
            lambda: gj.growth.context(4, length=8, stream="x")(eqx.filter_eval_shape(LLAMA.model)),
            "unknown axis 'x'",
        ),
    ],
    ids=["length", "low", "factor", "learned", "stream"],
)
def test_a_context_that_cannot_be_reached_says_why(make, message):
    with pytest.raises((GrowthError, AxisError), match=message):
        make()


def test_frequencies_are_stretched_once():
    op = gj.growth.context(2, how="interpolate")
    with jax.enable_x64(True), pytest.raises(AxisError, match="scaled already"):
        op(op(LLAMA.model()))


def test_qk_norms_gain_takes_the_temperature():
    model = testing.ARCHITECTURES[3].model()
    with jax.enable_x64(True):
        grown = gj.growth.context(4.0, length=100)(model)
    before, after = model.blocks.block.attention, grown.blocks.block.attention
    colder = (0.1 * np.log(4) + 1) ** 2 * np.asarray(before.k_norm.weight)
    np.testing.assert_allclose(after.k_norm.weight, colder, rtol=1e-12)
    np.testing.assert_array_equal(after.k, before.k)


OPERATORS = [
    gj.vocabulary(12, used=9, gate=True),
    gj.vocabulary(12, init="covariance", spread=1e-6),
    gj.positions(19, how="tile"),
    gj.growth.context(4.0, length=2048),
]


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op
