"""FLOPs against closed formulas, exactly, and against XLA's own count."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import growjax as gj
from growjax.cost import flops, parameters, training_flops_per_token
from growjax.errors import CostError


CONFIG = gj.models.GPTConfig(
    layers=4, embed=24, heads=4, head_dim=8, mlp=56, vocab=96, positions=32, kv_heads=2
)
LENGTH = 20


def shapes(config=CONFIG):
    return eqx.filter_eval_shape(gj.models.GPT, config, key=jax.random.key(0))


def tokens(length=LENGTH):
    return jax.ShapeDtypeStruct((length,), jnp.int32)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def formula(c, length, layers=None):
    """Forward FLOPs of a GPT on one sequence, by hand."""
    queries, keys = c.heads * c.head_dim, (c.kv_heads or c.heads) * c.head_dim
    projections = 2 * c.embed * (2 * queries + 2 * keys)
    attention = 2 * 2 * length * queries
    mlp = 2 * (3 if c.glu else 2) * c.embed * c.mlp
    block = projections + attention + mlp
    return length * ((layers or c.layers) * block + 2 * c.embed * c.vocab)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": None, "layers": 1},
        {"glu": True, "norm": "rms", "bias": False},
        {"position": "rotary", "qk_norm": True, "tied": False},
        {"remat": "everything", "post_norm": True},
    ],
    ids=str,
)
def test_gpt_costs_what_the_formula_says(changes):
    config = gj.models.GPTConfig(**{**vars(CONFIG), **changes})
    assert flops(shapes(config), tokens()) == formula(config, LENGTH)
    per_token = training_flops_per_token(shapes(config), LENGTH)
    assert per_token * LENGTH == 3 * formula(config, LENGTH)


def test_arrays_cost_what_their_shapes_cost(key):
    assert flops(gj.models.GPT(CONFIG, key=key), jnp.zeros(LENGTH, int)) == formula(CONFIG, LENGTH)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_path_costs_its_own_length(length, key):
    def run(model, key, tokens):
        return gj.random_path(length)(model, key=key)(tokens)

    assert flops(run, shapes(), key, tokens()) == formula(CONFIG, LENGTH, layers=length)


def test_layers_that_may_be_skipped_cost_as_if_they_ran(key):
    drop = gj.progressive_layer_drop()

    def run(model, key, tokens):
        return drop(model, key=key, step=5)(tokens)

    assert flops(run, shapes(), key, tokens()) == formula(CONFIG, LENGTH)


def test_grown_models_cost_their_new_sizes(key):
    grown = eqx.filter_eval_shape(gj.msg(mlp=80, layers=6), shapes(), key=key)
    config = gj.models.GPTConfig(**{**vars(CONFIG), "mlp": 80, "layers": 6})
    assert flops(grown, tokens()) == formula(config, LENGTH)


def test_depth_counts_every_layer_where_xla_counts_one():
    def deep(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    counted = [flops(deep, array(8, 16), array(n, 16, 16)) for n in (1, 7)]
    assert counted == [2 * 8 * 16 * 16, 7 * 2 * 8 * 16 * 16]


def xla_flops(fn, *args):
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_xla_counts_the_same():
    """On an unrolled MLP large enough that its products are nearly all there is."""

    def mlp(x, *weights):
        for w in weights:
            x = jax.nn.relu(x @ w)
        return x

    args = [array(128, 256), array(256, 512), array(512, 512), array(512, 64)]
    assert flops(mlp, *args) == pytest.approx(xla_flops(mlp, *args), rel=0.02)


def test_backward_is_counted_as_written():
    """A product's gradient is two products; XLA agrees."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    args = array(256, 128), array(64, 256)
    gradient = jax.grad(loss, argnums=(0, 1))
    assert flops(gradient, *args) == 3 * flops(loss, *args)
    assert flops(gradient, *args) == pytest.approx(xla_flops(gradient, *args), rel=0.02)


@pytest.mark.parametrize(
    "fn, shape, expected",
    [
        (lambda x: x @ x.T, (5, 7), 2 * 5 * 5 * 7),
        (lambda x: jnp.einsum("bij,bkj->bik", x, x), (3, 5, 7), 3 * 2 * 5 * 5 * 7),
        (jax.jit(lambda x: x @ x.T), (5, 7), 2 * 5 * 5 * 7),
        (jax.vmap(lambda x: x @ x), (3, 5, 5), 3 * 2 * 5**3),
        (jax.checkpoint(lambda x: x @ x), (5, 5), 2 * 5**3),
        (lambda x: jax.lax.fori_loop(0, 4, lambda _, x: x @ x, x), (5, 5), 4 * 2 * 5**3),
        (
            lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x),
            (5, 5),
            2 * 2 * 5**3,
        ),
        (lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), (5,), 0),
        (lambda x: jnp.sort(jnp.exp(x)).sum(), (5,), 0),
        # 2 images, 3 to 4 features, 6x6 inputs, 3x3 kernels, no padding
        (
            lambda x: jax.lax.conv(x, jnp.ones((4, 3, 3, 3)), (1, 1), "VALID"),
            (2, 3, 6, 6),
            2 * (2 * 4 * 4 * 4) * (3 * 3 * 3),
        ),
    ],
)
def test_small_programs(fn, shape, expected):
    assert flops(fn, array(*shape)) == expected


def test_custom_derivatives_are_counted():
    @jax.custom_jvp
    def square(x):
        return x @ x

    @jax.custom_vjp
    def cube(x):
        return x @ x @ x

    square.defjvps(lambda t, _, x: t @ x + x @ t)
    cube.defvjp(lambda x: (cube(x), x), lambda x, t: (t @ x.T @ x.T,))
    assert flops(square, array(5, 5)) == 2 * 5**3
    assert flops(cube, array(5, 5)) == 2 * 2 * 5**3


def test_what_cannot_be_counted_is_named_all_at_once():
    def program(x):
        x = jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
        kernel = jnp.ones((1, 1, 2, 2))
        dilated = jax.lax.conv_general_dilated(
            x[None, None], kernel, (1, 1), [(0, 0), (0, 0)], lhs_dilation=(2, 2)
        )
        seen = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((5, 5), x.dtype), x)
        return dilated.sum() + seen.sum()

    with pytest.raises(CostError) as error:
        flops(program, array(5, 5))
    message = str(error.value)
    assert message.count("\n  - ") == 3
    assert all(name in message for name in ("while: ", "conv_general_dilated: ", "pure_callback: "))


def count(c):
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = (c.embed + 1) * (queries + 2 * keys) + (queries + 1) * c.embed
    mlp = (c.embed + 1) * c.mlp + (c.mlp + 1) * c.embed
    blocks = c.layers * (attention + mlp + 2 * 2 * c.embed)
    return blocks + 2 * c.embed + c.embed * (c.vocab + c.positions)


def test_parameters_are_those_that_are_trained():
    trained, _ = gj.partition(shapes())
    assert count(CONFIG) == sum(x.size for x in jax.tree.leaves(trained)) == parameters(shapes())


def test_gates_are_no_parameters(key):
    grown = eqx.filter_eval_shape(gj.msg(mlp=80), shapes(), key=key)
    assert parameters(grown) == count(gj.models.GPTConfig(**{**vars(CONFIG), "mlp": 80}))
