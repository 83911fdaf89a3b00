"""BERT: an encoder, post-LN as published or pre-LN, with its two pre-training heads."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.errors import PlanError
from growjax.gates import Gate, gated
from growjax.models.config import Activation, Depth, Dtype, Eps, Remat, born, check_config
from growjax.nn import (
    ACTIVATIONS,
    Block,
    Body,
    Embedding,
    Mask,
    Norm,
    Readout,
    Stacked,
    Words,
    affine,
    check_sequence,
    logits,
    make_block,
    normal,
)
from growjax.values import Size, at_least, fits, register


@register
@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Sizes and choices of a `BERT`. The defaults are those of the published model.

    `post_norm=False` moves the norm of the embeddings behind the blocks, and each block's norms to
    the front of their branches; `embedding_norm` then keeps one on the embeddings all the same
    (Geiping and Goldstein, "Cramming", 2023). A classifier into so many `labels` (0: none) scores a
    sequence or every token, by what is `labelled`; that of sequences and `nsp_head` need the `pooler`.
    `tied` is about the masked-language head. With `padding`, the
    id of padding tokens, these have the position of that number, and others are counted from the next on
    (RoBERTa). `dtype` is that of the activations (None: the parameters'); norms, softmax
    and logits stay in float32 at least.
    """

    layers: Depth
    embed: Size
    heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    positions: Size
    token_types: Size = 2
    post_norm: bool = True
    embedding_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    bias: bool = True
    qk_norm: bool = False
    glu: bool = False
    activation: Activation = "gelu"
    eps: Eps = 1e-12
    tied: bool = True
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"
    mlm_head: bool = True
    nsp_head: bool = True
    pooler: bool = True
    labels: Annotated[int, at_least(0, "labels")] = 0
    labelled: Literal["sequence", "token"] = "sequence"
    padding: Annotated[int, at_least(0)] | None = None

    def __post_init__(self):
        check_config(self, self._faults())

    def _faults(self) -> Iterator[str]:
        for name in ("nsp_head", "labels"):
            pooled = name == "nsp_head" or self.labelled == "sequence"
            if getattr(self, name) and pooled and not self.pooler:
                yield f"{name}: it reads the pooler, which is off"
        padding = self.padding
        if fits(tuple[Size, int], (self.positions, padding)) and padding is not None:
            if self.positions <= padding + 1:
                yield (
                    f"positions: those up to padding={padding} are no real token's, and there are "
                    f"{self.positions}"
                )

    def build(self, key: PRNGKeyArray) -> "BERT":
        """A `BERT` of this configuration, its parameters drawn with this key by one compiled program."""
        return born(BERT, self, key=key)


class BERTOutput(NamedTuple):
    """What a `BERT` returns; None where the head is off."""

    hidden: Float[Array, "T embed"]
    pooled: Float[Array, " embed"] | None
    mlm_logits: Float[Array, "T vocab"] | None
    nsp_logits: Float[Array, " nsp"] | None
    label_logits: Float[Array, "... labels"] | None = None


class Pooler(eqx.Module):
    """`tanh(W h + b)` of the first token."""

    weight: Float[Array, "embed embed"] = param("embed -> embed")
    bias: Float[Array, " embed"] | None = param("-> embed")
    gate: Gate | None = axes.gate("embed")

    def __init__(self, embed: int, *, bias: bool = True, key: PRNGKeyArray):
        self.weight = normal(key, (embed, embed), embed)
        self.bias = jnp.zeros(embed) if bias else None
        self.gate = None

    def __call__(self, hidden: Float[Array, "T embed"]) -> Float[Array, " embed"]:
        return gated(jnp.tanh(affine("e,ef->f", hidden[0], self.weight, self.bias)), self.gate)


class MLMHead(eqx.Module):
    """`norm(act(W h + b))` against the word table or a decoder of its own, and a bias per word."""

    norm: Norm
    weight: Float[Array, "embed embed"] = param("embed -> embed")
    bias: Float[Array, " embed"] | None = param("-> embed")
    decoder: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    decoder_bias: Float[Array, " vocab"] | None = param("-> vocab")
    activation: str = eqx.field(static=True, default="gelu")

    def __init__(self, config: BERTConfig, *, key: PRNGKeyArray):
        c = config
        k_transform, k_decoder = jax.random.split(key)
        self.weight = normal(k_transform, (c.embed, c.embed), c.embed)
        self.bias = jnp.zeros(c.embed) if c.bias else None
        side = "consumed" if c.tied else "elementwise"
        self.norm = Norm(c.embed, c.norm, bias=c.bias, eps=c.eps, side=side)
        self.decoder = None if c.tied else normal(k_decoder, (c.embed, c.vocab), c.embed)
        self.decoder_bias = jnp.zeros(c.vocab) if c.bias else None
        self.activation = c.activation

    def __call__(self, hidden: Float[Array, "T embed"], words: Words) -> Float[Array, "T vocab"]:
        return self.readout(hidden, words).logits()

    def readout(self, hidden: Float[Array, "T embed"], words: Words) -> Readout:
        """The same, with no logit computed yet."""
        act = ACTIVATIONS[self.activation]
        x = self.norm(act(affine("te,ef->tf", hidden, self.weight, self.bias)))
        if self.decoder is None:
            return Readout(x, words.table, self.decoder_bias, tied=True, gate=words.gate)
        return Readout(x, self.decoder, self.decoder_bias, gate=words.gate)


class BERT(eqx.Module):
    """A bidirectional encoder on one sequence: `model(tokens) -> BERTOutput`.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019. Gates stand
    where MSG has them: on every norm (post-LN), after the pooler's tanh, and on the norm of the
    masked-language head.

    **Example**

        model = BERT(BERTConfig(layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=384,
                                positions=256), key=jax.random.key(0))
        output = jax.vmap(lambda t, m: model(t, mask=m))(tokens, mask)        # both [B, T]
        output.mlm_logits                                                     # [B, T, vocab]
    """

    embedding: Words
    token_type: Embedding
    position: Embedding
    embedding_norm: Norm | None
    blocks: Stacked[Block]
    norm: Norm | None
    pooler: Pooler | None
    mlm: MLMHead | None
    nsp: Float[Array, "embed nsp"] | None = param("embed -> nsp")
    nsp_bias: Float[Array, " nsp"] | None = param("-> nsp")
    classifier: Float[Array, "embed labels"] | None = param("embed -> labels")
    classifier_bias: Float[Array, " labels"] | None = param("-> labels")
    gate: Gate | None = axes.gate("embed")
    dtype: str | None = eqx.field(static=True, default=None)
    padding: int | None = eqx.field(static=True, default=None)
    labelled: Literal["sequence", "token"] = eqx.field(static=True, default="sequence")
    kind: ClassVar[str] = "encoder"

    def __init__(self, config: BERTConfig, *, key: PRNGKeyArray):
        c = config
        k_word, k_type, k_position, k_blocks, k_pooler, k_mlm, k_nsp = jax.random.split(key, 7)
        self.embedding = Words(c.vocab, c.embed, key=k_word)
        self.token_type = Embedding(c.token_types, c.embed, axis="token_types", key=k_type)
        self.position = Embedding(c.positions, c.embed, axis="positions", key=k_position)

        def block(key):
            return make_block(
                c.embed,
                c.heads,
                c.head_dim,
                c.mlp,
                norm=c.norm,
                post_norm=c.post_norm,
                bias=c.bias,
                qk_norm=c.qk_norm,
                glu=c.glu,
                activation=c.activation,
                eps=c.eps,
                attention=c.attention,
                key=key,
            )

        self.blocks = Stacked(block, c.layers, remat=c.remat, key=k_blocks)
        # Post-LN the stream starts as a norm's output; pre-LN it ends in one, and may start so too.
        norm = functools.partial(Norm, c.embed, c.norm, bias=c.bias, eps=c.eps)
        starts = c.post_norm or c.embedding_norm
        self.embedding_norm = norm(side="produced") if starts else None
        self.norm = None if c.post_norm else norm()
        self.pooler = Pooler(c.embed, bias=c.bias, key=k_pooler) if c.pooler else None
        self.mlm = MLMHead(c, key=k_mlm) if c.mlm_head else None
        self.nsp = normal(k_nsp, (c.embed, 2), c.embed) if c.nsp_head else None
        self.nsp_bias = jnp.zeros(2) if c.nsp_head and c.bias else None
        k_labels = jax.random.fold_in(key, c.labels)
        self.classifier = normal(k_labels, (c.embed, c.labels), c.embed) if c.labels else None
        self.classifier_bias = jnp.zeros(c.labels) if c.labels and c.bias else None
        self.gate, self.dtype, self.padding = None, c.dtype, c.padding
        self.labelled = c.labelled

    def __call__(
        self,
        tokens: Int[Array, " T"],
        *,
        token_types: Int[Array, " T"] | None = None,
        mask: Bool[Array, " T"] | None = None,
    ) -> BERTOutput:
        """Hidden states and what the heads make of them; `mask` is True at real tokens.

        Raises `AxisError` for more than one sequence, and for a sequence longer than the positions. Ids
        beyond their tables are an error outside of `jit` and `vmap` alone.
        """
        hidden = self._hidden(tokens, token_types, mask)
        pooled = None if self.pooler is None else self.pooler(hidden)
        nsp_logits = _scores(pooled, self.nsp, self.nsp_bias)
        scored = hidden if self.labelled == "token" else pooled
        label_logits = _scores(scored, self.classifier, self.classifier_bias)
        mlm_logits = None if self.mlm is None else self.mlm(hidden, self.embedding)
        return BERTOutput(hidden, pooled, mlm_logits, nsp_logits, label_logits)

    def predict(self, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
        """The masked-language logits on one example; raises `PlanError` if that head is off."""
        scores = self(example["tokens"], mask=example.get("mask")).mlm_logits
        if scores is None:
            raise PlanError("mlm_head: a BERT is trained through it, and it is off")
        return scores

    def readout(self, example: Mapping[str, Array]) -> Readout:
        """The same, with no logit computed yet."""
        if self.mlm is None:
            raise PlanError("mlm_head: a BERT is trained through it, and it is off")
        hidden = self._hidden(example["tokens"], None, example.get("mask"))
        return self.mlm.readout(hidden, self.embedding)

    def _hidden(
        self,
        tokens: Int[Array, " T"],
        token_types: Int[Array, " T"] | None,
        mask: Bool[Array, " T"] | None,
    ) -> Float[Array, "T embed"]:
        unused = 0 if self.padding is None else self.padding + 1
        check_sequence(tokens, self.position.table.shape[0] - unused)
        places = jnp.arange(tokens.shape[0])
        if self.padding is not None:
            real = tokens != self.padding
            places = jnp.cumsum(real) * real + self.padding
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = self.embedding(tokens) + self.token_type(token_types)
        x = x + self.position(places)
        x = x if self.dtype is None else x.astype(self.dtype)
        # The norm's own gate hides what it produces; without one the sum is gated here.
        x = gated(x, self.gate) if self.embedding_norm is None else self.embedding_norm(x)
        x = self.blocks(x, mask=Mask(keys=mask))
        return x if self.norm is None else self.norm(x)


def _scores(pooled: Array | None, head: Array | None, bias: Array | None) -> Array | None:
    """The logits of a head on the pooled token, or on all; None without either."""
    if pooled is None or head is None:
        return None
    scores = logits(pooled, head)
    return scores if bias is None else scores + bias
