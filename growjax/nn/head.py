"""The output head: logits, and sums over them that never hold all of them in memory.

`[T, vocab]` logits are the largest array of a step by far, and a loss needs one number of each row. So
losses read a few tokens at a time (`per_token`), and the gradient computes the logits again. Tokens
are split and not words: every device then works on its own sequences, and on its own words where a layout
splits the vocabulary. Cross-entropy has a gradient of its own, which goes over the logits once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from growjax.errors import AxisError, raise_all
from growjax.gates import Gate
from growjax.nn.linear import product
from growjax.nn.place import CONTEXT, Place, current
from growjax.nn.split import odd_lengths


# From so many logits of one sequence on, they are computed in chunks: 32 MiB of them
LARGE = 2**23
# Tokens of a chunk of a long sequence, as long as they have no more logits than the second number
CHUNK, MOST = 256, 2**24
# The name under which the sum of a row's exponentials is saved for the gradient
_SAVED = "logsumexp"


class Readout(eqx.Module):
    """Hidden states, and the head that reads logits from them; no logit is computed yet.

    **Fields**

    - `hidden`: the head's input, after the last norm.
    - `weight`: the head's matrix; `[vocab, embed]` if it is the embedding's (`tied`).
    - `bias`: one number per word, or None.
    - `auxiliary`: the auxiliary loss of the sequence, which training adds to its mean loss; None
      without any.
    - `cap`: if not None, logits are `cap * tanh(logits / cap)` (Gemma 2).
    - `exits`, `weights`: the head's input after some layers, and the weight of each: what is read token
      by token is then their sum. None, and (), of a whole model.
    - `gate`: the gate of the words, or None. Level l multiplies the probability of a new word by l,
      before all are normalised; at 0 the others are what they were, and such a target has no finite loss.

    Raises `AxisError` that lists every shape that does not fit.

    **Example**

        Readout(hidden, embedding.table, tied=True).logits()      # [T, vocab]
    """

    hidden: Float[Array, "T embed"]
    weight: Float[Array, "rows columns"]
    bias: Float[Array, " vocab"] | None = None
    tied: bool = eqx.field(static=True, default=False)
    auxiliary: Float[Array, ""] | None = None
    cap: float | None = eqx.field(static=True, default=None)
    gate: Gate | None = None
    exits: Float[Array, "exits T embed"] | None = None
    weights: tuple[float, ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        shapes = {"hidden": (self.hidden, 2), "weight": (self.weight, 2), "bias": (self.bias, 1)}
        faults = [
            f"{name}: expected an array of {rank} dimensions, got {getattr(x, 'shape', x)}"
            for name, (x, rank) in shapes.items()
            if x is not None and len(getattr(x, "shape", ())) != rank
        ]
        if not faults:
            embed, order = self.hidden.shape[1], "vocab, embed" if self.tied else "embed, vocab"
            if self.weight.shape[1 if self.tied else 0] != embed:
                faults.append(
                    f"weight: expected [{order}] with embed={embed}, got {list(self.weight.shape)}"
                )
            if self.bias is not None and self.bias.shape != (self.vocab,):
                faults.append(f"bias: expected [{self.vocab}], got {list(self.bias.shape)}")
        raise_all(AxisError, "this head cannot read these hidden states:", faults)

    @property
    def vocab(self) -> int:
        """The number of words."""
        return self.weight.shape[0 if self.tied else 1]

    def logits(self) -> Float[Array, "T vocab"]:
        """All logits, in float32 at least; raises `AxisError` with exits, of which each has its own."""
        if self.exits is not None:
            raise AxisError(
                "this model has early exits, whose losses are added: read it by growjax.nn.per_token, as "
                "the loss cross_entropy does"
            )
        x = self.hidden
        equation = "te,ve->tv" if self.tied else "te,ev->tv"
        wide = jnp.promote_types(x.dtype, jnp.float32)
        weight = self.weight.astype(x.dtype)
        scores = product(equation, x, weight, wide)
        scores = scores if self.bias is None else scores + self.bias
        scores = scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)
        if self.gate is None:
            return scores
        return scores + jnp.log(jax.lax.stop_gradient(self.gate.value)).astype(scores.dtype)


def chunk_of(tokens: int, vocab: int) -> int:
    """How many tokens of a sequence have their logits computed at once.

    All of them where logits are few: then nothing is computed twice.
    """
    if tokens * vocab < LARGE:
        return tokens
    # Short sequences come several to a device, which reads a chunk of each at the same time
    chunk = -(-CHUNK // 2) if tokens <= 4 * CHUNK else CHUNK
    while chunk > 1 and chunk * vocab > MOST:
        chunk //= 2
    parts = -(-tokens // chunk)
    return -(-tokens // parts)  # alike, so that little is left over


def per_token(
    function: Callable[..., Any], readout: Readout, *rows: Any, chunk: int | None = None
) -> Any:
    """`function(logits, *rows)` of a whole sequence, computed a chunk of its tokens at a time.

    `function` maps logits `[t, vocab]` and `t` rows of each array in `rows` to arrays of `t` rows, each
    row of its own token alone. It is called with any `t`. The gradient computes logits again. `chunk` is
    decided by `chunk_of` if it is None: by shapes alone, so that a program is always the same. Another
    chunk may change the last bit, since products of other shapes are summed in another order.

    **Example**

        losses = per_token(cross_entropies, readout, targets)     # [T]
    """
    place = current()
    if place is not None and place.context > 1:
        return _per_device(function, readout, *rows, chunk=chunk, place=place)
    return _in_chunks(function, readout, *rows, chunk=chunk)


def _per_device(
    function: Callable[..., Any], readout: Readout, *rows: Any, chunk: int | None, place: Place
) -> Any:
    """Each part of a sequence that is split over `context` by itself: its chunks are on one device."""
    ways, tokens = place.context, readout.hidden.shape[0]
    raise_all(AxisError, "this sequence cannot be read:", odd_lengths(ways, tokens=tokens))
    own = NamedSharding(place.mesh, PartitionSpec(CONTEXT))  # type: ignore[arg-type]

    def split(x: Array, axis: int = 0) -> Array:
        """The parts as a leading axis."""
        shape = x.shape[:axis] + (ways, tokens // ways) + x.shape[axis + 1 :]
        parts = jnp.moveaxis(x.reshape(shape), axis, 0)
        return jax.lax.with_sharding_constraint(parts, own)

    def of_part(hidden: Array, exits: Array | None, *rows: Any) -> Any:
        part = dataclasses.replace(readout, hidden=hidden, exits=exits)
        return _in_chunks(function, part, *rows, chunk=chunk)

    exits = None if readout.exits is None else split(readout.exits, 1)
    arrays = split(readout.hidden), exits, *jax.tree.map(split, rows)
    results = jax.vmap(of_part, spmd_axis_name=CONTEXT)(*arrays)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _in_chunks(
    function: Callable[..., Any], readout: Readout, *rows: Any, chunk: int | None
) -> Any:
    """`per_token` of tokens that are on one device, or not split by `context`."""
    if readout.exits is not None:
        return _per_exit(function, readout, *rows, chunk=chunk)
    tokens = readout.hidden.shape[0]
    chunk = chunk_of(tokens, readout.vocab) if chunk is None else chunk

    def of(hidden: Array, *rows: Any) -> Any:
        # The head is a constant of the loop: its gradient is a sum over chunks, in its own precision
        part = dataclasses.replace(readout, hidden=hidden)
        return function(part.logits(), *rows)

    if chunk >= tokens:
        return of(readout.hidden, *rows)
    policy = jax.checkpoint_policies.save_only_these_names(_SAVED)
    arrays = readout.hidden, *rows
    whole = tokens - tokens % chunk

    def split(x: Array) -> Array:
        return x[:whole].reshape(-1, chunk, *x.shape[1:])

    in_loop = jax.checkpoint(of, prevent_cse=False, policy=policy)
    chunks = jax.lax.map(lambda xs: in_loop(*xs), jax.tree.map(split, arrays))
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunks)
    if whole == tokens:
        return results
    # The remaining tokens are a chunk of their own: padding would be charged as work
    rest = jax.checkpoint(of, policy=policy)(*jax.tree.map(lambda x: x[whole:], arrays))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), results, rest)


def _per_exit(function: Callable[..., Any], readout: Readout, *rows: Any, chunk: int | None) -> Any:
    """The weighted sum over exits, whose tokens are read as those of one long sequence."""
    assert readout.exits is not None
    count, tokens, _ = readout.exits.shape
    hidden = readout.exits.reshape(count * tokens, -1)
    long = dataclasses.replace(readout, hidden=hidden, exits=None, weights=())
    tiled = jax.tree.map(lambda x: jnp.concatenate([x] * count), rows)
    results = _in_chunks(function, long, *tiled, chunk=chunk)

    def total(x: Array) -> Array:
        # Not a product of matrices, which would be counted
        each = x.reshape(count, tokens, *x.shape[1:])
        weights = jnp.asarray(readout.weights, x.dtype).reshape(count, *[1] * x.ndim)
        return jnp.sum(weights * each, axis=0)

    return jax.tree.map(total, results)


@jax.custom_jvp
def cross_entropies(
    logits: Float[Array, "t vocab"], targets: Int[Array, " t"]
) -> Float[Array, " t"]:
    """The cross-entropy of each row's target, in nats and in the precision of the logits."""
    return _cross_entropies(logits, targets)[0]


def _cross_entropies(logits: Array, targets: Array) -> tuple[Array, Array]:
    total = checkpoint_name(jax.nn.logsumexp(logits, axis=-1), _SAVED)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return total - chosen, total


@cross_entropies.defjvp
def _cross_entropies_rule(primals, tangents):
    """By a row's logits: the probabilities, less one at the target."""
    logits, targets = primals
    losses, total = _cross_entropies(logits, targets)
    vocab = logits.shape[-1]
    places = jnp.where(targets < 0, targets + vocab, targets)  # as indexing counts from the end
    hit = jnp.arange(vocab) == places[:, None]
    slope = jnp.exp(logits - total[:, None]) - hit
    return losses, jnp.sum(slope * tangents[0], axis=-1)
