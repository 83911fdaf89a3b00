"""The state of a user's own training loop, grown in one call.

`gj.grow(op, State(...))` gives bit by bit what `gj.grow` of the model and `gj.carry` of its optimizer's
state give. It also grows averages of the weights, leaves the data cursor unchanged, and records the
growth in which every coordinate was born. `gj.ramp` and `gj.settle` change the gates of the model and of
its averages.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import gates, growth, maps
from growjax.axes import Slot, axes_of, get, partition, put
from growjax.errors import StateError, raise_all
from growjax.growth import Births, Operator, atoms
from growjax.growth.operator import free
from growjax.optim.carrying import carry, finishes, moved_average
from growjax.optim.cells import alike


Model = TypeVar("Model")


class State(eqx.Module):
    """A model, its optimizer's state, averages of its weights and a data cursor, which grow together.

    **Fields**

    - `model`: the model, or anything else with axes.
    - `opt_state`: the state that `optimizer.init(gj.partition(model)[0])` and its updates return; None
      without an optimizer.
    - `average`: averages of the weights: models, or trained halves of one, in any tree (a dict of them,
      an `optax.EmaState`). Numbers in the same tree stay unchanged.
    - `cursor`: the position in the data, or any other value that growth does not change.
    - `births`: the growth in which every coordinate was born; by default, that of a model that has not
      grown.

    A pytree, so it goes through `jit`, `jax.tree.map` and checkpoints.

    **Example**

        state = gj.State(model, tx.init(gj.partition(model)[0]), average=model, cursor=0)
        state = gj.grow(gj.stack(layers=12), state, optimizer=tx, key=key)
    """

    model: Any
    opt_state: Any
    average: Any
    cursor: Any
    births: Births

    def __init__(
        self,
        model: Any,
        opt_state: Any = None,
        average: Any = None,
        *,
        cursor: Any = None,
        births: Births | None = None,
    ):
        self.model, self.opt_state, self.average, self.cursor = model, opt_state, average, cursor
        births = Births.original(model) if births is None else births
        self.births = jax.tree.map(jnp.asarray, births)

    def masks(self, part: Literal["new", "old"] | int = "new") -> Any:
        """Masks of the parameters' entries that the last growth added, or of another part; see
        `gj.Births.masks`.
        """
        return self.births.masks(self.model, part)


def grow(
    op: Operator,
    model: Model,
    *,
    key: PRNGKeyArray | None = None,
    donate: bool = False,
    optimizer: Any = None,
    copies: Literal["dual", "zero"] = "dual",
) -> Model:
    """Grow a model, or a `gj.State` with its optimizer state and averages: a pure, jit-compiled call.

    **Arguments**

    - `op`: an operator or a chain.
    - `model`: a model, or a `gj.State`.
    - `key`: needed by operators that draw new coordinates.
    - `donate`: free the old arrays that grew (shapes change, so they can never be reused).
    - `optimizer`, `copies`: for a state, the transformation that made its `opt_state`, and how the
      optimizer state of copied coordinates starts; see `gj.carry`.

    Leaves that no map touches are not copied: both models share their arrays. In a state, the entries of
    an average move as the weights do, and the average of a fresh coordinate starts from its weight. The
    leaves of an average that are not trained (buffers, gates) become those of the grown model.

    Raises `GrowthError` for parameters that are not finite, `StateError` for a state that cannot be
    carried or an average of another structure than the model's, and the errors of the operator's maps
    (`AxisError`, `GateError`, `GrowthError`), always before it computes an array. Works under `jit`,
    where it does not check values.

    **Example**

        big = gj.grow(gj.msg(mlp=2048), small, key=jax.random.key(0))
        state = gj.grow(gj.msg(mlp=2048), state, optimizer=tx, key=jax.random.key(0))
    """
    if not isinstance(model, State):
        if optimizer is not None:
            raise StateError(
                "optimizer: a model is grown alone; give gj.State(model, opt_state), or use gj.carry"
            )
        return growth.grow(op, model, key=key, donate=donate)
    return _grown_state(op, model, key, donate, optimizer, copies)


def ramp(model: Model, level: Any, *, axes: Sequence[str] | None = None) -> Model:
    """Set every gate's new coordinates to `level`, from 0 (hidden) to 1 (ordinary).

    `model` is a model, or a `gj.State`, whose averages get the gates of its model, too. `level` may be a
    traced scalar, so that a whole ramp is one program, or a vector with a level for every coordinate of
    one axis (old ones stay at 1). `axes` limits the change to some axes, by the names that growth takes
    (`heads` are query heads). Raises `GateError` for a concrete level outside [0, 1], for a vector of
    another length than the axis, and for a model, or one of the axes, without gates.

    **Example**

        model = gj.ramp(model, jnp.minimum(step / 1000, 1.0))
        model = gj.ramp(model, levels, axes=["layers"])           # levels [layers]
        state = gj.ramp(state, jnp.minimum(state.cursor / 1000, 1.0))
    """
    return _regated(model, lambda own: gates.ramp(own, level, axes=axes))


def settle(model: Model, *, axes: Sequence[str] | None = None) -> Model:
    """Drop gates that are fully open: the same function, and the ungated program from now on.

    `model` is a model, or a `gj.State`, whose averages lose these gates, too. Raises `GateError` if a
    gate of the model is not at 1 yet, or under `jit` (it changes the tree).

    **Example**

        state = gj.settle(gj.ramp(state, 1.0))
    """
    return _regated(model, lambda own: gates.settle(own, axes=axes))


def _regated(model: Any, change: Callable[[Any], Any]) -> Any:
    """A model after a change of its gates; in a state, averages that hold gates get the model's."""
    if not isinstance(model, State):
        return change(model)
    changed = change(model.model)
    values = {slot.steps: slot.value for slot in axes_of(changed).of_kind("gate")}
    average = jax.tree.map(
        lambda node: put(node, values) if _is_whole(node, model.model) else node,
        model.average,
        is_leaf=lambda node: alike(node, model.model),
    )
    return State(changed, model.opt_state, average, cursor=model.cursor, births=model.births)


def _grown_state(op, state: State, key, donate: bool, optimizer, copies) -> Any:
    raise_all(StateError, "this state cannot grow:", list(_faults(state, optimizer)))
    births = state.births.grown(op, state.model)
    opt_state = state.opt_state
    if opt_state is not None:
        opt_state = carry(op, opt_state, state.model, optimizer=optimizer, key=key, copies=copies)
    model = growth.grow(op, state.model, key=key)
    average = _grown_average(op, state, model, key)
    grown = State(model, opt_state, average, cursor=state.cursor, births=births)
    if donate:
        free((state.model, state.opt_state, state.average), grown)
    return grown


def _faults(state: State, optimizer: Any) -> Iterator[str]:
    if not isinstance(state.births, Births):
        kind = type(state.births).__name__
        yield f"births: expected gj.Births, got a {kind}; leave them out for a new model"
    if state.opt_state is not None and optimizer is None:
        yield "optimizer: expected the transformation that made opt_state, got None"
    if state.opt_state is None and optimizer is not None:
        yield "opt_state: expected the optimizer's state, got None; give State(model, opt_state)"
    expected = {slot.path: slot for slot in _params(state.model)}
    for name, node in _averages(state):
        if not alike(node, state.model):
            if np.ndim(node):
                yield (
                    f"{name}: expected a model like the one that grows, its trained half, or a number, "
                    f"got an array of shape {np.shape(node)}"
                )
            continue
        given = {slot.path: slot for slot in _params(node)}
        for path, slot in expected.items():
            shape = np.shape(given[path].value) if path in given else "nothing"
            if shape != slot.value.shape:
                yield f"{name}.{path}: expected shape {slot.value.shape}, got {shape}"


def _averages(state: State) -> list[tuple[str, Any]]:
    """The models in `average` and the other leaves next to them, each with its path."""
    leaves = jax.tree_util.tree_leaves_with_path(
        state.average, is_leaf=lambda node: alike(node, state.model)
    )
    return [(f"average{jax.tree_util.keystr(path)}", node) for path, node in leaves]


def _params(model: Any) -> list[Slot]:
    """The parameters that are trained, of which there are averages: not those of whole numbers."""
    return axes_of(partition(model)[0]).params()


def _grown_average(op: Operator, state: State, grown: Any, key: PRNGKeyArray | None) -> Any:
    """The averages of the grown model's weights, in the tree of `state.average`."""
    like = lambda node: alike(node, state.model)  # noqa: E731
    nodes, structure = jax.tree.flatten(state.average, is_leaf=like)
    models = [node for node in nodes if like(node)]
    if not models:
        return state.average
    trained, rest = partition(grown)
    # A model without buffers and gates is its own half; its average grows with the gates it gets
    whole = bool(jax.tree.leaves(partition(state.model)[1]))
    halves = _averaged(op, state.model, trained, [partition(node)[0] for node in models], key)
    moved = iter(
        half if whole and _is_half(node) else eqx.combine(half, rest)
        for node, half in zip(models, halves, strict=True)
    )
    return structure.unflatten([next(moved) if like(node) else node for node in nodes])


def _is_whole(node: Any, model: Any) -> bool:
    """Whether a node of an average is a model with buffers or gates, not a trained half or a number."""
    return alike(node, model) and not _is_half(node)


def _is_half(node: Any) -> bool:
    """Whether a tree has trained parameters alone, without buffers or gates."""
    return not jax.tree.leaves(partition(node)[1])


@eqx.filter_jit
def _averaged(op: Operator, model: Any, trained: Any, halves: list[Any], key: Any) -> list[Any]:
    """Trained halves of averages after an operator; `trained` is that of the grown model."""
    values = [{slot.steps: get(half, slot.steps) for slot in _params(model)} for half in halves]
    for atom in atoms(op):
        for move in atom.maps(axes_of(model)):
            table, after = axes_of(model), maps.apply(move, model, key)
            if move.born:
                # An average has the structure of the weights, so it moves as they do
                for i, average in enumerate(values):
                    moved = maps.apply(move, put(model, average), key)
                    values[i] = {slot.steps: get(moved, slot.steps) for slot in _params(after)}
                model = after
                continue
            for average in values:
                # A finish (a shrink, a gain) changes old coordinates of the weights, and of an average
                moved = maps.apply(move, put(model, average), key) if finishes(move) else None
                for slot in _params(model):
                    if slot.positions(move.axis):
                        average[slot.steps] = moved_average(
                            move,
                            table,
                            slot,
                            average[slot.steps],
                            fresh=get(after, slot.steps),
                            moved=None if moved is None else get(moved, slot.steps),
                        )
            model = after
        model = atom.completed(model)
    return [put(trained, average) for average in values]
