"""Optimizer state through growth: moments, ages, structure, and Adam's kick of new coordinates."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import models, optim, testing
from growjax.axes import axes_of, get
from growjax.errors import StateError
from growjax.optim.age import AgedAdamState, Ages


KEY = jax.random.key(0)
KEPT = 10_000  # updates that old coordinates have seen: bias correction is over for them


def blank(make, *args, **kwargs):
    """A model without the seconds that drawing it takes; `testing.randomise` fills it."""
    shapes = eqx.filter_eval_shape(make, *args, key=KEY, **kwargs)
    return jax.tree.map(lambda s: jnp.full(s.shape, 1e-5, s.dtype), shapes)


def mlp(dtype=jnp.float32):
    """The smallest model with axes: `embed` and `mlp`."""
    with jax.enable_x64(True):
        model = testing.randomise(blank(gj.nn.MLP, 3, 4))
        return jax.tree.map(lambda x: x.astype(dtype), model)


def gpt(**options):
    sizes: Any = testing.TOY | dict(layers=2, positions=testing.LENGTH) | options
    return testing.randomise(blank(models.GPT, models.GPTConfig(remat="everything", **sizes)))


def trained(model):
    return gj.partition(model)[0]


def like(tree, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def updates(tx, state, params, steps, gradient=1.0):
    """The updates of some steps under a constant gradient, and the state after them."""

    def step(state, _):
        out, state = tx.update(like(params, gradient), state, params)
        return state, out

    state, out = jax.jit(lambda state: jax.lax.scan(step, state, None, steps))(state)
    return jax.tree.map(np.asarray, out), state


# Adam with ages ------------------------------------------------------------------------------


# In float32 `1 - b2^t` has lost five digits at b2 = 0.999, in optax too.
@pytest.mark.parametrize(
    "dtype, b2, rtol", [(jnp.float32, 0.95, 2e-6), (jnp.float64, 0.999, 1e-12)], ids=["f32", "f64"]
)
def test_adam_is_optax_adam_while_nothing_grows(dtype, b2, rtol):
    params = trained(mlp(dtype))
    ours = optim.adamw(1e-2, b2=b2, weight_decay=0.1)
    theirs = optax.adamw(1e-2, b2=b2, weight_decay=0.1, mask=optim.matrices)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        left, right = ours.init(params), theirs.init(params)
        for _ in range(4):
            draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
            gradient = jax.tree.map(draw, params)
            a, left = ours.update(gradient, left, params)
            b, right = theirs.update(gradient, right, params)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                assert x.dtype == y.dtype == dtype
                np.testing.assert_allclose(x, y, rtol=rtol)


def settled_in(tx, params):
    """The state after very many steps of a constant gradient of one."""

    def fill(node):
        if isinstance(node, Ages):
            return like(node, KEPT)
        return like(node, KEPT if isinstance(node, jax.Array) and node.ndim == 0 else 1.0)

    leaf = lambda x: isinstance(x, type(params) | Ages)  # noqa: E731
    return jax.tree.map(fill, tx.init(params), is_leaf=leaf)


def test_plain_adam_kicks_new_coordinates_by_six_and_a_half_learning_rates():
    """Empty moments under an old step count: (1 - b1^t) / sqrt(1 - b2^t) learning rates."""
    model, op, lr = mlp(), gj.msg(mlp=6), 0.01
    tx = optax.adam(lr)
    state = gj.carry(op, settled_in(tx, trained(model)), model, optimizer=tx, key=KEY)
    out, _ = updates(tx, state, trained(gj.grow(op, model, key=KEY)), 100)
    t = np.arange(1, 101)
    kick = (1 - 0.9**t) / np.sqrt(1 - 0.999**t)
    np.testing.assert_allclose(-out.up[:, 0, 4] / lr, kick, rtol=2e-3)
    assert (-out.up[:, :, 4:] / lr).max() == pytest.approx(6.57, abs=0.01)
    assert np.argmax(-out.up[:, 0, 4]) == 11
    np.testing.assert_allclose(-out.up[:, :, :4] / lr, 1, rtol=1e-3)


def test_a_grown_coordinate_starts_as_in_a_fresh_run():
    model, op, tx = mlp(), gj.msg(mlp=6), optim.scale_by_adam()
    state = gj.carry(op, settled_in(tx, trained(model)), model, optimizer=tx, key=KEY)
    grown = trained(gj.grow(op, model, key=KEY))
    out, after = updates(tx, state, grown, 30, gradient=0.7)
    fresh, _ = updates(tx, tx.init(grown), grown, 30, gradient=0.7)
    for slot in axes_of(grown).of_kind("param"):
        new, young = get(out, slot.steps), get(fresh, slot.steps)
        for i in slot.positions("mlp") if slot.value is not None else ():
            ours, theirs = (np.take(x, [4, 5], axis=i + 1) for x in (new, young))
            np.testing.assert_array_equal(ours, theirs)
            assert np.abs(ours).max() < 1.01
    assert after.ages.of["mlp"].tolist() == [KEPT + 30] * 4 + [30] * 2
    assert after.ages.of["embed"].tolist() == [KEPT + 30] * 3


def test_an_entry_is_as_old_as_the_youngest_of_its_coordinates():
    tx, params = optim.scale_by_adam(), trained(mlp())
    embed, units = np.array([0, 3, 50]), np.array([9, 0, 2, 400])
    age = np.minimum(embed[:, None], units[None, :])
    # Moments as a constant gradient of one leaves them: with the right age the update is one.
    mu, nu = (eqx.tree_at(lambda p: p.up, params, 1 - decay**age) for decay in (0.9, 0.999))
    ages = Ages({"embed": jnp.asarray(embed), "mlp": jnp.asarray(units)})
    out, _ = updates(tx, AgedAdamState(mu, nu, ages), params, 1)
    np.testing.assert_allclose(out.up[0], 1, rtol=1e-4)


def test_weight_decay_is_for_matrices():
    params = trained(gpt(norm="rms", glu=True, qk_norm=True))
    decayed = optim.matrices(params)
    block = decayed.blocks.block
    matrices = (block.attention.q, block.attention.o, block.mlp.glu, decayed.embedding.table)
    vectors = (
        block.attention.q_bias,
        block.attention.k_norm.weight,
        block.mlp.up_bias,
        block.mlp_norm.weight,
        decayed.norm.weight,
    )
    assert all(matrices) and not any(vectors)
    assert jax.tree.structure(decayed) == jax.tree.structure(params)


# Carrying: structure -------------------------------------------------------------------------


def labels(params):
    return jax.tree.map(lambda matrix: "matrix" if matrix else "rest", optim.matrices(params))


class Average(NamedTuple):
    params: Any


def average():
    """An exponential average of the parameters."""

    def update(updates, state, params=None):
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state.params, params)
        return updates, Average(average)

    return optax.GradientTransformation(Average, update)


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adamw, masked": optax.adamw(1e-3, weight_decay=0.1, mask=optim.matrices),
    "aged adamw": optim.adamw(1e-3, weight_decay=0.1),
    "amsgrad": optax.amsgrad(1e-3),
    "lion": optax.lion(1e-3),
    "sgd with momentum": optax.sgd(1e-3, momentum=0.9),
    "adagrad": optax.adagrad(1e-3),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 4),
    "hyper-parameters": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1, 0, 9)),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), optax.ema(0.9)),
    "masked": optax.masked(optax.adam(1e-3), optim.matrices),
    "labels": optax.partition({"matrix": optax.adam(1e-3), "rest": optax.lion(1e-3)}, labels),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_carried_state_has_the_structure_of_the_grown_models_own(name):
    tx, model = OPTIMIZERS[name], gpt()
    op = gj.chain(gj.msg(embed=12, heads=4), gj.copy(mlp=15), gj.stack(layers=3, order="top"))
    carried = eqx.filter_eval_shape(
        lambda model: gj.carry(op, tx.init(trained(model)), model, optimizer=tx, key=KEY), model
    )
    own = eqx.filter_eval_shape(lambda model: tx.init(trained(op(model, key=KEY))), model)
    assert jax.tree.structure(carried) == jax.tree.structure(own)
    for a, b in zip(jax.tree.leaves(carried), jax.tree.leaves(own), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_counters_and_hyper_parameters_stay_as_they_are():
    tx = optax.MultiSteps(OPTIMIZERS["hyper-parameters"], 3)
    model, op = mlp(), gj.msg(mlp=6)
    _, state = updates(tx, tx.init(trained(model)), trained(model), 5)
    carried = gj.carry(op, state, model, optimizer=tx, key=KEY)
    scalars = lambda s: [float(x) for x in jax.tree.leaves(s) if jnp.ndim(x) == 0]  # noqa: E731
    assert scalars(carried) == scalars(state)
    assert int(carried.mini_step) == 2 and int(carried.inner_opt_state.count) == 1
    assert carried.acc_grads.up.shape == (3, 6)


def test_the_average_of_the_parameters_moves_as_the_parameters():
    model, tx = mlp(), optax.chain(optax.scale_by_adam(), average())
    state = tx.init(trained(model))
    op = gj.copy(mlp=7, shares="random")
    grown = trained(gj.grow(op, model))
    assert eqx.tree_equal(gj.carry(op, state, model, optimizer=tx)[1].params, grown, rtol=1e-6)
    # Copies behind gates are young, but an average of them is no moment that starts from zero
    hidden = gj.msg(mlp=7, init="copy")
    grown = trained(gj.grow(hidden, model))
    assert eqx.tree_equal(gj.carry(hidden, state, model, optimizer=tx)[1].params, grown)
    with pytest.raises(StateError, match="average again after growing"):
        gj.carry(gj.msg(mlp=6), state, model, key=KEY)


class Strange(NamedTuple):
    wobble: Any
    nu: Any


def test_a_field_of_unknown_meaning_is_refused_by_name_until_it_is_explained():
    model, op = mlp(), gj.copy(mlp=8)
    state = Strange(*(like(trained(model), 1.0) for _ in range(2)))
    with pytest.raises(StateError, match="what does 'wobble' hold") as error:
        gj.carry(op, state, model)
    assert "'nu'" not in str(error.value)
    carried = gj.carry(op, state, model, moments={"wobble": "first"})
    np.testing.assert_allclose(carried.wobble.up, 0.5)
    np.testing.assert_allclose(carried.nu.up, 0.25)
    np.testing.assert_allclose(carried.wobble.down, 1)


def test_factored_and_misshapen_moments_are_refused_by_name():
    model = mlp()
    state = optax.adafactor(1e-3, min_dim_size_to_factor=1).init(trained(model))
    with pytest.raises(StateError) as error:
        gj.carry(gj.copy(mlp=8), state, model)
    for field in (".v_row:", ".v_col:", ".v:"):
        assert field in str(error.value)
    with pytest.raises(StateError, match=r"v_row: not shaped like the parameters \(up "):
        gj.carry(gj.copy(mlp=8), state, model, moments={"v_row": "second", "v_col": "second"})
    with pytest.raises(StateError, match="covers buffers too"):
        gj.carry(gj.msg(mlp=8), optax.adam(1e-3).init(gpt()), gpt(), key=KEY)


# Carrying: values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optim.scale_by_adam(),
        optax.scale_by_amsgrad(),
        optax.scale_by_rms(),
        optax.trace(0.9),
        optax.scale_by_rss(initial_accumulator_value=0.0),
    ],
    ids=["aged adam", "amsgrad", "rmsprop", "momentum", "adagrad"],
)
def test_carried_moments_are_those_that_the_grown_model_would_have(tx):
    batch: Any = np.random.default_rng(0).standard_normal((2, 5, 3))
    for op in (gj.copy(mlp=9, shares="random"), gj.chain(gj.copy(mlp=6), gj.copy(mlp=7))):
        testing.assert_carries(op, mlp(jnp.float64), batch, tx)


def test_copies_may_start_from_zero_and_young():
    model, op, tx = mlp(), gj.copy(mlp=7), optim.scale_by_adam()
    state = settled_in(tx, trained(model))
    dual, zero = (
        gj.carry(op, state, model, optimizer=tx, copies=how) for how in ("dual", "zero")
    )
    share = np.array([0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5], np.float32)
    for name, power in (("mu", 1), ("nu", 2)):
        kept, blank = getattr(dual, name), getattr(zero, name)
        np.testing.assert_allclose(kept.up_bias, share**power)
        np.testing.assert_allclose(blank.up_bias, share**power * (np.arange(7) < 4))
        assert not np.asarray(blank.down)[4:].any() and np.asarray(kept.down).all()
    assert dual.ages.of["mlp"].tolist() == [KEPT] * 7
    assert zero.ages.of["mlp"].tolist() == [KEPT] * 4 + [0] * 3


def test_split_branches_divide_what_writes_and_the_moments_of_what_does_not():
    """Layers 0, 1, 1, the last two with half a branch each: the share and its dual."""
    model, op, tx = gpt(), gj.stack(layers=3, branch="split"), optax.scale_by_adam()
    grown = jax.tree.map(np.asarray, eqx.filter_jit(op)(model).blocks.block)
    carried = gj.carry(op, settled_in(tx, trained(model)), model, optimizer=tx)
    mu, nu = (jax.tree.map(np.asarray, m.blocks.block) for m in (carried.mu, carried.nu))
    for layer, (source, share) in enumerate([(0, 1), (1, 0.5), (1, 0.5)]):
        old = jax.tree.map(lambda x, i=source: np.asarray(x)[i], model.blocks.block)
        np.testing.assert_array_equal(grown.mlp.down[layer], share * old.mlp.down)
        np.testing.assert_array_equal(grown.attention.o_bias[layer], share * old.attention.o_bias)
        np.testing.assert_array_equal(grown.mlp.up[layer], old.mlp.up)
        assert (mu.mlp.down[layer] == 1).all() and (nu.mlp.down[layer] == 1).all()
        assert (mu.mlp.up[layer] == share).all() and (nu.mlp.up[layer] == share**2).all()


@pytest.fixture(scope="module")
def hop():
    """A step, growth behind gates, and a step more; and the two steps without growth."""
    op, tx = gj.msg(embed=12, mlp=10, layers=3, init="copy"), optim.adamw(1e-2, weight_decay=0.1)
    tokens = testing.Architecture("GPT").batch()

    @eqx.filter_jit
    def step(model, state):
        def loss(params):
            y = jax.vmap(eqx.combine(params, rest))(tokens)
            return jnp.mean(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        params, rest = gj.partition(model)
        change, state = tx.update(jax.grad(loss)(params), state, params)
        return eqx.combine(optax.apply_updates(params, change), rest), state

    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: x.astype(jnp.float64), gpt())
        one, state = step(model, tx.init(trained(model)))
        two, _ = step(one, state)
        carried = gj.carry(op, state, one, optimizer=tx, key=KEY)
        grown, after = step(gj.grow(op, one, key=KEY), carried)
    return op, model, two, carried, grown, after


def corners(small, big):
    for slot in axes_of(small).of_kind("param"):
        old = get(small, slot.steps)
        if old is not None:
            found = np.asarray(get(big, slot.steps))
            yield np.asarray(old), found, tuple(map(slice, old.shape))


def test_moments_of_new_coordinates_are_zero(hop):
    _, model, _, carried, _, _ = hop
    for moment in (carried[0].mu, carried[0].nu):
        for _, found, corner in corners(trained(model), moment):
            outside = np.ones(found.shape, bool)
            outside[corner] = False
            assert not found[outside].any()
        assert np.asarray(moment.embedding.table)[:, :8].any()
    ages = carried[0].ages.of
    assert ages["embed"].tolist() == [1] * 8 + [0] * 4
    assert ages["layers"].tolist() == [1, 1, 0]


def test_a_step_commutes_with_growth_behind_gates(hop):
    _, _, two, _, grown, _ = hop
    for expected, found, corner in corners(two, grown):
        np.testing.assert_allclose(found[corner], expected, rtol=1e-9, atol=1e-9)


def test_carrying_through_a_chain_is_carrying_step_by_step_also_inside_jit():
    model, tx = mlp(), optim.adamw(1e-3)
    a, b = gj.copy(mlp=6, shares="random"), gj.msg(mlp=9)
    _, state = updates(tx, tx.init(trained(model)), trained(model), 2)
    carry = functools.partial(gj.carry, optimizer=tx)
    at_once = eqx.filter_jit(lambda s, m: carry(gj.chain(a, b), s, m, key=KEY))(state, model)
    one_by_one = carry(b, carry(a, state, model), gj.grow(a, model), key=KEY)
    assert eqx.tree_equal(at_once, one_by_one)
    assert at_once[0].ages.of["mlp"].tolist() == [2] * 6 + [0] * 3


def test_ramping_and_settling_recompile_no_optimizer_step():
    tx, model = optim.adamw(1e-3), gj.grow(gj.msg(mlp=6), mlp(), key=KEY)
    traces, state, opened = [], tx.init(trained(model)), gj.ramp(model, 1.0)

    @jax.jit
    def update(gradient, state, params):
        traces.append(state)
        return tx.update(gradient, state, params)

    for now in (model, gj.ramp(model, 0.3), opened, gj.settle(opened)):
        _, state = update(like(trained(now), 1.0), state, trained(now))
    assert len(traces) == 1
