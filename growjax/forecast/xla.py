"""XLA's count of the FLOPs of a training step, to check our own count (`growjax.cost`) against.

XLA's cost analysis counts the body of a scan once, whatever its length, and elementwise operations
together with products. Therefore the step is first unrolled: every layer in a row, and nothing
recomputed. Then XLA counts it twice, once as it is and once with each product replaced by a broadcast,
which costs nothing; the difference is XLA's count of the products. Nothing is compiled or computed.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from growjax.axes import partition, put
from growjax.data.objectives import Objective, batch_shapes
from growjax.nn import Attention, Experts
from growjax.plan.losses import Loss, cross_entropy
from growjax.subnet import Subnet


_PRODUCTS = ("dot_general", "conv_general_dilated")


def xla_training_flops(
    model: Any, objective: Objective, part: Subnet | None = None, *, loss: Loss = cross_entropy
) -> int:
    """XLA's count of the products in the loss of one sequence and its gradient.

    It should equal `growjax.plan.stages.step_flops` for a batch of one. `model` may hold shapes; `part`
    is the sub-network that is trained.
    """
    trained, rest = partition(model)
    arrays, static = eqx.partition(rest, lambda x: hasattr(x, "shape"))
    rows = batch_shapes(objective, 1)
    example = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in rows.items()}

    def total(trained, arrays, example):
        model = _countable(eqx.combine(trained, arrays, static))
        model = model if part is None else part(model, key=jax.random.key(0), step=0)
        losses, weights, *_ = loss(model, example)
        return jnp.sum(losses * weights)

    args = trained, arrays, example
    # The loss is unrolled before its gradient is taken, so that no `jax.checkpoint` is left in it: the
    # gradient then recomputes nothing
    unrolled = _function(jax.make_jaxpr(total)(*args), products=True)
    step = jax.make_jaxpr(jax.grad(lambda *args: unrolled(*args)[0]))(*args)
    shapes = jax.tree.leaves(args)
    return _count(step, shapes, products=True) - _count(step, shapes, products=False)


def _countable(model: Any) -> Any:
    """The model with bodies whose products XLA counts as they are charged.

    Attention over tiles is a loop of unknown length; as one einsum it makes the whole matrix of scores.
    Experts are charged for the tokens that choose them; with gathered weights no others are computed.
    """
    bodies = {Attention: "einsum", Experts: "gathered"}

    def change(part):
        body = bodies.get(type(part))
        return part if body is None else put(part, {("body",): body})

    return jax.tree.map(change, model, is_leaf=lambda part: type(part) in bodies)


def _function(program: ClosedJaxpr, *, products: bool) -> Callable[..., list[Any]]:
    """The function that a program computes, unrolled, of trees whose leaves are its inputs."""
    return lambda *args: _run(program, jax.tree.leaves(args), products=products)


def _count(program: ClosedJaxpr, shapes: list[Any], *, products: bool) -> int:
    """XLA's count of the FLOPs of a program, unrolled; without `products`, these cost nothing."""
    lowered = jax.jit(_function(program, products=products)).lower(*shapes)
    costs = lowered.cost_analysis()
    return round(costs["flops"]) if costs else 0


def _run(program: ClosedJaxpr, inputs: Any, *, products: bool) -> list[Any]:
    """Evaluate a program equation by equation, with loops of known length and calls unrolled."""
    values: dict[Any, Any] = {}  # variable -> its value

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    jaxpr = program.jaxpr
    values.update(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        outputs = _equation(equation, [read(x) for x in equation.invars], products=products)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _equation(equation: Any, inputs: list[Any], *, products: bool) -> list[Any]:
    """The results of one equation of a program."""
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS and not products:
        out = equation.outvars[0].aval
        # A broadcast of one entry of each operand: the result still depends on both operands, so that
        # the equations before it are not removed as unused
        corner = sum(x[(0,) * x.ndim].astype(out.dtype) for x in inputs)
        return [jnp.broadcast_to(corner, out.shape)]
    if name == "scan":
        return _loop(equation, inputs, products=products)
    if name == "cond":
        index, *operands = inputs
        branches = [_function(branch, products=products) for branch in params["branches"]]
        return list(jax.lax.switch(index, branches, *operands))
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None and name != "while":
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _run(closed, inputs, products=products)
    outputs = equation.primitive.bind(*inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _loop(equation: Any, inputs: list[Any], *, products: bool) -> list[Any]:
    """The results of a scan with all of its iterations unrolled, by the scan's own `unroll`."""
    body = equation.params["jaxpr"]
    closed = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
    inner = jax.make_jaxpr(_function(closed, products=products))(*closed.in_avals)
    assert not inner.consts
    # Older versions of JAX keep the body closed
    inner = inner if isinstance(body, ClosedJaxpr) else inner.jaxpr
    unrolled = {"jaxpr": inner, "unroll": equation.params["length"]}
    return equation.primitive.bind(*inputs, **equation.params | unrolled)
