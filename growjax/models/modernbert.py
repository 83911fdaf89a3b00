"""ModernBERT: an encoder with rotary positions, windows in most layers and gated feed-forwards."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.errors import PlanError
from growjax.models.bert import BERTOutput
from growjax.models.config import Activation, Dtype, Eps, Remat, born, check_config, odd_rotary
from growjax.models.decoder import Sight, sights
from growjax.nn import (
    ACTIVATIONS,
    NO_WINDOW,
    Block,
    Body,
    Mask,
    Norm,
    Readout,
    Rotary,
    Stacked,
    Words,
    affine,
    check_sequence,
    logits,
    make_block,
    normal,
)
from growjax.values import Size, at_least, register


@register
@dataclasses.dataclass(frozen=True)
class ModernBERTConfig:
    """Sizes and choices of a `ModernBERT`. The defaults are those of the published model.

    `layers` counts all of them. The first one reads the embeddings as they are, without a norm, and
    stands before the stack of the others: operators grow that stack, and `gj.sizes` counts one layer
    less. Layer `i` sees by `pattern[i % len(pattern)]`, where a window of `n` reaches `n - 1` tokens to
    both sides. `bias` is that of attention, `head_bias` that of the layer before a head, and
    `decoder_bias` that of the masked-language head. `labels` are those of a classifier of sequences (0:
    none), which reads the first token or the `"mean"` of all (`pooling`). `dtype` is that
    of the activations (None: the parameters'); norms, softmax and logits stay in float32 at least.

    **Example**

        ModernBERTConfig(layers=6, embed=256, heads=4, head_dim=64, mlp=384, vocab=384)
    """

    layers: Size
    embed: Size
    heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    pattern: tuple[Sight, ...] = (Sight(theta=160000.0), Sight(window=65), Sight(window=65))
    norm_bias: bool = False
    bias: bool = False
    activation: Activation = "gelu"
    head_activation: Activation = "gelu"
    head_bias: bool = False
    decoder_bias: bool = True
    eps: Eps = 1e-5
    tied: bool = True
    mlm_head: bool = True
    labels: Annotated[int, at_least(0, "labels")] = 0
    labelled: Literal["sequence", "token"] = "sequence"
    pooling: Literal["cls", "mean"] = "cls"
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"

    def __post_init__(self):
        check_config(self, odd_rotary(self))

    def build(self, key: PRNGKeyArray) -> "ModernBERT":
        """A `ModernBERT` of this configuration, its parameters drawn with this key by one program."""
        return born(ModernBERT, self, key=key)


class Transform(eqx.Module):
    """`norm(act(W h + b))`, which every head reads."""

    norm: Norm
    weight: Float[Array, "embed embed"] = param("embed -> embed")
    bias: Float[Array, " embed"] | None = param("-> embed")
    activation: str = eqx.field(static=True, default="gelu")

    def __init__(self, config: ModernBERTConfig, *, key: PRNGKeyArray):
        c = config
        # A head that is the table cannot take the share of copies
        side = "consumed" if c.tied and c.mlm_head else "elementwise"
        self.norm = Norm(c.embed, bias=c.norm_bias, eps=c.eps, side=side)
        self.weight = normal(key, (c.embed, c.embed), c.embed)
        self.bias = jnp.zeros(c.embed) if c.head_bias else None
        self.activation = c.head_activation

    def __call__(self, h: Float[Array, "T embed"]) -> Float[Array, "T embed"]:
        return self.norm(
            ACTIVATIONS[self.activation](affine("te,ef->tf", h, self.weight, self.bias))
        )


class ModernBERT(eqx.Module):
    """A bidirectional encoder on one sequence: `model(tokens) -> BERTOutput`, of any length.

    Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", ACL 2025. What BERT
    pools and pairs is not there: `pooled` and `nsp_logits` are None.

    **Example**

        model = ModernBERT(ModernBERTConfig(layers=6, embed=256, heads=4, head_dim=64, mlp=384,
                                            vocab=384), key=jax.random.key(0))
        output = jax.vmap(lambda t, m: model(t, mask=m))(tokens, mask)        # both [B, T]
        output.mlm_logits                                                     # [B, T, vocab]
    """

    embedding: Words
    embedding_norm: Norm
    rotary: Rotary
    first: Block
    blocks: Stacked[Block]
    norm: Norm
    transform: Transform | None
    decoder: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    decoder_bias: Float[Array, " vocab"] | None = param("-> vocab")
    classifier: Float[Array, "embed labels"] | None = param("embed -> labels")
    classifier_bias: Float[Array, " labels"] | None = param("-> labels")
    # Rotations of other kinds of layers; the blocks' `turn` counts them, and 0 is `rotary`
    others: tuple[Rotary, ...] = ()
    mlm: bool = eqx.field(static=True, default=True)
    pooling: Literal["cls", "mean"] = eqx.field(static=True, default="cls")
    labelled: Literal["sequence", "token"] = eqx.field(static=True, default="sequence")
    dtype: str | None = eqx.field(static=True, default=None)
    kind: ClassVar[str] = "encoder"

    def __init__(self, config: ModernBERTConfig, *, key: PRNGKeyArray):
        c = config
        k_words, k_first, k_blocks, k_head, k_decoder, k_labels = jax.random.split(key, 6)
        self.embedding = Words(c.vocab, c.embed, key=k_words)
        self.embedding_norm = Norm(c.embed, bias=c.norm_bias, eps=c.eps, side="produced")

        def block(key):
            return make_block(
                c.embed,
                c.heads,
                c.head_dim,
                c.mlp,
                bias=c.bias,
                mlp_bias=False,
                norm_bias=c.norm_bias,
                glu=True,
                activation=c.activation,
                eps=c.eps,
                attention=c.attention,
                key=key,
            )

        every = [c.pattern[i % len(c.pattern)] for i in range(c.layers)]
        rotaries, turns, windows = sights(every, c.head_dim)
        self.rotary, *others = rotaries
        self.others = tuple(others)
        of_first: dict[tuple, Any] = {("attention_norm",): None}
        of_blocks: dict[tuple, Any] = {}
        for name, values, needed in (
            ("turn", turns, len(rotaries) > 1),
            ("window", windows, any(window is not None for window in windows)),
        ):
            if needed:
                whole = [NO_WINDOW if value is None else value for value in values]
                of_first["attention", name] = jnp.asarray(whole[0], jnp.int32)
                of_blocks["block", "attention", name] = jnp.asarray(whole[1:], jnp.int32)
        self.first = axes.put(block(k_first), of_first)
        blocks = Stacked(block, c.layers - 1, remat=c.remat, key=k_blocks)
        self.blocks = axes.put(blocks, of_blocks)
        self.norm = Norm(c.embed, bias=c.norm_bias, eps=c.eps)
        heads = c.mlm_head or c.labels
        self.transform = Transform(c, key=k_head) if heads else None
        untied, biased = c.mlm_head and not c.tied, c.mlm_head and c.decoder_bias
        self.decoder = normal(k_decoder, (c.embed, c.vocab), c.embed) if untied else None
        self.decoder_bias = jnp.zeros(c.vocab) if biased else None
        self.classifier = normal(k_labels, (c.embed, c.labels), c.embed) if c.labels else None
        self.classifier_bias = jnp.zeros(c.labels) if c.labels else None
        self.mlm, self.pooling, self.dtype = c.mlm_head, c.pooling, c.dtype
        self.labelled = c.labelled

    def __call__(
        self, tokens: Int[Array, " T"], *, mask: Bool[Array, " T"] | None = None
    ) -> BERTOutput:
        """Hidden states and what the heads make of them; `mask` is True at real tokens.

        Raises `AxisError` for more than one sequence. Ids beyond the vocabulary are an error outside of
        `jit` and `vmap` alone.
        """
        hidden = self._hidden(tokens, mask)
        mlm_logits = self._read_out(hidden).logits() if self.mlm else None
        return BERTOutput(hidden, None, mlm_logits, None, self._classified(hidden, mask))

    def predict(self, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
        """The masked-language logits on one example; raises `PlanError` if that head is off."""
        return self.readout(example).logits()

    def readout(self, example: Mapping[str, Array]) -> Readout:
        """The same, with no logit computed yet."""
        if not self.mlm:
            raise PlanError("mlm_head: a ModernBERT is trained through it, and it is off")
        return self._read_out(self._hidden(example["tokens"], example.get("mask")))

    def _hidden(
        self, tokens: Int[Array, " T"], mask: Bool[Array, " T"] | None
    ) -> Float[Array, "T embed"]:
        check_sequence(tokens)
        x = self.embedding(tokens)
        x = self.embedding_norm(x if self.dtype is None else x.astype(self.dtype))
        turns = [rotary(jnp.arange(tokens.shape[0])) for rotary in (self.rotary, *self.others)]
        turn = turns[0]
        if self.others:
            turn = jnp.stack([cos for cos, _ in turns]), jnp.stack([sin for _, sin in turns])
        seen = Mask(keys=mask)
        return self.norm(self.blocks(self.first(x, mask=seen, turn=turn), mask=seen, turn=turn))

    def _read_out(self, hidden: Float[Array, "T embed"]) -> Readout:
        assert self.transform is not None
        x, words = self.transform(hidden), self.embedding
        if self.decoder is None:
            return Readout(x, words.table, self.decoder_bias, tied=True, gate=words.gate)
        return Readout(x, self.decoder, self.decoder_bias, gate=words.gate)

    def _classified(
        self, hidden: Float[Array, "T embed"], mask: Bool[Array, " T"] | None
    ) -> Float[Array, "... labels"] | None:
        if self.classifier is None or self.transform is None:
            return None
        pooled = hidden if self.labelled == "token" else hidden[:1]
        if self.labelled == "sequence" and self.pooling == "mean":
            real = jnp.ones(hidden.shape[0], bool) if mask is None else mask
            pooled = jnp.mean(hidden, 0, where=real[:, None], keepdims=True)
        scores = logits(self.transform(pooled), self.classifier)
        scores = scores if self.labelled == "token" else scores[0]
        return scores if self.classifier_bias is None else scores + self.classifier_bias
