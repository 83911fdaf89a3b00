"""T5: an encoder and a decoder with relative positions, in the forms of v1.0, v1.1 and UL2."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import buffer, param
from growjax.gates import Gate, gated
from growjax.models.config import Activation, Depth, Dtype, Eps, Remat, born, check_config
from growjax.nn import (
    Block,
    Body,
    Cache,
    Mask,
    Norm,
    Readout,
    RelativeBias,
    Stacked,
    Words,
    causal,
    check_sequence,
    empty_cache,
    make_block,
    normal,
)
from growjax.values import Size, fits, register


@register
@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and choices of a `T5`. The defaults are v1.0's; see `v1_1` and `ul2`.

    `scale_output` multiplies what the head reads by `embed ** -0.5` (None: if it is `tied`).
    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least.

    **Example**

        T5Config.v1_1(encoder_layers=8, decoder_layers=8, embed=512, heads=6, head_dim=64, mlp=1024,
                      vocab=384)
    """

    encoder_layers: Depth
    decoder_layers: Depth
    embed: Size
    heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    buckets: Size = 32
    max_distance: Size = 128
    activation: Activation = "relu"
    glu: bool = False
    tied: bool = True
    scale_output: bool | None = None
    eps: Eps = 1e-6
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"

    def __post_init__(self):
        check_config(self, _distances(self.buckets, self.max_distance))

    def build(self, key: PRNGKeyArray) -> "T5":
        """A `T5` of this configuration, its parameters drawn with this key by one compiled program."""
        return born(T5, self, key=key)

    @classmethod
    def v1_1(cls, **sizes: Any) -> "T5Config":
        """A gated GELU and a head of its own, unscaled (also Flan-T5)."""
        return cls(**{"activation": "gelu_tanh", "glu": True, "tied": False} | sizes)

    @classmethod
    def ul2(cls, **sizes: Any) -> "T5Config":
        """A gated SiLU and a head of its own, unscaled (Tay et al., "UL2", ICLR 2023)."""
        return cls(**{"activation": "silu", "glu": True, "tied": False} | sizes)


@register
@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
    """Sizes and choices of a `T5Encoder`, as in `T5Config`.

    **Example**

        T5EncoderConfig(encoder_layers=8, embed=512, heads=6, head_dim=64, mlp=1024, vocab=384)
    """

    encoder_layers: Depth
    embed: Size
    heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    buckets: Size = 32
    max_distance: Size = 128
    activation: Activation = "relu"
    glu: bool = False
    eps: Eps = 1e-6
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"

    def __post_init__(self):
        check_config(self, _distances(self.buckets, self.max_distance))

    def build(self, key: PRNGKeyArray) -> "T5Encoder":
        """A `T5Encoder` of this configuration, its parameters drawn with this key by one program."""
        return born(T5Encoder, self, key=key)


def _distances(buckets: Any, max_distance: Any) -> Iterator[str]:
    """What is wrong with the buckets of relative positions."""
    if not fits(tuple[Size, Size], (buckets, max_distance)):
        return
    if buckets < 4 or buckets % 4:
        yield (
            "buckets: the encoder halves them by sign, then by near and far; expected a "
            f"multiple of 4, got {buckets}"
        )
    if max_distance <= buckets // 2:
        yield (
            f"max_distance: expected more than {buckets // 2}, the distances that the "
            f"decoder counts one by one with {buckets} buckets, got {max_distance}"
        )


def _stack(
    config: T5Config | T5EncoderConfig, axis: str, *, cross: bool = False, key: PRNGKeyArray
) -> tuple[RelativeBias, Stacked[Block]]:
    """The layers of the encoder, or with `cross` of the decoder, and their relative positions."""
    c = config

    def block(key):
        return make_block(
            c.embed,
            c.heads,
            c.head_dim,
            c.mlp,
            norm="rms",
            bias=False,
            glu=c.glu,
            activation=c.activation,
            eps=c.eps,
            scale=1.0,
            cross=cross,
            attention=c.attention,
            key=key,
        )

    k_bias, k_blocks = jax.random.split(key)
    bias = RelativeBias(
        c.buckets, c.heads, 1, bidirectional=not cross, max_distance=c.max_distance, key=k_bias
    )
    return bias, Stacked(block, getattr(c, axis), axis=axis, remat=c.remat, key=k_blocks)


class T5Cache(NamedTuple):
    """What the decoder saw of its own tokens, and what it remembers of the encoder's."""

    seen: Cache
    crossed: Cache
    encoder_mask: Mask


class T5(eqx.Module):
    """An encoder-decoder on one pair: `model(encoder_tokens, decoder_tokens) -> logits [T, vocab]`.

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", JMLR 2020. No biases, logits of attention unscaled; each stack has one table of
    relative positions for all its layers, and cross-attention has none.

    **Example**

        model = T5(T5Config(encoder_layers=4, decoder_layers=4, embed=256, heads=4, head_dim=64,
                            mlp=1024, vocab=384), key=jax.random.key(0))
        logits = jax.vmap(model)(encoder_tokens, decoder_tokens)      # [B, S], [B, T]
    """

    embedding: Words
    encoder_bias: RelativeBias
    encoder: Stacked[Block]
    encoder_norm: Norm
    decoder_bias: RelativeBias
    decoder: Stacked[Block]
    decoder_norm: Norm
    head: Float[Array, "embed vocab"] | None = param("embed -> vocab")
    output_scale: Float[Array, ""] | None = buffer()
    gate: Gate | None = axes.gate("embed")
    dtype: str | None = eqx.field(static=True, default=None)
    kind: ClassVar[str] = "seq2seq"

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        c = config
        k_embed, k_encoder, k_decoder, k_head = jax.random.split(key, 4)

        self.embedding = Words(c.vocab, c.embed, std=1.0, key=k_embed)
        self.encoder_bias, self.encoder = _stack(c, "encoder_layers", key=k_encoder)
        self.decoder_bias, self.decoder = _stack(c, "decoder_layers", cross=True, key=k_decoder)
        self.encoder_norm = Norm(c.embed, "rms", eps=c.eps)
        side = "consumed" if c.tied else "elementwise"
        self.decoder_norm = Norm(c.embed, "rms", eps=c.eps, side=side)
        scaled = c.tied if c.scale_output is None else c.scale_output
        # Data, because it may not change when embed grows.
        scale = jnp.asarray(c.embed**-0.5, self.embedding.table.dtype)
        self.output_scale = scale if scaled else None
        self.head = None if c.tied else normal(k_head, (c.embed, c.vocab), c.embed)
        self.gate, self.dtype = None, c.dtype

    def __call__(
        self,
        encoder_tokens: Int[Array, " S"],
        decoder_tokens: Int[Array, " T"],
        *,
        encoder_mask: Bool[Array, " S"] | None = None,
        decoder_mask: Bool[Array, " T"] | None = None,
    ) -> Float[Array, "T vocab"]:
        """Logits of the token after each decoder token; masks are True at real tokens.

        Raises `AxisError` for more than one pair of sequences, which may be of any length. Ids beyond the
        vocabulary are an error outside of `jit` and `vmap` alone.
        """
        return self._read(encoder_tokens, decoder_tokens, encoder_mask, decoder_mask).logits()

    def predict(self, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
        """The logits on one example of an objective for pairs."""
        return self(
            example["encoder_tokens"],
            example["decoder_tokens"],
            encoder_mask=example.get("encoder_mask"),
            decoder_mask=example.get("decoder_mask"),
        )

    def readout(self, example: Mapping[str, Array]) -> Readout:
        """The same, with no logit computed yet."""
        return self._read(
            example["encoder_tokens"],
            example["decoder_tokens"],
            example.get("encoder_mask"),
            example.get("decoder_mask"),
        )

    def cache(
        self,
        encoder_tokens: Int[Array, " S"],
        size: int,
        *,
        encoder_mask: Bool[Array, " S"] | None = None,
    ) -> T5Cache:
        """What `extend` reads: the encoded tokens, and room for `size` of the decoder's."""
        check_sequence(encoder_tokens, name="encoder_tokens")
        sees = Mask(keys=encoder_mask)
        memory = self._encode(encoder_tokens, sees)
        crossed = eqx.filter_vmap(lambda block: block.cross.remember(memory))(self.decoder.block)
        seen = empty_cache(self.decoder, size, self.dtype or self.embedding.table.dtype)
        return T5Cache(seen, crossed, sees)

    def extend(
        self, decoder_tokens: Int[Array, " T"], cache: T5Cache, at: Int[Array, ""] | int
    ) -> tuple[Float[Array, "T vocab"], T5Cache]:
        """Logits of the decoder's tokens at the places from `at` on, and the cache with them in it.

        `cache` holds the places before `at`; any others in it are not seen, and are written over.
        """
        check_sequence(decoder_tokens, cache.seen.keys.shape[2], at=at, name="decoder_tokens")
        places = jnp.arange(cache.seen.keys.shape[2])
        x, seen = self.decoder.extend(
            self._embed(decoder_tokens),
            cache.seen,
            cache.crossed,
            at,
            memory_mask=cache.encoder_mask,
            bias=self.decoder_bias(at + jnp.arange(decoder_tokens.shape[0]), places),
        )
        return self._read_out(x).logits(), cache._replace(seen=seen)

    def _encode(self, tokens: Int[Array, " S"], sees: Mask) -> Float[Array, "S embed"]:
        bias = self.encoder_bias.among(tokens.shape[0])
        return self.encoder_norm(self.encoder(self._embed(tokens), mask=sees, bias=bias))

    def _read(
        self,
        encoder_tokens: Int[Array, " S"],
        decoder_tokens: Int[Array, " T"],
        encoder_mask: Bool[Array, " S"] | None,
        decoder_mask: Bool[Array, " T"] | None,
    ) -> Readout:
        check_sequence(encoder_tokens, name="encoder_tokens")
        check_sequence(decoder_tokens, name="decoder_tokens")
        sees = Mask(keys=encoder_mask)
        x = self.decoder(
            self._embed(decoder_tokens),
            self._encode(encoder_tokens, sees),
            mask=causal(decoder_mask),
            memory_mask=sees,
            bias=self.decoder_bias.among(decoder_tokens.shape[0]),
        )
        return self._read_out(x)

    def _read_out(self, x: Float[Array, "T embed"]) -> Readout:
        x = self.decoder_norm(x)
        if self.output_scale is not None:
            x = x * jax.lax.stop_gradient(self.output_scale).astype(x.dtype)
        if self.head is None:
            return Readout(x, self.embedding.table, tied=True, gate=self.embedding.gate)
        return Readout(x, self.head, gate=self.embedding.gate)

    def _embed(self, tokens: Int[Array, " n"]) -> Float[Array, "n embed"]:
        x = self.embedding(tokens)
        return gated(x if self.dtype is None else x.astype(self.dtype), self.gate)


class T5Encoder(eqx.Module):
    """The encoder of a T5 on one sequence: `model(tokens) -> hidden states [T, embed]`.

    **Example**

        model = T5Encoder(T5EncoderConfig(encoder_layers=4, embed=256, heads=4, head_dim=64, mlp=1024,
                                          vocab=384), key=jax.random.key(0))
        hidden = jax.vmap(lambda t, m: model(t, mask=m))(tokens, mask)      # [B, T], True at real tokens
    """

    embedding: Words
    encoder_bias: RelativeBias
    encoder: Stacked[Block]
    encoder_norm: Norm
    gate: Gate | None = axes.gate("embed")
    dtype: str | None = eqx.field(static=True, default=None)
    kind: ClassVar[str] = "encoder"

    def __init__(self, config: T5EncoderConfig, *, key: PRNGKeyArray):
        c = config
        k_embed, k_encoder = jax.random.split(key)
        self.embedding = Words(c.vocab, c.embed, std=1.0, key=k_embed)
        self.encoder_bias, self.encoder = _stack(c, "encoder_layers", key=k_encoder)
        self.encoder_norm = Norm(c.embed, "rms", eps=c.eps)
        self.gate, self.dtype = None, c.dtype

    def __call__(
        self, tokens: Int[Array, " T"], *, mask: Bool[Array, " T"] | None = None
    ) -> Float[Array, "T embed"]:
        """Hidden states; `mask` is True at real tokens.

        Raises `AxisError` for more than one sequence, which may be of any length. Ids beyond the
        vocabulary are an error outside of `jit` and `vmap` alone.
        """
        check_sequence(tokens)
        x = self.embedding(tokens)
        x = gated(x if self.dtype is None else x.astype(self.dtype), self.gate)
        bias = self.encoder_bias.among(tokens.shape[0])
        return self.encoder_norm(self.encoder(x, mask=Mask(keys=mask), bias=bias))
