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


EVERY_AXIS = gj.chain(gj.msg(embed=12, heads=4), gj.copy(mlp=15), gj.stack(layers=3, order="top"))


@functools.cache
def shapes() -> tuple[Any, Any]:
    """A model without values, and what is trained of it once every axis has grown."""
    model = eqx.filter_eval_shape(gpt)
    return model, eqx.filter_eval_shape(lambda m: trained(EVERY_AXIS(m, key=KEY)), model)


# The others are carried, with their values, by `test_carry`
QUICK = ("adam", "adamw, masked", "aged adamw", "accumulated", "hyper-parameters", "labels")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in OPTIMIZERS],
)
def test_carried_state_has_the_structure_of_the_grown_models_own(name):
    tx, op, (model, grown) = OPTIMIZERS[name], EVERY_AXIS, shapes()
    carried = eqx.filter_eval_shape(
        lambda model: gj.carry(op, tx.init(trained(model)), model, optimizer=tx, key=KEY), model
    )
    own = eqx.filter_eval_shape(tx.init, grown)
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
    # Copied, with shares, and copied behind gates
    for op in (gj.copy(mlp=7, shares="random"), gj.msg(mlp=7, init="copy")):
        grown = trained(gj.grow(op, model))
        carried = gj.carry(op, state, model, optimizer=tx)
        assert eqx.tree_equal(carried[1].params, grown, rtol=1e-6)


@pytest.mark.parametrize("op", [gj.msg(mlp=6, init="matched"), gj.zeros(mlp=6)], ids=str)
def test_the_average_of_a_fresh_coordinate_is_its_own_weight(op):
    model, tx = mlp(), optax.chain(optax.scale_by_adam(), average())
    _, state = updates(tx, tx.init(trained(model)), like(trained(model), 3.0), 4)
    grown = trained(gj.grow(op, model, key=KEY))
    carried = gj.carry(op, state, model, optimizer=tx, key=KEY)[1].params
    old = np.asarray(state[1].params.up)
    assert not np.allclose(old, model.up, rtol=0.1)
    np.testing.assert_array_equal(carried.up[:, :4], old)
    np.testing.assert_array_equal(carried.up[:, 4:], grown.up[:, 4:])
    np.testing.assert_array_equal(carried.down[4:], grown.down[4:])
    shapes = eqx.filter_eval_shape(lambda m: m, model)
    with pytest.raises(StateError, match="give the model itself"):
        gj.carry(op, state, shapes, optimizer=tx, key=KEY)


def test_accumulators_of_fresh_coordinates_start_from_their_own_constant():
    model, op = mlp(), gj.msg(mlp=6)
    for tx, field, constant in [
        (optax.adagrad(1e-2), "sum_of_squares", 0.1),
        (optax.adagrad(1e-2, initial_accumulator_value=0.7), "sum_of_squares", 0.7),
        (optax.yogi(1e-2), "nu", 1e-6),
    ]:
        _, state = updates(tx, tx.init(trained(model)), trained(model), 3)
        carried = gj.carry(op, state, model, optimizer=tx, key=KEY)
        new, old = (np.asarray(getattr(s[0], field).up) for s in (carried, state))
        np.testing.assert_array_equal(new[:, :4], old)
        np.testing.assert_allclose(new[:, 4:], constant, rtol=1e-6)


NAMED = optax.named_chain(("ema", optax.trace(0.9)), ("mom", optax.scale_by_rms()))


@pytest.mark.parametrize(
    "tx, pick, power",
    [
        (optax.adamax(1e-2), lambda s: s[0].nu, 1),
        (optax.rmsprop(1e-2, momentum=0.9), lambda s: s[2].trace, 0),
        (optax.rmsprop(1e-2, momentum=0.9), lambda s: s[0].nu, 2),
        (optax.chain(optax.scale_by_adam(), optax.ema(0.9)), lambda s: s[1].ema, 0),
        (NAMED, lambda s: s["ema"].trace, 1),
        (NAMED, lambda s: s["mom"].nu, 2),
    ],
    ids=["adamax", "trace of rms", "rms", "ema of adam", "named trace", "named rms of it"],
)
def test_copies_of_a_producer_take_the_power_of_their_share_that_a_fresh_run_takes(tx, pick, power):
    model, op = mlp(), gj.copy(mlp=8, shares="equal")
    _, state = updates(tx, tx.init(trained(model)), trained(model), 3)
    moment = pick(gj.carry(op, state, model, optimizer=tx))
    old = np.asarray(pick(state).up)
    np.testing.assert_allclose(moment.up, np.tile(old, 2) * 0.5**power, rtol=1e-6)


def test_weights_added_to_gradients_are_refused_where_shares_tell_them_apart():
    model = mlp()
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3))
    state = tx.init(trained(model))
    with pytest.raises(
        StateError, match=r"(?s)mu\.\w+.*no power of the gradients.*gj\.msg does not"
    ):
        gj.carry(gj.copy(mlp=8), state, model, optimizer=tx)
    carried = gj.carry(gj.msg(mlp=8), state, model, optimizer=tx, key=KEY)
    assert carried[1][0].mu.up.shape == (3, 8)


def test_factored_and_misshapen_moments_are_refused_by_name():
    model = mlp()
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=1)
    with pytest.raises(StateError, match="not shaped like its parameter") as error:
        gj.carry(gj.copy(mlp=8), tx.init(trained(model)), model, optimizer=tx)
    for field in (".v_row.up", ".v_col.down"):
        assert field in str(error.value) or "more" in str(error.value)
    # Whole at one size and factored at the other
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=3)
    small = eqx.tree_at(lambda m: (m.up, m.down), model, (model.up[:, :2], model.down[:2]))
    small = eqx.tree_at(lambda m: m.up_bias, small, small.up_bias[:2])
    with pytest.raises(StateError, match="grow"):
        gj.carry(gj.msg(mlp=6), tx.init(trained(small)), small, optimizer=tx, key=KEY)
    adam = optax.adam(1e-3)
    with pytest.raises(StateError, match="covers buffers too"):
        gj.carry(gj.msg(mlp=8), adam.init(gpt()), gpt(), optimizer=adam, key=KEY)


def test_a_moment_that_scales_as_small_gradients_alone_is_refused():
    def halve_small(updates, params):
        return jax.tree.map(lambda g: g * (1 - 0.5 * jnp.exp(-((10 * g) ** 2))), updates)

    # Next to the largest entry, what is not linear here is less than the tolerance for an `eps`
    tx = optax.chain(optax.stateless(halve_small), optax.trace(0.9))
    with pytest.raises(StateError, match="trace.up: scales with no power of the gradients"):
        gj.carry(gj.copy(mlp=7, shares="random"), tx.init(trained(mlp())), mlp(), optimizer=tx)


def test_an_average_of_anything_is_refused_with_what_to_do():
    model, tx = mlp(), optax.ema(0.999)
    with pytest.raises(StateError, match=r"gradients or of the weights.*gj\.grow\(op, average"):
        gj.carry(gj.copy(mlp=8), tx.init(trained(model)), model, optimizer=tx)


def test_a_transformation_of_a_trace_is_refused_and_one_of_outside_is_not_traced():
    model, op = mlp(), gj.copy(mlp=8)
    state = optax.trace(0.9).init(trained(model))

    def inside(decay):
        return gj.carry(op, state, model, optimizer=optax.chain(optax.trace(decay)))

    with pytest.raises(StateError, match="outside of jit"):
        jax.jit(inside)(0.9)
    # An array that it closes over is no value of a trace
    table = jnp.linspace(1.0, 0.1, 9)
    scaled = optax.chain(
        optax.scale_by_schedule(lambda n: table[n]), optax.trace(0.9), optax.scale(-1.0)
    )
    gj.carry(op, scaled.init(trained(model)), model, optimizer=scaled)
    tx = optax.trace(0.9)
    plain = gj.carry(op, state, model, optimizer=tx)
    fresh = optax.trace(0.9)  # not asked about before
    traced = jax.jit(lambda s: gj.carry(op, s, model, optimizer=fresh))(state)
    assert eqx.tree_equal(plain, traced)


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
    model, op, tx = mlp(), gj.copy(mlp=7, shares="equal"), optim.scale_by_adam()
    state = settled_in(tx, trained(model))
    dual, zero = (gj.carry(op, state, model, optimizer=tx, copies=how) for how in ("dual", "zero"))
    share = np.array([0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5], np.float32)
    for name, power in (("mu", 1), ("nu", 2)):
        carried, blank = getattr(dual, name), getattr(zero, name)
        np.testing.assert_allclose(carried.up_bias, share**power)
        np.testing.assert_allclose(blank.up_bias, share**power * (np.arange(7) < 4))
        assert not np.asarray(blank.down)[4:].any() and np.asarray(carried.down).all()
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
            new = np.asarray(get(big, slot.steps))
            yield np.asarray(old), new, tuple(map(slice, old.shape))


def test_moments_of_new_coordinates_are_zero(hop):
    _, model, _, carried, _, _ = hop
    for moment in (carried[0].mu, carried[0].nu):
        for _, new, corner in corners(trained(model), moment):
            outside = np.ones(new.shape, bool)
            outside[corner] = False
            assert not new[outside].any()
        assert np.asarray(moment.embedding.table)[:, :8].any()
    ages = carried[0].ages.of
    assert ages["embed"].tolist() == [1] * 8 + [0] * 4
    assert ages["layers"].tolist() == [1, 1, 0]


def test_a_step_commutes_with_growth_behind_gates(hop):
    _, _, two, _, grown, _ = hop
    for expected, new, corner in corners(two, grown):
        np.testing.assert_allclose(new[corner], expected, rtol=1e-9, atol=1e-9)


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
