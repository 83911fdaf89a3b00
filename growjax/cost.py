"""What a model costs: matmul FLOPs counted off the traced program, and parameters off the axes.

XLA's own cost analysis counts a scanned layer once and a library call not at all. Here the jaxpr is
walked instead, so that L layers cost L layers, a path of k costs k, and what cannot be counted is an
error and not a zero. Nothing is computed: shapes are enough.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from growjax.axes import axes_of
from growjax.errors import CostError, raise_all


# What only wraps another program, under the names of the JAX versions that are supported.
_CALLS = frozenset(
    "jit pjit closed_call core_call call checkpoint remat remat2 custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_lin".split()
)
# What may hold products that no jaxpr shows.
_OPAQUE = frozenset("ffi_call pure_callback io_callback ragged_dot ragged_dot_general".split())


def _attention(queries: tuple[int, ...], keys: tuple[int, ...], *_: tuple[int, ...]) -> int:
    """All scores and all that is read, as if every tile were computed, whatever is skipped."""
    return 4 * math.prod(queries) * keys[-2]


# FLOPs of jitted functions, by name and from the shapes of their arguments: of those whose products stand
# in a kernel or in a loop of unknown length. A run is charged the same for every body of attention.
RULES: dict[str, Callable[..., int]] = {"blockwise_attention": _attention}


def flops(fn: Any, *args: Any) -> int:
    """Matmul FLOPs of `fn(*args)`: two for every multiply-add of a product or convolution.

    Arrays may be `jax.ShapeDtypeStruct`s, also inside `fn` if it is a module; anything that is not an
    array is static. The program is counted as it is written: a scan costs its length, a `cond` its
    dearest branch, what `jax.checkpoint` recomputes counts again, and so does work that the compiler
    would drop. Everything that is not a product of arrays counts as 0.

    Raises `CostError` that lists every part that cannot be counted: a `while` of unknown length, a
    kernel or a foreign call around a product. Jit such a function and put a rule under its name into
    `growjax.cost.RULES`: from the shapes of its array arguments to its FLOPs.

    **Example**

        flops(model, jax.ShapeDtypeStruct((128,), "int32"))
    """
    # `fn` is passed as an argument, or its ShapeDtypeStructs would be mistaken for constants.
    program = eqx.filter_make_jaxpr(lambda fn, *args: fn(*args))(fn, *args)[0]
    complaints: list[str] = []
    total = _count(program.jaxpr, complaints)
    raise_all(CostError, "these parts of the program cannot be counted:", dict.fromkeys(complaints))
    return total


def parameters(model: eqx.Module) -> int:
    """How many numbers are trained: those of `gj.partition`, so no buffer and no gate."""
    leaves = [leaf for slot in axes_of(model).of_kind("param") for leaf in slot.arrays()]
    return sum(math.prod(x.shape) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))


def training_flops_per_token(model: Any, length: int) -> float:
    """Model FLOPs of one token's training, in sequences of `length`: three forward passes.

    `model` is called on one sequence of tokens; a function that calls a sub-network of it is fine.
    These are *model* FLOPs: the backward pass is two forward ones, and norms, softmax, the optimizer
    and recomputation are not counted, so runs are charged for what they learn with and not for how
    they are compiled.

    **Example**

        steps * batch * length * training_flops_per_token(model, length)
    """
    return 3 * flops(model, jax.ShapeDtypeStruct((length,), jnp.int32)) / length


def _count(jaxpr: Any, complaints: list[str]) -> int:
    return sum(_count_equation(equation, complaints) for equation in jaxpr.eqns)


def _count_equation(equation: Any, complaints: list[str]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(_out_shape(equation)) * math.prod(left[d] for d in contracted)
    if name == "conv_general_dilated":
        if any(d != 1 for d in params["lhs_dilation"]):
            complaints.append(f"{name}: most of what a dilated input is multiplied by is zeros")
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_out_shape(equation)) * math.prod(kernel) // out_features
    if params.get("name") in RULES:
        return RULES[params["name"]](*(x.aval.shape for x in equation.invars))
    if name in _OPAQUE:
        complaints.append(f"{name}: what it computes is not in the jaxpr")
        return 0
    costs = [_count(inner, complaints) for inner in _inner(params)]
    if name == "scan":
        return params["length"] * sum(costs)
    if name == "cond":
        return max(costs)
    if name not in _CALLS and sum(costs):
        why = "how often its body runs is not known before it runs; use lax.scan"
        complaints.append(
            f"{name}: {why if name == 'while' else 'a product inside a kernel or map'}"
        )
        return 0
    return sum(costs)


def _out_shape(equation: Any) -> tuple[int, ...]:
    return equation.outvars[0].aval.shape


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation: its branches, bodies and callees."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            program = getattr(item, "jaxpr", item)
            if hasattr(program, "eqns"):
                yield program
