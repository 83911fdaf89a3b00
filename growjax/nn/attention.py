"""Attention with grouped queries, and rotary positions.

Heads are factored so that grouped queries come out right by construction: queries are
`[kv_heads, group, head_dim]`, keys and values `[kv_heads, head_dim]`. Scores contract a key's
`head_dim` with a query's, so keys *consume* the axis that queries produce, and take the share when
`head_dim` is copied. `growjax.nn.bodies` computes the attention itself; gates, norms and rotations act
before it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import buffer, param
from growjax.errors import AxisError
from growjax.gates import Gate, gated
from growjax.nn.bodies import Bias, Body, attend
from growjax.nn.linear import affine, normal
from growjax.nn.mask import ALL, Mask
from growjax.nn.norm import Norm
from growjax.values import Size, check, positive, register


@register
@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How frequencies are lowered for contexts that are longer than in training.

    All are divided by `factor` (Chen et al., "Position Interpolation", 2023); or, if `length` is the
    trained context, only those that turn less than `low` times in it, and none that turns
    more than `high` times (Llama 3).

    **Example**

        RotaryScaling(8.0, low=1.0, high=4.0, length=8192)        # Llama 3.1
    """

    factor: Annotated[float, positive()]
    low: Annotated[float, positive()] = 1.0
    high: Annotated[float, positive()] = 4.0
    length: Size | None = None

    def __post_init__(self):
        check(self, AxisError, "these frequencies cannot be scaled:", self._faults)

    def _faults(self) -> Iterator[str]:
        if not self.low < self.high:
            yield f"low, high: expected a low below the high, got {self.low} and {self.high}"

    def __call__(self, freqs: Float[Array, " n"]) -> Float[Array, " n"]:
        """The frequencies that the model is run with."""
        if self.length is None:
            return freqs / self.factor
        turns = self.length * freqs / (2 * math.pi)
        weight = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return freqs * (weight + (1 - weight) / self.factor)


class Rotary(eqx.Module):
    """Rotary position embeddings on neighbouring pairs of coordinates.

    The frequencies are data, one per coordinate: a head that grows keeps those it has, and new pairs,
    appended at the end, repeat them. (Halves instead of pairs would have to grow in two places.)
    `theta` and `scaling` record their origin. Su et al., "RoFormer", 2021.
    """

    freqs: Float[Array, " head_dim"] = buffer("head_dim")
    theta: float = eqx.field(static=True, default=10000.0)
    scaling: RotaryScaling | None = eqx.field(static=True, default=None)

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: RotaryScaling | None = None):
        pairs = jnp.arange(0, head_dim, 2) / head_dim
        freqs = theta**-pairs
        self.freqs = jnp.repeat(freqs if scaling is None else scaling(freqs), 2)
        self.theta, self.scaling = theta, scaling

    def __check_init__(self):
        if self.freqs.shape[-1] % 2:
            raise AxisError(
                f"head_dim: rotary positions turn pairs, so it must be even, got {self.freqs.shape[-1]}"
            )

    def __call__(self, positions: Int[Array, " T"]) -> tuple[Array, Array]:
        """Cosines and sines `[T, head_dim]`, in float32 at least."""
        angles = positions[:, None] * jax.lax.stop_gradient(self.freqs)
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "T ... head_dim"], turn: tuple[Array, Array] | None) -> Array:
    """Turn every pair of coordinates of `x` by its angle at each position."""
    if turn is None:
        return x
    cos, sin = (t.reshape(t.shape[0], *[1] * (x.ndim - 2), -1).astype(x.dtype) for t in turn)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    quarter = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos + quarter * sin


class Cache(NamedTuple):
    """Keys and values of the places of a sequence, as attention reads them.

    Heads come first: products head by head read them as they lie, and nothing is moved for each token.
    """

    keys: Float[Array, "kv_heads S head_dim"]
    values: Float[Array, "kv_heads S head_dim"]


class Attention(eqx.Module):
    """Multi-head attention; self-attention unless it is given a `memory` to read from.

    Gates follow MSG: a new head's query, key and value are each multiplied by the gate, so its logits
    scale with the square and its values with the first power. A new query in an old group has no
    value of its own; its gate multiplies the query and its output. All act after QK-norm, which
    would undo them. `scale` (1/sqrt(head_dim) at birth) is kept when `head_dim` grows.
    """

    scale: float = eqx.field(static=True)
    q_norm: Norm | None
    k_norm: Norm | None
    q: Float[Array, "embed kv_heads group head_dim"] = param(
        "embed -> kv_heads group head_dim", fan_in="{query_fan}"
    )
    k: Float[Array, "embed kv_heads head_dim"] = param(
        "embed -> kv_heads {key_side} head_dim", fan_in="embed"
    )
    v: Float[Array, "embed kv_heads head_dim"] = param("embed -> kv_heads head_dim")
    o: Float[Array, "kv_heads group head_dim embed"] = param("kv_heads group head_dim -> embed")
    q_bias: Float[Array, "kv_heads group head_dim"] | None = param(
        "-> kv_heads group head_dim", init="zeros"
    )
    k_bias: Float[Array, "kv_heads head_dim"] | None = param(
        "-> kv_heads {key_side} head_dim", init="zeros"
    )
    v_bias: Float[Array, "kv_heads head_dim"] | None = param("-> kv_heads head_dim", init="zeros")
    o_bias: Float[Array, " embed"] | None = param("-> embed")
    gate_kv_heads: Gate | None = axes.gate("kv_heads")
    gate_group: Gate | None = axes.gate("group")
    gate_head_dim: Gate | None = axes.gate("head_dim")
    body: Body = eqx.field(static=True, default="auto")

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        scale: float | None = None,
        body: Body = "auto",
        key: PRNGKeyArray,
    ):
        if heads % kv_heads:
            raise AxisError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        group = heads // kv_heads
        k_q, k_k, k_v, k_o = jax.random.split(key, 4)
        self.q = normal(k_q, (embed, kv_heads, group, head_dim), embed)
        self.k = normal(k_k, (embed, kv_heads, head_dim), embed)
        self.v = normal(k_v, (embed, kv_heads, head_dim), embed)
        self.o = normal(k_o, (kv_heads, group, head_dim, embed), heads * head_dim)
        self.q_bias = jnp.zeros((kv_heads, group, head_dim)) if bias else None
        self.k_bias = jnp.zeros((kv_heads, head_dim)) if bias else None
        self.v_bias = jnp.zeros((kv_heads, head_dim)) if bias else None
        self.o_bias = jnp.zeros(embed) if bias else None
        self.q_norm = Norm(head_dim, "rms", eps=eps, axis="head_dim") if qk_norm else None
        self.k_norm = (
            Norm(head_dim, "rms", eps=eps, axis="head_dim", side="consumed") if qk_norm else None
        )
        self.gate_kv_heads = self.gate_group = self.gate_head_dim = None
        self.scale = head_dim**-0.5 if scale is None else scale
        self.body = body

    @property
    def key_side(self) -> str:
        """The arrow between `kv_heads` and `head_dim` of a key: under QK-norm its gain consumes."""
        return "<-" if self.k_norm is None else ""

    @property
    def query_fan(self) -> str:
        """The fan-in of queries at birth: they are smaller where their scores are not divided (T5)."""
        return "embed head_dim" if self.scale == 1 else "embed"

    def __call__(
        self,
        x: Float[Array, "T embed"],
        memory: Float[Array, "S embed"] | None = None,
        *,
        mask: Mask = ALL,
        bias: Bias | None = None,
        turn: tuple[Array, Array] | None = None,
    ) -> Float[Array, "T embed"]:
        """Attend from `x` to `memory` (or to `x`) where `mask` allows it, with `bias` on the scores."""
        seen = self.remember(x if memory is None else memory, turn=turn)
        return self.read(self.ask(x, turn=turn), seen, mask=mask, bias=bias)

    def extend(
        self,
        x: Float[Array, "T embed"],
        cache: Cache,
        at: Int[ArrayLike, ""],
        *,
        bias: Bias | None = None,
        turn: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "T embed"], Cache]:
        """Attend from the places `at`, `at + 1`, ... of a sequence to themselves and those before.

        `cache` has `S` places, of which those before `at` hold keys and values; `x` is put behind them.
        """
        new = self.remember(x, turn=turn)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
        cache = Cache(*(put(old, n.astype(old.dtype)) for old, n in zip(cache, new, strict=True)))
        places = jnp.arange(cache.keys.shape[1])
        mask = Mask(pairs=places[None, :] <= at + jnp.arange(x.shape[0])[:, None])
        return self.read(self.ask(x, turn=turn), cache, mask=mask, bias=bias), cache

    def ask(
        self, x: Float[Array, "T embed"], *, turn: tuple[Array, Array] | None = None
    ) -> Float[Array, "T kv_heads group head_dim"]:
        """The queries of the attending positions."""
        q = affine("te,ekgd->tkgd", x, self.q, self.q_bias)
        q = q if self.q_norm is None else self.q_norm(q)
        q = gated(gated(q, self.gate_kv_heads, -3), self.gate_group, -2)
        return rotate(gated(q, self.gate_head_dim), turn)

    def remember(
        self, source: Float[Array, "S embed"], *, turn: tuple[Array, Array] | None = None
    ) -> Cache:
        """The keys and values of the attended positions."""
        k = affine("se,ekd->skd", source, self.k, self.k_bias)
        v = affine("se,ekd->skd", source, self.v, self.v_bias)
        k = k if self.k_norm is None else self.k_norm(k)
        k, v = (gated(gated(h, self.gate_kv_heads, -2), self.gate_head_dim) for h in (k, v))
        return Cache(*(jnp.swapaxes(h, 0, 1) for h in (rotate(k, turn), v)))

    def read(
        self,
        queries: Float[Array, "T kv_heads group head_dim"],
        seen: Cache,
        *,
        mask: Mask = ALL,
        bias: Bias | None = None,
    ) -> Float[Array, "T embed"]:
        """Attend from queries to keys and values where `mask` allows it, and project to the stream."""
        k, v = (h.astype(queries.dtype) for h in seen)
        q = jnp.moveaxis(queries * self.scale, 0, 2)
        mixed = jnp.moveaxis(attend(q, k, v, mask, bias, body=self.body), 2, 0)
        return affine("tkgd,kgde->te", gated(mixed, self.gate_group, -2), self.o, self.o_bias)
