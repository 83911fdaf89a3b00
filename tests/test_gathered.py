"""Under `fsdp`, parameters are gathered layer by layer and their gradients scattered: in the program."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import growjax as gj
from growjax.data.objectives import batch_shapes
from growjax.models import LlamaConfig
from growjax.parallel import AXES, gathered, spec_of
from growjax.plan.stages import Work
from growjax.programs.step import Controls, Programs
from growjax.train import Layout, Plan, cross_entropy
from tests.runs import SMALL, plan, steps


LLAMA = LlamaConfig(layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=32, vocab=384)


def on(layout: Layout) -> Any:
    sizes = layout.resolved(layout.fsdp * layout.tensor)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def program(of: Plan, part: Any = None) -> Any:
    """The training step of a plan's first stage, as it is written."""
    mesh, (span, *_) = on(of.layout), of.spans
    programs = Programs(
        of.optimizer.build(), cross_entropy, mesh, of.layout, accumulate=of.accumulate
    )
    shapes = programs.shapes(span.model)
    number, whole = (jax.ShapeDtypeStruct((), kind) for kind in (jnp.float32, jnp.int32))
    controls = Controls(number, number, whole, whole)
    rows = batch_shapes(span.objective, span.batch)
    return jax.make_jaxpr(programs.step(shapes, Work(part)))(shapes, rows, controls, None).jaxpr


def constraints(jaxpr: Any, layers: int, inside: bool = False) -> Iterator[tuple[bool, Any, Any]]:
    """Every sharding that is asked for: whether in a scan over layers, of what shape, and which."""
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "sharding_constraint":
            yield inside, equation.outvars[0].aval.shape, params["sharding"].spec
        scan = equation.primitive.name == "scan" and params["length"] == layers
        for value in params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from constraints(inner, layers, inside or scan)


PLANS = {
    "GPT": (lambda: plan(steps(1), layout=Layout(fsdp=2)), None),
    "shared layers": (lambda: plan(steps(1), layout=Layout(fsdp=2, tensor=2)), None),
    "Llama in parts": (
        lambda: plan(steps(1), model=LLAMA, layout=Layout(fsdp=2), accumulate=4),
        None,
    ),
    "a path": (lambda: plan(steps(1), layout=Layout(fsdp=2)), gj.random_path(2, keep=())),
}


@pytest.mark.parametrize("name", PLANS)
def test_layers_are_gathered_by_the_scan_and_gradients_scattered(name):
    make, part = PLANS[name]
    of = make()
    mesh, model = on(of.layout), of.spans[0].model
    params = [s for s in gj.axes_of(model).of_kind("param") if s.arrays()]
    split = [(s, spec) for s in params if "fsdp" in (spec := spec_of(s, mesh))]
    stacked = [s for s, _ in split if s.dims[0].role == "stack"]
    assert len(stacked) > 5

    constrained = list(constraints(program(of, part), 2))
    in_scan = [(shape, spec) for inside, shape, spec in constrained if inside]
    gathers = [shape for shape, spec in in_scan if "fsdp" not in spec]
    scatters = [shape for shape, spec in in_scan if "fsdp" in spec]
    layer = [s.value.shape[1:] for s in stacked]
    assert Counter(scatters) == Counter(layer)
    # Forwards, and again on the way back: nothing that was gathered is kept. The last bias is not needed
    assert Counter(layer) < Counter(gathers) <= Counter(2 * layer)
    assert len(gathers) >= 2 * len(layer) - 1
    # A stack as a whole is only ever asked for in parts
    whole = {s.value.shape for s in stacked} - {s.value.shape for s in params if s not in stacked}
    assert all(
        "fsdp" in spec for inside, shape, spec in constrained if shape in whole and not inside
    )
    # What is not in a stack is gathered where it is used, and its gradient scattered
    outside = [s.value.shape for s, _ in split if s not in stacked]
    for shape in outside:
        specs = [spec for inside, found_shape, spec in constrained if found_shape == shape]
        assert any("fsdp" not in spec for spec in specs)


def test_without_sharing_nothing_is_touched():
    model = eqx.filter_eval_shape(gj.models.GPT, SMALL, key=jax.random.key(0))
    assert gathered(model, on(Layout())) is model
    assert gathered(model, on(Layout(tensor=2))) is model


def test_a_table_split_by_columns_sums_its_gradient_before_it_is_split():
    """Or the compiler sends the columns of activations to where they are added."""
    asked = constraints(program(PLANS["shared layers"][0]()), 2)
    table = [spec for inside, shape, spec in asked if shape == (SMALL.vocab, SMALL.embed)]
    split, whole = (
        jax.sharding.PartitionSpec("tensor", "fsdp"),
        jax.sharding.PartitionSpec("tensor", None),
    )
    gradient = table[table.index(whole) + 1 :]
    assert gradient[:2] == [whole, split], table
    rows = constraints(program(PLANS["GPT"][0]()), 2)
    table = [spec for inside, shape, spec in rows if shape == (SMALL.vocab, SMALL.embed)]
    # Split by rows, it is scattered at once
    assert table.count(jax.sharding.PartitionSpec(None, None)) == 1, table
