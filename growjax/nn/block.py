"""The Transformer block: norms before, after or around its branches, with or without cross-attention."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, ArrayLike, Float, Int

from growjax import axes
from growjax.errors import AxisError
from growjax.gates import Gate, gated
from growjax.nn.attention import Attention, Cache
from growjax.nn.experts import Experts
from growjax.nn.mask import ALL, Mask
from growjax.nn.mlp import MLP
from growjax.nn.norm import Norm
from growjax.nn.place import current
from growjax.nn.stacked import BETWEEN


class Multiplier(eqx.Module):
    """A trained number that multiplies a residual branch, 1 in a new model.

    A copied layer with a closed branch (`gj.stack(branch="zero")`) starts with 0 in it, and with all of
    its weights: `x + a f(x)`, with `a` trained from 0.

    Bachlechner et al., "ReZero is All You Need", UAI 2021; De & Smith, "Batch Normalization Biases
    Residual Blocks Towards the Identity Function in Deep Networks" (SkipInit), NeurIPS 2020.
    """

    weight: Float[Array, ""] = axes.param("", init="ones", closes="closes")
    closes: bool = eqx.field(static=True, default=True)


class Block(eqx.Module):
    """Attention, optional cross-attention and feed-forward, each on a residual branch.

    Pre-LN: `x + f(norm(x))`. Post-LN: `norm(x + f(x))`. With norms `after` the branches,
    `x + after(f(norm(x)))`, where `norm` may be left out (Gemma 2, OLMo 2). In `parallel`, attention and
    feed-forward read the same `x` (GPT-NeoX). `branch` multiplies what every branch adds, and so do
    trained multipliers, if there are any. The gate on the residual stream acts on the output of each
    branch (pre-LN) or through the norm (post-LN).

    The feed-forward is an `MLP`, or `Experts` with an auxiliary loss, which `with_auxiliary` returns too.
    """

    attention: Attention
    attention_norm: Norm | None
    cross: Attention | None
    cross_norm: Norm | None
    mlp: MLP | Experts
    mlp_norm: Norm | None
    gate: Gate | None = axes.gate("embed")
    post_norm: bool = eqx.field(static=True, default=False)
    attention_after: Norm | None = None
    mlp_after: Norm | None = None
    parallel: bool = eqx.field(static=True, default=False)
    attention_multiplier: Multiplier | None = None
    mlp_multiplier: Multiplier | None = None

    def __call__(
        self, x: Float[Array, "T embed"], *args: Any, **options: Any
    ) -> Float[Array, "T embed"]:
        """The output alone, of the same arguments as `with_auxiliary`."""
        return self.with_auxiliary(x, *args, **options)[0]

    def with_auxiliary(
        self,
        x: Float[Array, "T embed"],
        memory: Float[Array, "S embed"] | None = None,
        *,
        mask: Mask = ALL,
        memory_mask: Mask = ALL,
        bias: Array | Callable | None = None,
        turn: tuple[Array, Array] | None = None,
        branch: Array | None = None,
    ) -> tuple[Float[Array, "T embed"], Float[Array, ""] | None]:
        """The output, and the auxiliary loss of the experts (None where there is none)."""
        y = self.attention(self._input(x, self.attention_norm), mask=mask, bias=bias, turn=turn)
        y = _multiplied(y, self.attention_multiplier)
        start, x = x, self._add(x, y, self.attention_norm, branch, self.attention_after)
        x = checkpoint_name(_by_rows(x), BETWEEN)
        if self.cross is not None and self.cross_norm is not None:
            y = self.cross(self._input(x, self.cross_norm), memory, mask=memory_mask)
            x = self._add(x, y, self.cross_norm, branch)
        return self._feed_forward(x, start, branch)

    def on_tokens(
        self,
        x: Float[Array, "T embed"],
        tokens: Int[Array, " count"],
        memory: Float[Array, "S embed"] | None = None,
        *,
        mask: Mask = ALL,
        memory_mask: Mask = ALL,
        bias: Array | Callable | None = None,
        turn: tuple[Array, Array] | None = None,
        branch: Array | None = None,
    ) -> tuple[Float[Array, "T embed"], Float[Array, ""] | None]:
        """`with_auxiliary` on some tokens in order, which see each other alone; the others stay.

        Raises `AxisError` for a bias on scores and for windows, which count all tokens.
        """
        if bias is not None or self.attention.window is not None:
            raise AxisError(
                "biases of relative positions and windows count all tokens, and this layer reads some of "
                "them alone"
            )
        if turn is not None:
            turn = jnp.take(turn[0], tokens, axis=-2), jnp.take(turn[1], tokens, axis=-2)
        y, auxiliary = self.with_auxiliary(
            x[tokens],
            memory,
            mask=mask.of(tokens),
            memory_mask=memory_mask,
            turn=turn,
            branch=branch,
        )
        return x.at[tokens].set(y), auxiliary

    def with_experts(self, **options: Any) -> "Block":
        """The block with one expert in place of the dense feed-forward; see `Experts.of`."""
        return axes.put(self, {("mlp",): Experts.of(self.mlp, **options)})

    def extend(
        self,
        x: Float[Array, "T embed"],
        cache: Cache,
        memory: Cache | None,
        at: Int[ArrayLike, ""],
        *,
        memory_mask: Mask = ALL,
        bias: Array | Callable | None = None,
        turn: tuple[Array, Array] | None = None,
        branch: Array | None = None,
    ) -> tuple[Float[Array, "T embed"], Cache]:
        """The same for the places from `at` on, where `cache` holds the keys and values before them.

        `memory` holds the keys and values of the cross-attention.
        """
        h = self._input(x, self.attention_norm)
        y, cache = self.attention.extend(h, cache, at, bias=bias, turn=turn)
        y = _multiplied(y, self.attention_multiplier)
        start, x = x, self._add(x, y, self.attention_norm, branch, self.attention_after)
        if self.cross is not None and self.cross_norm is not None:
            if memory is None:
                raise AxisError(
                    "memory: expected keys and values for the cross-attention, got None"
                )
            queries = self.cross.ask(self._input(x, self.cross_norm))
            y = self.cross.read(queries, memory, mask=memory_mask)
            x = self._add(x, y, self.cross_norm, branch)
        return self._feed_forward(x, start, branch)[0], cache

    def _feed_forward(
        self, x: Array, start: Array, branch: Array | None
    ) -> tuple[Array, Array | None]:
        """`x` with the feed-forward's output added, and its auxiliary loss.

        It reads `x`, or what the block started with if in parallel.
        """
        h = self._input(start if self.parallel else x, self.mlp_norm)
        if isinstance(self.mlp, Experts):
            y, auxiliary = self.mlp.with_auxiliary(h)
        else:
            y, auxiliary = self.mlp(h), None
        y = _multiplied(y, self.mlp_multiplier)
        return self._add(x, y, self.mlp_norm, branch, self.mlp_after), auxiliary

    def _input(self, x: Array, norm: Norm | None) -> Array:
        return x if self.post_norm or norm is None else norm(x)

    def _add(
        self, x: Array, y: Array, norm: Norm | None, branch: Array | None, after: Norm | None = None
    ) -> Array:
        y = y if after is None else after(y)
        y = y if branch is None else y * jnp.asarray(branch, y.dtype)
        return norm(x + y) if self.post_norm and norm is not None else x + gated(y, self.gate)


def _by_rows(x: Array) -> Array:
    """The residual stream as it is; on TPUs its rows are laid out one after the other.

    Queries and keys lie there as `[head_dim, T]` (`growjax.nn.splash`). By itself, the compiler lays out
    the residual stream like them as well, and copies it for the feed-forward and for the gradient. Over
    several slices it would gather the rows of all chips where they are laid out, so there they are not.
    """
    place = current()
    if place is None or place.platform != "tpu" or place.slices > 1:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


def _multiplied(y: Array, multiplier: Multiplier | None) -> Array:
    return y if multiplier is None else y * multiplier.weight.astype(y.dtype)
