"""GPT: a decoder with learned (or rotary) positions and a head tied to the embedding."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax.axes import gate, param
from growjax.gates import Gate, gated
from growjax.nn import MLP, Attention, Block, Embedding, Norm, Rotary, Stacked, affine, normal
from growjax.models.config import check_choices


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of a `GPT`. The defaults are GPT-2's; `heads * head_dim` need not be `embed`.

    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least.
    """

    layers: int
    embed: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    positions: int
    kv_heads: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    post_norm: bool = False
    bias: bool = True
    qk_norm: bool = False
    glu: bool = False
    activation: str = "gelu_tanh"
    tied: bool = True
    position: Literal["learned", "rotary"] = "learned"
    eps: float = 1e-5
    dtype: str | None = None
    remat: Literal["dots", "nothing", "everything"] = "dots"

    def __post_init__(self):
        check_choices(self)


class GPT(eqx.Module):
    """A decoder-only language model on one sequence: `model(tokens) -> logits [T, vocab]`.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    **Example**

        model = GPT(GPTConfig(layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=384,
                              positions=256), key=jax.random.key(0))
        logits = jax.vmap(model)(tokens)          # tokens [B, T]
    """

    embedding: Embedding
    position: Embedding | None
    rotary: Rotary | None
    gate: Gate | None = gate("embed")
    blocks: Stacked[Block]
    norm: Norm
    head: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    dtype: str | None = eqx.field(static=True)

    def __init__(self, config: GPTConfig, *, key: PRNGKeyArray):
        c = config
        k_embed, k_position, k_blocks, k_head = jax.random.split(key, 4)
        self.embedding = Embedding(c.vocab, c.embed, key=k_embed)
        learned = c.position == "learned"
        self.position = (
            Embedding(c.positions, c.embed, axis="positions", key=k_position) if learned else None
        )
        self.rotary = None if learned else Rotary(c.head_dim)

        side = "produced" if c.post_norm else "elementwise"

        def block(key):
            k_attention, k_mlp = jax.random.split(key)
            return Block(
                attention=Attention(
                    c.embed,
                    c.heads,
                    c.kv_heads or c.heads,
                    c.head_dim,
                    bias=c.bias,
                    qk_norm=c.qk_norm,
                    key=k_attention,
                ),
                attention_norm=Norm(c.embed, c.norm, bias=c.bias, eps=c.eps, side=side),
                cross=None,
                cross_norm=None,
                mlp=MLP(
                    c.embed, c.mlp, activation=c.activation, glu=c.glu, bias=c.bias, key=k_mlp
                ),
                mlp_norm=Norm(c.embed, c.norm, bias=c.bias, eps=c.eps, side=side),
                post_norm=c.post_norm,
            )

        self.blocks = Stacked(block, c.layers, remat=c.remat, key=k_blocks)
        self.norm = Norm(
            c.embed, c.norm, bias=c.bias, eps=c.eps, side="consumed" if c.tied else "elementwise"
        )
        self.head = None if c.tied else normal(k_head, (c.embed, c.vocab), c.embed)
        self.dtype = c.dtype

    def __call__(
        self,
        tokens: Int[Array, " T"],
        *,
        positions: Int[Array, " T"] | None = None,
        mask: Bool[Array, " T"] | None = None,
    ) -> Float[Array, "T vocab"]:
        """Next-token logits; `mask` is True at real tokens, `positions` count from 0 by default."""
        length = tokens.shape[0]
        positions = jnp.arange(length) if positions is None else positions
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        x = gated(x if self.dtype is None else x.astype(self.dtype), self.gate)

        sees = jnp.tril(jnp.ones((length, length), bool))
        if mask is not None:
            sees = sees & mask[None, :]
        turn = None if self.rotary is None else self.rotary(positions)
        x = self.norm(self.blocks(x, mask=sees, turn=turn))

        if self.head is None:
            return self.embedding.attend(x)
        return affine("te,ev->tv", x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.head)
