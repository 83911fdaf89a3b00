"""Attention with grouped queries.

Heads are factored so that grouped queries come out right by construction: queries are
`[kv_heads, group, head_dim]`, keys and values `[kv_heads, head_dim]`. Scores contract a key's
`head_dim` with a query's, so keys *consume* the axis that queries produce, and take the share when
`head_dim` is copied. `growjax.nn.bodies` computes the attention itself; gates, norms and rotations act
before it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

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
from growjax.nn.norm import Norm, WidthNorm
from growjax.nn.rotary import rotate


# A window that no sequence reaches
NO_WINDOW = 2**30


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

    `window` is the number of keys that a query sees, itself among them, and `turn` picks one of several
    rotations: both are data, so that the layers of a stack may differ, and take theirs along when they
    are copied. `cap` bounds the scores. `inner` says that a norm follows before the residual stream.
    """

    scale: float = eqx.field(static=True)
    q_norm: Norm | WidthNorm | None
    k_norm: Norm | WidthNorm | None
    q: Float[Array, "embed kv_heads group head_dim"] = param(
        "embed -> kv_heads group head_dim", fan_in="{query_fan}"
    )
    k: Float[Array, "embed kv_heads head_dim"] = param(
        "embed -> kv_heads {key_side} head_dim", fan_in="embed"
    )
    v: Float[Array, "embed kv_heads head_dim"] = param("embed -> kv_heads head_dim")
    o: Float[Array, "kv_heads group head_dim embed"] = param(
        "kv_heads group head_dim -> embed", closes="closes"
    )
    q_bias: Float[Array, "kv_heads group head_dim"] | None = param(
        "-> kv_heads group head_dim", init="zeros"
    )
    k_bias: Float[Array, "kv_heads head_dim"] | None = param(
        "-> kv_heads {key_side} head_dim", init="zeros"
    )
    v_bias: Float[Array, "kv_heads head_dim"] | None = param("-> kv_heads head_dim", init="zeros")
    o_bias: Float[Array, " embed"] | None = param("-> embed", closes="closes")
    gate_kv_heads: Gate | None = axes.gate("kv_heads")
    gate_group: Gate | None = axes.gate("group")
    gate_head_dim: Gate | None = axes.gate("head_dim")
    body: Body = eqx.field(static=True, default="auto")
    window: Int[Array, ""] | None = buffer(born="born_window", default=None)
    turn: Int[Array, ""] | None = buffer(born="first_turn", default=None)
    cap: float | None = eqx.field(static=True, default=None)
    inner: bool = eqx.field(static=True, default=False)
    # What layers start with where there are none to repeat
    born_window: int = eqx.field(static=True, default=NO_WINDOW)
    first_turn: ClassVar[int] = 0

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        o_bias: bool | None = None,
        qk_norm: bool | Literal["head", "width"] = False,
        plus_one: bool = False,
        eps: float = 1e-6,
        scale: float | None = None,
        cap: float | None = None,
        inner: bool = False,
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
        self.o_bias = jnp.zeros(embed) if (bias if o_bias is None else o_bias) else None
        self.q_norm = self.k_norm = None
        if qk_norm == "width":
            make = functools.partial(WidthNorm, eps=eps, plus_one=plus_one)
            self.q_norm = make(kv_heads, group, head_dim, keys=False)
            self.k_norm = make(kv_heads, head_dim, keys=True)
        elif qk_norm:
            make = functools.partial(Norm, head_dim, "rms", eps=eps, axis="head_dim")
            self.q_norm = make(plus_one=plus_one)
            self.k_norm = make(plus_one=plus_one, side="consumed")
        self.gate_kv_heads = self.gate_group = self.gate_head_dim = None
        self.scale = head_dim**-0.5 if scale is None else scale
        self.body, self.cap, self.inner = body, cap, inner
        self.window, self.turn, self.born_window = None, None, NO_WINDOW

    @property
    def closes(self) -> bool | None:
        """Whether the output takes the share of a copied layer: not if a norm follows."""
        return False if self.inner else None

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
        if self.window is not None:
            mask = dataclasses.replace(mask, window=self.window)
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
        back = at + jnp.arange(x.shape[0])[:, None] - jnp.arange(cache.keys.shape[1])[None, :]
        pairs = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
        mask = Mask(pairs=jnp.asarray(pairs))
        return self.read(self.ask(x, turn=turn), cache, mask=mask, bias=bias), cache

    def ask(
        self, x: Float[Array, "T embed"], *, turn: tuple[Array, Array] | None = None
    ) -> Float[Array, "T kv_heads group head_dim"]:
        """The queries of the attending positions."""
        q = affine("te,ekgd->tkgd", x, self.q, self.q_bias)
        gates = self.gate_kv_heads, self.gate_group, self.gate_head_dim
        q = _normed(self.q_norm, q, gates)
        q = gated(gated(q, self.gate_kv_heads, -3), self.gate_group, -2)
        return rotate(gated(q, self.gate_head_dim), self._own(turn))

    def remember(
        self, source: Float[Array, "S embed"], *, turn: tuple[Array, Array] | None = None
    ) -> Cache:
        """The keys and values of the attended positions."""
        k = affine("se,ekd->skd", source, self.k, self.k_bias)
        v = affine("se,ekd->skd", source, self.v, self.v_bias)
        k = _normed(self.k_norm, k, (self.gate_kv_heads, self.gate_head_dim))
        k, v = (gated(gated(h, self.gate_kv_heads, -2), self.gate_head_dim) for h in (k, v))
        return Cache(*(jnp.swapaxes(h, 0, 1) for h in (rotate(k, self._own(turn)), v)))

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
        mixed = jnp.moveaxis(attend(q, k, v, mask, bias, cap=self.cap, body=self.body), 2, 0)
        return affine("tkgd,kgde->te", gated(mixed, self.gate_group, -2), self.o, self.o_bias)

    def _own(self, turn: tuple[Array, Array] | None) -> tuple[Array, Array] | None:
        """The rotation of this layer, of those of all kinds of layers if there are several."""
        if turn is None or self.turn is None:
            return turn
        cos, sin = turn
        return cos[self.turn], sin[self.turn]


def _normed(norm: Norm | WidthNorm | None, x: Array, gates: Sequence[Gate | None]) -> Array:
    """Queries or keys after their norm, if there is one."""
    if norm is None:
        return x
    return norm(x, *gates) if isinstance(norm, WidthNorm) else norm(x)
