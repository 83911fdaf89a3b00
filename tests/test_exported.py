"""A settled model as a program of `jax.export`, which needs no growjax to run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.errors import GateError, PlanError
from growjax.models import GPT, exported, predictions
from tests.runs import SMALL


EXAMPLE = {"tokens": jax.ShapeDtypeStruct((8,), "int32")}


def test_a_grown_and_settled_model_is_a_program_of_any_batch():
    small = GPT(SMALL, key=jax.random.key(0))
    grown = gj.grow(gj.msg(mlp=24), small, key=jax.random.key(1))
    with pytest.raises(GateError, match="settle"):
        exported(grown, EXAMPLE)
    model = gj.settle(gj.ramp(grown, 1.0))
    program, weights = exported(model, EXAMPLE)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [x.shape for x in weights] == [x.shape for x in jax.tree.leaves(model)]
    for batch in (1, 3):
        tokens = jnp.arange(8 * batch, dtype=jnp.int32).reshape(batch, 8)
        expected = jax.vmap(lambda row: predictions(model, {"tokens": row}))(tokens)
        np.testing.assert_allclose(
            program.call(weights, {"tokens": tokens}), expected, rtol=1e-5, atol=1e-6
        )
    # Other weights are other predictions: none are in the program
    others = program.call([2 * x for x in weights], {"tokens": tokens})
    assert np.all(np.any(others != expected, axis=-1))


def test_a_program_for_one_platform_has_its_kernel():
    """The TPU's attention, lowered where there is no TPU; the plain form has no such call."""
    config = dataclasses.replace(SMALL, positions=256, head_dim=64, dtype="bfloat16")
    model = GPT(config, key=jax.random.key(0))
    example = {"tokens": jax.ShapeDtypeStruct((256,), "int32")}
    kernels = {
        names: exported(model, example, batch=1, platforms=names)[0].mlir_module().count("splash")
        for names in (("tpu",), ("cpu", "tpu"))
    }
    assert kernels["tpu",] > 0 == kernels["cpu", "tpu"]


def test_a_model_without_words_is_refused():
    model = GPT(dataclasses.replace(SMALL, head="none"), key=jax.random.key(0))
    with pytest.raises(PlanError, match="head"):
        exported(model, EXAMPLE)
