"""New units with numbers of one's own, and those that the gradient of a batch asks for."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import growth, testing
from growjax.errors import GrowthError
from growjax.fitting import fit
from growjax.growth import given, gradmax
from growjax.values import from_dict, to_dict


KEY, GATES = jax.random.key(0), ("glu",)
GPT, RELU, GLU = (testing.ARCHITECTURES[i] for i in (0, 1, 2))


class Hidden(eqx.Module):
    """Layers of hidden units, with a gate or without."""

    up: Array = gj.param("layers: embed -> mlp")
    bias: Array = gj.param("layers: -> mlp")
    glu: Array | None = gj.param("layers: embed -> mlp")
    down: Array = gj.param("layers: mlp -> embed")

    def __call__(self, x):
        for layer in range(len(self.up)):
            hidden = x @ self.up[layer] + self.bias[layer]
            if self.glu is None:
                hidden = jnp.tanh(hidden)
            else:
                hidden = hidden * jax.nn.silu(x @ self.glu[layer])
            x = x + hidden @ self.down[layer]
        return x


def hidden(glu: bool = False) -> Hidden:
    rng = np.random.default_rng(0)
    shapes = [(2, 4, 5), (2, 5), (2, 4, 5), (2, 5, 4)]
    with jax.enable_x64(True):
        up, bias, gate, down = (jnp.asarray(rng.normal(size=s)) for s in shapes)
        return Hidden(up, bias, gate if glu else None, down)


BATCH = np.random.default_rng(1).normal(size=(6, 4))


def loss(model, batch):
    return jnp.mean(jnp.sin(jax.vmap(model)(jnp.asarray(batch))))


def measured(model, batch: Any = BATCH, loss=loss, **fields: Any) -> Any:
    """The operator that GradMax makes of a batch."""
    return fit(gradmax(**fields), model, [batch] * fields.get("batches", 1), loss, key=KEY).operator


def new_gradient(model, op) -> np.ndarray:
    """`[2, 4, new]` the gradient of the weights into new units."""
    return np.asarray(jax.grad(loss)(op(model), BATCH).up)[..., 5:]


@pytest.mark.parametrize("glu", [False, True], ids=["plain", "gated"])
def test_new_units_have_the_directions_in_which_the_loss_falls_fastest(glu):
    """No other two rows of this norm give a larger gradient than the first singular vectors."""
    with jax.enable_x64(True):
        model = hidden(glu)
        op = measured(model, gates=GATES, mlp=7)
        grown: Any = op(model)
        np.testing.assert_allclose(jax.vmap(grown)(BATCH), jax.vmap(model)(BATCH), rtol=1e-13)
        rows = np.asarray(grown.down)[:, 5:]
        norm = np.linalg.norm(rows, axis=-1)
        old = np.sqrt(np.mean(np.asarray(model.down) ** 2, (1, 2), keepdims=True)) * 2
        np.testing.assert_allclose(norm, np.broadcast_to(old[..., 0], norm.shape), rtol=1e-10)
        best = np.sum(new_gradient(model, op) ** 2, (1, 2))
        entries = dict(op.entries)
        for seed in range(20):
            # Two orthogonal rows of the same norm
            turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0][:2]
            other = given({**entries, "down": turn * old}, mlp=7)
            assert (np.sum(new_gradient(model, other) ** 2, (1, 2)) < best).all()
        if not glu:
            # Orthogonal gradients, the larger one first
            first = new_gradient(model, op)
            inner = np.einsum("lin,lim->lnm", first, first)
            assert (inner[:, 0, 0] > inner[:, 1, 1]).all()
            assert np.abs(inner[:, 0, 1]).max() < 1e-3 * inner[:, 0, 0].min()


def test_several_batches_are_one_large_one():
    """The products are summed over batches, and the directions are those of the sum."""
    with jax.enable_x64(True):
        model = hidden()
        op = gradmax(batches=2, mlp=7)
        parts: Any = fit(op, model, [BATCH[:3], BATCH[3:]], loss, key=KEY).operator
        whole = measured(model, mlp=7)
    for (_, a), (_, b) in zip(parts.entries, whole.entries, strict=True):
        signs = np.sign(np.sum(np.multiply(a, b), -1, keepdims=True))
        np.testing.assert_allclose(signs * a, b, rtol=1e-6, atol=1e-9)


def test_a_transformer_grows_by_its_gradient():
    def mean(model, batch):
        return jnp.mean(jnp.sin(jax.vmap(model)(batch)))

    with jax.enable_x64(True):
        model, batch = GLU.model(), GLU.batch()
        op = measured(model, batch, mean, gates=GATES, mlp=8)
    testing.assert_contract(op, model, batch)
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


def test_units_that_would_never_learn_are_refused():
    with jax.enable_x64(True):
        model, batch = RELU.model(), RELU.batch()
        with pytest.raises(GrowthError, match="would never learn"):
            measured(model, batch, lambda m, b: jnp.mean(jax.vmap(m)(b) ** 2), mlp=8)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda m: measured(m, gates=GATES, mlp=10),
            "at most 4 directions, got 5",
        ),
        (lambda m: measured(m, embed=6), "GradMax finds no hidden units along embed"),
        (lambda m: measured(m, mlp=6, embed=6), "expected one axis"),
        (
            lambda m: measured(m, mlp=7),
            r"at most one in gates, got 2 \((glu, up|up, glu)\), 1 and 0; .*gates=\(\"glu\",\)",
        ),
        (lambda m: given({"down": np.ones((2, 3, 4))}, mlp=7)(m), r"expected numbers \(2, 2, 4\)"),
        (lambda m: given({"downs": np.ones(2)}, mlp=7)(m), "no parameter with the axis mlp"),
        (lambda m: given({"down": [[np.nan]]}, mlp=7), "an array of finite numbers"),
        (lambda m: given({"down": np.ones(2)}, mlp=7, embed=6)(m), "chain several operators"),
    ],
    ids=["directions", "stream", "two", "gates", "shape", "path", "nan", "two given"],
)
def test_what_does_not_fit_says_why(make, message):
    with jax.enable_x64(True), pytest.raises(GrowthError, match=message):
        make(hidden(glu=True))
