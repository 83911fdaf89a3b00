"""Normalisation over one axis, with statistics that ignore coordinates behind a gate."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax import axes
from growjax.axes import buffer, param
from growjax.gates import Gate, gated


Side = Literal["elementwise", "consumed", "produced"]


class Norm(eqx.Module):
    """LayerNorm or RMSNorm over the last dimension, computed in float32 at least.

    Behind a gate `c` the statistics are means weighted by `c` and the output is multiplied by `c`
    (Yao et al. 2024, section on masked LayerNorm), so at gate 0 they are those of the old
    coordinates, whatever the new ones hold. Epsilon is data that belongs to a mean square over the axis,
    or to a variance: operators that pad the axis, with zeros or with the mean, rescale it.

    `side` is where the norm itself stands on its axis: `"consumed"` marks the last norm before a
    consumer that cannot take a share of its own (a head tied to the embedding, keys that meet
    normalised queries), `"produced"` one whose output is the residual stream (post-LN).
    """

    weight: Float[Array, " axis"] | None = param("{into}~{axis}{out}", init="ones")
    bias: Float[Array, " axis"] | None = param("{into}{axis}{out}", init="zeros")
    eps: Float[Array, ""] = buffer("{mean}", born="born_eps")
    gate: Gate | None = axes.gate("{axis}")
    axis: str = eqx.field(static=True, default="embed")
    side: Side = eqx.field(static=True, default="elementwise")
    centre: bool = eqx.field(static=True, default=True)
    born_eps: float = eqx.field(static=True, default=1e-5)

    def __init__(
        self,
        size: int,
        kind: Literal["layer", "rms"] = "layer",
        *,
        bias: bool = True,
        eps: float = 1e-5,
        axis: str = "embed",
        side: Side = "elementwise",
    ):
        self.weight = jnp.ones(size)
        self.centre = kind == "layer"
        self.bias = jnp.zeros(size) if bias and self.centre else None
        self.eps = jnp.asarray(eps, self.weight.dtype)
        self.gate, self.axis, self.side, self.born_eps = None, axis, side, eps

    @property
    def into(self) -> str:
        """The arrow before the axis in a spec."""
        return "-> " if self.side == "produced" else ""

    @property
    def out(self) -> str:
        """The arrow after it."""
        return " ->" if self.side == "consumed" else ""

    @property
    def mean(self) -> str:
        """The spec of epsilon, which scales like a variance or a mean square over the axis."""
        return f"<~{self.axis}>" if self.centre else f"<{self.axis}>"

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        eps = jax.lax.stop_gradient(self.eps)
        if self.gate is None:
            average = lambda v: jnp.mean(v, -1, keepdims=True)  # noqa: E731
        else:
            c = jax.lax.stop_gradient(self.gate.value).astype(h.dtype)
            weights = c * (1 / jnp.sum(c))
            average = lambda v: jnp.sum(weights * v, -1, keepdims=True)  # noqa: E731
        if self.centre:
            h = h - average(h)
        h = h * jax.lax.rsqrt(average(h * h) + eps.astype(h.dtype))
        if self.weight is not None:
            h = h * self.weight.astype(h.dtype)
        if self.bias is not None:
            h = h + self.bias.astype(h.dtype)
        return gated(h, self.gate).astype(x.dtype)
