"""Programs of unrolled layers, compiled in pieces: the same outputs and gradients, and few programs."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.certificate import measured
from growjax.certificate.pieces import TURNS, in_pieces, repeats
from tests import zoo
from tests.test_certify import Compiled


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


X = zoo.normal((2, 3, 8))
DEPTH = TURNS + 1


def alike(model, x):
    for block in model.blocks:
        x = block(x)
    return x


def faded(model, x):
    """Constants of their own in every block, but in the last two."""
    for index, block in enumerate(model.blocks):
        x = x + 0.5 ** min(index, DEPTH - 2) * block(x)
    return x


def counted(model, x):
    """An integer that all blocks hand on, and outputs of two kinds."""
    count = jnp.argmax(x)
    for block in model.blocks:
        x = block(x) + count
        count = count + jnp.argmax(x)
    return x, count


def kept(model, x):
    """What every block has put out is needed at the end."""
    every = []
    for block in model.blocks:
        x = block(x)
        every.append(x.sum())
    return jnp.stack(every)


@pytest.mark.parametrize("run", [alike, faded, counted, kept])
def test_pieces_compute_what_the_whole_does(run):
    model = zoo.build(lambda: zoo.Tower(DEPTH))
    forward = lambda model, x: jax.vmap(lambda x: run(model, x))(x)  # noqa: E731
    assert repeats(forward, model, X)
    pieces = in_pieces(forward)

    def observed(forward):
        def loss(trained):
            outputs = jax.tree.leaves(forward(eqx.combine(trained, rest), X))
            return sum(jnp.sum(jnp.sin(y)) for y in outputs), outputs

        trained, rest = eqx.partition(model, eqx.is_inexact_array)
        return jax.value_and_grad(loss, has_aux=True)(trained)

    whole = jax.tree.leaves(observed(eqx.filter_jit(forward)))
    for a, b in zip(whole, jax.tree.leaves(observed(pieces)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)
    # Other arrays of the same shapes, through the same programs
    other = jax.tree.map(lambda x: 2 * x if eqx.is_inexact_array(x) else x, model)
    outputs = (jax.tree.leaves(f(other, X)) for f in (eqx.filter_jit(forward), pieces))
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)


def annotated(depth):
    model, stacks = zoo.build(lambda: zoo.Tower(depth)), {"blocks": "layers"}
    return gj.annotate(model, zoo.TOWER, stacks=stacks, gates=["mlp"])


def test_a_certificate_of_unrolled_layers_is_that_of_one_program(monkeypatch):
    small, op = annotated(DEPTH), gj.chain(gj.msg(mlp=9), gj.stack(layers=DEPTH + 1))
    certificate = gj.certify(op, small, X, key=zoo.KEY)
    monkeypatch.setattr(measured, "repeats", lambda *args: False)
    whole = gj.certify(op, small, X, key=zoo.KEY)
    for a, b in zip(certificate.forward, whole.forward, strict=True):
        assert a.relative == pytest.approx(b.relative, rel=1e-6, abs=1e-12)
    for field in dataclasses.fields(whole):
        if field.name not in ("forward", "gradient"):
            assert getattr(certificate, field.name) == getattr(whole, field.name), field.name


def test_deeper_models_take_no_more_programs():
    """Fifty layers took XLA 23 CPU seconds as one program."""
    counts = []
    # The first one compiles what is outside of the layers, for all
    for depth in (DEPTH + 1, DEPTH, 3 * DEPTH):
        small = annotated(depth)
        with Compiled() as programs:
            assert gj.certify(gj.copy(mlp=12), small, X, key=zoo.KEY).passed
        counts.append(len(programs.names))
    assert counts[1] == counts[2]
