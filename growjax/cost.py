"""The cost of a model: matmul FLOPs, counted in the traced program, and the number of parameters.

XLA's own cost analysis counts the body of a scan once and a library call as 0. Here the jaxpr is counted
instead: L layers cost L layers, a path of k layers costs k, and an operation that cannot be counted is an
error and not 0. Nothing is computed: shapes suffice.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from growjax.axes import axes_of
from growjax.errors import CostError, raise_all


# Primitives that run another program once, by their names in all supported versions of JAX
_CALLS = frozenset(
    "jit pjit closed_call core_call call checkpoint remat remat2 custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_lin".split()
)
# Primitives that may compute products outside of any jaxpr
_OPAQUE = frozenset("ffi_call pure_callback io_callback ragged_dot ragged_dot_general".split())


def _attention(queries: tuple[int, ...], keys: tuple[int, ...], *_: tuple[int, ...]) -> int:
    """FLOPs of attention over tiles, as if no tile were skipped.

    The shapes are `[..., T, d]` and `[..., S, d]`. Each head has two products of `2 T S d` FLOPs: of
    queries with keys, and of scores with values.
    """
    return 4 * math.prod(queries) * keys[-2]


def _experts(tokens: tuple[int, ...], chosen: tuple[int, ...], *rest: tuple[int, ...]) -> int:
    """FLOPs of the experts that tokens choose, whatever a body computes besides.

    The shapes are `[..., T, embed]` and `[..., T, k]`, then that of the weights of choices, then the
    matrices `[..., experts, n, m]` and biases `[..., experts, m]` of all experts.
    """
    del tokens
    matrices = [shape for shape in rest[1:] if len(shape) == len(rest[1])]
    return 2 * math.prod(chosen) * sum(math.prod(shape[-2:]) for shape in matrices)


# FLOPs of jitted functions, by the function's name, from the shapes of its arguments: for functions whose
# products are in a kernel or in a loop of unknown length. All bodies of attention are charged alike.
RULES: dict[str, Callable[..., int]] = {
    "blockwise_attention": _attention,
    "splash_attention": _attention,
    "cudnn_attention": _attention,
    "expert_feed_forward": _experts,
}


def flops(fn: Any, *args: Any) -> int:
    """Matmul FLOPs of `fn(*args)`: two for every multiply-add of a product or convolution.

    Arrays may be `jax.ShapeDtypeStruct`s, also inside `fn` if it is a module; anything that is not an
    array is static. The program is counted as it is written: a scan counts its body for each iteration,
    a `cond` its most expensive branch; recomputation by `jax.checkpoint` counts again, and so do results
    that the compiler would drop as unused. Operations other than products of arrays count as 0.

    Raises `CostError` that lists every part that cannot be counted: a `while` of unknown length, a
    kernel or a foreign call around a product. For such a function, jit it and add a rule under its name
    to `growjax.cost.RULES`: a function from the shapes of its array arguments to its FLOPs.

    **Example**

        flops(model, jax.ShapeDtypeStruct((128,), "int32"))
    """
    # `fn` is passed as an argument: JAX would take ShapeDtypeStructs in a closure for constants
    program = eqx.filter_make_jaxpr(lambda fn, *args: fn(*args))(fn, *args)[0]
    complaints: list[str] = []
    total = _count(program.jaxpr, complaints)
    raise_all(CostError, "these parts of the program cannot be counted:", dict.fromkeys(complaints))
    return total


def parameters(model: eqx.Module) -> int:
    """The number of trained parameters: those of `gj.partition`, without buffers and gates."""
    leaves = [leaf for slot in axes_of(model).of_kind("param") for leaf in slot.arrays()]
    return sum(math.prod(x.shape) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))


def training_flops_per_token(model: Any, length: int) -> float:
    """Model FLOPs of training on one token, in sequences of `length`: three forward passes.

    `model` is called on one sequence of tokens; it may also be a function that calls a sub-network.
    These are *model* FLOPs: the backward pass costs two forward passes, and norms, softmax, the optimizer
    and recomputation are not counted, so that the charge does not depend on how a run is compiled.

    **Example**

        steps * batch * length * training_flops_per_token(model, length)
    """
    return 3 * flops(model, jax.ShapeDtypeStruct((length,), jnp.int32)) / length


def _count(jaxpr: Any, complaints: list[str]) -> int:
    """FLOPs of a program; parts that cannot be counted are added to `complaints`."""
    return sum(_count_equation(equation, complaints) for equation in jaxpr.eqns)


def _count_equation(equation: Any, complaints: list[str]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        # Every entry of the result is a sum over the contracted dimensions
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(_out_shape(equation)) * math.prod(left[d] for d in contracted)
    if name == "conv_general_dilated":
        if any(d != 1 for d in params["lhs_dilation"]):
            complaints.append(f"{name}: most products of a dilated input are with zeros")
        # Every entry of the result is a sum over the kernel of its own output feature
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_out_shape(equation)) * math.prod(kernel) // out_features
    if params.get("name") in RULES:
        return RULES[params["name"]](*(x.aval.shape for x in equation.invars))
    if name in _OPAQUE:
        complaints.append(f"{name}: the jaxpr does not show its computation")
        return 0
    costs = [_count(inner, complaints) for inner in programs_in(params)]
    if name == "scan":
        return params["length"] * sum(costs)
    if name == "cond":
        return max(costs)
    if name not in _CALLS and sum(costs):
        reason = "a product inside a kernel or map"
        if name == "while":
            reason = "the number of its iterations is not known in advance; use lax.scan"
        complaints.append(f"{name}: {reason}")
        return 0
    return sum(costs)


def _out_shape(equation: Any) -> tuple[int, ...]:
    return equation.outvars[0].aval.shape


def programs_in(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation: its branches, bodies and callees."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            # A `ClosedJaxpr` holds a `Jaxpr`
            program = getattr(item, "jaxpr", item)
            if hasattr(program, "eqns"):
                yield program
