"""Attention on arrays that are split over a mesh: each device on its own sequences, heads and queries.

The compiler cannot split a kernel, nor a loop over tiles, so each device is handed its own part
(`jax.shard_map`). `jax.vmap` over sequences says by its `spmd_axis_name` how these are split. Heads are
split over `tensor`. Queries are split over `context`; each device gathers all keys and values, which are
smaller than what a layer keeps for the gradient, and sends the gradients of others' keys back.

Under a causal mask the last device would see most keys, and the others would wait for it. So devices
exchange halves of their queries before attention and of the outputs after it: of `2 n` halves, device i
attends from halves i and `2 n - 1 - i`, which see equally many keys together.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from growjax.nn.mask import Mask
from growjax.nn.place import CONTEXT, Place


_WHOLE = PartitionSpec()


def odd_lengths(devices: int, **lengths: int) -> list[str]:
    """Why sequences of these lengths cannot be split over the devices of `context`."""
    return [
        f"{name}: {length} places cannot be split over context={devices} devices"
        for name, length in lengths.items()
        if length % devices
    ]


def by_device(
    kernel: Callable[..., Array],
    place: Place,
    q: Array,
    k: Array,
    v: Array,
    rest: Any,
    *,
    specs: Any = _WHOLE,
    balanced: bool = False,
) -> Array:
    """`kernel(q, k, v, rest)` on the heads and queries of each device, and on all keys.

    The arrays are those of one sequence; `rest` is a tree of which every device gets what `specs` says,
    all of it by default. With `balanced`, queries are handed out so that each device sees equally many
    keys: their places are those of `places_of`.
    """
    if place.mesh is None:
        return kernel(q, k, v, rest)
    heads, ways = _heads(place, q), place.context
    sequence = CONTEXT if ways > 1 else None

    def of_device(q: Array, k: Array, v: Array, rest: Any) -> Array:
        if ways == 1:
            return kernel(q, k, v, rest)
        k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
        if not balanced:
            return kernel(q, k, v, rest)
        return _returned(kernel(_dealt(q, ways), k, v, rest), ways)

    of_keys = PartitionSpec(heads[0], sequence)
    of_queries = PartitionSpec(*heads, sequence)
    return jax.shard_map(
        of_device,
        mesh=place.mesh,
        in_specs=(of_queries, of_keys, of_keys, specs),
        out_specs=of_queries,
        # The outputs of a kernel do not say over which axes they vary
        check_vma=False,
    )(q, k, v, rest)


def in_parts(
    body: Callable[..., Array],
    place: Place,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    bias: Callable[[Array, Array], Array] | None,
) -> Array:
    """`body(q, k, v, mask, bias)` on the queries of each device; the mask says where they begin."""
    length, ways = q.shape[2], place.context
    balanced = balances(mask.causal, mask.window, length, ways)
    arrays, static = eqx.partition((mask, bias), eqx.is_array)
    heads = _heads(place, q)

    def kernel(q: Array, k: Array, v: Array, arrays: Any) -> Array:
        mask, bias = eqx.combine(arrays, static)
        for dim, axis in enumerate(heads):
            if axis is not None and bias is not None:
                pick = functools.partial(_of_heads, axis, dim, q.shape[dim])
                bias = jax.tree_util.Partial(pick, bias)
        firsts = jnp.asarray(firsts_of(length, ways, balanced))[jax.lax.axis_index(CONTEXT)]
        parts = jnp.split(q, firsts.shape[0], axis=2)
        outs = [
            body(part, k, v, dataclasses.replace(mask, first=first), bias)
            for part, first in zip(parts, firsts, strict=True)
        ]
        return jnp.concatenate(outs, axis=2)

    return by_device(kernel, place, q, k, v, arrays, balanced=balanced)


def balances(causal: bool, window: Any, length: int, devices: int) -> bool:
    """Whether queries are dealt out in halves: not where all see equally many keys, or halves are odd."""
    return causal and not isinstance(window, int) and length % (2 * devices) == 0


def firsts_of(length: int, devices: int, balanced: bool) -> np.ndarray:
    """The place of the first query of each part that a device attends from, `[devices, parts]`."""
    number = np.arange(devices, dtype=np.int32)
    if not balanced:
        return number[:, None] * (length // devices)
    mirrored = 2 * devices - 1 - number
    # The half with an even number comes first, as `_dealt` has it
    even = np.where(number % 2 == 0, number, mirrored)
    odd = np.where(number % 2 == 0, mirrored, number)
    return np.stack([even, odd], 1) * np.int32(length // devices // 2)


def heads_of_device(place: Place, q: Array) -> int:
    """The number of queries' heads that a device attends with."""
    heads, ways = q.shape[0] * q.shape[1], _tensor(place)
    return heads // ways if any(_heads(place, q)) else heads


def _tensor(place: Place) -> int:
    return 1 if place.mesh is None else place.mesh.shape.get("tensor", 1)


def _heads(place: Place, q: Array) -> tuple[str | None, str | None]:
    """The mesh axis that splits the key heads, and the one that splits the queries' heads of each."""
    ways = _tensor(place)
    for i in (0, 1):
        if ways > 1 and q.shape[i] % ways == 0:
            return ("tensor", None) if i == 0 else (None, "tensor")
    return None, None


def _of_heads(axis: str, dim: int, count: int, bias: Any, rows: Array, columns: Array) -> Array:
    """The bias of this device's heads."""
    first = jax.lax.axis_index(axis) * count
    return jax.lax.dynamic_slice_in_dim(bias(rows, columns), first, count, dim)


def _moves(devices: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where each device sends the first half of its queries, and the second: (from, to)."""
    last = 2 * devices - 1
    homes = [min(half, last - half) for half in range(2 * devices)]
    return list(enumerate(homes[::2])), list(enumerate(homes[1::2]))


def _dealt(x: Array, devices: int) -> Array:
    """Halves i and `2 n - 1 - i` of all queries, the even one first, from halves 2 i and 2 i + 1."""
    halves = zip(jnp.split(x, 2, axis=2), _moves(devices), strict=True)
    return jnp.concatenate([jax.lax.ppermute(half, CONTEXT, moves) for half, moves in halves], 2)


def _returned(x: Array, devices: int) -> Array:
    """The inverse of `_dealt`."""
    halves = zip(jnp.split(x, 2, axis=2), _moves(devices), strict=True)
    back = [
        jax.lax.ppermute(half, CONTEXT, [(to, source) for source, to in moves])
        for half, moves in halves
    ]
    return jnp.concatenate(back, 2)
