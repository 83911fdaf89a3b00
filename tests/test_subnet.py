"""Sub-networks: what is drawn, what runs, what it costs, and what receives a gradient."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growjax as gj
from growjax import maps, models, testing
from growjax.axes import axes_of, sizes
from growjax.cost import flops
from growjax.errors import SubnetError
from growjax.nn import causal


LAYERS, DRAWS = 6, 4000
MODES = ("none", "sqrt_gap", "linear_gap", "sqrt_global", "linear_global", "inverse_p")
KEYS = jax.random.split(jax.random.key(0), DRAWS)


def made(family: str, **options):
    """A tiny model with numpy's random numbers; drawing them with JAX would take seconds."""
    sizes = testing.TOY | options
    config = getattr(models, f"{family}Config")(remat="everything", **sizes)
    model = eqx.filter_eval_shape(getattr(models, family), config, key=jax.random.key(0))
    model = jax.tree.map(lambda s: jnp.full(s.shape, 1e-5, s.dtype), model)
    return testing.randomise(model)


@functools.cache
def gpt(layers: int = LAYERS):
    return made("GPT", layers=layers, positions=testing.LENGTH)


TOKENS: Any = testing.Architecture("GPT").batch()


def outputs(model, tokens=TOKENS):
    return jax.vmap(model)(tokens)


@eqx.filter_jit
def learn(subnet, model):
    """Outputs and gradient of a fixed loss under one draw of a sub-network."""

    def loss(model):
        y = outputs(model if subnet is None else subnet(model, key=KEYS[0]))
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return y, gradient


class Given(gj.Subnet):
    """One map that is already drawn."""

    move: gj.AxisMap

    def maps(self, axes, *, key, step):
        return [self.move]


@eqx.filter_jit
def taken(subnet, model):
    return subnet(model, key=KEYS[0])


def one_map(subnet, model, key, step=0):
    (move,) = subnet.maps(axes_of(model), key=key, step=step)
    return move


# Drawing -------------------------------------------------------------------------------------


@st.composite
def paths(draw):
    layers = draw(st.integers(1, 64))
    keep = draw(st.lists(st.integers(-layers, layers - 1), max_size=3))
    fixed = {i % layers for i in keep}
    length = draw(st.integers(max(len(fixed), 1), layers))
    return layers, fixed, gj.random_path(length, keep=keep)


@given(paths(), st.integers(0, 2**31 - 1))
def test_a_path_ascends_through_distinct_layers_and_holds_the_fixed_ones(drawn, seed):
    layers, fixed, path = drawn
    indices = np.asarray(path.sample(layers, key=jax.random.key(seed)))
    assert len(indices) == path.length
    assert (np.diff(indices) > 0).all()
    assert 0 <= indices[0] <= indices[-1] < layers
    assert fixed <= set(indices.tolist())


def test_every_free_layer_is_drawn_equally_often():
    path, layers, p = gj.random_path(6), 12, 0.4
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: path.sample(layers, key=key)))(KEYS))
    counts = np.bincount(drawn.ravel(), minlength=layers)
    free = counts[1:-1]
    assert counts[0] == counts[-1] == DRAWS
    assert np.abs(free - DRAWS * p).max() <= 5 * math.sqrt(DRAWS * p * (1 - p))
    # Without replacement the counts correlate by -1/(n - 1): chi-square with n - 1 degrees.
    n = len(free)
    chi_square = ((free - DRAWS * p) ** 2).sum() / (DRAWS * p * (1 - p)) * (n - 1) / n
    assert chi_square <= n - 1 + 5 * math.sqrt(2 * (n - 1))


def test_a_bernoulli_path_has_its_length_on_average_and_always_the_fixed_layers():
    path, axes = gj.random_path(3.5, mode="bernoulli"), axes_of(gpt())
    on = jax.jit(jax.vmap(lambda key: path.maps(axes, key=key, step=0)[0].active))(KEYS)
    p = path.probability(LAYERS)
    assert 2 + (LAYERS - 2) * p == pytest.approx(3.5)
    assert bool(on[:, 0].all() and on[:, -1].all())
    deviation = math.sqrt((LAYERS - 2) * p * (1 - p) / DRAWS)
    assert abs(float(on.sum(1).mean()) - 3.5) <= 5 * deviation
    assert np.abs(np.asarray(on)[:, 1:-1].mean(0) - p).max() <= 5 * math.sqrt(p * (1 - p) / DRAWS)


def test_a_path_is_a_function_of_seed_and_step():
    path = gj.random_path(16)
    draw = jax.jit(lambda step: path.sample(32, key=gj.step_key(7, step)))
    drawn = [tuple(draw(jnp.asarray(step)).tolist()) for step in range(20)]
    assert drawn[3] == tuple(path.sample(32, key=gj.step_key(7, 3)).tolist())  # resumed, not jitted
    assert len(set(drawn)) == 20  # of 145,422,675 paths
    assert tuple(path.sample(32, key=gj.step_key(8, 3)).tolist()) != drawn[3]


def test_a_fractional_length_rounds_by_chance_to_its_mean():
    path = gj.random_path(4.25, scale="sqrt_gap")
    lengths = [path.at(step, seed=1).length for step in range(2000)]
    assert set(lengths) == {4, 5}
    assert abs(np.mean(lengths) - 4.25) <= 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert lengths[:50] == [path.at(step, seed=1).length for step in range(50)]
    assert lengths[:50] != [path.at(step, seed=2).length for step in range(50)]
    assert path.at(0) == gj.random_path(path.at(0).length, scale="sqrt_gap")
    coins = gj.random_path(4.25, mode="bernoulli")
    assert coins.at(3) is coins


# Scales --------------------------------------------------------------------------------------


def table(mode, path, fixed, p):
    """The multipliers of a path, straight from their definition."""
    gaps, k = np.diff([*path, LAYERS]), len(path)
    return {
        "none": np.ones(k),
        "sqrt_gap": np.sqrt(gaps),
        "linear_gap": gaps,
        "sqrt_global": np.full(k, math.sqrt(LAYERS / k)),
        "linear_global": np.full(k, LAYERS / k),
        "inverse_p": np.where(np.isin(path, fixed), 1, 1 / p),
    }[mode]


@pytest.mark.parametrize("mode", MODES)
def test_multipliers_are_those_of_the_table_in_both_ways_of_drawing(mode):
    fixed = gj.random_path(4, keep=(0, 4), scale=mode)
    coins = dataclasses.replace(fixed, mode="bernoulli")
    for seed in range(5):
        key = jax.random.key(seed)
        move = one_map(fixed, gpt(), key)
        multipliers = 1 if move.branch is None else move.branch
        path = np.asarray(move.source)
        np.testing.assert_allclose(multipliers, table(mode, path, (0, 4), 0.5) * 1, rtol=1e-6)
        move = one_map(coins, gpt(), key)
        on = np.flatnonzero(move.active)
        multipliers = np.ones(LAYERS) if move.branch is None else np.asarray(move.branch)
        np.testing.assert_allclose(multipliers[on], table(mode, on, (0, 4), 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "mode, power", [("sqrt_gap", 2), ("linear_gap", 1), ("sqrt_global", 2), ("linear_global", 1)]
)
@given(seed=st.integers(0, 2**31 - 1))
def test_multipliers_add_up_to_the_depth(mode, power, seed):
    """Residual variance at birth (squares), or the sum of increments, is that of the full model."""
    move = one_map(gj.random_path(3, scale=mode), gpt(), jax.random.key(seed))
    assert float((move.branch**power).sum()) == pytest.approx(LAYERS, rel=1e-6)


def test_one_over_p_keeps_the_expectation_of_a_branch():
    """Over the two values of one gate, and for one branch: two under one gate are biased."""
    blocks = jax.tree.map(lambda leaf: leaf[:1], gpt().blocks)
    blocks = eqx.tree_at(lambda b: b.block.attention.o, blocks, replace_fn=jnp.zeros_like)
    blocks = eqx.tree_at(lambda b: b.block.attention.o_bias, blocks, replace_fn=jnp.zeros_like)
    drop = gj.progressive_layer_drop(rate=0.3, floor=0.25)
    move, p = one_map(drop, blocks, jax.random.key(0), 4), drop.chances(1, 4)
    x = gpt().embedding(TOKENS[0])
    run = jax.jit(lambda on: maps.apply(dataclasses.replace(move, active=on), blocks, None)(x))
    mean = p * run(jnp.array([True])) + (1 - p) * run(jnp.array([False]))
    np.testing.assert_allclose(mean, jax.jit(lambda x: blocks(x))(x), rtol=2e-5, atol=1e-6)
    assert float(p[0]) < 0.6


# Running -------------------------------------------------------------------------------------


def composed(model, layers, multipliers, tokens):
    """The kept blocks one after the other, written out."""
    x = model.embedding(tokens) + model.position(jnp.arange(tokens.shape[0]))
    for scale, layer in zip(multipliers, layers, strict=True):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks.block)
        x = x + scale * block.attention(block.attention_norm(x), mask=causal())
        x = x + scale * block.mlp(block.mlp_norm(x))
    return model.embedding.attend(model.norm(x))


@pytest.fixture(scope="module")
def full():
    return learn(None, gpt())


@pytest.fixture(scope="module")
def coins():
    """A draw of four of six layers by coins, with multipliers."""
    subnet = gj.random_path(4, scale="linear_gap", mode="bernoulli")
    draws = (one_map(subnet, gpt(), key) for key in KEYS)
    return next(move for move in draws if move.active.sum() == 4)


@pytest.fixture(scope="module")
def path(coins):
    """The same layers as a path of fixed length, with its outputs and gradient."""
    layers = jnp.flatnonzero(coins.active)
    move = gj.AxisMap("layers", layers, branch=coins.branch[layers])
    return move, *learn(Given(move), gpt())


def test_the_whole_path_is_the_model_bitwise(full):
    """A static branch: the very same program, in outputs and gradients."""
    for mode, way in itertools.product(MODES, ("fixed", "bernoulli")):
        whole = gj.random_path(LAYERS, scale=mode, mode=way)
        assert eqx.tree_equal(whole(gpt(), key=KEYS[1]), gpt())
        assert whole.maps(axes_of(gpt()), key=KEYS[1], step=0) == []
    assert eqx.tree_equal(learn(None, whole(gpt(), key=KEYS[1])), full)


def test_a_path_runs_its_blocks_one_after_the_other(path, full):
    move, scores, _ = path
    run = jax.jit(jax.vmap(lambda t: composed(gpt(), move.source, move.branch, t)))
    np.testing.assert_allclose(scores, run(TOKENS), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(scores - full[0])).max() > 0.1


def test_skipped_layers_get_a_gradient_of_exactly_zero_and_kept_ones_do_not(path):
    move, _, gradient = path
    drawn = np.asarray(move.source)
    skipped = np.setdiff1d(np.arange(LAYERS), drawn)
    block = gradient.blocks.block
    for leaf in jax.tree.leaves(block):
        assert not np.asarray(leaf)[skipped].any()
    for leaf in (block.attention.q, block.attention.o_bias, block.mlp.up, block.mlp.down):
        assert all(np.asarray(leaf)[layer].any() for layer in drawn)


def test_gathered_skipped_and_masked_layers_agree(path, coins):
    """A path, `lax.cond` over all layers, and a reference that runs them all and keeps some."""
    multipliers = coins.branch * coins.active
    masked = eqx.tree_at(lambda m: m.blocks.branch, gpt(), multipliers, is_leaf=lambda x: x is None)
    y, gradient = learn(None, masked)
    gradient = eqx.tree_at(lambda m: m.blocks.branch, gradient, None)
    for learnt in (path[1:], learn(Given(coins), gpt())):
        for a, b in zip(*map(jax.tree.leaves, (learnt, (y, gradient))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_dropped_layer_is_not_run(coins):
    """Its NaNs reach neither the outputs nor the gradient, which a mask would let through."""
    on = np.asarray(coins.active)
    sick = jax.tree.map(
        lambda x: jnp.asarray(np.where(on.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan), x.dtype),
        gpt().blocks.block,
    )
    learnt = learn(Given(coins), eqx.tree_at(lambda m: m.blocks.block, gpt(), sick))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(learnt))


def test_dropping_a_layer_that_adds_nothing_changes_nothing(path):
    move = path[0]
    skipped = jnp.setdiff1d(jnp.arange(LAYERS), move.source)
    ends = lambda m: [  # noqa: E731
        m.blocks.block.attention.o,
        m.blocks.block.attention.o_bias,
        m.blocks.block.mlp.down,
        m.blocks.block.mlp.down_bias,
    ]
    model = eqx.tree_at(ends, gpt(), replace_fn=lambda leaf: leaf.at[skipped].set(0.0))
    short = dataclasses.replace(move, branch=jnp.ones(move.length))
    scores, expected = learn(Given(short), model)[0], learn(None, model)[0]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


def test_many_paths_of_one_length_are_one_compilation():
    traces, path, x = [], gj.random_path(4), gpt().embedding(TOKENS[0])

    @eqx.filter_jit
    def run(blocks, step):
        traces.append(step)
        return path(blocks, key=gj.step_key(0, step))(x)

    drawn = {run(gpt().blocks, jnp.asarray(step)).tobytes() for step in range(8)}
    assert len(traces) == 1
    assert len(drawn) > 2


@pytest.mark.parametrize("length", [3, 4])
def test_a_step_at_k_of_l_layers_costs_k_of_l(length):
    def step(path):
        def loss(model, key, tokens):
            return jnp.sum(outputs(path(model, key=key), tokens))

        return lambda *args: eqx.filter_grad(loss)(*args)

    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    cost = {k: flops(step(gj.random_path(k)), gpt(), KEYS[0], tokens) for k in (2, length, LAYERS)}
    head = 3 * 2 * TOKENS.size * testing.VOCAB * testing.TOY["embed"]
    assert (cost[length] - head) * LAYERS == (cost[LAYERS] - head) * length
    assert cost[2] > 2 * head


def test_optimizer_state_needs_no_change_between_stages():
    """Gradients through a sub-network have the shapes of the whole model's, whatever the stage."""
    whole = eqx.filter(gpt(), eqx.is_inexact_array)
    for subnet in (gj.random_path(2), gj.random_path(4, mode="bernoulli"), gj.random_part(mlp=3)):
        gradient = eqx.filter_eval_shape(learn, subnet, gpt())[1]
        assert jax.tree.structure(gradient) == jax.tree.structure(whole)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, whole)


# Width ---------------------------------------------------------------------------------------


def chosen(subnet, model, key=KEYS[0]):
    return {
        move.axis: np.asarray(move.source) for move in subnet.maps(axes_of(model), key=key, step=0)
    }


def test_all_units_are_the_model_and_their_order_does_not_matter(full):
    whole = gj.random_part(mlp=6, heads=2, scale="linear")
    assert eqx.tree_equal(whole(gpt(), key=KEYS[0]), gpt())
    turned = taken(Given(gj.AxisMap("mlp", jnp.array([3, 0, 5, 1, 4, 2]))), gpt())
    turned = taken(Given(gj.AxisMap("kv_heads", jnp.array([1, 0]))), turned)
    np.testing.assert_allclose(learn(None, turned)[0], full[0], rtol=1e-5, atol=1e-5)


def test_units_differ_between_layers_unless_asked_not_to():
    units = chosen(gj.random_part(mlp=3), gpt())["mlp"]
    assert units.shape == (LAYERS, 3)
    assert (np.diff(units) > 0).all() and 0 <= units.min() <= units.max() < 6
    assert len(set(map(tuple, units.tolist()))) > 2
    same = gj.random_part(mlp=3, per_layer=False)
    assert chosen(same, gpt())["mlp"].shape == (3,)
    assert any(set(chosen(same, gpt(), key)["mlp"]) != {0, 1, 2} for key in KEYS[:5])


@pytest.mark.parametrize("scale, factor", [("none", 1), ("sqrt", 2**0.5), ("linear", 2)])
def test_a_part_of_a_path_is_what_indexing_gives(scale, factor):
    """Path then part; consumers of the chosen units are scaled, output biases are not."""
    path, part = gj.random_path(3), gj.random_part(mlp=3, heads=1, scale=scale)
    layers = np.asarray(path.sample(LAYERS, key=KEYS[0]))
    short = taken(path, gpt())
    small, picked = taken(part, short), chosen(part, short)
    assert sizes(small) | dict(layers=3, mlp=3, kv_heads=1) == sizes(small)
    old, new = (jax.tree.map(np.asarray, m.blocks.block) for m in (gpt(), small))
    for i, layer in enumerate(layers):
        unit, head = picked["mlp"][i], picked["kv_heads"][i]
        equal = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        equal(new.mlp.up[i], old.mlp.up[layer][:, unit])
        equal(new.mlp.down[i], factor * old.mlp.down[layer][unit])
        equal(new.mlp.down_bias[i], old.mlp.down_bias[layer])
        equal(new.attention.q[i], old.attention.q[layer][:, head])
        equal(new.attention.o[i], factor * old.attention.o[layer][head])


def test_units_that_are_not_chosen_get_no_gradient():
    part = gj.random_part(mlp=3)
    gradient = jax.tree.map(np.asarray, learn(part, gpt())[1].blocks.block.mlp)
    for layer, units in enumerate(chosen(part, gpt())["mlp"]):
        other = np.setdiff1d(np.arange(6), units)
        assert not gradient.up[layer][:, other].any() and not gradient.down[layer][other].any()
        assert gradient.up[layer][:, units].any(0).all() and gradient.down[layer].any()


def test_grouped_queries_are_chosen_by_whole_groups():
    model = made("Llama", heads=4, kv_heads=2, layers=2)
    small = taken(gj.random_part(heads=2), model)
    picked = chosen(gj.random_part(heads=2), model)["kv_heads"]
    q, old = (np.asarray(m.blocks.block.attention.q) for m in (small, model))
    assert q.shape == (2, 8, 1, 2, 4) and small.blocks.block.attention.k.shape == (2, 8, 1, 4)
    for layer in range(2):
        np.testing.assert_array_equal(q[layer], old[layer][:, picked[layer]])
    with pytest.raises(SubnetError, match="3 are not whole groups of 2"):
        gj.random_part(heads=3)(model, key=KEYS[0])


def test_a_table_shared_by_all_layers_needs_the_same_heads_in_all_of_them():
    t5 = made("T5", heads=4, encoder_layers=2, decoder_layers=2)
    (head,) = chosen(gj.random_part(heads=1), t5)["kv_heads"]  # two stacks: the same everywhere
    small = taken(gj.random_part(heads=1), t5)
    np.testing.assert_array_equal(small.encoder_bias.table, t5.encoder_bias.table[:, [head]])
    encoder = _Encoder(t5.encoder, t5.encoder_bias)
    with pytest.raises(SubnetError, match=r"bias.table: .* choose the same ones for every layer"):
        taken(gj.random_part(heads=1), encoder)
    same = eqx.filter_eval_shape(taken, gj.random_part(heads=1, per_layer=False), encoder)
    assert same.bias.table.shape[1] == 1


class _Encoder(eqx.Module):
    stack: gj.nn.Stacked
    bias: gj.nn.RelativeBias


# Progressive layer dropping, and schedules ---------------------------------------------------


def test_progressive_dropping_follows_its_formulas():
    drop = gj.progressive_layer_drop(floor=0.5, rate=1e-2)
    theta = np.asarray(drop.theta(jnp.arange(0, 1000, 10)))
    assert theta[0] == 1 and (np.diff(theta) < 0).all() and theta[-1] > 0.5
    np.testing.assert_allclose(theta, 0.5 * np.exp(-0.1 * np.arange(100)) + 0.5, rtol=1e-6)
    p = np.asarray(drop.chances(LAYERS, 100_000))
    np.testing.assert_allclose(p, 1 - np.arange(1, LAYERS + 1) / LAYERS * 0.5, rtol=1e-6)
    assert p.mean() == pytest.approx(1 - (LAYERS + 1) / (2 * LAYERS) * 0.5)
    draw = jax.jit(jax.vmap(lambda key: one_map(drop, gpt(), key, 100_000).active))
    shares = np.asarray(draw(KEYS)).mean(0)
    assert (np.abs(shares - p) <= 5 * np.sqrt(p * (1 - p) / DRAWS)).all()
    move = one_map(drop, gpt(), KEYS[0], 100_000)
    np.testing.assert_allclose(move.branch, 1 / p, rtol=1e-6)
    plain = gj.progressive_layer_drop(floor=0.5, rate=1e-2, inverse=False)
    assert one_map(plain, gpt(), KEYS[0], 5).branch is None


@pytest.mark.parametrize(
    "lengths, stages, warmup, steps, saving",
    [
        ((6, 8, 10, 12), "equal", 0, 400, 4 / 3),
        ((6, 8, 10, 12), "proportional", 0, 400, 6 / 5),
        ((6, 9, 12), "equal", 0, 300, 4 / 3),
        ((12, 16, 20, 24), "equal", 0, 400, 4 / 3),
        ((12, 16, 20, 24), "proportional", 0, 400, 6 / 5),
        ((12, 16, 20, 24), "proportional", 30, 400, 1.182),
    ],
)
def test_savings_are_the_published_ones_and_those_of_the_steps_taken(
    lengths, stages, warmup, steps, saving
):
    layers = lengths[-1]
    schedule = gj.path_schedule(lengths, layers=layers, steps=steps, stages=stages, warmup=warmup)
    assert schedule.saving == pytest.approx(saving, rel=3e-4 if warmup else 1e-12)
    taken = [schedule.at(step).length for step in range(steps)]
    assert layers * steps / sum(taken) == pytest.approx(schedule.saving, rel=1e-12)
    assert taken[:warmup] == [layers] * warmup
    assert taken[warmup:] == sorted(taken[warmup:]) and taken[-1] == layers
    assert [s.start for s in schedule.stages[1:]] == [s.stop for s in schedule.stages[:-1]]


def test_a_schedule_shares_out_its_steps():
    spans = lambda **how: [  # noqa: E731
        (s.start, s.stop, s.path.length)
        for s in gj.path_schedule((3, 4.5, 6), layers=6, **how).stages
    ]
    assert spans(steps=30) == [(0, 10, 3), (10, 20, 4.5), (20, 30, 6)]
    assert spans(steps=60, stages="proportional") == [(0, 10, 3), (10, 30, 4.5), (30, 60, 6)]
    assert spans(steps=34, warmup=4) == [(0, 4, 6), (4, 14, 3), (14, 24, 4.5), (24, 34, 6)]
    assert spans(steps=10) == [(0, 3, 3), (3, 7, 4.5), (7, 10, 6)]
    drawn = {gj.path_schedule((4.5, 6), layers=6, steps=40).at(i).length for i in range(20)}
    assert drawn == {4, 5}
