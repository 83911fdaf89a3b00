"""Muon, told by the axis table which leaves are matrices and between what."""

import math
from typing import Any

import jax

from growjax.axes import Axes, Slot, axes_of, put
from growjax.optim.age import scale_by_adam


def hidden_matrices(params: Any) -> Any:
    """True at the matrices inside a model: what `scale_by_muon` makes orthogonal.

    A matrix is inside if some leaf produces and some leaf consumes each of its axes. Embeddings, heads,
    gains and biases are not.
    """
    mask = jax.tree.map(lambda _: False, params)
    return put(mask, {slot.steps: True for slot, _, _ in _matrices(params)})


def scale_by_muon(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    momentum: float = 0.95,
    rms: float = 0.2,
) -> Any:
    """Orthogonal steps for hidden matrices, Adam's for all else; an `optax.GradientTransformation`.

    Every matrix, of every layer by itself, is seen as what it consumes by what it produces
    (`embed -> kv_heads group head_dim` is embed by all heads), and its momentum replaced by the nearest
    orthogonal matrix (`optax.contrib.scale_by_muon`: five Newton-Schulz iterations of the Nesterov
    momentum). Times `rms * sqrt(max(rows, columns))`, its root mean square is about `rms`, which is that
    of Adam's steps in practice, so AdamW's learning rate and weight decay carry over. `b1`, `b2` and
    `eps` are those of `growjax.optim.scale_by_adam`, which moves the rest.

    Growth cannot kick: an orthogonal matrix has no large entries, whatever the momentum of new
    coordinates. Jordan et al. (2024), "Muon"; the scale is that of Liu et al. (2025), "Muon is Scalable
    for LLM Training", arXiv:2502.16982.
    """
    import optax
    from optax.contrib import MuonDimensionNumbers
    from optax.contrib import scale_by_muon as orthogonalised

    def dimensions(params):
        seen = {slot.steps: MuonDimensionNumbers(a, b) for slot, a, b in _matrices(params)}
        return put(params, seen)

    def matched(updates, _):
        def scaled(slot: Slot, *sides: tuple[int, ...]):
            longer = max(math.prod(slot.value.shape[i] for i in side) for side in sides)
            return slot.value * (rms * longer**0.5)

        return put(updates, {slot.steps: scaled(slot, a, b) for slot, a, b in _matrices(updates)})

    def labels(params):
        return jax.tree.map(lambda inside: "muon" if inside else "adam", hidden_matrices(params))

    muon = optax.chain(
        orthogonalised(beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless(matched),
    )
    return optax.partition({"muon": muon, "adam": scale_by_adam(b1, b2, eps)}, labels)


def _matrices(params: Any) -> list[tuple[Slot, tuple[int, ...], tuple[int, ...]]]:
    """The matrices inside a model, with the dimensions of the array on either side of each."""
    table = axes_of(params)
    found = [(slot, _sides(slot, table)) for slot in table.of_kind("param") if slot.arrays()]
    return [(slot, *sides) for slot, sides in found if sides is not None]


def _sides(slot: Slot, table: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    data = [dim for dim in slot.dims if dim.role != "stack"]
    named = [dim for dim in data if not dim.literal]
    if not all({"consumed", "produced"} <= table.roles(dim.axis) for dim in named):
        return None
    # The second side starts where the role first changes; a key under QK-norm changes it twice
    # (`embed -> kv_heads <- head_dim`), and is embed by the rest.
    first = next((i for i, dim in enumerate(data) if dim.role != data[0].role), 0)
    if not first or not {dim.role for dim in data} <= {"consumed", "produced"}:
        return None
    sides, axis = ([], []), len(data) - len(slot.dims)
    for dimension, count in enumerate(slot.spec.groups):
        where = {i >= first for i in range(axis, axis + count)}
        if len(where) > 1:
            return None  # one dimension of the array that holds axes of both sides
        if axis >= 0:
            sides[where.pop()].append(dimension)
        axis += count
    return tuple(sides[0]), tuple(sides[1])
