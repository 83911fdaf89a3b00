"""GPT: a decoder with learned (or rotary) positions and a head tied to the embedding."""

import dataclasses
from typing import ClassVar, Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.cards import Card, Paper
from growjax.gates import Gate, gated
from growjax.models.causal import CausalModel, Classifier, Head, Labels
from growjax.models.config import (
    Activation,
    Coefficient,
    Depth,
    Dtype,
    Eps,
    Number,
    Remat,
    born,
    check_config,
    expert_options,
    odd_rotary,
)
from growjax.nn import (
    Block,
    Body,
    Embedding,
    ExpertBody,
    Norm,
    Rotary,
    Stacked,
    Words,
    make_block,
    normal,
)
from growjax.values import Size, register


_REZERO = Paper(
    "ReZero is All You Need: Fast Convergence at Large Depth",
    "Bachlechner, Thomas and Majumder, Bodhisattwa Prasad and Mao, Henry and Cottrell, Gary and McAuley, "
    "Julian",
    2021,
    "Conference on Uncertainty in Artificial Intelligence",
    "2003.04887",
)
_SKIPINIT = Paper(
    "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks",
    "De, Soham and Smith, Samuel L.",
    2020,
    "Advances in Neural Information Processing Systems",
    "2002.10444",
)


@register
@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of a `GPT`, with GPT-2's defaults; `heads * head_dim` need not be `embed`.

    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least. With `experts`, every feed-forward is a mixture of that many experts of `mlp` units
    (`growjax.nn.Experts`, which explains the options); 0 is one dense MLP. With `multipliers`, both
    branches of a layer have a trained number that multiplies them (`growjax.nn.Multiplier`). `head` is
    what is computed in the end: logits of `"words"`, hidden states (`"none"`) or scores of `Labels`.
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
    head: Head = "words"
    position: Literal["learned", "rotary"] = "learned"
    eps: Eps = 1e-5
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"
    experts: Number = 0
    experts_per_token: Size = 2
    shared_experts: Number = 0
    norm_topk_prob: bool = True
    aux_loss_coef: Coefficient = 0.01
    z_loss_coef: Coefficient = 0.001
    expert_body: ExpertBody = "auto"
    multipliers: bool = False
    card: ClassVar[Card] = Card(by={"multipliers": (_REZERO, _SKIPINIT)})

    def __post_init__(self):
        check_config(self, odd_rotary(self) if self.position == "rotary" else ())

    def build(self, key: PRNGKeyArray) -> "GPT":
        """A `GPT` of this configuration, its parameters drawn with this key by one compiled program."""
        return born(GPT, self, key=key)


class GPT(CausalModel):
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
    classifier: Classifier | None = None
    lm: bool = eqx.field(static=True, default=True)

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
                multipliers=c.multipliers,
                key=key,
            )

        self.blocks = Stacked(block, c.layers, remat=c.remat, key=k_blocks)
        self.lm = c.head == "words"
        side = "consumed" if c.tied and self.lm else "elementwise"
        self.norm = Norm(c.embed, c.norm, bias=c.bias, eps=c.eps, side=side)
        untied = self.lm and not c.tied
        self.head = normal(k_head, (c.embed, c.vocab), c.embed) if untied else None
        self.classifier = None
        if isinstance(c.head, Labels):
            self.classifier = Classifier(c.embed, c.head, key=k_head)
        self.gate, self.dtype = None, c.dtype

    @property
    def _places(self) -> int | None:
        """The number of learned positions; None for rotary ones."""
        return None if self.position is None else self.position.table.shape[0]

    def _embed(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> tuple[Array, tuple[Array, Array] | None]:
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        x = gated(x if self.dtype is None else x.astype(self.dtype), self.gate)
        return x, None if self.rotary is None else self.rotary(positions)
