"""Attention on TPUs by JAX's splash attention, a flash attention that skips the tiles nobody sees.

Who sees whom by position alone (causal, windows) is compiled into the kernel; padding, documents and
prefixes are numbers of queries and keys that must be equal. Importing this module imports Pallas, which
takes a second, so it is imported where it is used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from growjax.nn.bodies import SAVED
from growjax.nn.mask import Mask
from growjax.nn.place import CONTEXT, Place
from growjax.nn.split import balances, by_device, firsts_of, heads_of_device


# The sides that the kernel's tiles may have: multiples of a TPU's 128 lanes
_SIDES = range(128, 1025, 128)
# By the compiler's schedules, a tile costs as much as so many scores more, and two kernels for the
# gradients so much more than a fused one
_TILE, _SPLIT = 340**2, 1.34
# The segment of keys that no query may see; documents are counted from 0
_NOWHERE = -(2**31)


# Under this name `growjax.cost` counts its FLOPs
@functools.partial(jax.jit, static_argnames=("window", "cap", "place"))
def splash_attention(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Mask,
    *,
    window: int | None,
    cap: float | None,
    place: Place,
) -> Array:
    """`growjax.nn.attend` by the TPU's kernel; on other platforms, Pallas interprets it, slowly.

    `window` is that of the mask, whose own is None: the kernel is compiled for one width.
    """
    length, total, ways = queries.shape[2], keys.shape[1], place.context
    tile_q, tile_k = _side(length // ways), _side(total)
    balanced = balances(mask.causal, window, length, ways)
    places = _places(length, ways, balanced, tile_q)
    extra = -total % tile_k
    copies = 2 if mask.causal and mask.prefix is not None else 1
    pattern = _pattern(mask, window, places, total + extra)
    segments = _segments(mask, places, total, tile_k)
    run: Any = splash.make_splash_mha(
        masks.MultiHeadMask([pattern] * heads_of_device(place, queries)),
        block_sizes=_sizes(tile_q, tile_k, copies * (total + extra), keys.shape[2]),
        head_shards=1,
        q_seq_shards=ways,
        attn_logits_soft_cap=cap,
        interpret=place.platform != "tpu",
    )

    def kernel(q, k, v, rest):
        """Of one sequence, on one device."""
        run, segments = rest
        shape = q.shape
        q, k, v = _padded(q, 2, tile_q), _padded(k, 1, tile_k), _padded(v, 1, tile_k)
        # A query sees keys up to its own place, and any of a prefix behind it. These are disjoint, so one
        # softmax over two copies of the keys has both.
        k, v = (jnp.concatenate([x] * copies, 1) for x in (k, v))
        # Query heads that share a key head are neighbours
        out = _attention(run, q.reshape(-1, *q.shape[2:]), k, v, segments).reshape(q.shape)
        return out[:, :, : shape[2]]

    specs: Any = PartitionSpec()
    if ways > 1:
        assert place.mesh is not None
        rows: Any = PartitionSpec(CONTEXT)
        whole: Any = PartitionSpec()
        of_run = run.manual_sharding_spec(NamedSharding(place.mesh, PartitionSpec(None, CONTEXT)))
        specs = of_run, segments and splash.SegmentIds(rows, whole)
    return by_device(
        kernel, place, queries, keys, values, (run, segments), specs=specs, balanced=balanced
    )


@jax.custom_vjp
def _attention(run: Any, q: Array, k: Array, v: Array, segments: Any) -> Array:
    """A kernel on `[heads, T, head_dim]`, which keeps its output as `[heads, head_dim, T]`.

    The compiler then reads what a stack of layers has kept without a copy for each layer, which is 2.5%
    of a step of a 350M GPT by its estimate. The kernel's own gradient keeps it as the kernel writes it.
    """
    return run(q, k, v, segments)


def _forward(run: Any, q: Array, k: Array, v: Array, segments: Any) -> tuple[Array, Any]:
    infos = run.fwd_mask_info, run.dq_mask_info, run.dkv_mask_info
    keeps = splash.SplashAttentionKernel(*infos, **run.kwargs | {"save_residuals": True})
    out, (logs,) = keeps(q, k, v, segments)
    turned = checkpoint_name(jnp.swapaxes(out, 1, 2), SAVED)
    logs = checkpoint_name(logs, SAVED)
    return jnp.swapaxes(turned, 1, 2), (run, q, k, v, segments, turned, logs)


def _backward(saved: Any, gradient: Array) -> tuple[None, Array, Array, Array, None]:
    run, q, k, v, segments, turned, logs = saved
    out = jnp.swapaxes(turned, 1, 2)
    residuals = q, k, v, segments, None, out, logs, run.dq_mask_info, run.dkv_mask_info
    # JAX has no public name for the kernels of the gradient
    gradients = splash._splash_attention_bwd(**run.kwargs, res=residuals, do=gradient)
    _, _, _, dq, dk, dv, *_ = gradients
    return None, dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _places(length: int, devices: int, balanced: bool, tile: int) -> np.ndarray:
    """The places of the queries in the order in which devices attend from them, each filled up to tiles.

    What is filled up counts as the last place.
    """
    firsts = firsts_of(length, devices, balanced)
    part = length // firsts.size
    own = (firsts[:, :, None] + np.arange(part, dtype=np.int32)).reshape(devices, -1)
    return np.pad(own, ((0, 0), (0, -own.shape[1] % tile)), constant_values=length - 1).reshape(-1)


def _side(length: int) -> int:
    """The side of the tiles that compute a causal square of this length soonest."""

    def cost(side: int) -> float:
        rows = -(-length // side)
        return rows * (rows + 1) * (side**2 + _TILE) * (_SPLIT if rows > 1 else 1.0)

    return min(_SIDES, key=cost)


def _sizes(tile_q: int, tile_k: int, total: int, head_dim: int) -> splash.BlockSizes:
    """The tiles of the forward and backward kernels, and how they read their arguments."""
    # One kernel can compute all gradients, but writes the queries' for each tile of keys, to be added
    fused = total == tile_k
    # Heads that do not fill the lanes would be padded to them in memory
    order = splash.QKVLayout
    layout = order.SEQ_MINOR if head_dim % 128 else order.HEAD_DIM_MINOR
    return splash.BlockSizes(
        block_q=tile_q,
        block_kv=tile_k,
        block_q_dkv=tile_q,
        block_kv_dkv=tile_k,
        block_q_dq=None if fused else tile_q,
        block_kv_dq=None if fused else tile_k,
        use_fused_bwd_kernel=fused,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )


class _Behind(masks.Mask):
    """Keys up to the query's place, then a second copy of the keys, of which those after it."""

    def __init__(self, places: np.ndarray, keys: int, window: int | None):
        self.places, self.window = places, window
        self.shape_ = (places.size, 2 * keys)

    @property
    def shape(self) -> tuple[int, int]:
        return self.shape_

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = self.places[index[0]], np.arange(self.shape_[1])[index[1]]
        keys = self.shape_[1] // 2
        query, key = rows[:, None], columns[None, :] % keys
        seen = np.where(columns[None, :] < keys, key <= query, key > query)
        return seen if self.window is None else seen & (np.abs(query - key) < self.window)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Behind):
            return NotImplemented
        mine, theirs = (m.shape_ + (m.window, m.places.tobytes()) for m in (self, other))
        return mine == theirs

    def __hash__(self) -> int:
        return hash((_Behind, self.shape_, self.window, self.places.tobytes()))


def _pattern(mask: Mask, window: int | None, places: np.ndarray, keys: int) -> masks.Mask:
    """What a mask says by position alone, from which the kernel knows the tiles to skip."""
    shape = places.size, keys
    if mask.prefix is not None and mask.causal:
        return _Behind(places, keys, window)
    if window is None and not mask.causal:
        return masks.FullMask(shape)
    if window is None:
        pattern = masks.CausalMask(shape)
    else:
        pattern = masks.LocalMask(shape, (window - 1, 0 if mask.causal else window - 1), 0)
    pattern.q_sequence = places
    return pattern


def _segments(mask: Mask, places: np.ndarray, keys: int, tile_k: int) -> splash.SegmentIds | None:
    """Numbers for queries and keys, of which a query sees the equal ones; None where all are equal."""
    before = mask.causal and places.max() < keys  # no query sees the padding behind the keys
    if mask.keys is None and mask.documents is None and mask.prefix is None:
        if keys % tile_k == 0 or before:
            return None
    own = jnp.zeros(places.size, jnp.int32)
    if mask.documents is not None:
        own = mask.documents[places].astype(jnp.int32)
    of_keys = jnp.zeros(keys, jnp.int32) if mask.documents is None else mask.documents

    def hidden(numbers: Array, shown: Array | None) -> Int[Array, " S"]:
        numbers = numbers if shown is None else jnp.where(shown, numbers, _NOWHERE)
        extra = -keys % tile_k
        return jnp.pad(numbers.astype(jnp.int32), (0, extra), constant_values=_NOWHERE)

    of_keys = hidden(of_keys, mask.keys)
    if mask.prefix is not None and mask.causal:
        prefix = jnp.pad(mask.prefix, (0, of_keys.shape[0] - keys))
        of_keys = jnp.concatenate([of_keys, jnp.where(prefix, of_keys, _NOWHERE)])
    return splash.SegmentIds(own, of_keys)


def _padded(x: Array, axis: int, tile: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % tile)
    return jnp.pad(x, widths)
