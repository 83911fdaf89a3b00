"""Runs of an optimizer on a toy: parameters with a model's structure and two coordinates per axis.

A run has lanes, which `vmap` updates together. Every lane differs from the plain one by one change of its
gradients or weights: half of the entries are drawn again, or all entries are multiplied by a number of
their own, change sign, or are zero. `growjax.optim.probe` compares the optimizer's state between lanes.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from growjax.axes import DeclaredOutside, Slot, axes_of, put
from growjax.errors import StateError
from growjax.optim.rules import Rule


SIZE = 2  # coordinates of every axis of a toy; a wider one has one more
PERIOD = 5  # steps after which gradients and weights repeat
Shape = tuple[int, ...]


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """A context outside of every trace, on the CPU, in double precision, with JAX's default settings."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.ensure_compile_time_eval())
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.disable_jit(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.transfer_guard("allow"))
        # JAX raises RuntimeError if the process runs without the CPU platform
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def toy(params: Any, size: int | Mapping[str, int]) -> Any:
    """The shapes of parameters like these, with `size` coordinates on every axis, or a size for each."""
    table = axes_of(params)
    sizes = every(size) if isinstance(size, int) else size
    shapes = {
        slot.steps: jax.ShapeDtypeStruct(slot.spec.shape(sizes), np.float32)
        for slot in table.params()
    }
    small = put(params, shapes)
    if isinstance(small, DeclaredOutside):
        small = small.resized({axis: sizes[axis] for axis in table.sizes})
    return small


def leaves_of(params: Any) -> list[Slot]:
    """The slots of parameters in the order of their leaves."""
    slots = axes_of(params).params()
    numbers = put(params, {slot.steps: n for n, slot in enumerate(slots)})
    return [slots[n] for n in jax.tree.leaves(numbers)]


# Gradients and weights -----------------------------------------------------------------------


class Lane(NamedTuple):
    """The gradients and weights of every leaf, arrays of `[step, *shape]`."""

    gradients: list[np.ndarray]
    weights: list[np.ndarray]


class Trial(NamedTuple):
    """Lanes by name, each of which differs from the "plain" one by one change.

    - `masks`: for lanes with some entries drawn again: the mask of these in each leaf.
    - `factors`: for lanes with multiplied entries: the factors of the gradients and those of the weights,
      for each leaf.
    """

    lanes: dict[str, Lane]
    masks: dict[str, list[np.ndarray]]
    factors: dict[str, tuple[list[np.ndarray], list[np.ndarray]]]


def trial(shapes: list[Shape], size: float, seed: int) -> Trial:
    """A trial with gradients of half to twice `size` in magnitude, and weights of half to twice 1."""
    rng = np.random.default_rng(seed)

    def choice(*values: float) -> list[np.ndarray]:
        return [rng.choice(np.asarray(values), shape) for shape in shapes]

    def draw(scale: float) -> list[np.ndarray]:
        drawn = [(PERIOD, *shape) for shape in shapes]
        return [scale * rng.choice([-1.0, 1.0], s) * rng.uniform(0.5, 2, s) for s in drawn]

    g, w, other_g, other_w = draw(size), draw(1.0), draw(size), draw(1.0)
    ones = choice(1.0)
    # A chequerboard, so that every row of every dimension has black and white entries; the first is black
    board = [np.indices(shape).sum(0) % 2 == 0 for shape in shapes]
    mirrored = [np.where(black, -1.0, 1.0) for black in board]
    # Powers of two cause no rounding. Gradients shrink and weights grow, so that no more is clipped than
    # in the plain lane.
    factors = {
        "no gradients": (choice(0.0), ones),
        "no weights": (ones, choice(0.0)),
        "scaled gradients": (choice(0.5, 0.25), ones),
        "scaled weights": (ones, choice(2.0, 4.0)),
        "mirrored gradients": (mirrored, ones),
        "mirrored weights": (ones, mirrored),
        "both": (choice(0.5, 0.25), choice(2.0, 4.0)),
    }
    masks = {"black": board, "white": [~black for black in board]}
    for n in range(4):
        chosen = rng.permutation(len(shapes)) % 2 == 0
        for part in (True, False):
            masks[f"leaves {n} {part}"] = [
                np.full(shape, c == part) for c, shape in zip(chosen, shapes, strict=True)
            ]
    lanes = {
        "plain": Lane(g, w),
        "other gradients": Lane(other_g, w),
        "other weights": Lane(g, other_w),
    }
    for name, (by_g, by_w) in factors.items():
        lanes[name] = Lane(_times(by_g, g), _times(by_w, w))
    for name, mask in masks.items():
        lanes[name] = Lane(_mixed(mask, other_g, g), _mixed(mask, other_w, w))
    return Trial(lanes, masks, factors)


def _times(factors: list[np.ndarray], values: list[np.ndarray]) -> list[np.ndarray]:
    return [factor * value for factor, value in zip(factors, values, strict=True)]


def _mixed(masks: list[np.ndarray], a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [np.where(mask, x, y) for mask, x, y in zip(masks, a, b, strict=True)]


def padded(lane: Lane, slots: list[Slot], more: Mapping[str, int]) -> Lane:
    """A lane for a wider toy, with `more[axis]` further coordinates on each axis.

    The gradients and the weights of the further coordinates are 0.
    """

    def pad(values: list[np.ndarray]) -> list[np.ndarray]:
        wide, sizes = [], every(SIZE)
        wider = functools.partial(_wider, sizes, more)
        for x, slot in zip(values, slots, strict=True):
            wide.append(np.asarray([slot.mapped(wider, step, sizes) for step in x]))
        return wide

    return Lane(pad(lane.gradients), pad(lane.weights))


def _wider(sizes: Mapping[str, int], more: Mapping[str, int], part: Slot, x: Any) -> Any:
    by = [(0, 0 if dim.literal else more[dim.axis]) for dim in part.dims]
    # A scalar has no dimension to widen, and np.pad refuses an empty list
    if not by:
        return x
    padded: Any = np.pad(part.split(x, sizes), by)
    return part.join(padded)


def narrowed(x: np.ndarray, slot: Slot, more: Mapping[str, int]) -> np.ndarray:
    """The entries of a wider toy's leaf that the toy of `SIZE` coordinates per axis has too."""
    wide = {dim.axis: SIZE + more[dim.axis] for dim in slot.dims if not dim.literal}

    def old(part: Slot, x: Any) -> Any:
        slices = [slice(None) if dim.literal else slice(SIZE) for dim in part.dims]
        return part.join(part.split(x, wide)[tuple(slices)])

    return slot.mapped(old, x, wide)


def every(size: int) -> Mapping[str, int]:
    """A mapping that gives `size` for every name of an axis."""
    return collections.defaultdict(lambda: size)


# Taking steps --------------------------------------------------------------------------------


class Run:
    """An optimizer that takes the same steps in every lane.

    - `start`, `state`: its state before the first step and now; arrays are `[lane, ...]`.
    - `updates`: the updates of the last step if `updates=True`, else None. They are not applied: the
      weights of the lanes are given.
    """

    def __init__(self, optimizer: Any, structure: Any, lanes: list[Lane], updates: bool = False):
        def stacked(leaves: list[list[np.ndarray]]) -> list[Any]:
            whole = [np.stack(lane) for lane in zip(*leaves, strict=True)]
            return [structure.unflatten([leaf[:, t] for leaf in whole]) for t in range(PERIOD)]

        self.gradients = stacked([lane.gradients for lane in lanes])
        self.weights = stacked([lane.weights for lane in lanes])
        self.start = self.state = _run(_jit(jax.vmap(optimizer.init)), self.weights[0])
        self.updates: Any = None
        self._steps, self._with_updates = 0, updates
        self._update, shapes = self._accepted(optimizer)
        if jax.tree.structure(shapes) != jax.tree.structure(self.start):
            raise StateError(
                "optimizer: its first update changes the structure of its state, as that of "
                "optax.monitor does; keep such parts out of the chain"
            )
        self.state = jax.tree.map(_cast, self.start, shapes)

    def _accepted(self, optimizer: Any) -> tuple[Callable, Any]:
        """The compiled update with the further arguments that it needs, and the shapes of its state.

        Raises the error of the last attempt if the update accepts none of `_extra_arguments`.
        """
        problem: Exception | None = None
        for extra in _extra_arguments(optimizer):

            def update(gradients, later, state, weights, extra=extra):
                more = extra(gradients, later)
                updates, state = optimizer.update(gradients, state, weights, **more)
                return updates if self._with_updates else None, state

            program = _jit(jax.vmap(update))
            try:
                return program, program.trace(*self._inputs()).out_info[1]
            except Exception as error:  # a user's transformation may raise any exception
                problem = error
        assert problem is not None
        raise problem

    def _inputs(self) -> tuple:
        """This step's gradients, the next step's (as a second gradient), the state and the weights."""
        now, later = self._steps % PERIOD, (self._steps + 1) % PERIOD
        return self.gradients[now], self.gradients[later], self.state, self.weights[now]

    def until(self, steps: int) -> Any:
        """The state after `steps` steps, counted from the start."""
        while self._steps < steps:
            self.updates, self.state = _run(self._update, *self._inputs())
            self._steps += 1
        return self.state


def _jit(function: Callable) -> Callable:
    # Compilation takes most of the time, since the program runs a few times on tiny arrays
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _run(program: Any, *arguments: Any) -> Any:
    """The outputs of a program; raises `StateError` if the program closes over values of a trace."""
    try:
        return program(*arguments)
    except Exception as error:
        consts = jax.make_jaxpr(program.__wrapped__)(*arguments).consts
        if any(isinstance(x, Tracer) for x in consts):
            raise StateError(
                "optimizer: it contains values that a trace has not computed yet, so it cannot run on a "
                "toy; create it outside of jit, or put such values into its state "
                "(optax.inject_hyperparams)"
            ) from error
        raise


def _extra_arguments(optimizer: Any) -> list[Callable[[Any, Any], dict[str, Any]]]:
    """Functions that give further arguments of an update, in the order to try.

    Each takes the update's gradients and other gradients of the same shapes.
    """
    if isinstance(optimizer, Rule):
        return [lambda _, others: {"rate": 0.1, "curvature": others, "labels": 8.0}]
    return [
        lambda g, others: {"value": 1.0, "grad": g, "curvature": others, "labels": 8.0},
        lambda g, others: {},
    ]


def _cast(x: Any, like: Any) -> Any:
    if x.shape != like.shape:
        raise StateError(
            f"optimizer: its first update changes an array from {x.shape} to {like.shape}"
        )
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def numbers(state: Any) -> list[np.ndarray]:
    """The arrays of a state; random keys as their integers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(state)]
