"""Every operator on every architecture that it claims: the promise of its exactness class.

A new operator or architecture is one line in `growjax.testing` and is then held to all of this. The whole
table takes minutes: each operator meets every ninth architecture, and all of them at the deep profile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import growjax as gj
from growjax import testing
from growjax.growth import chain, copy, msg, stack, zeros
from tests.conftest import DEEP


ARCHITECTURES = testing.ARCHITECTURES


def table() -> list[testing.Case]:
    """All cases; without the deep profile every ninth one, and one of each operator that is missing."""
    rows = [
        [testing.Case(architecture, op) for op in testing.operators_for(architecture)]
        for architecture in ARCHITECTURES
    ]
    every = 1 if DEEP else 9
    part = [case for i, row in enumerate(rows) for case in row[i % every :: every]]
    for case in testing.all_cases():
        if all(case.operator != other.operator for other in part):
            part.append(case)
    return part


@pytest.mark.parametrize("case", table(), ids=str)
def test_every_operator_keeps_its_promise_on_every_architecture(case):
    testing.assert_contract(case.operator, case.model(), case.batch())


def test_the_part_of_the_table_has_every_operator_and_every_architecture():
    whole, part = testing.all_cases(), table()
    for what in ("operator", "architecture"):
        assert {getattr(case, what) for case in part} == {getattr(case, what) for case in whole}
    assert DEEP == (len(part) == len(whole))


@given(testing.cases(exactness=("exact", "exact-given-init")))
def test_promises_hold_for_any_weights(case):
    testing.assert_contract(case.operator, case.model(), case.batch())


@pytest.mark.parametrize("architecture", ARCHITECTURES[:: 1 if DEEP else 2], ids=str)
def test_float32_outputs_move_by_rounding_only(architecture):
    model, batch = architecture.model(dtype=jnp.float32), architecture.batch()
    heads = dict(testing.TOY, **dict(architecture.options))["heads"]
    sizes: dict[str, Any] = {"heads": 2 * heads, architecture.stacks[0]: 3}
    everything = msg(embed=12, mlp=10, **sizes)
    testing.assert_preserves(everything, model, batch)
    testing.assert_independent(everything, model, batch)


@pytest.mark.parametrize("architecture", [ARCHITECTURES[i] for i in (3, 5, 9)], ids=str)
def test_two_hops_are_one_hop(architecture, key):
    """The same weights, bit for bit, however many steps an axis takes, square leaves included."""
    model, layers = architecture.model(), architecture.stacks[0]
    for axis, one, two in [("embed", 10, 13), (layers, 3, 5)]:
        hops = chain(msg(**{axis: one}, init=cheap), msg(**{axis: two}, init=cheap))
        testing.assert_same_growth(hops, msg(**{axis: two}, init=cheap), model, key=key)


def cheap(key, shape, dtype):
    """Numbers that depend on the key, without a hash to compile for every leaf."""
    seed = jnp.sum(jax.random.key_data(key).astype(dtype)) * 1e-9
    return jnp.sin(seed + jnp.arange(int(np.prod(shape)), dtype=dtype)).reshape(shape)


@pytest.mark.parametrize("architecture", [ARCHITECTURES[i] for i in (3, 6, 10)], ids=str)
def test_adam_moments_are_those_of_the_grown_model(architecture):
    """Copies with unequal shares: moving a moment by the wrong power of the share cannot pass."""
    model, batch = architecture.model(), architecture.batch()
    ops = [copy(mlp=9, shares="random"), copy(embed=16, mlp=12, head_dim=8, shares="equal")]
    for op in ops if DEEP or architecture is ARCHITECTURES[3] else ops[1:]:
        testing.assert_carries(op, model, batch, optax.scale_by_adam())


def test_order_of_axes_does_not_change_the_function(key):
    """grow(a) then grow(b) and grow(b) then grow(a) agree in function, whatever they draw."""
    architecture = testing.ARCHITECTURES[3]
    model, batch = architecture.model(), architecture.batch()
    ops = [msg(embed=12), msg(mlp=10), zeros(heads=8), copy(mlp=9), stack(layers=4, branch="zero")]
    for a in ops:
        for b in ops:
            if a is not b and not (str(a).startswith("msg(mlp") and str(b).startswith("copy(mlp")):
                testing.assert_preserves(chain(a, b), model, batch)


def test_a_case_is_what_it_prints():
    case = testing.all_cases()[0]
    assert str(case) == "msg(embed=12) on GPT()"
    assert dataclasses.replace(case, seed=1).model() is not None
    assert gj.values.from_dict(gj.values.to_dict(case.operator)) == case.operator
