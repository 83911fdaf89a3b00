"""The feed-forward block, gated (GLU) or not."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.gates import Gate, gated
from growjax.nn.linear import affine, normal


@jax.custom_jvp
def normal_cdf(x: Array) -> Array:
    """The share of a standard normal distribution below `x`, with derivatives of every order.

    JAX's own derivative of `erfc` does not trace under `shard_map` in float32 and float64 since JAX 0.11
    (a polynomial whose coefficients do not vary over the mesh as its argument does).
    """
    return 0.5 * jax.lax.erfc(-x * np.sqrt(0.5).astype(x.dtype))


@normal_cdf.defjvp
def _normal_density(primals, tangents):
    (x,), (dx,) = primals, tangents
    density = jnp.exp(-0.5 * x * x) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return normal_cdf(x), density * dx


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: x * normal_cdf(x),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLP(eqx.Module):
    """`down(act(up(x)))`, or `down(act(glu(x)) * up(x))` with a gated linear unit.

    The gate multiplies the pre-activation, as in MSG, so every activation here maps 0 to 0. With a
    GLU it multiplies the product, which is linear in it. `axis` names the hidden units.
    """

    up: Float[Array, "embed mlp"] = param("embed -> {axis}")
    up_bias: Float[Array, " mlp"] | None = param("-> {axis}")
    glu: Float[Array, "embed mlp"] | None = param("embed -> {axis}")
    down: Float[Array, "mlp embed"] = param("{axis} -> embed", closes="closes")
    down_bias: Float[Array, " embed"] | None = param("-> embed", closes="closes")
    gate: Gate | None = axes.gate("{axis}")
    activation: str = eqx.field(static=True, default="gelu")
    axis: str = eqx.field(static=True, default="mlp")
    inner: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        embed: int,
        mlp: int,
        *,
        activation: str = "gelu",
        glu: bool = False,
        bias: bool = True,
        axis: str = "mlp",
        inner: bool = False,
        key: PRNGKeyArray,
    ):
        k_up, k_glu, k_down = jax.random.split(key, 3)
        self.up = normal(k_up, (embed, mlp), embed)
        self.up_bias = jnp.zeros(mlp) if bias else None
        self.glu = normal(k_glu, (embed, mlp), embed) if glu else None
        self.down = normal(k_down, (mlp, embed), mlp)
        self.down_bias = jnp.zeros(embed) if bias else None
        self.gate, self.activation, self.axis, self.inner = None, activation, axis, inner

    @property
    def closes(self) -> bool | None:
        """Whether the output takes the share of a copied layer: not if a norm follows (`inner`)."""
        return False if self.inner else None

    def __call__(self, x: Float[Array, "T embed"]) -> Float[Array, "T embed"]:
        act = ACTIVATIONS[self.activation]
        # The gate multiplies the output of `up`. Put on the weights it costs a product per weight and not
        # one per token, and the matrix product stays next to the activation: 2% of a step, not 28%.
        bias = None if self.up_bias is None else gated(self.up_bias, self.gate)
        h = affine("te,em->tm", x, gated(self.up, self.gate), bias)
        h = act(h) if self.glu is None else act(affine("te,em->tm", x, self.glu)) * h
        return affine("tm,me->te", h, self.down, self.down_bias)
