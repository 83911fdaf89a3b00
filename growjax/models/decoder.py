"""A decoder as a table of choices: what the families of published language models differ in."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax import axes, values
from growjax.axes import buffer, param
from growjax.errors import AxisError
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
    NO_WINDOW,
    Block,
    Body,
    ExpertBody,
    LongRotary,
    Norm,
    Rotary,
    Scaling,
    Stacked,
    Words,
    make_block,
    normal,
)
from growjax.values import Size, fits, positive, register


Positive = Annotated[float, positive()]


@register
@dataclasses.dataclass(frozen=True)
class Sight:
    """What the attention of a layer sees, and how positions turn its heads.

    `window` is the number of keys that a query sees, itself among them (None: all before it). `theta` and
    `scaling` set the frequencies of the rotary positions; without `rotary` the layer has no positions.

    **Example**

        Sight(window=1024, theta=1e4)        # five of six layers of Gemma 3
    """

    window: Size | None = None
    theta: Positive = 10000.0
    scaling: Scaling | None = None
    rotary: bool = True

    def __post_init__(self):
        values.check(self, AxisError, "a layer cannot see so:")


@register
@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a `Decoder`. The defaults are Llama's.

    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least.

    **Arguments**

    - `pattern`: layer `i` sees by `pattern[i % len(pattern)]`: all alike, in turn, or listed one by one.
    - `turned`: how many coordinates of a head rotary positions turn, the first ones (None: all).
    - `norm`, `norm_bias`, `placement`: the kind of the norms, whether layer norms have a bias, and where
      they stand: `"before"` a branch, `"after"` it (OLMo 2) or `"both"` (Gemma 2). With `plus_one`, gains
      are `1 + weight`.
    - `parallel`: attention and feed-forward read the same stream (GPT-NeoX).
    - `bias`, `o_bias`, `mlp_bias`: biases of queries, keys and values, of attention's output, of the MLP.
    - `qk_norm`: RMS norms of queries and keys, over a `"head"` (Qwen 3) or all their `"width"` (OLMo 2).
    - `glu`: whether the feed-forward is gated.
    - `scale`: of scores (None: `head_dim ** -0.5`). `embed_scale`: of embeddings (None: 1).
    - `head`: what is computed in the end: logits of `"words"`, hidden states (`"none"`) or scores of
      `Labels`.
    - `attention_cap`, `logit_cap`: scores and logits are `cap * tanh(x / cap)`.
    - `experts`: every feed-forward is a mixture of that many experts of `mlp` units (0: one dense MLP);
      `growjax.nn.Experts` explains it and the options after it. `shared_mlp` is the number of hidden
      units of all shared experts together (None: `mlp` for each).

    **Example**

        DecoderConfig(layers=6, embed=256, heads=8, kv_heads=2, head_dim=32, mlp=688, vocab=384,
                      qk_norm="head", pattern=(Sight(window=64), Sight(theta=1e6)))
    """

    layers: Depth
    embed: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    pattern: tuple[Sight, ...] = (Sight(),)
    turned: Size | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    placement: Literal["before", "after", "both"] = "before"
    plus_one: bool = False
    parallel: bool = False
    bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    glu: bool = True
    activation: Activation = "silu"
    scale: Positive | None = None
    embed_scale: Positive | None = None
    attention_cap: Positive | None = None
    logit_cap: Positive | None = None
    eps: Eps = 1e-5
    tied: bool = False
    head: Head = "words"
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"
    experts: Number = 0
    experts_per_token: Size = 2
    shared_experts: Number = 0
    shared_mlp: Size | None = None
    shared_gate: bool = False
    norm_topk_prob: bool = True
    aux_loss_coef: Coefficient = 0.01
    z_loss_coef: Coefficient = 0.001
    expert_body: ExpertBody = "auto"

    def __post_init__(self):
        check_config(self, self._faults())

    def _faults(self) -> Iterator[str]:
        if not fits(tuple[Sight, ...], self.pattern):
            return
        if self.experts and self.placement != "before":
            yield "experts: their outputs have no norm behind them yet; expected placement='before'"
        if not self.experts:
            for name in ("shared_mlp", "shared_gate"):
                if getattr(self, name):
                    yield f"{name}: there are no experts"
        if not self.pattern:
            yield "pattern: expected how at least one kind of layers sees, got none"
        elif fits(int, self.layers) and max(self.layers, 1) < len(self.pattern):
            most = f"{self.layers}, one for each layer"
            most = most if self.layers else "one, that of the layers which growth will add"
            yield f"pattern: expected at most {most}, got {len(self.pattern)}"
        if fits(Size | None, self.turned) and fits(Size, self.head_dim):
            turned = self.head_dim if self.turned is None else self.turned
            if any(sight.rotary for sight in self.pattern):
                yield from odd_rotary(self)
            if turned % 2 or turned > self.head_dim:
                if self.turned is not None:
                    yield (
                        f"turned: expected an even number of at most head_dim={self.head_dim}, got "
                        f"{self.turned}"
                    )
                return
            for sight in self.pattern:
                scaling = sight.scaling
                if isinstance(scaling, LongRotary) and len(scaling.short) != turned // 2:
                    yield (
                        f"pattern: expected a divisor for each of the {turned // 2} pairs of a head, got "
                        f"{len(scaling.short)}"
                    )

    def build(self, key: PRNGKeyArray) -> "Decoder":
        """A `Decoder` of this configuration, its parameters drawn with this key by one program."""
        return born(Decoder, self, key=key)


class Decoder(CausalModel):
    """A decoder-only language model on one sequence: `model(tokens) -> logits [T, vocab]`.

    Rotary positions turn neighbouring coordinates (2i, 2i + 1), whatever the family does.

    **Example**

        config = DecoderConfig(layers=6, embed=256, heads=8, kv_heads=2, head_dim=32, mlp=688, vocab=384,
                               placement="after", qk_norm="width")                        # like OLMo 2
        logits = jax.vmap(Decoder(config, key=jax.random.key(0)))(tokens)                 # [B, T, vocab]
    """

    embedding: Words
    rotary: Rotary
    blocks: Stacked[Block]
    norm: Norm
    head: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    gate: Gate | None = axes.gate("embed")
    dtype: str | None = eqx.field(static=True, default=None)
    # Rotations of other kinds of layers; the blocks' `turn` counts them, and 0 is `rotary`
    others: tuple[Rotary, ...] = ()
    embed_scale: Float[Array, ""] | None = buffer(default=None)
    logit_cap: float | None = eqx.field(static=True, default=None)
    classifier: Classifier | None = None
    lm: bool = eqx.field(static=True, default=True)

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        c = config
        k_embed, k_blocks, k_head = jax.random.split(key, 3)
        self.embedding = Words(c.vocab, c.embed, key=k_embed)

        def block(key):
            return make_block(
                c.embed,
                c.heads,
                c.head_dim,
                c.mlp,
                kv_heads=c.kv_heads,
                norm=c.norm,
                placement=c.placement,
                plus_one=c.plus_one,
                parallel=c.parallel,
                bias=c.bias,
                o_bias=c.o_bias,
                mlp_bias=c.mlp_bias,
                norm_bias=c.norm_bias,
                qk_norm=c.qk_norm or False,
                glu=c.glu,
                activation=c.activation,
                eps=c.eps,
                scale=c.scale,
                cap=c.attention_cap,
                attention=c.attention,
                **expert_options(c),
                key=key,
            )

        blocks = Stacked(block, c.layers, remat=c.remat, key=k_blocks)
        # Without layers, those that come will be of the one kind
        every = [c.pattern[i % len(c.pattern)] for i in range(max(c.layers, 1))]
        rotaries, turns, windows = sights(every, c.head_dim, c.turned)
        own: dict[tuple, Any] = {}
        if len(rotaries) > 1:
            own[("block", "attention", "turn")] = jnp.asarray(turns, jnp.int32)
        if any(window is not None for window in windows):
            reach = [NO_WINDOW if window is None else window for window in windows]
            own[("block", "attention", "window")] = jnp.asarray(reach[: c.layers], jnp.int32)
            if not c.layers:
                own[("block", "attention", "born_window")] = reach[0]
        self.blocks = axes.put(blocks, own)
        self.rotary, *others = rotaries
        self.others = tuple(others)
        self.lm = c.head == "words"
        side = "consumed" if c.tied and self.lm else "elementwise"
        self.norm = Norm(
            c.embed, c.norm, bias=c.norm_bias, eps=c.eps, side=side, plus_one=c.plus_one
        )
        untied = self.lm and not c.tied
        self.head = normal(k_head, (c.embed, c.vocab), c.embed) if untied else None
        self.classifier = None
        if isinstance(c.head, Labels):
            self.classifier = Classifier(c.embed, c.head, key=k_head)
        self.gate, self.dtype, self.logit_cap = None, c.dtype, c.logit_cap
        # Data, because it may not change when embed grows
        scale = c.embed_scale
        dtype = self.embedding.table.dtype
        self.embed_scale = None if scale is None else jnp.asarray(scale, dtype)

    @property
    def _cap(self) -> float | None:
        return self.logit_cap

    def _embed(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> tuple[Array, tuple[Array, Array]]:
        x = self.embedding(tokens)
        x = x if self.dtype is None else x.astype(self.dtype)
        if self.embed_scale is not None:
            x = x * jax.lax.stop_gradient(self.embed_scale).astype(x.dtype)
        turn = self.rotary(positions)
        if self.others:
            turns = [turn, *(rotary(positions) for rotary in self.others)]
            turn = jnp.stack([cos for cos, _ in turns]), jnp.stack([sin for _, sin in turns])
        return gated(x, self.gate), turn


def sights(
    every: Sequence[Sight], head_dim: int, turned: int | None = None
) -> tuple[list[Rotary], list[int], list[int | None]]:
    """The distinct rotations of layers that see so, and the rotation and the window of each."""
    kinds = [(s.theta, s.scaling, turned) if s.rotary else (1.0, None, 0) for s in every]
    distinct = list(dict.fromkeys(kinds))
    rotaries = [Rotary(head_dim, *kind) for kind in distinct]
    return rotaries, [distinct.index(kind) for kind in kinds], [s.window for s in every]
