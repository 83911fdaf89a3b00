"""What every model's configuration must satisfy."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import jax.numpy as jnp

from growjax import values
from growjax.errors import AxisError
from growjax.nn import ACTIVATIONS


def _floating(name: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


# The constant under the root of a norm
Eps = Annotated[float, values.positive()]
Activation = Annotated[str, values.one_of(ACTIVATIONS)]
# The type of the activations; None is that of the parameters
Dtype = Annotated[str, values.Range("a floating-point type such as 'bfloat16'", _floating)] | None
Remat = Literal["dots", "nothing", "everything"]


def check_config(config: Any, also: Iterable[str] = ()) -> None:
    """Raise `AxisError` with every field of a configuration out of its range.

    `also` are complaints of the model's own, listed in the same error.
    """
    complaints, heads, kv_heads = [], config.heads, getattr(config, "kv_heads", None)
    if values.fits(tuple[values.Size, values.Size], (heads, kv_heads)) and heads % kv_heads:
        complaints.append(f"heads: {heads} query heads cannot share {kv_heads} kv_heads evenly")
    headline = f"{type(config).__name__} is not a model:"
    values.check(config, AxisError, headline, [*complaints, *also])


def odd_rotary(config: Any) -> Iterable[str]:
    """The complaint about heads that rotary positions cannot turn, if there is one."""
    if values.fits(values.Size, config.head_dim) and config.head_dim % 2:
        yield f"head_dim: rotary positions turn pairs, so it must be even, got {config.head_dim}"
