"""Muon for models with an axis table, which names the matrices and the axes on their two sides."""

import math
from typing import Any

import jax

from growjax.axes import Axes, Slot, axes_of, put
from growjax.optim.age import scale_by_adam


def hidden_matrices(params: Any) -> Any:
    """A mask: True at the hidden matrices of a model, whose steps `scale_by_muon` orthogonalises.

    A matrix is hidden if each of its axes is produced by some leaf and consumed by another. Embeddings,
    heads, gains and biases are not.
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
    """Orthogonal steps for hidden matrices, Adam's for all others; an `optax.GradientTransformation`.

    Every matrix of every layer is reshaped to consumed axes by produced axes
    (`embed -> kv_heads group head_dim` becomes `embed` by all heads' dimensions), and its momentum is
    replaced by the nearest orthogonal matrix (`optax.contrib.scale_by_muon`: five Newton-Schulz
    iterations of the Nesterov momentum). The factor `rms * sqrt(max(rows, columns))` gives the step a
    root mean square of about `rms`, which is that of Adam's steps in practice, so AdamW's learning rate
    and weight decay carry over. `b1`, `b2` and `eps` belong to `growjax.optim.scale_by_adam`, which moves
    the other leaves.

    New coordinates cannot take large steps after growth, since the entries of an orthogonal matrix are
    bounded whatever their momentum. Jordan et al. (2024), "Muon"; the scale is that of Liu et al. (2025),
    "Muon is Scalable for LLM Training", arXiv:2502.16982.
    """
    import optax
    from optax.contrib import MuonDimensionNumbers
    from optax.contrib import scale_by_muon as orthogonalised

    def dimensions(params):
        sides = {slot.steps: MuonDimensionNumbers(a, b) for slot, a, b in _matrices(params)}
        return put(params, sides)

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
    """The hidden matrices of a model, each with the array dimensions of its rows and of its columns."""
    table = axes_of(params)
    split = [(slot, _sides(slot, table)) for slot in table.params()]
    return [(slot, *sides) for slot, sides in split if sides is not None]


def _sides(slot: Slot, table: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The array dimensions of a leaf's rows and of its columns; None if it is no hidden matrix."""
    # Each expert of a mixture has a matrix of its own, as each layer has
    apart = {"stack", "lookup"} if any(d.role == "consumed" for d in slot.dims) else {"stack"}
    data = [dim for dim in slot.dims if dim.role not in apart]
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
        on_second = {i >= first for i in range(axis, axis + count)}
        if len(on_second) > 1:
            return None  # one dimension of the array that holds axes of both sides
        if axis >= 0:
            sides[on_second.pop()].append(dimension)
        axis += count
    return tuple(sides[0]), tuple(sides[1])
