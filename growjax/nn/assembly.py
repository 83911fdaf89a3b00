"""Parts that all models share around their forward pass: blocks, masks, caches and logits."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from growjax.errors import AxisError
from growjax.nn.attention import Attention, Cache
from growjax.nn.block import Block, Multiplier
from growjax.nn.bodies import Body
from growjax.nn.experts import ExpertBody, Experts
from growjax.nn.mask import Mask
from growjax.nn.mlp import MLP
from growjax.nn.norm import Norm, Side
from growjax.nn.stacked import Stacked


def make_block(
    embed: int,
    heads: int,
    head_dim: int,
    mlp: int,
    *,
    kv_heads: int | None = None,
    norm: Literal["layer", "rms"] = "layer",
    post_norm: bool = False,
    placement: Literal["before", "after", "both"] = "before",
    plus_one: bool = False,
    parallel: bool = False,
    bias: bool = True,
    o_bias: bool | None = None,
    mlp_bias: bool | None = None,
    norm_bias: bool | None = None,
    qk_norm: bool | Literal["head", "width"] = False,
    glu: bool = False,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    cap: float | None = None,
    cross: bool = False,
    attention: Body = "auto",
    experts: int = 0,
    experts_per_token: int = 2,
    shared_experts: int = 0,
    shared_mlp: int | None = None,
    shared_gate: bool = False,
    norm_topk_prob: bool = True,
    aux_loss_coef: float = 0.01,
    z_loss_coef: float = 0.001,
    expert_body: ExpertBody = "auto",
    multipliers: bool = False,
    key: PRNGKeyArray,
) -> Block:
    """A `Block` from sizes and choices.

    `bias` is that of all its parts, unless another is given for what attention and MLP put out
    (`o_bias`, `mlp_bias`) or for norms. `placement` is where the norms of its branches stand.

    With `experts`, the feed-forward is a `growjax.nn.Experts`, whose experts have `mlp` units each. With
    `multipliers` both branches have a trained one (`growjax.nn.Multiplier`); the arrays before it then no
    longer end them. They do not go with experts, nor with norms after the branches.

    **Example**

        blocks = Stacked(lambda key: make_block(256, 4, 64, 1024, key=key), 6, key=key)
    """
    k_attention, k_cross, k_mlp = jax.random.split(key, 3)
    norm_bias = bias if norm_bias is None else norm_bias
    after = placement != "before"
    if multipliers and (experts or after or post_norm or cross):
        raise AxisError(
            "multipliers: expected plain pre-LN branches, without experts or norms after them"
        )
    inner = after or multipliers

    def make_attention(key):
        made = Attention(
            embed,
            heads,
            kv_heads or heads,
            head_dim,
            bias=bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
            plus_one=plus_one,
            eps=eps,
            scale=scale,
            cap=cap,
            inner=inner,
            body=attention,
            key=key,
        )
        # Logits start with the same variance whatever the scale (T5 has 1, and small queries).
        return eqx.tree_at(lambda a: a.q, made, made.q * (head_dim**-0.5 / made.scale))

    def make_feed_forward(key):
        options: Any = dict(
            activation=activation, glu=glu, bias=bias if mlp_bias is None else mlp_bias, key=key
        )
        if not experts:
            return MLP(embed, mlp, inner=inner, **options)
        return Experts(
            embed,
            mlp,
            experts,
            per_token=experts_per_token,
            shared=shared_experts,
            shared_mlp=shared_mlp,
            shared_gate=shared_gate,
            norm_topk_prob=norm_topk_prob,
            aux_loss_coef=aux_loss_coef,
            z_loss_coef=z_loss_coef,
            body=expert_body,
            **options,
        )

    def make_norm(side: Side):
        return Norm(embed, norm, bias=norm_bias, eps=eps, side=side, plus_one=plus_one)

    def before():
        # Post-LN, a norm's output is the residual stream itself.
        return make_norm("produced" if post_norm else "elementwise")

    return Block(
        attention=make_attention(k_attention),
        attention_norm=None if placement == "after" else before(),
        attention_after=make_norm("closing") if after else None,
        cross=make_attention(k_cross) if cross else None,
        cross_norm=before() if cross else None,
        mlp=make_feed_forward(k_mlp),
        mlp_norm=None if placement == "after" else before(),
        mlp_after=make_norm("closing") if after else None,
        post_norm=post_norm,
        parallel=parallel,
        attention_multiplier=Multiplier(jnp.ones(())) if multipliers else None,
        mlp_multiplier=Multiplier(jnp.ones(())) if multipliers else None,
    )


def check_sequence(
    tokens: Any, places: int | None = None, *, at: Any = 0, name: str = "tokens"
) -> None:
    """Raise `AxisError` unless `tokens` are one sequence that fits, from the place `at` on.

    `places` is the number of positions, or of places in a cache (None: any). Shapes are known
    under `jit`, so this costs nothing.
    """
    shape = jnp.shape(tokens)
    if len(shape) != 1:
        raise AxisError(
            f"{name}: a model reads one sequence, [T], and got shape {shape}; use jax.vmap(model) for a "
            "batch"
        )
    start = 0 if isinstance(at, Tracer) else int(at)
    if places is not None and start + shape[0] > places:
        raise AxisError(
            f"{name}: {shape[0]} of them from place {start} on, but there is room for {places}; give "
            "shorter sequences, a model with more positions or a larger cache"
        )


def causal(
    mask: Bool[Array, " T"] | Bool[Array, "T T"] | None = None,
    prefix: Bool[Array, " T"] | None = None,
    documents: Int[Array, " T"] | None = None,
) -> Mask:
    """The mask of a decoder: a token sees itself, those before it and those in the prefix.

    `mask` is False at tokens that no query may see `[T]`, or pair by pair `[T, T]`; tokens see their own
    document only, by the numbers in `documents`.
    """
    keys = mask if mask is None or mask.ndim == 1 else None
    pairs = None if mask is None or mask.ndim == 1 else mask
    return Mask(causal=True, prefix=prefix, keys=keys, documents=documents, pairs=pairs)


def empty_cache(blocks: Stacked[Block], size: int, dtype: DTypeLike) -> Cache:
    """Room for the keys and values of `size` places in every layer of a decoder."""
    layers, _, kv_heads, head_dim = blocks.block.attention.k.shape
    return Cache(*(jnp.zeros((layers, kv_heads, size, head_dim), dtype) for _ in range(2)))


def logits(x: Float[Array, "... embed"], head: Float[Array, "embed n"]) -> Float[Array, "... n"]:
    """Logits of an untied head, in float32 at least (`Embedding.attend` is the tied one)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...e,en->...n", x, head.astype(x.dtype), preferred_element_type=wide)
