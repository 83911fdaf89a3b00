"""Normalisation over one axis, with statistics that ignore coordinates behind a gate."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from growjax import axes
from growjax.axes import buffer, param
from growjax.gates import Gate, gated


# The name of what `jax.checkpoint` keeps of a norm
STATISTICS = "norm statistics"

Side = Literal["elementwise", "consumed", "produced", "closing"]


class Norm(eqx.Module):
    """LayerNorm or RMSNorm over the last dimension, computed in float32 at least.

    Behind a gate `c` the statistics are means weighted by `c` and the output is multiplied by `c`
    (Yao et al. 2024, section on masked LayerNorm), so at gate 0 they are those of the old
    coordinates, whatever the new ones hold. Epsilon is data that belongs to a mean square over the axis,
    or to a variance: operators that pad the axis, with zeros or with the mean, rescale it.

    `side` is where the norm itself stands on its axis: `"consumed"` marks the last norm before a
    consumer that cannot take a share of its own (a head tied to the embedding, keys that meet
    normalised queries), `"produced"` one whose output is the residual stream (post-LN), `"closing"` one
    that ends a residual branch (OLMo 2, Gemma 2): it takes the share of a copied layer, since a factor of
    its input would have no effect. With `plus_one` the gain is `1 + weight` (Gemma).
    """

    weight: Float[Array, " axis"] | None = param(
        "{into}~{axis}{out}", init="ones", origin="origin", closes="closes"
    )
    bias: Float[Array, " axis"] | None = param("{into}{axis}{out}", init="zeros", closes="closes")
    eps: Float[Array, ""] = buffer("{mean}", born="born_eps")
    gate: Gate | None = axes.gate("{axis}")
    axis: str = eqx.field(static=True, default="embed")
    side: Side = eqx.field(static=True, default="elementwise")
    centre: bool = eqx.field(static=True, default=True)
    born_eps: float = eqx.field(static=True, default=1e-5)
    plus_one: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        size: int,
        kind: Literal["layer", "rms"] = "layer",
        *,
        bias: bool = True,
        eps: float = 1e-5,
        axis: str = "embed",
        side: Side = "elementwise",
        plus_one: bool = False,
    ):
        self.weight = jnp.zeros(size) if plus_one else jnp.ones(size)
        self.centre = kind == "layer"
        self.bias = jnp.zeros(size) if bias and self.centre else None
        self.eps = jnp.asarray(eps, self.weight.dtype)
        self.gate, self.axis, self.side, self.born_eps = None, axis, side, eps
        self.plus_one = plus_one

    def uncentred(self) -> "Norm":
        """The same norm without its mean, for inputs whose mean is zero (`gj.growth.centred`)."""
        new = object.__new__(type(self))
        for name, value in {**vars(self), "centre": False}.items():
            object.__setattr__(new, name, value)
        return new

    @property
    def into(self) -> str:
        """The arrow before the axis in a spec."""
        return "-> " if self.side == "produced" else ""

    @property
    def out(self) -> str:
        """The arrow after it."""
        return " ->" if self.side == "consumed" else ""

    @property
    def origin(self) -> float:
        """The weight at which the gain is zero."""
        return -1.0 if self.plus_one else 0.0

    @property
    def closes(self) -> bool | None:
        """Whether the norm takes the share of a copied layer; None goes by its arrows."""
        return True if self.side == "closing" else None

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
        # A number a token, which is kept where the rest is recomputed for the gradient
        if self.centre:
            h = h - checkpoint_name(average(h), STATISTICS)
        scale = jax.lax.rsqrt(average(h * h) + eps.astype(h.dtype))
        h = h * checkpoint_name(scale, STATISTICS)
        if self.weight is not None:
            gain = self.weight.astype(h.dtype)
            h = h * (1 + gain if self.plus_one else gain)
        if self.bias is not None:
            h = h + self.bias.astype(h.dtype)
        return gated(h, self.gate).astype(x.dtype)


class WidthNorm(eqx.Module):
    """RMSNorm of queries or keys over all heads together, with a gain per coordinate (OLMo 2).

    The statistics of a norm over several axes are those of their product. The gates are those of the
    attention, whose coordinates it normalises; behind them the mean is weighted by their product.
    `keys` have no `group`, and their gain takes the share of a copied `head_dim`, as keys do.
    """

    weight: Float[Array, "..."] = param("{spec}", init="ones", origin="origin")
    eps: Float[Array, ""] = buffer("{mean}", born="born_eps")
    keys: bool = eqx.field(static=True, default=False)
    born_eps: float = eqx.field(static=True, default=1e-5)
    plus_one: bool = eqx.field(static=True, default=False)

    def __init__(self, *sizes: int, keys: bool, eps: float, plus_one: bool = False):
        self.weight = jnp.zeros(sizes) if plus_one else jnp.ones(sizes)
        self.eps = jnp.asarray(eps, self.weight.dtype)
        self.keys, self.born_eps, self.plus_one = keys, eps, plus_one

    @property
    def spec(self) -> str:
        """The axes of the gain."""
        return "-> ~kv_heads <- ~head_dim" if self.keys else "~kv_heads ~group ~head_dim"

    @property
    def mean(self) -> str:
        """The spec of epsilon."""
        return "<kv_heads> <head_dim>" if self.keys else "<kv_heads> <group> <head_dim>"

    @property
    def origin(self) -> float:
        """The weight at which the gain is zero."""
        return -1.0 if self.plus_one else 0.0

    def __call__(self, x: Float[Array, "T ..."], *gates: Gate | None) -> Float[Array, "T ..."]:
        """Normalise `x`; `gates` are those of its dimensions after the first."""
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        square, count = h * h, 1.0
        for dim, gate in enumerate(gates, start=-len(gates)):
            square = gated(square, gate, dim)
            count *= x.shape[dim] if gate is None else jnp.sum(jax.lax.stop_gradient(gate.value))
        over = tuple(range(-len(gates), 0))
        eps = jax.lax.stop_gradient(self.eps).astype(h.dtype)
        h = h * jax.lax.rsqrt(jnp.sum(square, over, keepdims=True) / count + eps)
        gain = self.weight.astype(h.dtype)
        return (h * (1 + gain if self.plus_one else gain)).astype(x.dtype)
