"""Width by copies that differ: LEMON, noise that cancels, scales per side, rows of the layer above."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

import growjax as gj
from growjax import growth, optim, testing
from growjax.axes import axes_of, partition
from growjax.errors import GrowthError, StateError
from growjax.growth.finishes import copy_groups
from growjax.optim import carry
from growjax.plan import Stage
from growjax.values import from_dict, to_dict
from tests.runs import plan, steps


KEY = jax.random.key(0)
GPT, UNTIED, RMS, GROUPED, POST, LLAMA = (testing.ARCHITECTURES[i] for i in (0, 1, 2, 3, 4, 7))

OPERATORS = [
    gj.copy(embed=16, mlp=12, shares="diagonal"),
    gj.copy(mlp=9, shares="equal", noise=0.1),
    gj.copy(embed=12, scale="rms"),
    gj.aki(mlp=9, order="random", seed=2),
    gj.lemon(embed=12, mlp=9, noise=0.5),
    gj.warm(embed=12, shrink=0.3),
    gj.warm(),
]


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


class Parts(eqx.Module):
    """What makes an axis, what reads it, and what is both, in a stack of layers."""

    makes: Array = gj.param("layers: embed -> mlp")
    bias: Array = gj.param("layers: -> mlp")
    reads: Array = gj.param("layers: mlp -> embed")

    def __call__(self, x):
        for layer in range(self.makes.shape[0]):
            x = x + jnp.tanh(x @ self.makes[layer] + self.bias[layer]) @ self.reads[layer]
        return x


def parts(layers: int = 3, embed: int = 4, mlp: int = 5) -> Parts:
    rng = np.random.default_rng(0)
    shapes = [(layers, embed, mlp), (layers, mlp), (layers, mlp, embed)]
    with jax.enable_x64(True):
        return Parts(*(jnp.asarray(rng.normal(size=s)) for s in shapes))


# Noise ---------------------------------------------------------------------------------------------


def test_noise_cancels_in_pairs_and_an_odd_last_copy_has_none():
    model = parts()
    source = (0, 1, 2, 3, 4, 0, 0, 1)
    with jax.enable_x64(True):
        clean = gj.copy(mlp=source, shares="equal")(model)
        noisy = gj.copy(mlp=source, shares="equal", noise=0.1)(model, key=KEY)
    noise = np.asarray(noisy.reads) - np.asarray(clean.reads)
    np.testing.assert_allclose(noise[:, 0], -noise[:, 5], atol=1e-15)
    np.testing.assert_allclose(noise[:, 1], -noise[:, 7], atol=1e-15)
    assert np.abs(noise[:, [0, 1]]).min() > 0
    np.testing.assert_array_equal(noise[:, [2, 3, 4, 6]], 0)  # 6 is the third copy of its source
    np.testing.assert_array_equal(noisy.makes, clean.makes)
    assert not np.allclose(noise[0], noise[1])


@pytest.mark.parametrize("kind", ["paired", "projected"])
def test_noise_has_the_size_that_was_asked_for(kind):
    """A deviation of 0.1 of the weights' root mean square is a signal-to-noise ratio of 20 dB."""
    model = parts(layers=2, embed=64, mlp=64)
    op = gj.copy(mlp=192, shares="equal", noise=0.1)
    if kind == "projected":
        op = gj.lemon(mlp=192, noise=0.1)
    with jax.enable_x64(True):
        clean, noisy = gj.copy(mlp=192, shares="equal")(model), op(model, key=KEY)
    for before, after in zip(np.asarray(clean.reads), np.asarray(noisy.reads), strict=True):
        noise = (after - before)[: 128 if kind == "paired" else 192]
        ratio = np.mean(before**2) / np.mean(noise**2)
        assert 10 * np.log10(ratio) == pytest.approx(20, abs=0.3)


def test_groups_of_copies_are_numbered():
    source = np.asarray([0, 1, -1, 0, 0, 1, 0])
    assert copy_groups(source).tolist() == [0, 1, -1, 0, 0, 1, 0]
    assert copy_groups(source, paired=True).tolist() == [0, 1, -1, 0, 2, 1, 2]


@pytest.mark.parametrize("architecture", [GPT, RMS, GROUPED, POST], ids=str)
def test_cloning_with_noise_keeps_the_function_and_locks_no_copy(architecture):
    model, batch = architecture.model(), architecture.batch()
    sizes: dict[str, Any] = dict(
        embed=16, mlp=12, heads=2 * dict(architecture.options).get("heads", 2)
    )
    op = gj.copy(shares="equal", noise=0.3, **sizes)
    testing.assert_contract(op, model, batch)
    if architecture is GPT:
        assert gj.certify(op, model, batch, key=KEY).locked == {"embed": 0, "kv_heads": 0, "mlp": 0}
        clean = gj.certify(gj.copy(shares="equal", **sizes), model, batch, key=KEY)
        assert clean.locked == {"embed": 8, "kv_heads": 2, "mlp": 6}


BLOCKS = {GPT: dict(heads=4), RMS: dict(heads=4), GROUPED: dict(kv_heads=4)}


@pytest.mark.parametrize("architecture", BLOCKS, ids=str)
def test_blocks_keep_the_function(architecture):
    sizes: dict[str, Any] = dict(embed=16, mlp=12) | BLOCKS[architecture]
    op = gj.copy(shares="diagonal", **sizes)
    testing.assert_contract(op, architecture.model(), architecture.batch())


def test_blocks_stand_on_the_diagonal_and_what_has_one_side_is_shared():
    with jax.enable_x64(True):
        small: Any = UNTIED.model()
        big: Any = gj.copy(embed=16, mlp=12, shares="diagonal")(small)
    up, down, head = (
        np.asarray(m) for m in (small.blocks.block.mlp.up, small.blocks.block.mlp.down, small.head)
    )
    zero = np.zeros_like
    np.testing.assert_array_equal(
        big.blocks.block.mlp.up, np.block([[up, zero(up)], [zero(up), up]])
    )
    np.testing.assert_array_equal(
        big.blocks.block.mlp.down, np.block([[down, zero(down)], [zero(down), down]])
    )
    np.testing.assert_allclose(big.head, np.concatenate([head, head], 0) / 2, rtol=1e-15)


def test_gradients_off_the_diagonal_are_halves_too():
    """Staged training leaves these moments at zero; a real backward pass does not."""
    op = gj.copy(embed=16, heads=4, mlp=12, shares="diagonal")
    testing.assert_carries(op, GPT.model(), GPT.batch(), optax.scale_by_adam())


@pytest.mark.parametrize(
    "op, message",
    [
        (gj.copy(embed=16, mlp=18, shares="diagonal"), "the same multiple of every axis"),
        (gj.copy(mlp=9, shares="diagonal"), "blocks need a multiple of 6"),
        (gj.copy(heads=4, head_dim=8, shares="diagonal"), "kv_heads and head_dim produced"),
        (gj.copy(mlp=12, shares="diagonal", noise=0.1), "without noise or scale"),
    ],
    ids=["multiples", "uneven", "two axes", "noise"],
)
def test_what_makes_no_blocks_says_why(op, message):
    with pytest.raises(GrowthError, match=message):
        op.maps(axes_of(GPT.model()))


def test_copies_are_told_apart_unless_that_is_refused():
    """Equal shares would lock copies for ever, so they are not what one gets."""
    model, batch = GPT.model(), GPT.batch()
    certificate = gj.certify(gj.copy(embed=16, mlp=12, heads=4), model, batch, key=KEY)
    assert certificate.passed and set(certificate.locked.values()) == {0}


def test_state_is_not_carried_through_noise():
    tx = optax.trace(0.9)
    shapes = eqx.filter_eval_shape(GPT.model)
    state = eqx.filter_eval_shape(lambda m: tx.init(partition(m)[0]), shapes)
    for op in (gj.copy(mlp=12, noise=0.1), gj.lemon(mlp=12)):
        with pytest.raises(StateError, match="copies are read with different noise"):
            carry(op, state, shapes, optimizer=tx, key=KEY)


# LEMON ---------------------------------------------------------------------------------------------

LEMONS = [
    (architecture, sizes)
    for architecture, sizes in [
        (GPT, dict(embed=13, mlp=11, heads=3)),
        (UNTIED, dict(embed=20)),
        (RMS, dict(embed=11, head_dim=6)),
        (LLAMA, dict(embed=19, heads=3, mlp=9)),
    ]
]


@pytest.mark.parametrize("architecture, sizes", LEMONS, ids=lambda x: str(x))
def test_lemon_keeps_the_function_at_any_size(architecture, sizes):
    """Also where norms average, LayerNorm or RMSNorm, and whatever the drawn numbers are."""
    op = gj.lemon(**sizes)
    testing.assert_contract(op, architecture.model(), architecture.batch())


def test_lemon_locks_no_copy():
    certificate = gj.certify(gj.lemon(embed=18, mlp=13, heads=4), GPT.model(), GPT.batch(), key=KEY)
    assert certificate.passed and set(certificate.locked.values()) == {0}
    assert all(one < 0.5 for one, _ in certificate.dead.values())


def test_uneven_copies_under_a_layer_norm_change_the_function():
    """What LEMON is for: bert2BERT's copies move the mean and the variance."""
    model, batch = GPT.model(), GPT.batch()
    with pytest.raises(GrowthError, match="copies are uneven"):
        gj.copy(embed=13)(model)
    with pytest.raises(AssertionError, match="outputs moved by"):
        testing.assert_preserves(Uneven(), model, batch)


class Uneven(gj.Operator):
    """FPI to an uneven size, with nobody to refuse it."""

    exactness = "exact-given-init"

    def maps(self, axes):
        source = np.arange(13) % 8
        return [gj.AxisMap("embed", source, share=1 / np.bincount(source)[source])]


def test_lemon_says_what_it_does_not_grow():
    shapes = eqx.filter_eval_shape(GPT.model)
    with pytest.raises(GrowthError, match="copies cannot share.*\n.*layers"):
        gj.lemon(layers=4).maps(axes_of(shapes))


@pytest.mark.parametrize("architecture", [POST, testing.ARCHITECTURES[6]], ids=str)
def test_lemon_refuses_a_stream_that_a_layer_norm_puts_out(architecture):
    """The rest would be the bias alone, and not the mean of what the gain has weighted."""
    shapes = eqx.filter_eval_shape(architecture.model)
    with pytest.raises(GrowthError, match="before a branch.*\n.*norm.weight"):
        eqx.filter_eval_shape(lambda m: gj.lemon(embed=13)(m, key=KEY), shapes)
    eqx.filter_eval_shape(lambda m: gj.lemon(embed=16, mlp=9)(m, key=KEY), shapes)


# Scales per side -----------------------------------------------------------------------------------


@given(st.sampled_from([6, 8, 10, 15, 18]), st.sampled_from(["cycle", "random"]))
def test_a_kept_mean_square_is_sparklings_scale(new, order):
    """`1 / sqrt(1 + 3c)` where a share c is doubled; 1 / copies where all are copied equally often."""
    old, model = 5, parts(layers=1)
    (move,) = gj.copy(mlp=new, scale="rms", order=order).maps(axes_of(model))
    counts = np.bincount(move.source, minlength=old)
    assert len(set(move.share)) == 1
    # The variance of a sum of copied, independent units is that of the sum before
    assert move.share[0] ** 2 * np.sum(counts**2) == pytest.approx(old)
    if counts.max() <= 2:
        assert move.share[0] == pytest.approx(1 / np.sqrt(1 + 3 * (new - old) / old))
    if len(set(counts)) == 1:
        assert move.share[0] == pytest.approx(old / new)


def test_a_kept_mean_square_takes_any_size_and_is_exact_for_whole_multiples():
    model, batch = GPT.model(), GPT.batch()
    op = gj.copy(embed=13, mlp=7, scale="rms")
    testing.assert_contract(op, model, batch)
    assert op.exactness == "approximate"
    doubled = gj.copy(embed=16, mlp=12, scale="rms")
    testing.assert_preserves(doubled, model, batch)


def test_sparklings_moments_part_copies_that_equal_ones_would_lock():
    """`S' = [S, 0]`: copies start anew, so their first steps are others than those of their sources."""
    with jax.enable_x64(True):
        model = parts()
        tx = optim.adamw(1e-2)
        trained = partition(model)[0]
        state = tx.init(trained)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)))

        def step(trained, state):
            gradient = jax.grad(lambda m: jnp.sum(jnp.sin(m(x))))(trained)
            updates, state = tx.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state

        for _ in range(3):
            trained, state = step(trained, state)
        op = gj.copy(mlp=10, scale="rms")
        gaps = {}
        for copies in ("dual", "zero"):
            moved: Any = carry(op, state, trained, optimizer=tx, copies=copies)
            big: Any = op(trained)
            for _ in range(2):
                big, moved = step(big, moved)
            gaps[copies] = float(jnp.abs(big.makes[..., :5] - big.makes[..., 5:]).max())
    assert gaps["dual"] < 1e-12 < 1e-3 < gaps["zero"]


def test_sparkling_is_a_stage():
    """Scales per side, moments `[S, 0]`, and a rate of the new part that rises to 1.3 and falls again."""
    curve = optim.Curve(((0, 1.0), (250, 1.3), (1000, 1.0)))
    stage = steps(
        3,
        grow=gj.copy(embed=24, mlp=24, scale="rms"),
        carry="zero",
        train=optim.Parts(new=curve),
    )
    whole = plan(steps(2), stage)
    assert whole.spans[1].sizes["embed"] == 24
    back: Any = from_dict(json.loads(json.dumps(to_dict(stage))))
    assert isinstance(back, Stage) and back == stage
    assert np.asarray(curve.at(125)) == pytest.approx(1.15)


# AKI -----------------------------------------------------------------------------------------------


def test_new_outputs_are_those_of_the_layer_above():
    model = parts(layers=3)
    with jax.enable_x64(True):
        grown = gj.aki(mlp=8)(model)
        plain = gj.copy(mlp=8, shares="equal")(model)
    above = np.asarray(model.makes)[[1, 2, 2]][:, :, :3]  # the last layer: itself
    np.testing.assert_array_equal(np.asarray(grown.makes)[:, :, 5:], above)
    np.testing.assert_array_equal(np.asarray(grown.makes)[:, :, :5], model.makes)
    np.testing.assert_array_equal(
        np.asarray(grown.bias)[:, 5:], np.asarray(model.bias)[[1, 2, 2], :3]
    )
    np.testing.assert_array_equal(grown.reads, plain.reads)  # consumers as in FPI


@pytest.mark.parametrize("architecture", [GPT, LLAMA], ids=str)
def test_aki_takes_any_sizes(architecture):
    op = gj.aki(embed=13, mlp=9, heads=4)
    testing.assert_contract(op, architecture.model(), architecture.batch())
    certificate = gj.certify(op, architecture.model(), architecture.batch(), key=KEY)
    assert certificate.forward[0].relative > 0.01 and set(certificate.locked.values()) == {0}


# Warm starts ---------------------------------------------------------------------------------------


def test_old_weights_are_shrunk_once_however_many_axes_grow():
    model = UNTIED.model()
    with jax.enable_x64(True):
        padded = gj.warm(shrink=0.4, perturb=0.0, embed=12, mlp=9, heads=3)(model, key=KEY)
    for slot in axes_of(model).of_kind("param"):
        if slot.arrays():
            new = np.asarray(axes_of(padded)[slot.path].value)
            corner = new[tuple(map(slice, slot.value.shape))]
            factor = 0.4 if slot.init == "normal" else 1.0
            np.testing.assert_allclose(corner, factor * np.asarray(slot.value), rtol=1e-12)
            if slot.init == "normal":  # all else is 0 before the draw
                assert np.abs(new).sum() == pytest.approx(np.abs(corner).sum())


def test_the_draw_is_that_of_a_new_model_in_every_entry():
    model = parts(layers=2, embed=32, mlp=32)
    with jax.enable_x64(True):
        warm = gj.warm(shrink=0.4, embed=64, mlp=48)(model, key=KEY)
        again = gj.warm(shrink=0.4)(model, key=KEY)
        padded = gj.warm(shrink=0.4, perturb=0.0, embed=64, mlp=48)(model, key=KEY)
    model, warm, again, padded = (jax.tree.map(np.asarray, m) for m in (model, warm, again, padded))
    noise = warm.makes - padded.makes
    for part in (noise[:, :32, :32], noise[:, 32:, 32:], noise[:, :32, 32:]):
        assert part.std() == pytest.approx(64**-0.5, rel=0.1)
    assert (warm.reads - padded.reads).std() == pytest.approx(48**-0.5, rel=0.1)
    # The same size: shrink and perturb
    assert again.makes.shape == model.makes.shape
    assert (again.makes - 0.4 * model.makes).std() == pytest.approx(32**-0.5, rel=0.1)
    testing.assert_contract(gj.warm(embed=12, mlp=9), GPT.model(), GPT.batch())


def test_what_draws_needs_a_key():
    for op in (gj.copy(mlp=10, noise=0.1), gj.lemon(mlp=10), gj.warm(mlp=10)):
        with jax.enable_x64(True), pytest.raises(GrowthError, match="pass key="):
            op(parts())
