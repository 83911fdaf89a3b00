"""The Transformer block: pre-LN or post-LN, with or without cross-attention."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax import axes
from growjax.gates import Gate, gated
from growjax.nn.attention import Attention
from growjax.nn.mlp import MLP
from growjax.nn.norm import Norm


class Block(eqx.Module):
    """Attention, optional cross-attention and feed-forward, each on a residual branch.

    Pre-LN: `x + f(norm(x))`. Post-LN: `norm(x + f(x))`. `branch` multiplies every `f`. The gate on the
    residual stream acts on what each branch adds (pre-LN) or through the norm (post-LN).
    """

    attention: Attention
    attention_norm: Norm
    cross: Attention | None
    cross_norm: Norm | None
    mlp: MLP
    mlp_norm: Norm
    gate: Gate | None = axes.gate("embed")
    post_norm: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        x: Float[Array, "T embed"],
        memory: Float[Array, "S embed"] | None = None,
        *,
        mask: Array | None = None,
        memory_mask: Array | None = None,
        bias: Array | None = None,
        turn: tuple[Array, Array] | None = None,
        branch: Array | None = None,
    ) -> Float[Array, "T embed"]:
        def residual(x, norm: Norm, f, *args, **kwargs: Any):
            y = f(x if self.post_norm else norm(x), *args, **kwargs)
            y = y if branch is None else y * jnp.asarray(branch, y.dtype)
            return norm(x + y) if self.post_norm else x + gated(y, self.gate)

        x = residual(x, self.attention_norm, self.attention, mask=mask, bias=bias, turn=turn)
        if self.cross is not None and self.cross_norm is not None:
            x = residual(x, self.cross_norm, self.cross, memory, mask=memory_mask)
        return residual(x, self.mlp_norm, self.mlp)
