"""Depth by layers between two old ones: their mean, aligned first, or a prediction.

OpT-DeUS, "Progressive Depth Up-scaling via Optimal Transport", 2025 (arXiv:2508.08011); LESA, Yang et
al., "Learnable LLM Layer Scaling-Up", ACL 2025.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from growjax import values
from growjax.algebra import NONE, AxisMap, factors
from growjax.axes import Axes, Slot
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.depth import require_closable, require_stacks
from growjax.growth.finishes import Finish, drawn
from growjax.growth.fits import adam
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve
from growjax.values import Size


_OPT_DEUS = Paper(
    "Progressive Depth Up-scaling via Optimal Transport",
    "Cao, Mingzi and Wang, Xi and Aletras, Nikolaos",
    2025,
    arxiv="2508.08011",
)
_LESA = Paper(
    "LESA: Learnable LLM Layer Scaling-Up",
    "Yang, Yifei and Cao, Zouying and Ma, Xinbei and Yao, Yao and Qin, Libo and Chen, Zhi and Zhao, Hai",
    2025,
    "Annual Meeting of the Association for Computational Linguistics",
    "2502.13794",
)

Fill = Literal["mean", "transport", "lesa"]

# OpT-DeUS: the entropy of a plan, here as a multiple of the mean cost, so that no unit matters
_ENTROPY, _ROUNDS = 0.06, 200
# LESA: hidden units, learning rate, decay, batch, and the weight of the norm in the loss
_HIDDEN, _RATE, _DECAY, _BATCH, _NORM = 256, 1e-3, 1e-2, 64, 5e-4


@dataclasses.dataclass(frozen=True)
class Filled(Finish):
    """The arrays of new layers, from those of the layers below and above each.

    - `how`: "mean", "transport" or "lesa".
    - `stream`: the axis of the residual stream, whose coordinates are the same in all layers.
    - `epochs`: how often the network of "lesa" sees all rows.
    - `closed`: the arrays that are zero in new layers, whatever the fill.
    - `plans`: for each axis inside the blocks, which coordinates are alike, `[gaps, below, above]`.
    """

    how: Fill
    stream: str
    epochs: int = 10
    closed: tuple[str, ...] = ()
    plans: Mapping[str, Array] | None = None

    def prepared(self, move: AxisMap, table: Axes) -> "Filled":
        """The rule with what it has to know of all arrays at once."""
        parts = [
            pair
            for slot in table.having(move.axis, "param")
            if slot.arrays()
            for pair in zip(slot.parts, slot.cut(slot.value, table.sizes), strict=True)
        ]
        closed = [
            part.path
            for part, _ in parts
            if any(side == "weight" for _, side, _ in factors(move, table, part))
        ]
        plans = None
        if self.how == "transport":
            plans = _plans(move, table, parts, self.stream)
        return dataclasses.replace(self, closed=tuple(closed), plans=plans)

    def applied(self, move, slot, old, new, *, key):
        """The old layers as they are, and the filled ones between them."""
        if slot.path in self.closed:
            return new
        (dim,) = slot.positions(move.axis)
        (ids,) = np.nonzero(move.source == NONE)
        below = np.asarray(move.source)[ids - 1]
        # A fill is a starting value, as a draw is: gradients do not flow through it
        layers = _wide(jax.lax.stop_gradient(jnp.moveaxis(old, dim, 0)))
        filled = layers[below]
        if slot.kind == "param":
            filled = self._between(slot, layers, below, key)
        return jnp.moveaxis(jnp.moveaxis(new, dim, 0).at[ids].set(filled.astype(new.dtype)), 0, dim)

    def _between(self, slot: Slot, layers: Array, below: np.ndarray, key: Any) -> Array:
        """`[gaps, ...]` the arrays of the layers between `below` and the ones above these."""
        lower, upper = layers[below], layers[below + 1]
        dims = [dim for dim in slot.dims if dim.role != "stack"]
        if self.how == "lesa" and len({"consumed", "produced"} & {d.role for d in dims}) == 2:
            inner = [i for i, dim in enumerate(dims, 1) if dim.role != "produced"]
            outer = [i for i, dim in enumerate(dims, 1) if dim.role == "produced"]
            turned = jnp.transpose(layers, (0, *inner, *outer))
            rows = int(np.prod([layers.shape[i] for i in inner]))
            matrices = turned.reshape(len(layers), rows, -1)
            predicted = _predicted(matrices, below, self.epochs, drawn(key=key))
            predicted = predicted.reshape(len(below), *turned.shape[1:])
            return jnp.transpose(predicted, np.argsort((0, *inner, *outer)).tolist())
        for i, dim in enumerate(dims, 1):
            if self.plans is not None and dim.axis in self.plans:
                moved = jnp.moveaxis(lower, i, 1)
                aligned = jnp.einsum("gij,gi...->gj...", self.plans[dim.axis], moved)
                lower = jnp.moveaxis(aligned, 1, i)
        return (lower + upper) / 2


def _wide(x: Array) -> Array:
    """Numbers in float32 at least, which distances and decompositions need; others as they are."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x


# Optimal transport ---------------------------------------------------------------------------------


def _plans(
    move: AxisMap, table: Axes, parts: list[tuple[Slot, Any]], stream: str
) -> dict[str, Array]:
    """For each axis that the blocks produce, a plan for each gap, its columns summing to 1.

    Heads are moved whole: only the first axis that an array produces is aligned, by all arrays that
    produce it.
    """
    below = np.asarray(move.source)[np.flatnonzero(move.source == NONE) - 1]
    features: dict[str, list[Array]] = {}
    for part, value in parts:
        produced = [i for i, dim in enumerate(part.dims) if dim.role == "produced"]
        if not produced or part.dims[produced[0]].axis == stream:
            continue
        (stack,) = part.positions(move.axis)
        axis = part.dims[produced[0]].axis
        x = _wide(jax.lax.stop_gradient(part.split(value, table.sizes)))
        x = jnp.moveaxis(x, (stack, produced[0]), (0, 1))
        features.setdefault(axis, []).append(x.reshape(*x.shape[:2], -1))
    plans = {}
    for axis, arrays in features.items():
        units = jnp.concatenate(arrays, axis=-1)
        plans[axis] = jax.vmap(_aligned)(units[below], units[below + 1])
    return plans


def _aligned(lower: Float[Array, "n f"], upper: Float[Array, "n f"]) -> Float[Array, "n n"]:
    """The entropic transport plan between two sets of n units, times n: rows and columns sum to 1.

    With the masses 1/n of the paper's code, it would shrink what it moves to an n-th.
    """
    squares = jnp.sum(lower**2, 1)[:, None] + jnp.sum(upper**2, 1) - 2 * lower @ upper.T
    cost = jnp.sqrt(jnp.maximum(squares, 0))
    scores = -cost / (_ENTROPY * jnp.maximum(jnp.mean(cost), jnp.finfo(cost.dtype).tiny))

    def rounds(_, scores):
        scores = scores - jax.nn.logsumexp(scores, axis=1, keepdims=True)
        return scores - jax.nn.logsumexp(scores, axis=0, keepdims=True)

    return jnp.exp(jax.lax.fori_loop(0, _ROUNDS, rounds, scores))


# LESA ------------------------------------------------------------------------------------------------


def _predicted(
    x: Float[Array, "L i o"], below: np.ndarray, epochs: int, key: PRNGKeyArray
) -> Array:
    """`[gaps, i, o]` matrices that a small network predicts from those below and above.

    All layers have common left singular vectors, and the network predicts a layer's coefficients row by
    row. It learns from the old layers that have two neighbours.
    """
    depth, inputs, outputs = x.shape
    rank = min(outputs, depth * inputs)
    # The singular vectors of all layers side by side, by way of the smaller Gram matrix
    squares, vectors = jnp.linalg.eigh(jnp.einsum("lio,lip->op", x, x))
    sizes = jnp.sqrt(jnp.maximum(squares[::-1][:rank], 0))
    vectors = vectors[:, ::-1][:, :rank]
    inverse = jnp.where(sizes > 1e-6 * sizes[0], 1 / jnp.maximum(sizes, 1e-30), 0)
    rows = jnp.einsum("lio,or->lri", x, vectors) * inverse[:, None]
    pairs = jnp.concatenate([rows[:-2], rows[2:]], axis=-1).reshape(-1, 2 * inputs)
    network = _fitted(pairs, rows[1:-1].reshape(-1, inputs), epochs, key)
    between = jnp.concatenate([rows[below], rows[below + 1]], axis=-1)
    return jnp.einsum("gri,r,or->gio", _network(network, between), sizes, vectors)


def _network(weights: list[tuple[Array, Array]], x: Array) -> Array:
    *hidden, (last, bias) = weights
    for matrix, shift in hidden:
        x = jax.nn.relu(x @ matrix + shift)
    return x @ last + bias


def _fitted(x: Array, y: Array, epochs: int, key: PRNGKeyArray) -> list[tuple[Array, Array]]:
    """The weights of the network after some epochs of AdamW on the rows."""
    sizes = [x.shape[1], _HIDDEN, _HIDDEN, y.shape[1]]
    start, order = jax.random.split(key)
    weights = []
    for n, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        draws = jax.random.uniform(
            jax.random.fold_in(start, n), (fan_in + 1, fan_out), x.dtype, -1, 1
        )
        draws = draws * fan_in**-0.5
        weights.append((draws[:-1], draws[-1]))
    batch = min(_BATCH, len(x))
    steps = len(x) // batch
    keys = jax.random.split(order, epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, len(x))[: steps * batch])(keys)

    def loss(weights, rows):
        predicted, true = _network(weights, x[rows]), y[rows]
        norms = jnp.sqrt(jnp.sum(predicted**2) + 1e-30) - jnp.sqrt(jnp.sum(true**2))
        return (1 - _NORM) * jnp.mean((predicted - true) ** 2) + _NORM * norms**2

    def step(carried, now):
        weights, moments = carried
        t, rows = now
        gradient = jax.grad(loss)(weights, rows)
        return adam(weights, gradient, moments, t, rate=_RATE, decay=_DECAY), None

    zeros = jax.tree.map(jnp.zeros_like, weights)
    batches = jnp.arange(epochs * steps), orders.reshape(-1, batch)
    return jax.lax.scan(step, (weights, (zeros, zeros)), batches)[0][0]


# The operator ----------------------------------------------------------------------------------------


@values.register
class Between(Operator):
    """New layers between old ones; see `between`."""

    sizes: Sizes = eqx.field(static=True)
    fill: Fill = eqx.field(static=True, default="mean")
    branch: Literal["zero", "open"] = eqx.field(static=True, default="zero")
    stream: str = eqx.field(static=True, default="embed")
    epochs: Size = eqx.field(static=True, default=10)
    card: ClassVar[Card] = Card(
        use="Depth for a model that goes on with other data: new layers that fit between their "
        "neighbours, trained alone.",
        traps=(
            "The network of fill='lesa' is trained while the model grows; a plan charges its FLOPs.",
            "With branch='zero' the fill matters only from the second step on, when gradients reach it.",
        ),
        example="between(layers=3, fill='transport')",
        by={"fill": {"transport": (_OPT_DEUS,), "lesa": (_LESA,)}},
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """New layers with zeroed branches do nothing; others do."""
        return "exact-given-init" if self.branch == "zero" else "approximate"

    @property
    def trains(self) -> bool:
        """The network of LESA is trained whenever it grows a model."""
        return self.fill == "lesa"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """One fresh layer in each of the highest gaps."""
        axes.size(self.stream)
        wanted = resolve(axes, dict(self.sizes))
        require_stacks(axes, list(wanted))
        faults, moves = [], []
        for axis, size in wanted.items():
            old = axes.size(axis)
            extra = size - old
            if extra > old - 1:
                faults.append(
                    f"{axis}: {old} layers have {max(old - 1, 0)} gaps, too few for {extra} more; grow "
                    "twice"
                )
            elif self.fill == "lesa" and old < 3:
                faults.append(
                    f"{axis}: 'lesa' learns from layers between two others, of {old} none is"
                )
            if self.branch == "zero":
                require_closable(axes, axis, self.stream)
            first = old - 1 - extra
            source = [i for n in range(old) for i in ([n, NONE] if first <= n < old - 1 else [n])]
            share = np.where(np.asarray(source) == NONE, 0.0, 1.0)
            moves.append(
                AxisMap(
                    axis,
                    source,
                    share=share if self.branch == "zero" else None,
                    via=self.stream,
                    init="zeros",
                    finish=Filled(self.fill, self.stream, self.epochs),
                )
            )
        raise_all(GrowthError, "layers cannot be put between these:", faults)
        return moves


def between(
    *,
    fill: Fill = "mean",
    branch: Literal["zero", "open"] = "zero",
    stream: str = "embed",
    epochs: int = 10,
    **sizes: int,
) -> Between:
    """Grow depth by new layers between old ones, one in each of the highest gaps.

    **Arguments**

    - `layers=12` (or the model's own stack axis), at most one fewer than twice as many as before.
    - `fill`: what a new layer holds. `"mean"`: the mean of the layers below and above. `"transport"`: the
      same after the hidden units and heads of the layer below were matched to those of the layer above by
      entropic optimal transport (OpT-DeUS, but with whole heads, one plan for all arrays that produce an
      axis, and plans that keep the size of what they move). `"lesa"`: what a small network, which learns
      to predict each old layer from its neighbours, predicts of each matrix; vectors are means. It needs
      three layers and a key, and its training is part of the growth; a plan charges its FLOPs.
    - `branch`: `"zero"` closes the new layers' residual branches, so that the function is kept, as in
      OpT-DeUS; `"open"` leaves them as they are filled, as in LESA: a jump in loss is expected.
    - `stream`: the axis of the residual stream.
    - `epochs`: of the network of `"lesa"`, in batches of 64 rows. The paper's 10 are for matrices of some
      thousand rows; small ones need more.

    The optimizer state of new layers starts anew. The papers train only new layers (`train="new"` in a
    stage). Raises `GrowthError` for too few gaps, and as `gj.stack` does with `branch="zero"`.

    **Example**

        gj.growth.between(layers=12, fill="transport")              # from 8
        gj.growth.between(layers=48, fill="lesa", branch="open")    # from 32
    """
    return Between(frozen_sizes(sizes), fill, branch, stream, epochs)
