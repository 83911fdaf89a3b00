"""Rules of updates: the formula of each, what growth does to its state, and runs with all of them."""

from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import optim, testing
from growjax.axes import axes_of, get
from growjax.optim.sophia import SophiaState
from growjax.plan.optimizer import Name, Optimizer


NAMES = get_args(Name)
KEY = jax.random.key(0)


def mlp(dtype: Any = jnp.float32):
    """The smallest model with axes: `embed` and `mlp`."""
    with jax.enable_x64(True):
        model = testing.randomise(gj.nn.MLP(3, 4, key=KEY))
        return jax.tree.map(lambda x: x.astype(dtype), model)


def trained(model):
    return gj.partition(model)[0]


def drawn(tree, seed: int = 0):
    """A tree of normal numbers, in the shapes and types of another."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


def like(tree, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def follow(rule, params, gradients, rates, **more):
    """The parameters after each step, the first ones included, and the last state."""

    def step(carry, now):
        params, state = carry
        gradient, rate = now
        updates, state = rule.update(gradient, state, params, rate=rate, **more)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    start = params, rule.init(params)
    (_, state), path = jax.jit(lambda s, g: jax.lax.scan(step, s, (g, jnp.asarray(rates))))(
        start, stacked
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), params, path), state


def plain(name: Name, **fields: Any):
    return Optimizer(name, clip=None, **fields).build()


# All of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_at_a_rate_of_zero_nothing_moves(name):
    """Also in the middle of a run, with decay, and while an average still has somewhere to go."""
    params = trained(mlp())
    rule = Optimizer(name, weight_decay=0.1, scale_by_parameter=True).build()
    gradients = [drawn(params, seed) for seed in range(5)]
    path, _ = follow(rule, params, gradients, [0.0, 0.1, 0.1, 0.0, 0.0])
    for x in leaves(path):
        assert np.array_equal(x[1], x[0]) and not np.array_equal(x[2], x[1])
        assert np.array_equal(x[4], x[3]) and np.array_equal(x[5], x[4])


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_in_proportion_to_the_rate(name):
    params = trained(mlp(jnp.float64))
    with jax.enable_x64(True):
        for rate in (0.1, 0.01):
            rule = plain(name, weight_decay=0.5)
            path, _ = follow(rule, params, [like(params, 0.0)], [rate])
            assert np.allclose(path.up[1], (1 - 0.5 * rate) * params.up, rtol=1e-12)
            assert np.array_equal(path.up_bias[1], params.up_bias)


@pytest.mark.parametrize(
    "decayed, moves",
    [("matrices", [True, False, False]), ("weights", [True, True, False]), ("all", [True] * 3)],
)
def test_what_decays_is_said(decayed, moves):
    params = trained(testing.Architecture("GPT").model(dtype=jnp.float32))
    rule = plain("adamw", weight_decay=0.5, decayed=decayed)
    updates, _ = rule.update(like(params, 0.0), rule.init(params), params, rate=0.1)
    norm = updates.blocks.block.mlp_norm
    decays = [bool(np.any(u)) for u in (updates.blocks.block.mlp.up, norm.weight, norm.bias)]
    assert decays == moves


REFERENCES: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.scale_by_adam(0.9, 0.95),
    "nadamw": lambda: optax.scale_by_adam(0.9, 0.95, nesterov=True),
    "ademamix": lambda: optax.contrib.scale_by_ademamix(0.9, 0.95, 0.999, 5.0),
    "lion": lambda: optax.scale_by_lion(0.9, 0.95),
    "sgd": lambda: optax.trace(0.9),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_rule_is_that_of_optax_while_nothing_grows(name):
    params, rates = trained(mlp(jnp.float64)), [0.1, 0.2, 0.05, 0.1]
    with jax.enable_x64(True):
        gradients = [drawn(params, seed) for seed in range(4)]
        ours, _ = follow(plain(name), params, gradients, rates)
        theirs, _ = follow(optim.rule(REFERENCES[name]()), params, gradients, rates)
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


# Lion ----------------------------------------------------------------------------------------


def test_lion_moves_every_entry_by_the_rate_whatever_the_scale_of_gradients():
    params, rates = like(trained(mlp()), 0.0), [0.25] * 3
    gradients = [drawn(params, seed) for seed in range(3)]
    path, state = follow(plain("lion", b2=0.99), params, gradients, rates)
    assert all(np.all(np.abs(np.diff(x, axis=0)) == 0.25) for x in leaves(path))
    for scale in (2.0**-9, 1024.0, -1.0):
        scaled = jax.tree.map(lambda g, s=scale: s * g, gradients)
        other, _ = follow(plain("lion", b2=0.99), params, scaled, rates)
        assert eqx.tree_equal(other, jax.tree.map(lambda x, s=scale: np.sign(s) * x, path))
    swapped = jax.tree.map(lambda g: g[..., ::-1], gradients)
    other, _ = follow(plain("lion", b2=0.99), params, swapped, rates)
    assert eqx.tree_equal(other, jax.tree.map(lambda x: x[..., ::-1], path))
    still, _ = follow(plain("lion"), params, [params], rates[:1])
    assert not any(np.any(x) for x in leaves(still))
    held = sum(x.size for x in leaves(state) if x.ndim)
    assert held == sum(x.size for x in leaves(params))


# Sophia --------------------------------------------------------------------------------------


def sophia(m, h, rho: float = 0.04, b1: float = 0.0):
    """The update of single numbers: gradients `m` under curvatures `h`."""
    state = SophiaState(jnp.zeros_like(m), jnp.asarray(h))
    return np.asarray(optim.scale_by_sophia(b1=b1, rho=rho).update(m, state)[0])


def test_sophia_steps_are_clipped_newton_steps():
    m, h = drawn(jnp.zeros((500,)), 1), jnp.abs(drawn(jnp.zeros((500,)), 2))
    update = sophia(m, h, rho=1.0)
    assert np.abs(update).max() == 1 and (np.abs(update) < 1).mean() > 0.2
    assert np.all(np.sign(update) == np.sign(m))
    np.testing.assert_allclose(update, np.clip(m / h, -1, 1), rtol=1e-5)
    # Without curvature, or as rho goes to 0, signs; as rho grows, Newton's step
    np.testing.assert_array_equal(sophia(m, 0 * h), np.sign(m))
    np.testing.assert_array_equal(sophia(m, h, rho=1e-12), np.sign(m))
    np.testing.assert_allclose(sophia(m, h, rho=1e6), m / (1e6 * h), rtol=1e-5)
    assert not sophia(jnp.zeros(3), jnp.zeros(3)).any()
    # A step never grows with curvature, and never shrinks with the gradient
    assert np.all(np.abs(sophia(m, 2 * h, rho=1.0)) <= np.abs(update))
    assert np.all(np.abs(sophia(2 * m, h, rho=1.0)) >= np.abs(update))


def test_sophia_averages_gradients_and_looks_at_curvature_only_when_it_is_shown():
    tx, params = optim.scale_by_sophia(b1=0.75, b2=0.5), jnp.zeros(4)
    g, c = drawn(params, 0), drawn(params, 1)
    _, one = tx.update(g, tx.init(params))
    assert not np.any(one.h) and np.allclose(one.m, 0.25 * g)
    shown, two = tx.update(g, one, curvature=c, labels=8.0)
    np.testing.assert_allclose(two.h, 0.5 * 8 * c * c, rtol=1e-6)
    # at once: the same step as from a state that already knew
    assert np.array_equal(shown, tx.update(g, one._replace(h=two.h))[0])
    _, three = tx.update(g, two)
    assert np.array_equal(three.h, two.h)
    _, four = tx.update(g, three, curvature=2 * c, labels=8.0)
    np.testing.assert_allclose(four.h, 0.25 * 8 * c * c + 0.5 * 8 * 4 * c * c, rtol=1e-6)


def test_only_the_product_of_rho_and_labels_matters():
    params = trained(mlp())
    gradients = [drawn(params, seed) for seed in range(3)]
    paths = [
        follow(plain("sophia", rho=rho), params, gradients, [0.1] * 3, curvature=gradients[0], **n)[
            0
        ]
        for rho, n in [(0.5, {"labels": 16}), (2.0, {"labels": 4}), (8.0, {})]
    ]
    assert eqx.tree_equal(*paths)
    signs = follow(plain("sophia"), params, gradients, [0.1] * 3)[0]
    assert not eqx.tree_equal(paths[0], signs)


def test_sophias_curvature_is_the_diagonal_of_the_gauss_newton_matrix():
    """Of the mean loss of a linear softmax model, at two batch sizes; 4,000 draws each."""
    x, w = drawn(jnp.zeros((6, 3)), 0), drawn(jnp.zeros((3, 4)), 1)
    for rows in (x, jnp.concatenate([x, x, x])):
        p = jax.nn.softmax(rows @ w)
        exact = np.einsum("ij,ik->jk", rows**2, p * (1 - p)) / len(rows)

        def once(key, rows=rows):
            labels = jax.random.categorical(key, rows @ w)

            def loss(w):
                chosen = optax.softmax_cross_entropy_with_integer_labels(rows @ w, labels)
                return jnp.mean(chosen)

            tx, c = optim.scale_by_sophia(b2=0.0), jax.grad(loss)(w)
            return tx.update(c, tx.init(w), curvature=c, labels=len(rows))[1].h

        draws = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, 4000)))
        error = draws.std(0) / np.sqrt(len(draws))
        assert np.all(np.abs(draws.mean(0) - exact) < 4 * error)
        assert np.all(error < 0.1 * exact)  # or the interval would hold anything


def test_only_sophia_asks_for_curvature():
    asked = {name: Optimizer(name, refresh_every=7).curvature_every for name in NAMES}
    assert asked == {**dict.fromkeys(NAMES), "sophia": 7}


# Scaling by the parameters -------------------------------------------------------------------


def test_steps_are_scaled_by_their_tensor_layer_by_layer():
    params = trained(testing.Architecture("GPT").model(dtype=jnp.float32))
    up = params.blocks.block.mlp.up
    assert len(up) > 1
    up = up.at[0].multiply(1e-9)
    params = eqx.tree_at(lambda p: p.blocks.block.mlp.up, params, up)
    scaled, unscaled = plain("adamw", scale_by_parameter=True), plain("adamw")
    gradient = drawn(params)
    new, old = (r.update(gradient, r.init(params), params, rate=1.0)[0] for r in (scaled, unscaled))
    rms = np.sqrt(np.mean(np.square(up), axis=(1, 2)))
    factor = new.blocks.block.mlp.up / old.blocks.block.mlp.up
    for layer, expected in enumerate(np.maximum(rms, 1e-3)):
        np.testing.assert_allclose(factor[layer], expected, rtol=1e-5)
    table = params.embedding.table
    np.testing.assert_allclose(
        new.embedding.table / old.embedding.table, np.sqrt(np.mean(table**2)), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "sophia"])
def test_a_tensor_of_zeros_still_moves_and_a_larger_one_moves_more(name):
    params = trained(mlp())
    gradient = drawn(params)

    def step(weights, **fields):
        rule = plain(name, **fields)
        return leaves(rule.update(gradient, rule.init(weights), weights, rate=1.0)[0])

    unscaled = step(params)
    for value, factor in [(0.0, 1e-3), (1e-4, 1e-3), (0.5, 0.5), (-3.0, 3.0)]:
        weights = like(params, value)
        scaled = step(weights, scale_by_parameter=True)
        decayed = step(weights, scale_by_parameter=True, weight_decay=0.25)
        matrices = jax.tree.leaves(optim.matrices(params))
        for one, few, less, matrix in zip(unscaled, scaled, decayed, matrices, strict=True):
            np.testing.assert_allclose(few, factor * one, rtol=1e-5)
            # decay is of the weights as they are
            np.testing.assert_allclose(less, few - 0.25 * value * matrix, rtol=1e-5)


# Muon ----------------------------------------------------------------------------------------


def gpt(**options):
    sizes: Any = testing.TOY | dict(layers=2, positions=testing.LENGTH) | options
    config = gj.models.GPTConfig(**sizes)
    model = eqx.filter_jit(lambda: gj.models.GPT(config, key=KEY))()
    return testing.randomise(model)


def test_muon_is_for_the_matrices_inside():
    inside = optim.hidden_matrices(trained(gpt(tied=False, glu=True, qk_norm=True, norm="rms")))
    attention, block = inside.blocks.block.attention, inside.blocks.block.mlp
    assert all((attention.q, attention.k, attention.v, attention.o))
    assert all((block.up, block.glu, block.down))
    rest = (inside.embedding.table, inside.head, block.up_bias, attention.k_norm.weight)
    assert not any(rest) and not inside.norm.weight
    inside = optim.hidden_matrices(trained(testing.Architecture("T5").model()))
    assert inside.encoder.block.mlp.up and not inside.encoder_bias.table and not inside.head


@pytest.mark.parametrize("qk_norm", [False, True])
def test_muons_steps_are_orthogonal_layer_by_layer_and_the_rest_is_adams(qk_norm):
    """Under QK-norm a key consumes `head_dim` in the table, and is embed by heads all the same."""
    params = trained(gpt(embed=8, heads=2, head_dim=8, qk_norm=qk_norm))
    gradient = drawn(params)
    muon, adam = plain("muon"), plain("adamw")
    moved, _ = eqx.filter_jit(lambda: muon.update(gradient, muon.init(params), params, rate=-1.0))()
    other, _ = adam.update(gradient, adam.init(params), params, rate=-1.0)
    block = moved.blocks.block
    for leaf, rows in [
        (block.attention.q, 8),
        (block.attention.k, 8),
        (block.attention.o, 16),
        (block.mlp.up, 8),
        (block.mlp.down, 6),
    ]:
        for layer in np.asarray(leaf):
            matrix = layer.reshape(rows, -1)
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert 0.6 < values.min() and values.max() < 1.3
            if max(matrix.shape) < 2 * min(matrix.shape):
                assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.3
    np.testing.assert_allclose(moved.embedding.table, other.embedding.table, rtol=1e-6)
    np.testing.assert_allclose(block.mlp.up_bias, other.blocks.block.mlp.up_bias, rtol=1e-6)


def test_muon_is_that_of_optax_on_plain_matrices():
    params, rates = trained(mlp(jnp.float64)), [0.1, 0.2, 0.05]
    with jax.enable_x64(True):
        gradients = [drawn(params, seed) for seed in range(3)]
        ours, _ = follow(plain("muon", momentum=0.9, b2=0.99), params, gradients, rates)
        theirs = optax.contrib.muon(-1.0, beta=0.9, adam_b2=0.99, consistent_rms=0.2)

        def update(gradient, state, params, *, rate):
            updates, state = theirs.update(gradient, state, params)
            return jax.tree.map(lambda u: -rate * u, updates), state

        path, _ = follow(optim.Rule(theirs.init, update), params, gradients, rates)
        for leaf in ("up", "down"):  # its Adam looks ahead, ours does not
            np.testing.assert_allclose(getattr(ours, leaf), getattr(path, leaf), rtol=1e-9)


# Schedule-Free -------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [[0.1] * 6, [0.0, 0.02, 0.05, 0.1, 0.1, 0.1]])
def test_schedule_free_is_that_of_optax_at_a_rate_that_never_falls(rates):
    params = trained(mlp(jnp.float64))
    with jax.enable_x64(True):
        gradients = [drawn(params, seed) for seed in range(6)]
        rule = plain("schedule_free", b1=0.8, b2=0.9, weight_decay=0.1)
        ours, state = follow(rule, params, gradients, rates)
        table = jnp.asarray([np.nan, *rates])  # optax counts steps from one
        theirs = optax.contrib.schedule_free(
            optax.chain(
                optax.scale_by_rms(0.9, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
                optax.add_decayed_weights(0.1, optim.matrices),
                optax.scale_by_learning_rate(lambda count: table[count + 1]),
            ),
            lambda count: table[count],
            b1=0.8,
        )

        def update(gradient, state, params, *, rate):
            del rate
            return theirs.update(gradient, state, params)

        path, reference = follow(optim.Rule(theirs.init, update), params, gradients, rates)
        last = lambda tree: jax.tree.map(lambda x: x[-1], tree)  # noqa: E731
        judged = optax.contrib.schedule_free_eval_params(reference, last(path))
        pairs = [(ours, path), (rule.evaluated(last(ours), state), judged)]
        for a, b in pairs:
            for x, y in zip(leaves(a), leaves(b), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_what_is_judged_is_the_average_of_where_the_base_rule_went():
    """Weighted by squared rates, also of rates that fall, of which one is zero."""
    params, b1, rates = trained(mlp(jnp.float64)), 0.7, np.array([0.1, 0.3, 0.0, 0.2, 0.05])
    with jax.enable_x64(True):
        gradients = [drawn(params, seed) for seed in range(5)]
        base = optim.rule(optax.identity())
        rule = optim.schedule_free(base, b1)
        path, state = follow(rule, params, gradients, rates)
        judged = rule.evaluated(jax.tree.map(lambda x: x[-1], path), state)
        for x, y, start, *g in zip(
            leaves(judged), leaves(path), leaves(params), *map(leaves, gradients), strict=True
        ):
            z = start - np.cumsum([r * gi for r, gi in zip(rates, g, strict=True)], axis=0)
            average = np.tensordot(rates**2, z, 1) / np.sum(rates**2)
            np.testing.assert_allclose(x, average, rtol=1e-10)
            np.testing.assert_allclose(y[-1], b1 * x + (1 - b1) * z[-1], rtol=1e-10)


def test_rules_that_do_not_average_are_judged_as_they_are():
    params = trained(mlp(jnp.bfloat16))
    for name in NAMES:
        rule = plain(name, scale_by_parameter=True)
        updates, state = rule.update(drawn(params), rule.init(params), params, rate=0.1)
        assert all(u.dtype == jnp.bfloat16 for u in leaves(updates))
        assert (rule.evaluated(params, state) is params) == (name != "schedule_free")


# Growth --------------------------------------------------------------------------------------


def fixed(name: Name) -> Any:
    """A rule at one rate, shown curvature at every step, as an optax transformation."""
    rule = plain(name)

    def update(updates, state, params=None):
        more = {"curvature": updates, "labels": 8.0} if name == "sophia" else {}
        return rule.update(updates, state, params, rate=0.1, **more)

    return optax.GradientTransformation(lambda params: rule.init(params), update)


@pytest.mark.parametrize("name", NAMES)
def test_carried_state_is_that_of_the_grown_model(name):
    batch: Any = np.random.default_rng(0).standard_normal((2, 5, 3))
    testing.assert_carries(gj.copy(mlp=9, shares="random"), mlp(jnp.float64), batch, fixed(name))


OPERATORS = {
    "msg": gj.msg(embed=12, heads=4, layers=3),
    "zeros": gj.zeros(mlp=15),
    "stack": gj.stack(layers=4, order="top"),
    "copy": gj.chain(gj.copy(mlp=12, shares="equal"), gj.copy(embed=16, shares="equal")),
}


@pytest.mark.parametrize("op", OPERATORS)
def test_state_grows_in_the_middle_of_a_run_into_the_grown_models_own(op):
    def carry(m, rule):
        return gj.carry(operator, rule.init(trained(m)), m, optimizer=rule, key=KEY)

    operator, model = OPERATORS[op], eqx.filter_eval_shape(gpt)
    grown = eqx.filter_eval_shape(lambda m: trained(operator(m, key=KEY)), model)
    for name in NAMES:
        rule = Optimizer(name).build()
        carried = eqx.filter_eval_shape(carry, model, rule)
        own = eqx.filter_eval_shape(rule.init, grown)
        assert jax.tree.structure(carried) == jax.tree.structure(own), name
        for a, b in zip(jax.tree.leaves(carried), jax.tree.leaves(own), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "muon"])
def test_new_coordinates_move_as_in_a_fresh_run(name):
    """After a long run of the old ones: neither kicked by empty moments nor held by an old average."""
    model, op = mlp(), gj.msg(mlp=6)
    rule = plain(name, b2=0.999)
    more = {"curvature": like(trained(model), 0.1)} if name == "sophia" else {}
    path, state = follow(
        rule, trained(model), [like(trained(model), 1.0)] * 40, [0.01] * 40, **more
    )
    model = eqx.combine(jax.tree.map(lambda x: x[-1], path), gj.partition(model)[1])
    carried = gj.carry(op, state, model, optimizer=rule, key=KEY)
    grown = trained(gj.grow(op, model, key=KEY))
    if name == "schedule_free":
        judged = rule.evaluated(grown, carried)
        assert np.array_equal(judged.up[:, 4:], grown.up[:, 4:])
        assert not np.any(judged.up[:, :4] == grown.up[:, :4])
    old, new = grown, grown
    fresh, gradient = rule.init(grown), like(grown, 0.7)
    more = {"curvature": like(grown, 0.1)} if name == "sophia" else {}
    update = eqx.filter_jit(lambda s, p: rule.update(gradient, s, p, rate=0.01, **more))
    for _ in range(4):
        (a, carried), (b, fresh) = update(carried, old), update(fresh, new)
        old, new = optax.apply_updates(old, a), optax.apply_updates(new, b)
        for slot in axes_of(grown).of_kind("param"):
            for i in slot.positions("mlp") if slot.arrays() else ():
                kicked, usual = (np.take(get(u, slot.steps), [4, 5], axis=i) for u in (a, b))
                np.testing.assert_allclose(kicked, usual, rtol=1e-5, atol=1e-9)


def test_muons_steps_stay_orthogonal_through_growth():
    model, op, rule = mlp(), gj.msg(mlp=6), plain("muon")
    _, state = follow(rule, trained(model), [drawn(trained(model))] * 9, [0.01] * 9)
    carried = gj.carry(op, state, model, optimizer=rule, key=KEY)
    grown = trained(gj.grow(op, model, key=KEY))
    updates, _ = rule.update(drawn(grown, 1), carried, grown, rate=-1.0)
    values = np.linalg.svd(updates.up, compute_uv=False) / (0.2 * 6**0.5)
    assert 0.6 < values.min() and values.max() < 1.3


def test_an_average_of_the_parameters_is_carried_with_them():
    """Copies share their source's average: the judged model computes what it did, and new ones differ."""
    model, rule = mlp(jnp.float64), plain("schedule_free")
    with jax.enable_x64(True):
        gradients = [drawn(trained(model), seed) for seed in range(4)]
        path, state = follow(rule, trained(model), gradients, [0.1] * 4)
        model = jax.tree.map(lambda x: x[-1], path)
        judged = rule.evaluated(trained(model), state)
        op = gj.copy(mlp=9, shares="random")
        carried = gj.carry(op, state, model, optimizer=rule)
        average = rule.evaluated(trained(gj.grow(op, model)), carried)
        for a, b in zip(leaves(average), leaves(trained(gj.grow(op, judged))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
        assert np.array_equal(carried.total, state.total)
        np.testing.assert_allclose(carried.weights.of["mlp"], state.total)
        blank = gj.carry(op, state, model, optimizer=rule, copies="zero")
        assert blank.weights.of["mlp"].tolist() == [float(state.total)] * 4 + [0] * 5
        assert not blank.offset.up[:, 4:].any() and blank.offset.up[:, :4].any()
