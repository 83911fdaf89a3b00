"""Small rules that nothing else holds: for each, a planted bug once left every other test green."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import maps
from growjax.axes import axes_of, put
from growjax.certificate import Difference, distance, new_coordinates
from growjax.gates import Gate
from growjax.nn import Attention, Norm
from growjax.nn.attention import Cache
from growjax.optim.age import by_youngest


class Tower(eqx.Module):
    """Three layers whose stream is not called `embed`, with a multiplier for their branches."""

    up: Array = gj.param("layers: width -> mlp")
    down: Array = gj.param("layers: mlp -> width")
    scale: Array | None = gj.branch("layers")

    def __call__(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + jnp.tanh(x @ up) @ down
        return x


def tower() -> Tower:
    rng = np.random.default_rng(0)
    return Tower(*(jnp.asarray(rng.normal(size=s)) for s in ((3, 2, 4), (3, 4, 2))))


# Operators ---------------------------------------------------------------------------------------


def test_random_copies_follow_the_seed_and_are_not_cyclic():
    def copied(seed: int) -> list[int]:
        op = gj.copy(mlp=40, order="random", seed=seed)
        return list(np.asarray(op.maps(axes_of(tower()))[0].source))

    assert copied(1) == copied(1) != copied(2)
    for seed in range(3):
        assert copied(seed) != [i % 4 for i in range(40)]
        assert copied(seed)[:4] == [0, 1, 2, 3] and set(copied(seed)) == {0, 1, 2, 3}


def test_random_shares_follow_the_seed():
    def shares(seed: int) -> list[float]:
        op = gj.copy(mlp=8, shares="random", seed=seed)
        return list(np.asarray(op.maps(axes_of(tower()))[0].share))

    assert shares(1) == shares(1) != shares(2)


@pytest.mark.parametrize("branch", ["copy", "zero", "split"])
def test_a_stack_knows_its_stream_by_the_name_it_is_given(branch):
    op = gj.stack(layers=6, branch=branch, stream="width")
    (move,) = op.maps(axes_of(tower()))
    assert move.via == "width"


def test_layers_of_zeros_on_a_stream_of_another_name_change_nothing():
    model = tower()
    big = gj.stack(layers=5, branch="zero", stream="width")(model)
    x = jnp.asarray([0.3, -0.2])
    np.testing.assert_array_equal(big(x), model(x))
    assert not np.asarray(big.down[3:]).any() and np.asarray(big.up[3:]).any()


def test_two_multipliers_of_one_branch_are_both_applied():
    model = put(tower(), {("scale",): jnp.asarray([1.0, 2.0, 3.0])})
    move = gj.AxisMap("layers", [0, 2], branch=jnp.asarray([10.0, 100.0]))
    np.testing.assert_array_equal(maps.apply(move, model, None).scale, [10.0, 300.0])


class Normed(eqx.Module):
    norm: Norm
    out: Array = gj.param("embed -> out")
    into: Array = gj.param("[vocab] -> embed")


def test_grow_moves_the_epsilon_of_a_norm_as_the_operator_does():
    """`grow` copies no leaf that no map touches: an epsilon that is added to a mean is touched."""
    model = Normed(Norm(4, "rms", eps=0.1), jnp.ones((4, 2)), jnp.ones((3, 4)))
    op = gj.zeros(embed=6)
    grown = gj.grow(op, model, key=jax.random.key(0))
    assert float(grown.norm.eps) == pytest.approx(0.1 * 4 / 6, rel=1e-6)
    assert grown.norm.eps == op(model, key=jax.random.key(0)).norm.eps


# Parts of models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate, shape", [("kv_heads", (2, 1, 1)), ("group", (1, 3, 1))])
def test_queries_and_keys_are_gated_after_their_norm(gate, shape):
    """A norm would undo a gate before it."""
    attention = Attention(5, 6, 2, 4, qk_norm=True, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 5))
    level = jnp.full(max(shape), 0.25).at[0].set(1.0)
    shut = put(attention, {(f"gate_{gate}",): Gate(level, level < 1)})
    factor = level.reshape(shape)
    np.testing.assert_allclose(shut.ask(x), attention.ask(x) * factor, rtol=1e-6)
    if gate == "kv_heads":
        keys = attention.remember(x).keys * factor
        np.testing.assert_allclose(shut.remember(x).keys, keys, rtol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_computed_in_float32_whatever_it_is_given(kind):
    norm = Norm(64, kind)
    x = (20 + jax.random.normal(jax.random.key(0), (7, 64))).astype(jnp.bfloat16)
    wide = norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), wide)


def test_attention_weighs_in_float32_whatever_it_is_given():
    """With the identity for values and for the projection, the output is the weights themselves."""
    n = 64
    shapes = eqx.filter_eval_shape(
        lambda key: Attention(n, 1, 1, n, bias=False, key=key), jax.random.key(0)
    )
    attention = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    attention = put(attention, {("o",): jnp.eye(n).reshape(1, 1, n, n), ("scale",): 1.0})
    # One coordinate of a query holds a number, and that of a key another: logits are their product
    asked = np.zeros((3, 1, 1, n), np.float32)
    asked[:, 0, 0, 0] = (1, 2, 4)
    held = np.zeros((1, n, n), np.float32)
    held[0, :, 0] = np.linspace(-1, 1, n)
    half = jnp.bfloat16
    seen = Cache(jnp.asarray(held, half), jnp.eye(n, dtype=half)[None])
    outputs = np.asarray(attention.read(jnp.asarray(asked, half), seen), np.float64)
    keys = np.asarray(seen.keys, np.float64)[0, :, 0]
    logits = np.asarray([[float(jnp.asarray(q * k, half)) for k in keys] for q in (1, 2, 4)])
    exact = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rounded = np.asarray(jnp.asarray(exact, jnp.float32).astype(half), np.float64)
    assert (outputs == rounded).mean() > 0.97


class Heads(eqx.Module):
    weight: Array = gj.param("(heads dim) <- embed")
    gain: Array = gj.param("heads")
    out: Array = gj.param("embed -> out")


def test_an_array_with_two_axes_in_one_dimension_is_as_old_as_the_youngest():
    model = Heads(jnp.ones((6, 2)), jnp.ones(2), jnp.ones((2, 1)))
    ages = {"heads": [9, 2], "dim": [9, 5, 9], "embed": [9, 4], "out": [9]}
    vectors = {axis: jnp.asarray(age) for axis, age in ages.items()}
    youngest = {slot.path: age for slot, age in by_youngest(model, vectors, 99)}
    expected = np.minimum.outer(np.minimum.outer([9, 2], [9, 5, 9]), [9, 4]).reshape(6, 2)
    np.testing.assert_array_equal(youngest["weight"], expected)
    np.testing.assert_array_equal(np.broadcast_to(youngest["gain"], 2), [9, 2])


# Certificates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, floor, limit",
    [
        ("float64", 0.0, 1e-12),
        ("float64", 1e-9, 16e-9),
        ("float32", 0.0, 16 * 2.0**-23),
        ("float32", 1e-5, 16e-5),
        ("bfloat16", 0.0, 16 * 2.0**-7),
    ],
)
def test_what_rounding_explains_is_sixteen_steps_or_sixteen_floors(dtype, floor, limit):
    assert Difference(dtype, 0.0, 0.0, 0.0, floor).limit == pytest.approx(limit)


def test_an_output_that_is_not_finite_is_infinitely_far():
    one, broken = np.ones(3), np.asarray([1.0, np.nan, 1.0])
    assert distance(one, one) == (0.0, 0.0)
    assert distance(one, broken) == (np.inf, np.inf)


def test_new_coordinates_of_earlier_operators_stay_new():
    op = gj.chain(gj.copy(mlp=6), gj.copy(mlp=9))
    new, _ = new_coordinates(op, tower())
    assert new["mlp"].tolist() == [False] * 4 + [True] * 5


class Gated(eqx.Module):
    up: Array = gj.param("embed -> mlp")
    down: Array = gj.param("mlp -> out")
    gate: Gate | None = gj.gate("mlp")

    def __call__(self, x):
        return gj.gated(jnp.tanh(x @ self.up), self.gate) @ self.down


@pytest.mark.parametrize("level, dead", [(0.0, 1.0), (0.5, 0.0)])
def test_liveness_is_measured_where_the_gates_stand(level, dead):
    """Behind a closed gate nothing has a gradient; behind one that is half open everything has."""
    rng = np.random.default_rng(0)
    up, down = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4), (4, 2)))
    model = Gated(up, down)
    batch = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    certificate = gj.certify(gj.msg(mlp=6), model, batch, key=jax.random.key(0), level=level)
    assert certificate.passed and certificate.dead == {"mlp": (dead, dead)}
