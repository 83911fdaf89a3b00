"""Attention as one function, and the bodies that compute it.

All bodies compute `softmax(queries @ keys + bias, where mask is True) @ values`. "einsum" writes all
scores to memory, `[T, S]` a head, which is fastest for short sequences. "blockwise" never does: it goes
over tiles of queries and keys with a running maximum and sum, and computes each tile again in the
backward pass from the logarithm of the sum (Milakov and Gimelshein, arXiv:1805.02867, 2018; Dao et al.,
"FlashAttention", 2022). Tiles that no query can see are skipped: in a decoder, half of them. It is
plain JAX, so it runs everywhere, in float64 too, with a bias and with any mask. "splash" and "cudnn" are
the kernels of TPUs and of NVIDIA GPUs (`growjax.nn.kernels`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from growjax.errors import AxisError, raise_all
from growjax.nn.kernels import cudnn_attention, obstacle
from growjax.nn.mask import ALL, Mask
from growjax.nn.place import SHAPES, Place, current
from growjax.nn.split import in_parts, odd_lengths


Body = Literal["auto", "einsum", "blockwise", "splash", "cudnn"]
# Bias on the scores: all of it, or a function of the places of queries and of keys
Bias = Float[Array, "kv_heads group T S"] | Callable[[Array, Array], Array]

# For "auto": the fewest scores of one head for which tiles pay, and the side of a tile
LONG = 256 * 256
TILE = 256
# The kernel of each platform
KERNELS: dict[str, Body] = {"tpu": "splash", "gpu": "cudnn"}
# The names under which `jax.checkpoint` policies save the residuals of the backward pass, and what
# attention reads: queries, keys and values after biases, norms and rotations
SAVED, READ = "attention", "attention inputs"


def attend(
    queries: Float[Array, "kv_heads group T head_dim"],
    keys: Float[Array, "kv_heads S head_dim"],
    values: Float[Array, "kv_heads S head_dim"],
    mask: Mask = ALL,
    bias: Bias | None = None,
    *,
    cap: float | None = None,
    body: Body = "auto",
) -> Float[Array, "kv_heads group T head_dim"]:
    """Attention of queries, which are scaled already, to keys and values.

    With `cap`, scores are `cap * tanh(scores / cap)` before the bias and the mask (Gemma 2).

    Scores and sums are in float32 at least. A query that sees no key gets an average of some values, and
    never NaN. `body` says how it is computed; "auto" takes tiles for long sequences, and the platform's
    kernel instead where there is one and it can (of the platform that is compiled for). Raises
    `AxisError` for a body that does not exist or cannot compute this, and for a mask or a bias of other
    lengths. Off TPUs "splash" is interpreted, which is slow; "cudnn" is for GPUs alone.

    **Example**

        attend(q * q.shape[-1] ** -0.5, k, v, Mask(causal=True, window=1024))
    """
    if body not in get_args(Body):
        raise AxisError(f"body: expected one of {', '.join(get_args(Body))}, got {body!r}")
    shape = (*queries.shape[:3], keys.shape[1])
    place = current()
    faults = mask.misfits(*shape[2:])
    if place is not None and place.context > 1:
        faults += odd_lengths(place.context, queries=shape[2], keys=shape[3])
    if bias is not None and not callable(bias) and bias.shape != shape:
        faults.append(f"bias: expected {list(shape)}, got {list(bias.shape)}")
    raise_all(AxisError, "attention cannot be computed with these:", faults)
    queries, keys, values = (checkpoint_name(x, READ) for x in (queries, keys, values))
    if body == "auto":
        body = _chosen(queries, keys, mask, bias, cap, place)
    elif body in ("splash", "cudnn") and (
        reason := obstacle(body, queries, mask, bias, cap, place)
    ):
        raise AxisError(f"body: {body!r} cannot compute this attention; take 'auto'. {reason}")
    if place == SHAPES and body in ("splash", "cudnn"):
        body = "blockwise"  # which has the FLOPs and residuals of every kernel
    if body in ("splash", "cudnn"):
        place = place or Place(jax.default_backend())
        width: Any = mask.window
        fixed = {"window": None if width is None else int(width), "place": place}
        mask = dataclasses.replace(mask, window=None)
        if body == "cudnn":
            if place.platform != "gpu":
                raise AxisError(f"body: 'cudnn' is for NVIDIA GPUs, not for {place.platform}")
            return cudnn_attention(queries, keys, values, mask, **fixed)
        # Importing Pallas takes a second
        from growjax.nn.splash import splash_attention

        return splash_attention(queries, keys, values, mask, cap=cap, **fixed)
    plain = functools.partial(_einsum if body == "einsum" else _tiles, cap=cap)
    whole = place is None or place.context == 1
    if body == "einsum" and whole:
        return plain(queries, keys, values, mask, bias)
    sliced: Any = bias
    if bias is not None and not callable(bias):
        sliced = jax.tree_util.Partial(_slice, bias)
    if place is None or whole:
        return plain(queries, keys, values, mask, sliced)
    return in_parts(plain, place, queries, keys, values, mask, sliced)


def _chosen(queries, keys, mask, bias, cap, place) -> Body:
    """The body that "auto" stands for."""
    if queries.shape[2] * keys.shape[1] < LONG:
        return "einsum"
    kernel = None if place is None else KERNELS.get(place.platform)
    if kernel is None or obstacle(kernel, queries, mask, bias, cap, place):
        return "blockwise"
    return kernel


def _einsum(queries, keys, values, mask, bias, cap=None):
    """All scores at once."""
    rows, columns = jnp.arange(queries.shape[2]), jnp.arange(keys.shape[1])
    scores = jnp.einsum("kgtd,ksd->kgts", queries, keys).astype(_wide(queries))
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    if bias is not None:
        some = bias(mask.places(rows), columns) if callable(bias) else bias
        scores = scores + jnp.asarray(some, scores.dtype)
    seen = mask.tile(rows, columns, whole=mask.first is None)
    if seen is not None:
        scores = jnp.where(seen, scores, _unseen(scores))
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    return jnp.einsum("kgts,ksd->kgtd", weights, values)


def _tiles(queries, keys, values, mask, bias, cap):
    place, side = current(), TILE
    if place is not None and place.platform == "cpu":
        # Short sequences come several at a time, and a CPU's caches hold one tile of each; long ones come
        # alone, and the products of a tile keep all cores busy only if it is large
        length = queries.shape[2]
        side = TILE // 2 if length <= 4 * TILE else TILE if length <= 8 * TILE else 2 * TILE
    return blockwise_attention(queries, keys, values, mask, bias, side, cap)


# Blockwise -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(5, 6))  # `growjax.cost` counts FLOPs under this name
def blockwise_attention(queries, keys, values, mask, bias, tile, cap=None):
    """Attention over square tiles; `bias` is None or a pytree that is called with places."""
    return _blockwise(queries, keys, values, mask, bias, tile, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(queries, keys, values, mask, bias, tile, cap):
    return _forward(queries, keys, values, mask, bias, tile, cap)[0]


def _forward(queries, keys, values, mask, bias, tile, cap):
    """The output, and the logarithm of each row's sum, which the backward pass needs besides."""
    length, total = queries.shape[2], keys.shape[1]
    q, k, v = _padded(queries, 2, tile), _padded(keys, 1, tile), _padded(values, 1, tile)
    wide = _wide(queries)

    def row(i):
        block = _block(q, i, 2, tile)

        def add(j, carry):
            out, top, sums = carry
            scores, _, _ = _tile(block, _block(k, j, 1, tile), mask, bias, i, j, tile, total, cap)
            highest = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - highest[..., None])
            fade = jnp.exp(top - highest)
            read = jnp.einsum(
                "kgts,ksd->kgtd",
                weights.astype(v.dtype),
                _block(v, j, 1, tile),
                preferred_element_type=wide,
            )
            return out * fade[..., None] + read, highest, sums * fade + weights.sum(-1)

        shape = block.shape[:3]
        start = (
            jnp.zeros(block.shape, wide),
            jnp.full(shape, _unseen(jnp.zeros((), wide))),
            jnp.zeros(shape, wide),
        )
        out, top, sums = jax.lax.fori_loop(*_reach(mask, i, tile, total), add, start)
        return (out / sums[..., None]).astype(queries.dtype), top + jnp.log(sums)

    rows = q.shape[2] // tile
    if rows == 1:
        out, logs = row(0)
    else:
        out, logs = (_joined(x) for x in jax.lax.map(row, jnp.arange(rows)))
    out, logs = out[:, :, :length], logs[:, :, :length]
    return checkpoint_name(out, SAVED), checkpoint_name(logs, SAVED)


def _forward_rule(queries, keys, values, mask, bias, tile, cap):
    out, logs = _forward(queries, keys, values, mask, bias, tile, cap)
    return out, (queries, keys, values, mask, bias, out, logs)


def _backward_rule(tile, cap, residuals, gradient):
    """Gradients by the rule of the softmax: of a score, `weight * (d weight - sum of out * d out)`."""
    queries, keys, values, mask, bias, out, logs = residuals
    total, wide = keys.shape[1], _wide(queries)
    mean = jnp.einsum("kgtd,kgtd->kgt", gradient, out, preferred_element_type=wide)
    q, do = _padded(queries, 2, tile), _padded(gradient, 2, tile)
    logs, mean = _padded(logs, 2, tile), _padded(mean, 2, tile)
    k, v = _padded(keys, 1, tile), _padded(values, 1, tile)

    def product(spec, *arrays):
        return jnp.einsum(spec, *arrays, preferred_element_type=wide)

    def row(i, carry):
        mine = [_block(x, i, 2, tile) for x in (q, do, logs, mean)]
        block, d_out, log, average = mine
        # Gradients of keys and values are summed as [head_dim, S]: no tile of scores is transposed
        turned_block, turned_d_out = (jnp.moveaxis(x, 3, 1) for x in (block, d_out))

        def add(j, carry):
            dq, dk, dv, db = carry
            k_block, v_block = _block(k, j, 1, tile), _block(v, j, 1, tile)
            scores, seen, slope = _tile(block, k_block, mask, bias, i, j, tile, total, cap)
            weights = jnp.exp(scores - log[..., None])
            d_scores = weights * (product("kgtd,ksd->kgts", d_out, v_block) - average[..., None])
            d_scores = d_scores if seen is None else jnp.where(seen, d_scores, 0)
            if bias is not None:
                places = mask.places(_places(i, tile)), _places(j, tile)
                _, pull = jax.vjp(lambda b: b(*places).astype(wide), bias)
                db = jax.tree.map(jnp.add, db, pull(d_scores)[0])
            d_scores = d_scores if slope is None else d_scores * slope
            d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
            dq = dq + product("kgts,ksd->kgtd", d_scores, k_block)
            dk = _added(dk, product("kdgt,kgts->kds", turned_block, d_scores), j, tile)
            dv = _added(dv, product("kdgt,kgts->kds", turned_d_out, weights), j, tile)
            return dq, dk, dv, db

        dq, dk, dv, db = carry
        start = jnp.zeros(block.shape, wide), dk, dv, db
        row_dq, dk, dv, db = jax.lax.fori_loop(*_reach(mask, i, tile, total), add, start)
        return _put(dq, row_dq, i, tile), dk, dv, db

    turned = (jnp.zeros((x.shape[0], x.shape[2], x.shape[1]), wide) for x in (k, v))
    start = jnp.zeros(q.shape, wide), *turned, jax.tree.map(jnp.zeros_like, bias)
    dq, dk, dv, db = jax.lax.fori_loop(0, q.shape[2] // tile, row, start)
    dq = dq[:, :, : queries.shape[2]].astype(queries.dtype)
    # With one tile, XLA would fold the transposes into the products that follow, which is slow on CPUs
    dk, dv = jax.lax.optimization_barrier((dk, dv))
    dk, dv = (x.mT[:, :total].astype(y.dtype) for x, y in ((dk, keys), (dv, values)))
    return dq, dk, dv, None, db


_blockwise.defvjp(_forward_rule, _backward_rule)


def _tile(queries, keys, mask, bias, i, j, tile, total, cap):
    """The scores of one tile, which of them are of keys that are seen (None: all), and their slopes.

    The slope is that of a cap on the scores, by the products of queries and keys (None: no cap).
    """
    rows, columns, slope = _places(i, tile), _places(j, tile), None
    scores = jnp.einsum("kgtd,ksd->kgts", queries, keys, preferred_element_type=_wide(queries))
    if cap is not None:
        bent = jnp.tanh(scores / cap)
        scores, slope = cap * bent, 1 - bent * bent
    if bias is not None:
        scores = scores + bias(mask.places(rows), columns).astype(scores.dtype)
    seen = mask.tile(rows, columns)
    if total % tile:
        real = (columns < total)[None, :]
        seen = real if seen is None else seen & real
    scores = scores if seen is None else jnp.where(seen, scores, _unseen(scores))
    return scores, seen, slope


def _reach(mask, i, tile, total):
    """The tiles of keys that the queries of tile `i` can see, as a range."""
    low, high = mask.reach(i * tile, tile, total)
    return low // tile, -(-high // tile)


def _places(i, tile):
    return i * tile + jnp.arange(tile)


def _block(x, i, axis, tile):
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis)


def _put(x, block, i, tile):
    return jax.lax.dynamic_update_slice_in_dim(x, block, i * tile, 2)


def _added(x, block, j, tile):
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, j, 2, tile) + block, j * tile, 2)


def _joined(x):
    """Rows of tiles `[n, kv_heads, group, tile, ...]` as one sequence."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _padded(x, axis, tile):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % tile)
    return jnp.pad(x, widths)


def _slice(bias, rows, columns):
    """One tile of a bias that is given as a whole array."""
    return bias.at[:, :, rows[:, None], columns[None, :]].get(mode="clip")


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _unseen(scores):
    # Finite, so that a row without any key gives an average instead of NaN
    return jnp.finfo(scores.dtype).min / 2
