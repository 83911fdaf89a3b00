"""How decoder-only models read: calls, examples, caches and heads, which GPT and `Decoder` share."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax.axes import param
from growjax.errors import AxisError, PlanError
from growjax.models.protocol import READ
from growjax.nn import (
    Block,
    Cache,
    Norm,
    Readout,
    Stacked,
    Words,
    causal,
    check_sequence,
    empty_cache,
    logits,
    normal,
)
from growjax.values import at_least, check, register


@register
@dataclasses.dataclass(frozen=True)
class Labels:
    """The head of a decoder that scores `count` labels in place of words, once trained to.

    `of` is what has a label: the `"sequence"`, by its last token, or every `"token"`. The last token is
    the last one that is not `padding`, the id of padding tokens; without such an id it is the last one
    that the mask shows.

    **Example**

        DecoderConfig(..., head=Labels(3, padding=0))      # scores [3] of a sequence
    """

    count: Annotated[int, at_least(1, "labels")]
    of: Literal["sequence", "token"] = "sequence"
    padding: int | None = None

    def __post_init__(self):
        check(self, AxisError, "a head cannot have these labels:")


# What a decoder computes from its hidden states: the next word, nothing, or labels
Head = Literal["words", "none"] | Labels


class Classifier(eqx.Module):
    """Scores of labels from hidden states; `Labels` explains it."""

    weight: Float[Array, "embed labels"] = param("embed -> labels")
    bias: Float[Array, " labels"] | None = param("-> labels")
    of: Literal["sequence", "token"] = eqx.field(static=True, default="sequence")
    padding: int | None = eqx.field(static=True, default=None)

    def __init__(self, embed: int, labels: Labels, *, key: PRNGKeyArray):
        self.weight = normal(key, (embed, labels.count), embed)
        self.bias = jnp.zeros(labels.count) if labels.of == "token" else None
        self.of, self.padding = labels.of, labels.padding

    def __call__(
        self, hidden: Float[Array, "T embed"], tokens: Int[Array, " T"], mask: Array | None = None
    ) -> Float[Array, "... labels"]:
        """The scores `[labels]` of a sequence, or `[T, labels]` of its tokens."""
        if self.of == "sequence":
            real = jnp.ones_like(tokens, bool) if mask is None or mask.ndim > 1 else mask
            real = real if self.padding is None else tokens != self.padding
            hidden = hidden[jnp.max(jnp.arange(tokens.shape[0]) * real)]
        scores = logits(hidden, self.weight)
        return scores if self.bias is None else scores + self.bias


class CausalModel(eqx.Module):
    """A decoder-only language model on one sequence; a subclass has the parts, and embeds the tokens."""

    embedding: eqx.AbstractVar[Words]
    blocks: eqx.AbstractVar[Stacked[Block]]
    norm: eqx.AbstractVar[Norm]
    # None: the table of the embedding, if it reads words
    head: eqx.AbstractVar[Float[Array, "embed vocab"] | None]
    dtype: eqx.AbstractVar[str | None]
    classifier: eqx.AbstractVar[Classifier | None]
    # Whether it has a head of words at all
    lm: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def _embed(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> tuple[Float[Array, "T embed"], tuple[Array, Array] | None]:
        """The residual stream, and the cosines and sines that turn heads (None: nothing does)."""

    @property
    def _places(self) -> int | None:
        """The number of positions that there are; None for any."""
        return None

    @property
    def _cap(self) -> float | None:
        """The cap of the logits; see `growjax.nn.Readout`."""
        return None

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

        A model with another `head` than words gives what that is: hidden states `[T, embed]` without
        one, and scores of labels `[labels]` or `[T, labels]`.

        `mask` is True at real tokens, or `[T, T]` where one may see the other; tokens in the `prefix`
        are seen by all; of `documents` packed into one sequence, tokens see only their own number.
        Windows count places of the sequence, whatever its `positions`.

        Raises `AxisError` for more than one sequence, and for one longer than learned positions. Ids and
        positions beyond their tables are an error outside of `jit` and `vmap` alone.
        """
        readout = self._read(tokens, positions, mask, prefix, documents)
        if self.lm:
            return readout.logits()
        if self.classifier is None:
            return readout.hidden
        return self.classifier(readout.hidden, tokens, mask)

    def predict(self, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
        """The logits on one example of an objective, whose keys say what there is to read.

        Raises `PlanError` for a model without a head of words.
        """
        self._need_words()
        return self(example["tokens"], **{name: example.get(key) for key, name in READ.items()})

    def readout(self, example: Mapping[str, Array]) -> Readout:
        """The same, with no logit computed yet."""
        self._need_words()
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
        self._need_words()
        check_sequence(tokens, cache.keys.shape[2], at=at)
        check_sequence(tokens, self._places, at=at)
        x, turn = self._embed(tokens, at + jnp.arange(tokens.shape[0]))
        x, cache = self.blocks.extend(x, cache, None, at, turn=turn)
        return self._read_out(x).logits(), cache

    def _need_words(self) -> None:
        if not self.lm:
            raise PlanError(
                "head: a decoder is trained and evaluated as a language model through its head of words, "
                "and this one has none"
            )

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
        x, auxiliary, exits = self.blocks.with_exits(
            x, mask=causal(mask, prefix, documents), turn=turn
        )
        readout = self._read_out(x, auxiliary)
        if exits is None:
            return readout
        weights = tuple(weight for _, weight in self.blocks.exits)
        return dataclasses.replace(readout, exits=jax.vmap(self.norm)(exits), weights=weights)

    def _read_out(
        self, x: Float[Array, "T embed"], auxiliary: Float[Array, ""] | None = None
    ) -> Readout:
        return Readout(
            self.norm(x),
            self.embedding.table if self.head is None else self.head,
            tied=self.head is None,
            auxiliary=auxiliary,
            cap=self._cap,
            gate=self.embedding.gate,
        )
