"""What XLA counts for a model's training step, to hold against our own count.

XLA's cost analysis counts the body of a scan once, whatever its length, and elementwise work together
with products. So the step is written out first: every layer in a row, nothing recomputed. Then it is
counted twice, as it is and with each product replaced by something that costs nothing; the difference
is what XLA counts for products. Nothing is compiled or computed.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from growjax.axes import partition, put
from growjax.data.objectives import Objective, batch_shapes
from growjax.nn import Attention
from growjax.plan.losses import Loss, cross_entropy
from growjax.subnet import Subnet


_PRODUCTS = ("dot_general", "conv_general_dilated")


def xla_training_flops(
    model: Any, objective: Objective, part: Subnet | None = None, *, loss: Loss = cross_entropy
) -> int:
    """XLA's count of the products in the loss of one sequence and its gradient.

    It should be that of `growjax.plan.plan.step_flops` for a batch of one. `model` may hold shapes;
    `part` is the sub-network that is trained.
    """
    trained, rest = partition(model)
    arrays, static = eqx.partition(rest, lambda x: hasattr(x, "shape"))
    rows = batch_shapes(objective, 1)
    example = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in rows.items()}

    def total(trained, arrays, example):
        # XLA counts no loop of unknown length, which attention over tiles is
        model = _with_all_scores(eqx.combine(trained, arrays, static))
        model = model if part is None else part(model, key=jax.random.key(0), step=0)
        losses, weights = loss(model, example)
        return jnp.sum(losses * weights)

    args = trained, arrays, example
    # Written out before its gradient is taken: there is no checkpoint left to recompute from
    step = jax.make_jaxpr(jax.grad(_flat(jax.make_jaxpr(total)(*args))))(*args)
    flat = jax.tree.leaves(args)
    with_products, without = (_count(step, flat, products=keep) for keep in (True, False))
    return with_products - without


def _with_all_scores(model: Any) -> Any:
    """The model with every attention in the body that writes all scores."""

    def change(part):
        return put(part, {("body",): "einsum"}) if isinstance(part, Attention) else part

    return jax.tree.map(change, model, is_leaf=lambda part: isinstance(part, Attention))


def _flat(program: ClosedJaxpr) -> Callable[..., Any]:
    """The function that a program with one result computes, written out."""
    return lambda *args: _run(program, jax.tree.leaves(args), products=True)[0]


def _count(program: ClosedJaxpr, shapes: list[Any], *, products: bool) -> int:
    analysis = jax.jit(lambda *xs: _run(program, xs, products=products)).lower(*shapes)
    found = analysis.cost_analysis()
    return round(found["flops"]) if found else 0


def _run(program: ClosedJaxpr, inputs: Any, *, products: bool) -> list[Any]:
    """Evaluate a program with every loop of known length and every call written out."""
    known: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, Literal) else known[atom]

    jaxpr = program.jaxpr
    known.update(zip(jaxpr.constvars, program.consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        found = _equation(equation, [read(x) for x in equation.invars], products=products)
        known.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _equation(equation: Any, inputs: list[Any], *, products: bool) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS and not products:
        out = equation.outvars[0].aval
        # Still depends on both, so that nothing before it is dropped
        corner = sum(x[(0,) * x.ndim].astype(out.dtype) for x in inputs)
        return [jnp.broadcast_to(corner, out.shape)]
    if name == "scan":
        return _loop(equation, inputs, products=products)
    if name == "cond":
        index, *operands = inputs
        branches = [_branch(branch, products) for branch in params["branches"]]
        return list(jax.lax.switch(index, branches, *operands))
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None and name != "while":
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _run(closed, inputs, products=products)
    found = equation.primitive.bind(*inputs, **params)
    return list(found) if equation.primitive.multiple_results else [found]


def _branch(program: ClosedJaxpr, products: bool) -> Callable[..., Any]:
    return lambda *operands: _run(program, operands, products=products)


def _loop(equation: Any, inputs: list[Any], *, products: bool) -> list[Any]:
    """A scan all of whose turns are written out, as JAX does it when it is asked to unroll."""
    body = equation.params["jaxpr"]
    closed = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
    inner = jax.make_jaxpr(lambda *xs: _run(closed, xs, products=products))(*closed.in_avals)
    assert not inner.consts
    # Older versions of JAX keep the body closed
    inner = inner if isinstance(body, ClosedJaxpr) else inner.jaxpr
    unrolled = {"jaxpr": inner, "unroll": equation.params["length"]}
    return equation.primitive.bind(*inputs, **equation.params | unrolled)
