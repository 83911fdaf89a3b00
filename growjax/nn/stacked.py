"""A stack of equal blocks, scanned: depth costs one compilation."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from growjax import axes
from growjax.errors import AxisError
from growjax.gates import Gate
from growjax.nn.bodies import READ, SAVED
from growjax.nn.norm import STATISTICS


Block = TypeVar("Block", bound=eqx.Module)

Remat = Literal["dots", "attention", "nothing", "everything", "offload"]

# What may be kept in the host's memory: the residual stream that enters a block, what its attention reads
# and gives, and the residual stream between its attention and its feed-forward
Name = Literal["layer inputs", "attention inputs", "attention", "between branches"]
INPUTS, BETWEEN = "layer inputs", "between branches"

# Attention over tiles saves the residuals of its own backward pass, or it would run a second time
_attention: Any = jax.checkpoint_policies.save_only_these_names(SAVED, STATISTICS)
_to_host: Any = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")


def _offload(primitive: Any, *args: Any, **params: Any) -> Any:
    """What "dots" keeps, with the matrix products in the host's memory until the backward pass."""
    return _attention(primitive, *args, **params) or _to_host(primitive, *args, **params)


_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _attention
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED, READ, BETWEEN, STATISTICS),
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "offload": _offload,
}


def _policy(remat: Remat, offload: tuple[Name, ...]) -> Any:
    """What `jax.checkpoint` keeps of a block, and where; None for everything, where it is computed."""
    if not offload:
        return _POLICIES.get(remat)
    keeps = _POLICIES.get(remat, jax.checkpoint_policies.everything_saveable)
    to_host: Any = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        named = primitive.name == "name" and params["name"] in offload
        return (to_host if named else keeps)(primitive, *args, **params)

    return policy


def remembering(model: Any, remat: Remat | None, unroll: int, offload: tuple[Name, ...]) -> Any:
    """The model with every stack scanned so; a `remat` of None is that of each stack."""

    def change(part: Any) -> Any:
        if not isinstance(part, Stacked):
            return part
        fields = {
            "remat": remat or part.remat,
            "unroll": unroll,
            "offload": offload,
            "block": remembering(part.block, remat, unroll, offload),  # there may be stacks in it
        }
        return axes.put(part, {(name,): value for name, value in fields.items()})

    if (remat, unroll, offload) == (None, 1, ()):
        return model
    return jax.tree.map(change, model, is_leaf=lambda part: isinstance(part, Stacked))


class Stacked(eqx.Module, Generic[Block]):
    """One block whose leaves have a leading `axis`; calling it runs the blocks in turn.

    Three optional vectors along the axis, each None (and free) until something sets it:

    - `gate` (MSG): mixes a block with the identity, `m * block(x) + (1 - m) * x`;
    - `branch` (RaPTr, PLD): handed to the block, which multiplies its residual branches by it;
    - `active`: layers marked False are skipped by `lax.cond`, at no cost for their FLOPs.

    A stack that is `thinned` gives some blocks a part of the tokens, and one with `exits` has the outputs
    of some blocks besides, each with a weight in the loss (`LayerSkip`).

    `remat="dots"` keeps matrix products and recomputes the rest, the fastest form even on a CPU but for
    models of a few 100,000 weights, where "nothing" is, which recomputes everything. "attention" keeps
    what attention reads and gives, and recomputes the feed-forward: the fastest on TPUs, by the
    compiler's cycles. "everything" keeps everything, and "offload" what "dots" does, the products in the
    host's memory. Of what has a name (`Name`), that in `offload` is kept there, whatever `remat` is.
    `unroll` blocks are compiled in a row in each iteration of the scan. `read` is applied to one layer's
    weights when the scan comes to them: a sharded run gathers them so (`growjax.parallel.gathered`).
    """

    block: Block = axes.stacked("{axis}")
    gate: Gate | None = axes.gate("{axis}")
    branch: Float[Array, " layers"] | None = axes.branch("{axis}")
    active: Bool[Array, " layers"] | None = axes.active("{axis}")
    token_keys: UInt32[Array, "layers 2"] | None = axes.buffer("{axis}: 2")
    token_count: int = eqx.field(static=True, default=0)
    token_keep: tuple[int, ...] = eqx.field(static=True, default=())
    exits: tuple[tuple[int, float], ...] = eqx.field(static=True, default=())
    axis: str = eqx.field(static=True, default="layers")
    remat: Remat = eqx.field(static=True, default="dots")
    unroll: int = eqx.field(static=True, default=1)
    offload: tuple[Name, ...] = eqx.field(static=True, default=())
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
        self.gate = self.branch = self.active = self.token_keys = None
        self.token_count, self.token_keep, self.exits = 0, (), ()
        self.axis, self.remat, self.unroll = axis, remat, 1
        self.offload, self.read = (), None

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
        if self.exits:
            raise AxisError(
                "this stack has early exits, and the model around it reads only the output; let it call "
                "`with_exits` and give the outputs to its Readout, as GPT and Llama do"
            )
        x, auxiliary, _ = self.with_exits(x, *args, **kwargs)
        return x, auxiliary

    def with_exits(
        self, x: Float[Array, "T embed"], *args: Any, **kwargs: Any
    ) -> tuple[Array, Float[Array, ""] | None, Float[Array, "exits T embed"] | None]:
        """The same, and the outputs of the blocks in `exits`; None without any."""
        arrays, static = eqx.partition(self.block, eqx.is_array)
        layers = (arrays, self.gate, self.branch, self.active, self.token_keys)

        def run(whole, x, layer):
            weights, gate, scale, on, key = layer
            block = self._block(weights, static)
            x = checkpoint_name(x, INPUTS)

            def mixed(x):
                call = (
                    block if whole else _Thinned(block, _drawn(key, self.token_count, x.shape[0]))
                )
                y, auxiliary = _run(call, x, *args, branch=scale, **kwargs)
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

        total, outputs, policy = None, [], _policy(self.remat, self.offload)
        for whole, part in self._runs(x.shape[0], layers):
            step: Any = functools.partial(run, whole)
            if self.exits:
                step = functools.partial(_with_output, step)
            if policy is not None:
                step = jax.checkpoint(step, prevent_cse=False, policy=policy)
            x, auxiliary = jax.lax.scan(step, x, part, unroll=self.unroll)
            if self.exits:
                auxiliary, after = auxiliary
                outputs.append(after)
            if auxiliary is not None:
                total = jnp.sum(auxiliary) if total is None else total + jnp.sum(auxiliary)
        if not self.exits:
            return x, total, None
        chosen = np.array([layer for layer, _ in self.exits])
        return x, total, jnp.concatenate(outputs)[chosen]

    def thinned(
        self, keys: UInt32[Array, "layers 2"], count: int, keep: tuple[int, ...]
    ) -> "Stacked[Block]":
        """The stack whose blocks, but for those of `keep`, read `count` tokens each, drawn by keys.

        Blocks need a method `on_tokens`, as `growjax.nn.Block` has.
        """
        changed = {
            "token_keys": keys,
            "token_count": count,
            "token_keep": keep,
        }
        return axes.put(self, {(name,): value for name, value in changed.items()})

    def exiting(self, exits: tuple[tuple[int, float], ...]) -> "Stacked[Block]":
        """The stack with these exits: pairs of a block's number and its weight in the loss."""
        return axes.put(self, {("exits",): exits})

    def _runs(self, tokens: int, layers: Any) -> Iterator[tuple[bool, Any]]:
        """The layers in runs that read all tokens, or some of them; one run unless it is thinned."""
        depth = 0 if self.token_keys is None else self.token_keys.shape[0]
        if not depth or self.token_count >= tokens:
            yield True, layers
            return
        reads_all = {i % depth for i in self.token_keep if -depth <= i < depth}
        for whole, run in itertools.groupby(range(depth), reads_all.__contains__):
            numbers = list(run)
            part = slice(numbers[0], numbers[-1] + 1)
            yield whole, jax.tree.map(lambda x, part=part: x[part], layers)

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

        if self.token_keys is not None:
            raise AxisError(
                "a stack that reads some of the tokens has no cache; use the whole model"
            )
        layers = (arrays, self.gate, self.branch, self.active, cache, memory)
        return jax.lax.scan(run, x, layers)

    def _block(self, weights: Any, static: Any) -> Any:
        block: Any = eqx.combine(weights, static)
        return block if self.read is None else self.read(block)


def _with_output(step: Callable[[Any, Any], Any], x: Any, layer: Any) -> Any:
    """A step of the scan that hands out the block's output as well."""
    x, auxiliary = step(x, layer)
    return x, (auxiliary, x)


class _Thinned(NamedTuple):
    """A block on some of the tokens."""

    block: Any
    tokens: Int[Array, " count"]

    def with_auxiliary(self, x: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array | None]:
        return self.block.on_tokens(x, self.tokens, *args, **kwargs)


def _drawn(key: Array, count: int, tokens: int) -> Int[Array, " count"]:
    """Some of the tokens, in order."""
    drawn = jax.random.permutation(jax.random.wrap_key_data(key), tokens)[:count]
    return jnp.sort(drawn)


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
