"""Embedding tables, and positions relative to each other."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.errors import AxisError
from growjax.gates import Gate
from growjax.nn.bodies import LONG, Bias


class Embedding(eqx.Module):
    """A table looked up by index along `axis`; `attend` uses it as a tied output head.

    Raises `AxisError` for indices that the table does not have, where they are known. Under `jit` and
    `vmap` they are not, and an index beyond the table reads its first or last row.
    """

    table: Float[Array, "n embed"] = param("[{axis}] -> embed")
    axis: str = eqx.field(static=True, default="vocab")

    def __init__(
        self, size: int, embed: int, *, axis: str = "vocab", std: float = 0.02, key: PRNGKeyArray
    ):
        self.table = std * jax.random.normal(key, (size, embed))
        self.axis = axis

    def __call__(self, ids: Int[Array | np.ndarray, " T"]) -> Float[Array, "T embed"]:
        size = self.table.shape[0]
        known = not isinstance(ids, Tracer) and getattr(ids, "is_fully_addressable", True)
        if known and np.size(ids):
            numbers = np.asarray(ids)  # by NumPy, so that no trace is in the way
            low, high = numbers.min(), numbers.max()
            if low < 0 or high >= size:
                raise AxisError(
                    f"{self.axis}: this table has the indices 0 to {size - 1}, got {low} to {high}"
                )
        return jnp.take(self.table, ids, axis=0, mode="clip")

    def attend(self, x: Float[Array, "T embed"]) -> Float[Array, "T n"]:
        """Logits against every row, in float32 at least."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("te,ve->tv", x, self.table.astype(x.dtype), preferred_element_type=wide)


class Words(Embedding):
    """The table of a vocabulary, with the gate of its words.

    Rows are looked up whatever the gate is. A model gives it to its `Readout`, tied or not, which adds
    its logarithm to the logits, so that new words have no probability at level 0.
    """

    gate: Gate | None = axes.gate("{axis}")

    def __init__(
        self, size: int, embed: int, *, axis: str = "vocab", std: float = 0.02, key: PRNGKeyArray
    ):
        super().__init__(size, embed, axis=axis, std=std, key=key)
        self.gate = None


class RelativeBias(eqx.Module):
    """T5's attention bias: one learned number per head and bucket of distance.

    Half of the buckets count single steps, the rest grow logarithmically up to `max_distance`.
    Raffel et al., "Exploring the Limits of Transfer Learning", 2020.
    """

    bidirectional: bool = eqx.field(static=True)
    table: Float[Array, "buckets kv_heads group"] = param("[buckets] -> kv_heads group")
    max_distance: int = eqx.field(static=True, default=128)

    def __init__(
        self,
        buckets: int,
        kv_heads: int,
        group: int,
        *,
        bidirectional: bool,
        max_distance: int = 128,
        key: PRNGKeyArray,
    ):
        self.table = 0.02 * jax.random.normal(key, (buckets, kv_heads, group))
        self.bidirectional, self.max_distance = bidirectional, max_distance

    def __call__(
        self, queries: Int[Array, " T"], keys: Int[Array, " S"]
    ) -> Float[Array, "kv_heads group T S"]:
        """The bias for every pair of positions."""
        ahead = keys[None, :] - queries[:, None]
        buckets = self.table.shape[0]
        if self.bidirectional:
            buckets //= 2
            offset, distance = buckets * (ahead > 0), jnp.abs(ahead)
        else:
            offset, distance = 0, jnp.maximum(-ahead, 0)
        near = buckets // 2
        # The largest of two keeps the logarithm finite where it is not used.
        ratio = jnp.log(jnp.maximum(distance, 1) / near) / math.log(self.max_distance / near)
        far = jnp.minimum(near + (ratio * (buckets - near)).astype(jnp.int32), buckets - 1)
        bucket = offset + jnp.where(distance < near, distance, far)
        return jnp.moveaxis(jnp.take(self.table, bucket, axis=0, mode="clip"), (2, 3), (0, 1))

    def among(self, length: int) -> Bias:
        """The bias among the places of one sequence: written out once, or tile by tile if it is long."""
        places = jnp.arange(length)
        return self(places, places) if length * length < LONG else self
