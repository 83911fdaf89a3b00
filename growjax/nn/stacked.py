"""A stack of equal blocks, scanned: depth costs one compilation."""

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from growjax import axes
from growjax.errors import AxisError
from growjax.gates import Gate
from growjax.nn.bodies import SAVED


Block = TypeVar("Block", bound=eqx.Module)

Remat = Literal["dots", "nothing", "everything", "offload"]

# Attention over tiles saves the residuals of its own backward pass, or it would run a second time
_attention: Any = jax.checkpoint_policies.save_only_these_names(SAVED)
_to_host: Any = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")


def _offload(primitive: Any, *args: Any, **params: Any) -> Any:
    """What "dots" keeps, with the matrix products in the host's memory until the backward pass."""
    return _attention(primitive, *args, **params) or _to_host(primitive, *args, **params)


_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _attention
    ),
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "offload": _offload,
}


class Stacked(eqx.Module, Generic[Block]):
    """One block whose leaves have a leading `axis`; calling it runs the blocks in turn.

    Three optional vectors along the axis, each None (and free) until something sets it:

    - `gate` (MSG): mixes a block with the identity, `m * block(x) + (1 - m) * x`;
    - `branch` (RaPTr, PLD): handed to the block, which multiplies its residual branches by it;
    - `active`: layers marked False are skipped by `lax.cond`, at no cost for their FLOPs.

    `remat="dots"` keeps matrix products and recomputes the rest, the fastest form even on a CPU but for
    models of a few 100,000 weights, where "nothing" is, which recomputes everything; "everything" keeps
    everything, and "offload" keeps what "dots" does, the products in the host's memory. `unroll`
    blocks are compiled in a row in each iteration of the scan. `read` is applied to one layer's weights
    when the scan comes to them: a sharded run gathers them so (`growjax.parallel.gathered`).
    """

    block: Block = axes.stacked("{axis}")
    gate: Gate | None = axes.gate("{axis}")
    branch: Float[Array, " layers"] | None = axes.branch("{axis}")
    active: Bool[Array, " layers"] | None = axes.active("{axis}")
    axis: str = eqx.field(static=True, default="layers")
    remat: Remat = eqx.field(static=True, default="dots")
    unroll: int = eqx.field(static=True, default=1)
    read: Callable[[Block], Block] | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        make: Callable[[PRNGKeyArray], Block],
        length: int,
        *,
        axis: str = "layers",
        remat: Remat = "dots",
        key: PRNGKeyArray,
    ):
        self.block = eqx.filter_vmap(make)(jax.random.split(key, length))
        self.gate = self.branch = self.active = None
        self.axis, self.remat, self.unroll, self.read = axis, remat, 1, None

    def __call__(self, x: Float[Array, "T embed"], *args: Any, **kwargs: Any) -> Array:
        """Run `block(x, *args, branch=..., **kwargs)` for each layer; the arguments are shared.

        Raises `AxisError` for blocks with auxiliary losses, which would be lost.
        """
        x, auxiliary = self.with_auxiliary(x, *args, **kwargs)
        if auxiliary is not None:
            raise AxisError(
                "this stack of blocks has auxiliary losses (of experts), and the model around it reads "
                "only the output; let it call `with_auxiliary` and give the loss to its Readout, as GPT "
                "and Llama do, or set aux_loss_coef and z_loss_coef to 0"
            )
        return x

    def with_auxiliary(
        self, x: Float[Array, "T embed"], *args: Any, **kwargs: Any
    ) -> tuple[Array, Float[Array, ""] | None]:
        """The output, and the sum of the layers' auxiliary losses; None where there is none.

        A block has them if it has a method `with_auxiliary`, as `growjax.nn.Block` does. The loss of a
        layer is multiplied by its gate; a layer that does not run has none.
        """
        arrays, static = eqx.partition(self.block, eqx.is_array)

        def run(x, layer):
            weights, gate, scale, on = layer
            block = self._block(weights, static)

            def mixed(x):
                y, auxiliary = _run(block, x, *args, branch=scale, **kwargs)
                if auxiliary is None:
                    return _mix(gate, y, x), None
                if gate is not None:
                    auxiliary = auxiliary * jax.lax.stop_gradient(gate.value).astype(
                        auxiliary.dtype
                    )
                return _mix(gate, y, x), auxiliary

            def skipped(x):
                auxiliary = jax.eval_shape(mixed, x)[1]
                # The sum of no entries of x: a zero that varies over devices where x does
                return x, None if auxiliary is None else jnp.sum(x[:0], dtype=auxiliary.dtype)

            return mixed(x) if on is None else jax.lax.cond(on, mixed, skipped, x)

        if self.remat != "everything":
            run = jax.checkpoint(run, prevent_cse=False, policy=_POLICIES[self.remat])
        layers = (arrays, self.gate, self.branch, self.active)
        x, auxiliary = jax.lax.scan(run, x, layers, unroll=self.unroll)
        return x, None if auxiliary is None else jnp.sum(auxiliary)

    def extend(
        self, x: Float[Array, "T embed"], cache: Any, memory: Any, *args: Any, **kwargs: Any
    ) -> tuple[Array, Any]:
        """Run `block.extend(x, cache, memory, *args, branch=..., **kwargs)` for each layer.

        The leaves of `cache` and `memory` have a leading `axis`. Returns the last block's output, and
        the new caches of all.
        """
        arrays, static = eqx.partition(self.block, eqx.is_array)

        def run(x, layer):
            weights, gate, scale, on, cache, memory = layer
            block = self._block(weights, static)

            def mixed(x):
                y, new = block.extend(x, cache, memory, *args, branch=scale, **kwargs)
                return _mix(gate, y, x), new

            return mixed(x) if on is None else jax.lax.cond(on, mixed, lambda x: (x, cache), x)

        layers = (arrays, self.gate, self.branch, self.active, cache, memory)
        return jax.lax.scan(run, x, layers)

    def _block(self, weights: Any, static: Any) -> Any:
        block: Any = eqx.combine(weights, static)
        return block if self.read is None else self.read(block)


def _run(block: Any, x: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array | None]:
    """A block's output and auxiliary loss; `with_auxiliary` must be as new as `__call__`."""
    for cls in type(block).__mro__:
        if "with_auxiliary" in vars(cls):
            return block.with_auxiliary(x, *args, **kwargs)
        if "__call__" in vars(cls):
            break
    return block(x, *args, **kwargs), None


def _mix(gate: Gate | None, y: Array, x: Array) -> Array:
    if gate is None:
        return y
    m = jax.lax.stop_gradient(gate.value).astype(x.dtype)
    return m * y + (1 - m) * x
