"""GPT: a decoder with learned (or rotary) positions and a head tied to the embedding."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

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
    Stacked,
    Words,
    causal,
    check_sequence,
    empty_cache,
    make_block,
    normal,
)
from growjax.values import Size, at_least, register


@register
@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of a `GPT`, with GPT-2's defaults; `heads * head_dim` need not be `embed`.

    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least. With `experts`, every feed-forward is a mixture of that many experts of `mlp` units
    (`growjax.nn.Experts`, which explains the options); 0 is one dense MLP.
    """

    layers: Depth
    embed: Size
    heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    positions: Size
    kv_heads: Size | None = None
    norm: Literal["layer", "rms"] = "layer"
    post_norm: bool = False
    bias: bool = True
    qk_norm: bool = False
    glu: bool = False
    activation: Activation = "gelu_tanh"
    tied: bool = True
    position: Literal["learned", "rotary"] = "learned"
    eps: Eps = 1e-5
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
        check_config(self, odd_rotary(self) if self.position == "rotary" else ())

    def build(self, key: PRNGKeyArray) -> "GPT":
        """A `GPT` of this configuration, its parameters drawn with this key by one compiled program."""
        return born(GPT, self, key=key)


class GPT(eqx.Module):
    """A decoder-only language model on one sequence: `model(tokens) -> logits [T, vocab]`.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    **Example**

        model = GPT(GPTConfig(layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=384,
                              positions=256), key=jax.random.key(0))
        logits = jax.vmap(model)(tokens)          # tokens [B, T]
    """

    embedding: Words
    position: Embedding | None
    rotary: Rotary | None
    blocks: Stacked[Block]
    norm: Norm
    head: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    gate: Gate | None = axes.gate("embed")
    dtype: str | None = eqx.field(static=True, default=None)

    def __init__(self, config: GPTConfig, *, key: PRNGKeyArray):
        c = config
        k_embed, k_position, k_blocks, k_head = jax.random.split(key, 4)
        self.embedding = Words(c.vocab, c.embed, key=k_embed)
        learned = c.position == "learned"
        self.position = (
            Embedding(c.positions, c.embed, axis="positions", key=k_position) if learned else None
        )
        self.rotary = None if learned else Rotary(c.head_dim)

        def block(key):
            return make_block(
                c.embed,
                c.heads,
                c.head_dim,
                c.mlp,
                kv_heads=c.kv_heads,
                norm=c.norm,
                post_norm=c.post_norm,
                bias=c.bias,
                qk_norm=c.qk_norm,
                glu=c.glu,
                activation=c.activation,
                eps=c.eps,
                attention=c.attention,
                **expert_options(c),
                key=key,
            )

        self.blocks = Stacked(block, c.layers, remat=c.remat, key=k_blocks)
        self.norm = Norm(
            c.embed, c.norm, bias=c.bias, eps=c.eps, side="consumed" if c.tied else "elementwise"
        )
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

        Raises `AxisError` for more than one sequence, and for one longer than the learned positions.
        Ids and positions beyond their tables are an error outside of `jit` and `vmap` alone.
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
        check_sequence(tokens, self._places, at=at)
        x, turn = self._embed(tokens, at + jnp.arange(tokens.shape[0]))
        x, cache = self.blocks.extend(x, cache, None, at, turn=turn)
        return self._read_out(x).logits(), cache

    @property
    def _places(self) -> int | None:
        """How many positions were learned; None where they are rotary."""
        return None if self.position is None else self.position.table.shape[0]

    def _embed(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> tuple[Array, tuple[Array, Array] | None]:
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        x = gated(x if self.dtype is None else x.astype(self.dtype), self.gate)
        return x, None if self.rotary is None else self.rotary(positions)

    def _read(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"] | None,
        mask: Bool[Array, " T"] | Bool[Array, "T T"] | None,
        prefix: Bool[Array, " T"] | None,
        documents: Int[Array, " T"] | None,
    ) -> Readout:
        check_sequence(tokens, None if positions is not None else self._places)
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
            return Readout(
                x,
                self.embedding.table,
                tied=True,
                gate=self.embedding.gate,
                auxiliary=auxiliary,
            )
        return Readout(x, self.head, gate=self.embedding.gate, auxiliary=auxiliary)
