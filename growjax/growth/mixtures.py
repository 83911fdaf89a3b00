"""Maps that were learned: a matrix for each side of an axis, and for the depth of each array (LiGO).

Wang et al., "Learning to Grow Pretrained Models for Efficient Transformer Training", ICLR 2023.
`ligo` learns them in a plan, and by `growjax.fitting.fit`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import maps, values
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes, axes_of
from growjax.cards import Card
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish
from growjax.growth.fits import Fit, Measure, adam
from growjax.growth.matrices import LIGO, Matrices, matrix_faults
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve
from growjax.values import Size, at_least, positive


@dataclasses.dataclass(frozen=True)
class Mixed(Finish):
    """Layers that are sums of old layers, with a matrix `[new, old]` for each array's path."""

    matrices: Any

    def prepared(self, move, table):
        """The same with the matrices of whole arrays for each of their blocks."""
        given = dict(self.matrices)
        slots = [slot for slot in table.having(move.axis, "param") if slot.path in given]
        return Mixed({part.path: given[slot.path] for slot in slots for part in slot.parts})

    def applied(self, move, slot, old, new, *, key):
        """The sums over old layers; arrays without a matrix stay as they were gathered."""
        del key
        matrix = self.matrices.get(slot.path)
        if slot.kind != "param" or matrix is None:
            return new
        (dim,) = slot.positions(move.axis)
        weights = jnp.asarray(matrix, old.dtype)
        # Where a module computes with `1 + w`, that is what is summed
        rows = old - slot.origin
        mixed = jnp.tensordot(weights, rows, axes=(1, dim), precision=jax.lax.Precision.HIGHEST)
        return jnp.moveaxis(mixed + slot.origin, 0, dim)

    def undetermined(self, move, role):
        """Sums of layers have no gradient of their own."""
        del role
        return f"new {move.axis} are sums of old ones"


def width_map(axis: str, produced: Any, consumed: Any) -> AxisMap:
    """The map of an axis by a matrix `[new, old]` for each side, which may be traced."""
    new, old = produced.shape
    source = np.where(np.arange(new) < old, np.arange(new), NONE)
    return AxisMap(axis, source, produced=produced, consumed=consumed)


def depth_map(axis: str, old: int, new: int, matrices: Any) -> AxisMap:
    """The map of a stack by a matrix for each array, which may be traced."""
    source = np.where(np.arange(new) < old, np.arange(new), NONE)
    return AxisMap(axis, source, init="zeros", finish=Mixed(matrices))


@values.register
class Learned(Operator):
    """Growth by learned matrices; see `learned`."""

    produced: Matrices = eqx.field(static=True, default=())
    consumed: Matrices = eqx.field(static=True, default=())
    depth: Annotated[
        tuple[tuple[str, Any], ...], values.Faults("matrices [new, old]", matrix_faults)
    ] = eqx.field(static=True, default=())
    stack: str = eqx.field(static=True, default="layers")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="Width and depth by matrices that were learned elsewhere (gj.growth.ligo learns them).",
        traps=(
            "Its numbers have cost something, which a comparison has to charge.",
            "Optimizer state does not follow; start it anew.",
        ),
        example="learned(depth=(('blocks.block.mlp.up', ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))),))",
        papers=(LIGO,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """A dense map for every axis of the width, then one for the depth."""
        consumed = dict(self.consumed)
        faults = []
        pairs = [(axis, rows, consumed.get(axis)) for axis, rows in self.produced]
        for axis, rows, other in pairs:
            if other is None or np.shape(other) != np.shape(rows):
                faults.append(
                    f"{axis}: expected a matrix for what consumes it too, of the same shape"
                )
            elif len(rows[0]) != axes.size(axis):
                faults.append(
                    f"{axis}: expected a matrix [new, {axes.size(axis)}], got {np.shape(rows)}"
                )
        faults += [
            f"{axis}: expected a matrix for what produces it too"
            for axis in consumed
            if axis not in dict(self.produced)
        ]
        paths = [s.path for s in axes.having(self.stack, "param")] if self.depth else []
        old = axes.size(self.stack) if self.depth else 0
        faults += [
            f"{path}: no array of {self.stack} has this path"
            for path, _ in self.depth
            if path not in paths
        ]
        faults += [
            f"{path}: expected a matrix [new, {old}], got {np.shape(rows)}"
            for path, rows in self.depth
            if np.shape(rows)[1] != old
        ]
        if len({len(rows) for _, rows in self.depth}) > 1:
            faults.append(f"depth: expected as many new {self.stack} in every matrix")
        raise_all(GrowthError, "these matrices do not fit the model:", faults)
        produced = {axis: np.asarray(rows) for axis, rows in self.produced}
        other = {axis: np.asarray(rows) for axis, rows in self.consumed}
        return _moves(axes, self.stack, produced, other, dict(self.depth))


def _moves(
    axes: Axes, stack: str, produced: Mapping[str, Any], consumed: Mapping[str, Any], depth: Any
) -> list[AxisMap]:
    """The maps of matrices for both sides of axes, and for the layers of arrays."""
    moves = [width_map(axis, rows, consumed[axis]) for axis, rows in produced.items()]
    if depth:
        new = len(next(iter(depth.values())))
        moves.append(depth_map(stack, axes.size(stack), new, tuple(depth.items())))
    return moves


def learned(
    *,
    produced: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    consumed: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    depth: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    stack: str = "layers",
) -> Learned:
    """Grow by learned matrices `[new, old]`: for both sides of an axis, and for the layers of an array.

    As `gj.dense`, but what consumes an axis has a matrix that is no dual of the other, so nothing keeps
    the function, and optimizer state is refused (`StateError`): start it again.

    **Arguments**

    - `produced`, `consumed`: axis to matrix.
    - `depth`: path of an array to the matrix that mixes its layers; others have zeros in new layers.
    - `stack`: the axis of the layers.

    `growjax.growth.ligo` learns such matrices. Raises `GrowthError` for matrices that do not fit.

    **Example**

        gj.growth.learned(produced={"mlp": made}, consumed={"mlp": read})      # both [1536, 1024]
        gj.growth.learned(depth={"blocks.block.mlp.up": mixed})                 # [3, 2], of layers
    """
    return Learned(values.tuples(produced), values.tuples(consumed), values.tuples(depth), stack)


# LiGO ------------------------------------------------------------------------------------------------


@values.register
class LiGO(Fit):
    """Growth by matrices that are learned when it is due; see `ligo`."""

    sizes: Sizes = eqx.field(static=True)
    batches: Size = eqx.field(static=True, default=100)
    rate: Annotated[float, positive("learning rate")] = eqx.field(static=True, default=2e-3)
    noise: Annotated[float, at_least(0)] = eqx.field(static=True, default=0.03)
    stack: str = eqx.field(static=True, default="layers")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="Width and depth at once where some 100 steps of the large model may be spent before "
        "training.",
        traps=(
            "The fit costs as much as its steps of the large model; a plan charges them.",
            "Optimizer state does not follow; start it anew (carry='reset').",
        ),
        example="ligo(embed=12, mlp=9, layers=3, batches=20)",
        papers=(LIGO,),
    )

    def start(self, model: Any, *, key: PRNGKeyArray) -> Any:
        """Copies in turn, each row of P and W with noise and sum 1; and Adam's moments."""
        table, produced, consumed, depth = axes_of(model), {}, {}, {}

        def rows(name: str, old: int, new: int) -> tuple[Any, np.ndarray]:
            source = np.arange(new) % old
            matrix = jnp.asarray(np.eye(old)[source])
            if self.noise:
                named = maps.fold_in_name(key, name)
                matrix += jax.random.uniform(named, (new, old), maxval=self.noise)
            return matrix / jnp.sum(matrix, 1, keepdims=True), source

        for axis, new in self._wanted(table).items():
            old = table.size(axis)
            if axis == self.stack:
                for path in _stacked(table, axis):
                    depth[path] = rows(path, old, new)[0]
                continue
            produced[axis], source = rows(axis, old, new)
            counts = np.bincount(source, minlength=old)
            consumed[axis] = jnp.asarray(np.eye(old)[source] / counts[source][:, None])
        weights = produced, consumed, depth
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return {"weights": weights, "moments": (zeros, zeros), "steps": jnp.int32(0)}

    def improved(self, numbers: Any, model: Any, measure: Measure) -> tuple[Any, Any]:
        """One step of Adam on the loss of the large model."""
        loss, gradient = measure(lambda w: self.filled({"weights": w})(model), numbers["weights"])
        steps = numbers["steps"]
        weights, moments = adam(
            numbers["weights"], gradient, numbers["moments"], steps, rate=self.rate
        )
        return {"weights": weights, "moments": moments, "steps": steps + 1}, loss

    def maps_of(self, axes: Axes, numbers: Any) -> list[AxisMap]:
        """A dense map for every axis of the width, then one for the depth."""
        wanted = self._wanted(axes)
        if numbers is not None:
            return _moves(axes, self.stack, *numbers["weights"])
        # Before they are learned, means of everything, which take no memory
        means = {
            axis: np.broadcast_to(np.float32(1 / axes.size(axis)), (new, axes.size(axis)))
            for axis, new in wanted.items()
        }
        rows = means.pop(self.stack, None)
        depth = {} if rows is None else dict.fromkeys(_stacked(axes, self.stack), rows)
        return _moves(axes, self.stack, means, means, depth)

    def frozen(self, numbers: Any) -> Learned:
        """`gj.growth.learned` with the matrices."""
        produced, consumed, depth = jax.device_get(numbers["weights"])
        return learned(produced=produced, consumed=consumed, depth=depth, stack=self.stack)

    def _wanted(self, axes: Axes) -> dict[str, int]:
        wanted = resolve(axes, dict(self.sizes))
        faults = [
            axis
            for axis in wanted
            if axes.roles(axis) & {"lookup"} or ("stack" in axes.roles(axis) and axis != self.stack)
        ]
        raise_all(GrowthError, "no matrix grows these axes:", faults)
        if wanted.get(self.stack) and not axes.size(self.stack):
            raise GrowthError(
                f"{self.stack}: there is no layer to mix; gj.fresh({self.stack}={wanted[self.stack]})"
            )
        return wanted


def _stacked(axes: Axes, stack: str) -> list[str]:
    """The paths of the parameters of a stack."""
    return [slot.path for slot in axes.having(stack, "param") if slot.arrays()]


def ligo(
    *,
    batches: int = 100,
    rate: float = 2e-3,
    noise: float = 0.03,
    stack: str = "layers",
    **sizes: int,
) -> LiGO:
    """Grow by matrices that are learned right before: one for each side of an axis, and for depth (LiGO).

    Only the matrices are trained, for one step of Adam a batch, on the loss of the large model that they
    make of the small one, which stays as it is. They start from copies in turn, with what consumes copies
    divided by their number: the paper's do not divide, and so begin with another function.

    In a plan it is fitted when the growth is due, on the stage's first batches (which the stage trains on
    afterwards), and charged for; elsewhere `growjax.fitting.fit` fits it. Optimizer state does not follow
    (`carry="reset"`).

    **Arguments**

    - `batches`: the number of steps of the fit.
    - `rate`: the learning rate.
    - `noise`: the largest number that is added to a row before it is divided by its sum.
    - `stack`: the axis whose growth is in depth.
    - the sizes to reach, such as `embed=768, mlp=3072, layers=12`.

    Raises `GrowthError` for axes that no matrix can grow: tables, `head_dim` under rotary positions.

    **Example**

        Stage(share=0.7, grow=gj.growth.ligo(embed=768, mlp=3072, layers=12), carry="reset")
    """
    return LiGO(sizes=frozen_sizes(sizes), batches=batches, rate=rate, noise=noise, stack=stack)
