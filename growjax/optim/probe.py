"""The scaling law of every array in an optimizer's state, measured by running the optimizer on a toy.

The names and types of optimizer state do not tell: `mu` is a moment of gradients in one transformation
and of normalised updates in another. So the probe runs the transformation on a small model
(`growjax.optim.toy`), once per lane, and compares the state between lanes whose gradients and weights
differ. Which lanes change an entry gives its reach (the gradients and weights that it depends on); the
ratio of its values gives its law (the powers of the gradients and weights that it scales with). The
initial state gives the value that a new coordinate starts from.

The probe uses gradients of three sizes. Those of 1 are large next to the small constants of optimizers
(an `eps` of 1e-8); those with a norm below 1, and those of 0.001, are too small for most clipping. The
law is measured at the largest size at which entries do not depend on each other; a smaller size that
gives another law refutes it. The tolerance covers the effect of `eps`, and clipping by a global norm
does not change the law.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from growjax.algebra import FIRST, WEIGHT, Law, Power, Side
from growjax.axes import Slot, put
from growjax.errors import StateError, raise_all
from growjax.optim.cells import Cell, cells, numberless
from growjax.optim.rules import Rule
from growjax.optim.toy import (
    PERIOD,
    SIZE,
    Lane,
    Run,
    Trial,
    aside,
    every,
    leaves_of,
    narrowed,
    numbers,
    padded,
)
from growjax.optim.toy import toy as toy_of
from growjax.optim.toy import trial as trial_of


Reach = Literal["nothing", "entry", "leaf", "all"]
# A power, or: no power fits, the array is zero in the plain lane, the array does not depend on this side
Measured = Power | Literal["unknown", "zero"] | None

STEPS = (7, 61, 257)  # updates of a run; a longer run only if some array has not changed yet
_UNCHANGED, _NEAR = 1e-9, 0.02  # relative tolerances: for rounding, and for the effect of an eps
_SMALL = 1e-5  # relative; the most that an eps or a small initial value leaves without gradients
_MANY = 40  # parameters, from which on the probe leaves out layers that repeat
_UNKNOWN = Law("unknown", "unknown")


@dataclasses.dataclass(frozen=True)
class Traits:
    """The measured properties of one array of an optimizer's state.

    - `reach`: the gradients and weights that an entry depends on: "nothing" (a step count), those of its
      own "entry", of other entries of its "leaf", or of "all" leaves.
    - `law`: the powers of the gradients and of the weights that entries scale with.
    - `initial`: the number that every entry starts from; None if entries start from different numbers
      (from the weights).
    - `shaped`: whether the array has the shape of its parameter.
    - `additive`: whether further coordinates with zero gradients and weights leave it unchanged (they
      do not change sums; they change means and factors that depend on a shape).
    - `updates`: the number of updates after which it was measured.
    """

    reach: Reach
    law: Law
    initial: float | None
    shaped: bool
    additive: bool
    updates: int


class Probe(NamedTuple):
    """The traits of the arrays of an optimizer's state, in the order of `cells`.

    `averages` says whether the optimizer does nothing but average its input.
    """

    cells: tuple[Cell, ...]
    traits: tuple[Traits, ...]
    averages: bool

    def of(self, requested: Sequence[Cell]) -> list[Traits | None]:
        """The traits of each requested array; None if the toy has no such array.

        An array of the same name has them; otherwise all arrays of the same kind do, if they agree.
        """
        by_name = {cell.name: traits for cell, traits in zip(self.cells, self.traits, strict=True)}
        by_kind: dict[str, set[Traits]] = {}
        for cell, traits in zip(self.cells, self.traits, strict=True):
            by_kind.setdefault(cell.kind, set()).add(traits)
        agreed = {kind: next(iter(group)) for kind, group in by_kind.items() if len(group) == 1}
        return [by_name.get(cell.name, agreed.get(cell.kind)) for cell in requested]

    def required(self, requested: Sequence[Cell], remedy: str) -> list[Traits]:
        """As `of`; raises `StateError`, with a remedy, for the arrays that the toy does not have."""
        all_traits = self.of(requested)
        raise_all(
            StateError,
            "the optimizer has these arrays only for parameters of certain sizes, so a toy does not show "
            f"how they scale; {remedy}:",
            [
                f"state{cell.name}"
                for cell, traits in zip(requested, all_traits, strict=True)
                if traits is None
            ],
        )
        return [traits for traits in all_traits if traits is not None]


def probe(optimizer: Any, params: Any, requested: Sequence[Cell]) -> Probe:
    """Measure the traits of the requested arrays of an optimizer's state.

    Only the structure of `params` matters, not its values or sizes. The probe runs immediately, on the
    CPU, also inside `jit`, and its result is cached by the transformation and the structure.

    Raises `StateError` if the transformation cannot be run on a toy.
    """
    subset = _representatives(params)
    if subset is not None:
        # A transformation whose mask is a tree of all parameters raises on a subset of them
        with contextlib.suppress(StateError):
            result = _of_toy(optimizer, subset)
            if None not in result.of(requested):
                return result
    return _of_toy(optimizer, params)


def _representatives(params: Any) -> Any:
    """The parameters with None in place of those that an earlier layer has too.

    Returns None if parameters are few or most of them differ. The program grows with every parameter,
    so dozens of unrolled layers would take long to compile.
    """
    slots = leaves_of(params)
    first = {numberless(slot.path, slot): slot.steps for slot in reversed(slots)}
    if len(slots) < _MANY or 2 * len(first) > len(slots):
        return None
    chosen = set(first.values())
    return put(params, {slot.steps: None for slot in slots if slot.steps not in chosen})


def _of_toy(optimizer: Any, params: Any) -> Probe:
    leaves, structure = jax.tree.flatten(toy_of(params, SIZE))
    return _probed(optimizer, structure, tuple(leaves))


@functools.lru_cache(maxsize=256)
def _probed(optimizer: Any, structure: Any, shapes: tuple[Any, ...]) -> Probe:
    params = jax.tree.unflatten(structure, shapes)
    try:
        with aside():
            return _probe_toy(optimizer, params)
    except StateError:
        raise
    except Exception as error:  # a user's transformation may raise any exception
        raise StateError(
            "optimizer: growjax runs it on a small copy of the parameters to learn how its state scales, "
            f"and this failed: {type(error).__name__}: {error}\n"
            "(its init and update have to accept gj.partition(model)[0] at any size of its axes, without "
            "further required arguments; or initialise its state again after growing)"
        ) from error


def _probe_toy(optimizer: Any, params: Any) -> Probe:
    """Run the optimizer on a toy, for longer if some array has not changed yet, and measure its state."""
    slots, structure = leaves_of(params), jax.tree.structure(params)
    shapes = [slot.value.shape for slot in slots]
    # Gradients reach twice their size, so the global norm at the second size is at most 0.9
    entries = sum(np.prod(shape, dtype=int) for shape in shapes)
    sizes = (1.0, 0.45 / entries**0.5, 1e-3)
    trials = [[trial_of(shapes, size, seed) for seed in range(2)] for size in sizes]
    flat = [trial for group in trials for trial in group]
    run = Run(optimizer, structure, [lane for trial in flat for lane in trial.lanes.values()])
    wider = toy_of(params, SIZE + 1)
    wide = [padded(trial.lanes["plain"], slots, every(1)) for trial in flat]
    wide_run = Run(optimizer, jax.tree.structure(wider), wide)

    all_cells = cells(run.start, params)
    traits: dict[int, Traits] = {}
    for steps in STEPS:
        start, end = numbers(run.start), numbers(run.until(steps))
        wide_start, wide_end = numbers(wide_run.start), numbers(wide_run.until(steps))
        for i, cell in enumerate(all_cells):
            if i not in traits or traits[i].reach == "nothing":
                leaf = [slot.steps for slot in slots].index(cell.steps) if cell.steps else None
                array = _Array(cell, leaf, trials, start[i], end[i])
                slot = None if leaf is None else slots[leaf]
                traits[i] = _traits(array, slot, wide_start[i], wide_end[i], steps)
        if not any(t.shaped and t.reach == "nothing" for t in traits.values()):
            break
    measured = _with_differences(optimizer, run, [traits[i] for i in range(len(all_cells))])
    return Probe(
        tuple(all_cells), tuple(measured), _averages(optimizer, structure, shapes, measured)
    )


# One array -----------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """The values of one array in every lane of one trial, before the first update and after the last."""

    trial: Trial
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]


class _Array:
    """One array of the state in all trials, grouped by the size of the gradients.

    `leaf` is the index of its parameter among the leaves; None if it belongs to none.
    """

    def __init__(
        self,
        cell: Cell,
        leaf: int | None,
        trials: list[list[Trial]],
        start: np.ndarray,
        end: np.ndarray,
    ):
        self.cell, self.leaf = cell, leaf
        end, first = _wide(end), 0
        self.by_size: list[list[_Outcome]] = []
        for group in trials:
            outcomes = []
            for trial in group:
                lanes = {name: first + n for n, name in enumerate(trial.lanes)}
                first += len(lanes)
                starts = {name: start[i] for name, i in lanes.items()}
                ends = {name: end[i] for name, i in lanes.items()}
                outcomes.append(_Outcome(trial, starts, ends))
            self.by_size.append(outcomes)

    @property
    def outcomes(self) -> list[_Outcome]:
        """The outcomes of the trials at all sizes."""
        return [outcome for group in self.by_size for outcome in group]


def _wide(x: np.ndarray) -> np.ndarray:
    """The array in double precision if it holds floats (NumPy does not count bfloat16 as a float)."""
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _traits(
    array: _Array, slot: Slot | None, wide_start: np.ndarray, wide_end: np.ndarray, steps: int
) -> Traits:
    """The traits of an array; `wide_*` is the same array of a toy with one more coordinate per axis."""
    outcomes, leaf = array.outcomes, array.leaf
    plain = outcomes[0].end["plain"]
    shaped = array.cell.alone and slot is not None and plain.shape == slot.value.shape
    starts = [*(x for outcome in outcomes for x in outcome.start.values()), *wide_start]
    first = starts[0].flat[0].item() if starts[0].size else 0
    constant = all(np.all(x == first) for x in starts)
    reaches: list[Reach] = [
        _widest(_reach(outcome, leaf, shaped) for outcome in group) for group in array.by_size
    ]
    moved: list[Any] = [reach for reach in reaches if reach != "nothing"]
    reach: Reach = min(moved, key=_order) if moved else "nothing"
    law = _UNKNOWN
    if shaped and leaf is not None and all(_starts_as_weights(x, leaf) for x in outcomes):
        law = WEIGHT
    elif shaped and leaf is not None and reach == "entry":
        groups = [
            g for g, r in zip(array.by_size, reaches, strict=True) if r in ("entry", "nothing")
        ]
        law = _law(groups, leaf, first if constant else 0.0)
    ends = [outcome.end["plain"] for outcome in outcomes]
    additive = all(_same_old(x, y, slot) for x, y in zip(ends, _wide(wide_end), strict=True))
    additive = additive or array.cell.axis is not None
    return Traits(reach, law, first if constant else None, shaped, additive, steps)


def _order(reach: str) -> int:
    return get_args(Reach).index(reach)


def _widest(reaches: Iterable[Reach]) -> Reach:
    return max(reaches, key=_order)


def _starts_as_weights(outcome: _Outcome, leaf: int) -> bool:
    return all(
        np.array_equal(x, outcome.trial.lanes[name].weights[leaf][0].astype(x.dtype))
        for name, x in outcome.start.items()
    )


def _reach(outcome: _Outcome, leaf: int | None, shaped: bool) -> Reach:
    """The narrowest reach that fits the lanes that leave an entry unchanged."""
    end, plain = outcome.end, outcome.end["plain"]
    if all(_same(x, plain) for x in end.values()):
        return "nothing"
    if leaf is None:
        return "all"
    masks = {name: mask[leaf] for name, mask in outcome.trial.masks.items()}
    if shaped and all(_same(end[name], plain, ~mask) for name, mask in masks.items()):
        return "entry"
    others = [name for name, mask in masks.items() if name.startswith("leaves") and not mask.any()]
    return "leaf" if all(_same(end[name], plain) for name in others) else "all"


def _same(x: np.ndarray, y: np.ndarray, where: Any = True) -> bool:
    """Whether two arrays are equal up to rounding; `where` selects the entries to compare."""
    if not np.issubdtype(y.dtype, np.inexact):
        return bool(np.all((x == y) | ~np.asarray(where)))
    near = np.abs(x - y) <= _UNCHANGED * np.max(np.abs(y), initial=0)
    return bool(np.all(near | (np.isnan(x) & np.isnan(y)) | (x == y) | ~np.asarray(where)))


def _same_old(x: np.ndarray, wide: np.ndarray, slot: Slot | None) -> bool:
    """Whether an array and that of a wider toy are equal at the coordinates that both have."""
    if x.shape == wide.shape:
        return _same(wide, x)
    if slot is None or x.shape != slot.value.shape:
        return False
    return _same(narrowed(wide, slot, every(1)), x)


# Laws ----------------------------------------------------------------------------------------


def _law(groups: list[list[_Outcome]], leaf: int, initial: float) -> Law:
    """The law that fits best, with an origin at `initial` (a sum) or at 0 (a decaying average)."""
    best, gap = _UNKNOWN, np.inf
    for origin in dict.fromkeys((initial, 0.0)):
        gradient, weight = (
            _agreed(
                [[_power(outcome, leaf, origin, side) for outcome in group] for group in groups]
            )
            for side in get_args(Side)
        )
        if "unknown" in (gradient, weight):
            # A sum of a term in the gradients and one in the weights is a power of neither
            both: Any = [None if power is None else "unknown" for power in (gradient, weight)]
            best = Law(*both) if best == _UNKNOWN else best
            continue
        law = Law(gradient, weight, origin)  # pyright: ignore[reportArgumentType]
        worst = max(_misfit(outcome, leaf, law) for outcome in groups[0])
        if worst < min(gap, _NEAR):
            best, gap = law, worst
    return best


def _power(outcome: _Outcome, leaf: int, origin: float, side: Side) -> Measured:
    """The power of the gradients (or of the weights: `side`) that an array minus `origin` scales with.

    None if the array does not change with them in this trial, "zero" if it is zero in the plain lane, so
    that it shows no ratio, and "unknown" if no power fits.
    """
    end = {name: x - origin for name, x in outcome.end.items()}
    plain, scaled, mirrored = end["plain"], end[f"scaled {side}s"], end[f"mirrored {side}s"]
    if not np.issubdtype(plain.dtype, np.floating):
        return "unknown"  # such as the integer codes of a quantised moment
    if all(
        _same(outcome.end[f"{change} {side}s"], outcome.end["plain"])
        for change in ("other", "no", "mirrored")
    ):
        return None
    size = np.max(np.abs(plain), initial=0)
    alive = np.abs(plain) > _UNCHANGED * size
    if not alive.any():
        return "zero"
    # A power of zero is zero, so zero gradients must leave the array at its origin
    if not np.all(np.abs(end[f"no {side}s"]) <= _SMALL * size):
        return "unknown"
    number = get_args(Side).index(side)
    by, turned = (
        np.broadcast_to(outcome.trial.factors[f"{change} {side}s"][number][leaf], plain.shape)[
            alive
        ]
        for change in ("scaled", "mirrored")
    )
    ratio = scaled[alive] / plain[alive]
    if not np.all(ratio > 0) or np.any(np.abs(scaled[~alive]) > _NEAR * size):
        return "unknown"
    degrees = np.log(ratio) / np.log(by)
    degree = float(np.round(6 * np.median(degrees)) / 6)  # sixths include halves and thirds (roots)
    if np.any(np.abs(degrees - degree) > _NEAR):
        return "unknown"
    signs = mirrored[alive] / plain[alive]
    for odd, expected in ((True, turned), (False, 1.0)):
        if np.allclose(signs, expected, rtol=0, atol=_NEAR):
            return Power(degree, odd)
    return Power(degree, None)


def _agreed(groups: list[list[Measured]]) -> Power | Literal["unknown"] | None:
    """The power at the largest size of gradients that shows one; "unknown" if a smaller size differs."""
    agreed: Power | None = None
    for powers in groups:
        if agreed is None and "unknown" in powers:
            return "unknown"
        for power in [power for power in powers if isinstance(power, Power)]:
            if agreed is None:
                agreed = power
            elif power.degree != agreed.degree:
                return "unknown"
            elif power.odd != agreed.odd:
                agreed = Power(agreed.degree, None)
    depends = any(power is not None for group in groups for power in group)
    return "unknown" if agreed is None and depends else agreed


def _misfit(outcome: _Outcome, leaf: int, law: Law) -> float:
    """The relative error of a law in the lane that multiplies both the gradients and the weights."""
    expected = outcome.end["plain"] - law.origin
    for power, factor in zip(law[:2], outcome.trial.factors["both"], strict=True):
        if isinstance(power, Power):
            expected = expected * np.asarray(power.of(jnp.asarray(factor[leaf])))
    gap = np.abs(outcome.end["both"] - law.origin - expected)
    return float(np.max(gap, initial=0) / np.max(np.abs(expected), initial=1e-300))


# The whole optimizer -------------------------------------------------------------------------


def _with_differences(optimizer: Any, run: Run, traits: list[Traits]) -> list[Traits]:
    """The traits with the law of weights for arrays that the evaluated parameters are computed from.

    Such arrays are differences of weights (the offset of `schedule_free`). They start from 0 and have a
    nonzero derivative in `Rule.judged`.
    """
    if not isinstance(optimizer, Rule) or optimizer.judged is None:
        return traits
    judged, params = optimizer.judged, jax.tree.map(lambda x: x[0], run.weights[0])
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x[0], run.state))

    def total(arrays: dict[int, Any]):
        state = structure.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return sum(jnp.sum(x) for x in jax.tree.leaves(judged(params, state)))

    slopes = jax.grad(total)(
        {i: leaves[i] for i, t in enumerate(traits) if t.shaped and t.initial == 0}
    )
    inside = {i for i, slope in slopes.items() if np.any(np.asarray(slope))}
    return [dataclasses.replace(t, law=WEIGHT) if i in inside else t for i, t in enumerate(traits)]


def _averages(
    optimizer: Any, structure: Any, shapes: list[tuple[int, ...]], traits: list[Traits]
) -> bool:
    """Whether the optimizer does nothing but average its input, be it gradients or weights.

    If so, a constant input comes out times a share that does not shrink and is the same for every entry,
    and an input at the first step alone comes out times ever smaller shares.
    """
    if {t.law for t in traits if t.reach != "nothing"} != {FIRST}:
        return False
    rng = np.random.default_rng(0)
    inputs = [rng.uniform(0.5, 2, shape) * rng.choice([-1.0, 1.0], shape) for shape in shapes]
    always = [np.broadcast_to(x, (PERIOD, *x.shape)) for x in inputs]
    once = [np.concatenate([x[None], np.zeros((PERIOD - 1, *x.shape))]) for x in inputs]
    lanes = [Lane(always, always), Lane(once, always)]
    run = Run(optimizer, structure, lanes, updates=True)
    by_step = []
    for step in range(PERIOD):
        run.until(step + 1)
        ratios = [y / x for x, y in zip(inputs, numbers(run.updates), strict=True)]
        by_step.append(np.concatenate([ratio.reshape(2, -1) for ratio in ratios], axis=1))
    shares = np.stack(by_step)  # [step, lane, entry]
    constant, faded = shares[:, 0], shares[:, 1]
    uniform = np.allclose(shares, shares[..., :1], rtol=1e-6, atol=0)
    bounded = np.all((constant > 0) & (constant < 1 + 1e-6))
    rises = np.all(np.diff(constant, axis=0) > -1e-6)
    fades = np.all(faded > 0) and np.all(np.diff(faded, axis=0) < 0)
    return bool(uniform and bounded and rises and fades)
