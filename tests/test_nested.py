"""Nested sizes, random tokens, and layers that are skipped with early exits."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import testing, values
from growjax.cost import flops
from growjax.data import Causal
from growjax.errors import AxisError, SubnetError
from growjax.models import GPT, GPTConfig, LlamaConfig
from growjax.nn.mask import Mask
from growjax.plan import Optimizer, Plan, Schedule, Stage


TOKENS = jnp.asarray([1, 4, 2, 8, 5, 7, 3, 6])
KEY = jax.random.key(1)
CONFIG = GPTConfig(
    layers=4, embed=8, heads=2, head_dim=4, mlp=6, vocab=11, positions=8, remat="everything"
)


@functools.cache
def gpt():
    shapes = eqx.filter_eval_shape(GPT, CONFIG, key=KEY)
    return testing.randomise(jax.tree.map(lambda s: jnp.full(s.shape, 1e-5, s.dtype), shapes))


call = eqx.filter_jit(lambda model, tokens, **masks: model(tokens, **masks))


def cost(model) -> int:
    return flops(model, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype))


def shapes_of(**sizes):
    return eqx.filter_eval_shape(GPT, GPTConfig(**{**vars(CONFIG), **sizes}), key=KEY)


@functools.cache
def cost_of_depth(layers: int) -> int:
    return cost(shapes_of(layers=layers))


@functools.cache
def cost_of(part) -> int:
    return cost(eqx.filter_eval_shape(lambda m: part(m, key=KEY), shapes_of()))


# Nested sizes ----------------------------------------------------------------------------------


def test_the_first_units_are_a_model_of_that_size():
    small = gj.nested(mlp=4, heads=1)(gpt(), key=KEY)
    assert gj.sizes(small) == gj.sizes(shapes_of(mlp=4, heads=1))
    assert cost(small) == cost(shapes_of(mlp=4, heads=1)) < cost(gpt())
    mlp, whole = small.blocks.block.mlp, gpt().blocks.block.mlp
    np.testing.assert_array_equal(mlp.up, whole.up[..., :4])
    np.testing.assert_array_equal(mlp.down, whole.down[:, :4])
    np.testing.assert_array_equal(mlp.down_bias, whole.down_bias)
    attention = small.blocks.block.attention
    np.testing.assert_array_equal(attention.o, gpt().blocks.block.attention.o[:, :1])
    assert gj.nested(mlp=6)(gpt(), key=KEY) is gpt()


def test_each_step_has_one_of_the_sizes_and_each_as_often():
    part = gj.nested(mlp=(2, 4), heads=(1, 2))
    drawn = [part.at(step, seed=3) for step in range(400)]
    small, large = gj.nested(mlp=2, heads=1), gj.nested(mlp=4, heads=2)
    assert all(each in (small, large) for each in drawn)
    assert 160 < drawn.count(small) < 240
    assert drawn == [part.at(step, seed=3) for step in range(400)]
    assert drawn != [part.at(step, seed=4) for step in range(400)]
    assert part.steady(7) == 8 and gj.nested(mlp=2).steady(7) == float("inf")
    with pytest.raises(SubnetError, match="nested.at"):
        part(gpt(), key=KEY)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({}, "at least one axis"),
        ({"mlp": (4, 2)}, "that rise"),
        ({"mlp": ()}, "that rise"),
        ({"mlp": (2, 4), "heads": 1}, "as many sizes"),
        ({"mlp": 7}, "between 1 and 6"),
        ({"embed": 4}, "norms do not average"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(SubnetError, match=message):
        gj.nested(**sizes)(gpt(), key=KEY)


# Random tokens ---------------------------------------------------------------------------------


def test_all_tokens_and_kept_layers_alone_are_the_model_bitwise():
    whole = call(gpt(), TOKENS)
    for part in (gj.random_tokens(8), gj.random_tokens(3, keep=(0, 1, 2, -1))):
        np.testing.assert_array_equal(call(part(gpt(), key=KEY), TOKENS), whole)


@pytest.mark.parametrize("masked", [False, True])
def test_layers_in_the_middle_read_some_tokens_and_pass_the_others_on(masked):
    """Against the blocks one after the other, each on the tokens that its key draws."""
    real = jnp.arange(8) < 7
    documents = jnp.asarray([0, 0, 0, 0, 1, 1, 1, 1])
    masks = {"mask": real, "documents": documents} if masked else {}
    part = gj.random_tokens(5)(gpt(), key=KEY)

    @eqx.filter_jit
    def by_hand(model, keys):
        x = model.embedding(TOKENS) + model.position(jnp.arange(8))
        for layer in range(4):
            block = jax.tree.map(lambda w, layer=layer: w[layer], model.blocks.block)
            key = jax.random.wrap_key_data(keys[layer])
            some = jnp.sort(jax.random.permutation(key, 8)[:5])
            some = jnp.arange(8) if layer in (0, 3) else some
            fields = {"keys": real[some], "documents": documents[some]} if masked else {}
            x = x.at[some].set(block(x[some], mask=Mask(causal=True, **fields)))
        return model.embedding.attend(model.norm(x))

    expected = by_hand(gpt(), part.blocks.token_keys)
    np.testing.assert_allclose(call(part, TOKENS, **masks), expected, rtol=2e-5, atol=2e-5)
    assert np.abs(expected - call(gpt(), TOKENS, **masks)).max() > 0.1


def test_a_step_on_some_tokens_is_charged_for_them():
    part = gj.random_tokens(5)
    some = jax.ShapeDtypeStruct((5,), TOKENS.dtype)
    # Blocks alone, by the difference of two depths
    middle = flops(shapes_of(layers=2), some) - flops(shapes_of(layers=0), some)
    assert cost(part(gpt(), key=KEY)) == cost(shapes_of(layers=2)) + middle


def test_tokens_are_drawn_by_the_key_and_another_way_in_each_layer():
    keys = {
        int(k): gj.random_tokens(5)(gpt(), key=jax.random.key(k)).blocks.token_keys for k in (0, 1)
    }
    assert len({tuple(row) for some in keys.values() for row in np.asarray(some).tolist()}) == 8
    again = gj.random_tokens(5)(gpt(), key=jax.random.key(0)).blocks.token_keys
    np.testing.assert_array_equal(keys[0], again)


def test_the_number_of_tokens_rises_in_steps_to_all():
    part = gj.random_tokens(2, stop=8, steps=30, by=2)
    counts = [part.at(step).count for step in range(33)]
    assert counts == [2] * 10 + [4] * 10 + [6] * 10 + [8] * 3
    for step in range(33):
        later = counts.index(counts[step] + 2) if counts[step] < 8 else float("inf")
        assert part.steady(step) == later
    with pytest.raises(SubnetError, match="take tokens.at"):
        part(gpt(), key=KEY)


def test_what_counts_all_tokens_is_refused():
    part = gj.random_tokens(3)
    for family in ("T5",):
        model = testing.Architecture(family).model(dtype=jnp.float32)
        thinned = gj.random_tokens(2, axis="encoder_layers", keep=())(model, key=KEY)
        with pytest.raises(AxisError, match="relative positions"):
            eqx.filter_eval_shape(thinned, TOKENS[:5], TOKENS[:3])
    with pytest.raises(AxisError, match="window"):
        Mask(causal=True, window=2).of(jnp.arange(2))
    with pytest.raises(AxisError, match="no cache"):
        model = part(gpt(), key=KEY)
        model.extend(TOKENS[:2], model.cache(8), 0)
    with pytest.raises(SubnetError, match="not among 4 layers"):
        gj.random_tokens(3, keep=(4,))(gpt(), key=KEY)
    with pytest.raises(SubnetError, match="both or neither"):
        gj.random_tokens(3, stop=8)
    with pytest.raises(SubnetError, match="3 tokens or more"):
        gj.random_tokens(3, stop=2, steps=5)


# LayerSkip -------------------------------------------------------------------------------------


def test_layers_are_dropped_by_the_formula_and_exits_by_their_weights():
    skip = gj.layer_skip(rate=0.4, exits=0.5)
    expected = 0.4 * (np.exp(np.arange(4) * np.log(2) / 3) - 1)
    np.testing.assert_allclose(skip.dropped(4, 0), expected, rtol=1e-6)
    depths, odds = skip.depths(4)
    # 0.5 times 0, 0 + 1 and 0 + 1 + 2; the last 3 + 0.5 (0 + 1 + 2)
    assert depths.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(odds, np.array([0, 0.5, 1.5, 4.5]) / 6.5)
    assert gj.layer_skip(exits=0.5, every=2).depths(6)[0].tolist() == [2, 4, 6]
    assert gj.layer_skip().depths(3)[1].tolist() == [0, 0, 1]
    rising = gj.layer_skip(rate=0.4, steps=10)
    assert float(rising.dropped(4, 0)[-1]) == 0
    np.testing.assert_allclose(rising.dropped(4, 5)[-1], 0.4 * (2**0.5 - 1), rtol=1e-6)
    np.testing.assert_allclose(rising.dropped(4, 99), expected, rtol=1e-6)


def test_coins_fall_as_their_chances_say_and_nothing_runs_after_the_exit():
    skip = gj.layer_skip(rate=0.4, exits=0.5)
    on = skip.tossed(4, 0, 0, 4000)
    np.testing.assert_allclose(on.mean(0), skip.chances(4, 0), atol=0.03)
    exits_only = gj.layer_skip(rate=0.0, exits=0.5).tossed(4, 0, 0, 200)
    depth = exits_only.sum(1)
    np.testing.assert_array_equal(exits_only, np.arange(4) < depth[:, None])
    assert set(depth.tolist()) == {2, 3, 4}


def test_an_exit_is_the_model_of_the_first_layers():
    part = gj.layer_skip(rate=0.0, exits=1.0)
    exits = {int(part.toss(4, key=jax.random.key(k), step=0).sum()): k for k in range(40)}
    key = jax.random.key(exits[2])
    early = call(part(gpt(), key=key), TOKENS)
    cut = eqx.tree_at(
        lambda m: m.blocks.block, gpt(), jax.tree.map(lambda w: w[:2], gpt().blocks.block)
    )
    np.testing.assert_allclose(early, call(cut, TOKENS), rtol=1e-5, atol=1e-5)


# In plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        gj.nested(mlp=(2, 4, 6)),
        gj.random_tokens(2, stop=8, steps=12, by=2),
        gj.layer_skip(rate=0.3, exits=0.3),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_plan_charges_each_step_for_its_own_part_and_can_be_saved(part):
    plan = Plan(
        "p",
        CONFIG,
        (Stage(tokens=20 * 4 * 8, subnet=part),),
        batch=4,
        objective=Causal(8),
        rate=Schedule(1e-3),
        optimizer=Optimizer(),
        seed=5,
    )
    assert values.from_dict(values.to_dict(plan), Plan) == plan
    (span,) = plan.spans
    for step, (work, charged) in enumerate(zip(span.works, span.flops, strict=True)):
        assert work.part == part.at(step, seed=5)
        if isinstance(part, gj.subnet.LayerSkip):
            runs = int(part.tossed(4, 5, step, 1).sum())
            expected = cost_of_depth(runs)
        else:
            expected = cost_of(part.at(step, seed=5))
        assert charged == 3 * 4 * expected
    assert len(set(span.flops)) > 1


def test_llamas_too_read_some_tokens_with_their_positions():
    config = LlamaConfig(
        layers=3, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=6, vocab=11, remat="everything"
    )
    model = gj.models.Llama(config, key=KEY)
    part = gj.random_tokens(8)
    np.testing.assert_array_equal(call(part(model, key=KEY), TOKENS), call(model, TOKENS))
    some = call(gj.random_tokens(4)(model, key=KEY), TOKENS)
    # Shifted positions turn queries and keys alike, so only a token that lost its own would differ
    shifted = call(gj.random_tokens(4)(model, key=KEY), TOKENS, positions=jnp.arange(8) + 3)
    np.testing.assert_allclose(some, shifted, rtol=1e-4, atol=1e-5)
    # Layers that all read some tokens read the positions behind the first four as well
    part = gj.random_tokens(4, keep=())(model, key=KEY)
    torn = call(part, TOKENS, positions=jnp.asarray([0, 1, 2, 3, 9, 11, 13, 15]))
    assert np.abs(torn - call(part, TOKENS)).max() > 1e-4
