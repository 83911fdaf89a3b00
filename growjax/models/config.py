"""What every model's configuration must satisfy."""

import math
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PRNGKeyArray

from growjax import values
from growjax.errors import AxisError
from growjax.nn import ACTIVATIONS
from growjax.nn.stacked import Remat as Remat


def _floating(name: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


# How many layers: a stack may be empty, to be grown
Depth = Annotated[
    int,
    values.at_least(0, "layers"),
    values.Range("an integer of at most 2**24", lambda n: n <= 2**24),
]
# The constant under the root of a norm
Eps = Annotated[float, values.positive()]
Activation = Annotated[str, values.one_of(ACTIVATIONS)]
# The type of the activations; None is that of the parameters
Dtype = Annotated[str, values.Range("a floating-point type such as 'bfloat16'", _floating)] | None


# How many experts: 0 of them is a dense feed-forward
Number = Annotated[int, values.at_least(0, "experts")]
# The coefficient of an auxiliary loss
Coefficient = Annotated[float, values.at_least(0)]


def check_config(config: Any, also: Iterable[str] = ()) -> None:
    """Raise `AxisError` with every field of a configuration out of its range.

    `also` are complaints of the model's own, listed in the same error.
    """
    complaints, heads, kv_heads = [], config.heads, getattr(config, "kv_heads", None)
    experts, per_token = getattr(config, "experts", 0), getattr(config, "experts_per_token", 1)
    if values.fits(tuple[values.Size, values.Size], (experts, per_token)) and per_token > experts:
        complaints.append(f"experts_per_token: {per_token} cannot be chosen from {experts} experts")
    if values.fits(tuple[values.Size, values.Size], (heads, kv_heads)) and heads % kv_heads:
        complaints.append(f"heads: {heads} query heads cannot share {kv_heads} kv_heads evenly")
    headline = f"{type(config).__name__} is not a model:"
    values.check(config, AxisError, headline, [*complaints, *also])


def expert_options(config: Any) -> dict[str, Any]:
    """The arguments of `growjax.nn.make_block` for the experts of a configuration."""
    names = ("experts", "experts_per_token", "shared_experts", "norm_topk_prob")
    names += ("aux_loss_coef", "z_loss_coef", "expert_body", "shared_mlp", "shared_gate")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def odd_rotary(config: Any) -> Iterable[str]:
    """The complaint about heads that rotary positions cannot turn, if there is one."""
    if values.fits(values.Size, config.head_dim) and config.head_dim % 2:
        yield f"head_dim: rotary positions turn pairs, so it must be even, got {config.head_dim}"


# Options of programs that run once or twice: compiling takes longer than they do
QUICK: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if version("jaxlib").startswith("0.10."):
    # The older code generator for CPUs takes a quarter of the time, and later ones do not have it
    QUICK |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
# From so many numbers on, drawing them takes longer than compiling how
_LARGE = 2**24


def born(model: Callable[..., Any], config: Any, *, key: PRNGKeyArray) -> Any:
    """A model of a configuration, drawn by one program instead of some for every array."""
    if isinstance(key, Tracer) or isinstance(jax.device_put(np.float32(0)), Tracer):
        return _draw(model, config, key)  # part of the program that is being traced
    shapes = jax.tree.leaves(eqx.filter_eval_shape(_draw, model, config, key))
    numbers = sum(math.prod(x.shape) for x in shapes if hasattr(x, "shape"))
    return (_born if numbers > _LARGE else _born_quickly)(model, config, key)


def _draw(model: Callable[..., Any], config: Any, key: PRNGKeyArray) -> Any:
    return model(config, key=key)


_jit: Any = eqx.filter_jit
_born, _born_quickly = _jit(_draw), _jit(_draw, compiler_options=QUICK)
