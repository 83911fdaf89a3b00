"""Attention by the kernels of accelerators: cuDNN's on GPUs, splash attention (`splash.py`) on TPUs.

Both are flash attention (Dao et al., 2022): no score is written to memory, forward or backward. What they
can compute is less than what `growjax.nn.bodies` can: `obstacle` names what is in the way. Arrays that
are split over a mesh are handed to the kernel device by device (`growjax.nn.split`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from growjax.nn.mask import Mask
from growjax.nn.place import Place
from growjax.nn.split import by_device


def obstacle(
    body: str,
    queries: Array,
    mask: Mask,
    bias: Any,
    cap: float | None = None,
    place: Place | None = None,
) -> str | None:
    """The reason why a kernel cannot compute this attention; None if it can.

    `body` is "splash" or "cudnn".
    """
    if bias is not None:
        return "bias: the kernel adds nothing to scores"
    types = ("bfloat16", "float32") if body == "splash" else ("bfloat16", "float16")
    if queries.dtype not in types:
        return f"dtype: expected {' or '.join(types)}, got {queries.dtype}"
    if mask.pairs is not None:
        return "mask.pairs: the kernel reads no array of all pairs"
    if mask.window is not None and not isinstance(mask.window, int | np.integer):
        return "mask.window: the kernel is compiled for one width, and this one is an array"
    if body == "cudnn":
        if place is not None and place.context > 1:
            return "context: the kernel counts the places of queries from 0"
        if cap is not None:
            return "cap: the kernel does not bend scores"
        for name in ("keys", "prefix", "documents"):
            if getattr(mask, name) is not None:
                return f"mask.{name}: the kernel knows causal masks and windows behind a query"
        if mask.window is not None and not mask.causal:
            return "mask.window: the kernel has windows behind a query only, with causal=True"
        if queries.shape[-1] % 8:
            return f"head_dim: expected a multiple of 8, got {queries.shape[-1]}"
    return None


# Under this name `growjax.cost` counts its FLOPs
@functools.partial(jax.jit, static_argnames=("window", "place"))
def cudnn_attention(
    queries: Array, keys: Array, values: Array, mask: Mask, *, window: int | None, place: Place
) -> Array:
    """`growjax.nn.attend` by cuDNN, on NVIDIA GPUs; `window` is that of the mask, whose own is None."""
    reach = None if window is None else (window - 1, 0)

    def kernel(q, k, v, _):
        """Of one sequence, on one device."""
        kv_heads, group, length, size = q.shape
        out = jax.nn.dot_product_attention(
            jnp.swapaxes(q.reshape(kv_heads * group, length, size), 0, 1),
            jnp.swapaxes(k, 0, 1),
            jnp.swapaxes(v, 0, 1),
            scale=1.0,
            is_causal=mask.causal,
            local_window_size=reach,
            implementation="cudnn",
        )
        return jnp.swapaxes(out, 0, 1).reshape(q.shape)

    return by_device(kernel, place, queries, keys, values, None)
