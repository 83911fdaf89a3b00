"""Llama: a decoder with RMS norms, rotary positions, a gated MLP and grouped queries."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.gates import Gate, gated
from growjax.models.config import (
    Activation,
    Depth,
    Dtype,
    Eps,
    Remat,
    born,
    check_config,
    expert_options,
    odd_rotary,
)
from growjax.models.protocol import READ
from growjax.nn import (
    Block,
    Body,
    Cache,
    Embedding,
    ExpertBody,
    Norm,
    Readout,
    Rotary,
    RotaryScaling,
    Stacked,
    causal,
    check_sequence,
    empty_cache,
    make_block,
    normal,
)
from growjax.values import Size, at_least, positive, register


@register
@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and choices of a `Llama`; `heads` are query heads, `bias` is that of attention alone.

    `theta` and `scaling` (a `growjax.nn.RotaryScaling`) set the frequencies of the rotary positions.
    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least. With `experts`, every feed-forward is a mixture of that many experts of `mlp` units
    (`growjax.nn.Experts`, which explains the options); 0 is one dense MLP.
    """

    layers: Depth
    embed: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    theta: Annotated[float, positive()] = 10000.0
    scaling: RotaryScaling | None = None
    eps: Eps = 1e-5
    tied: bool = False
    bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"
    experts: Annotated[int, at_least(0, "experts")] = 0
    experts_per_token: Size = 2
    shared_experts: Annotated[int, at_least(0, "experts")] = 0
    norm_topk_prob: bool = True
    aux_loss_coef: Annotated[float, at_least(0)] = 0.01
    z_loss_coef: Annotated[float, at_least(0)] = 0.001
    expert_body: ExpertBody = "auto"

    def __post_init__(self):
        check_config(self, odd_rotary(self))

    def build(self, key: PRNGKeyArray) -> "Llama":
        """A `Llama` of this configuration, its parameters drawn with this key by one compiled program."""
        return born(Llama, self, key=key)


class Llama(eqx.Module):
    """A decoder-only language model on one sequence: `model(tokens) -> logits [T, vocab]`.

    Rotary positions turn neighbouring coordinates (2i, 2i + 1), as in the published weights of
    Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.

    **Example**

        model = Llama(LlamaConfig(layers=6, embed=256, heads=8, kv_heads=2, head_dim=32, mlp=688,
                                  vocab=384), key=jax.random.key(0))
        logits = jax.vmap(model)(tokens)          # tokens [B, T]
    """

    embedding: Embedding
    rotary: Rotary
    blocks: Stacked[Block]
    norm: Norm
    head: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    gate: Gate | None = axes.gate("embed")
    dtype: str | None = eqx.field(static=True, default=None)

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray):
        c = config
        k_embed, k_blocks, k_head = jax.random.split(key, 3)
        self.embedding = Embedding(c.vocab, c.embed, key=k_embed)
        self.rotary = Rotary(c.head_dim, c.theta, c.scaling)

        def block(key):
            return make_block(
                c.embed,
                c.heads,
                c.head_dim,
                c.mlp,
                kv_heads=c.kv_heads,
                norm="rms",
                bias=c.bias,
                mlp_bias=False,
                qk_norm=c.qk_norm,
                glu=True,
                activation=c.activation,
                eps=c.eps,
                attention=c.attention,
                **expert_options(c),
                key=key,
            )

        self.blocks = Stacked(block, c.layers, remat=c.remat, key=k_blocks)
        side = "consumed" if c.tied else "elementwise"
        self.norm = Norm(c.embed, "rms", eps=c.eps, side=side)
        self.head = None if c.tied else normal(k_head, (c.embed, c.vocab), c.embed)
        self.gate, self.dtype = None, c.dtype

    def __call__(
        self,
        tokens: Int[Array, " T"],
        *,
        positions: Int[Array, " T"] | None = None,
        mask: Bool[Array, " T"] | Bool[Array, "T T"] | None = None,
        prefix: Bool[Array, " T"] | None = None,
        documents: Int[Array, " T"] | None = None,
    ) -> Float[Array, "T vocab"]:
        """Next-token logits; `positions` count from 0 by default.

        `mask` is True at real tokens, or `[T, T]` where one may see the other; tokens in the `prefix`
        are seen by all; of `documents` packed into one sequence, tokens see only their own number.

        Raises `AxisError` for more than one sequence. Ids beyond the vocabulary are an error outside of
        `jit` and `vmap` alone.
        """
        return self._read(tokens, positions, mask, prefix, documents).logits()

    def predict(self, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
        """The logits on one example of an objective, whose keys say what there is to read."""
        return self(example["tokens"], **{name: example.get(key) for key, name in READ.items()})

    def readout(self, example: Mapping[str, Array]) -> Readout:
        """The same, with no logit computed yet."""
        return self._read(example["tokens"], *(example.get(key) for key in READ))

    def cache(self, size: int) -> Cache:
        """An empty cache for `extend`, of `size` places."""
        return empty_cache(self.blocks, size, self.dtype or self.embedding.table.dtype)

    def extend(
        self, tokens: Int[Array, " T"], cache: Cache, at: Int[Array, ""] | int
    ) -> tuple[Float[Array, "T vocab"], Cache]:
        """Logits of the tokens at the places from `at` on, and the cache with them in it.

        `cache` holds the places before `at`; any others in it are not seen, and are written over.
        """
        check_sequence(tokens, cache.keys.shape[2], at=at)
        x, turn = self._embed(tokens, at + jnp.arange(tokens.shape[0]))
        x, cache = self.blocks.extend(x, cache, None, at, turn=turn)
        return self._read_out(x).logits(), cache

    def _embed(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> tuple[Array, tuple[Array, Array]]:
        x = self.embedding(tokens)
        x = gated(x if self.dtype is None else x.astype(self.dtype), self.gate)
        return x, self.rotary(positions)

    def _read(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"] | None,
        mask: Bool[Array, " T"] | Bool[Array, "T T"] | None,
        prefix: Bool[Array, " T"] | None,
        documents: Int[Array, " T"] | None,
    ) -> Readout:
        check_sequence(tokens)
        positions = jnp.arange(tokens.shape[0]) if positions is None else positions
        x, turn = self._embed(tokens, positions)
        x, auxiliary = self.blocks.with_auxiliary(
            x, mask=causal(mask, prefix, documents), turn=turn
        )
        return self._read_out(x, auxiliary)

    def _read_out(
        self, x: Float[Array, "T embed"], auxiliary: Float[Array, ""] | None = None
    ) -> Readout:
        x = self.norm(x)
        if self.head is None:
            return Readout(x, self.embedding.table, tied=True, auxiliary=auxiliary)
        return Readout(x, self.head, auxiliary=auxiliary)
