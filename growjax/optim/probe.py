"""What an optimizer keeps, found by running it on a toy.

Names and types of optimizer state say little: `mu` is a moment of gradients in one transformation and of
normalised updates in another. So the transformation is asked (`growjax.optim.toy`). What an array of its
state does when something else is fed says which entries it depends on (its reach) and how it scales
(its law); what it holds before, where a new coordinate starts.

Three sizes of gradients are tried. Those of 1 are large next to the small constants of optimizers (an
`eps` of 1e-8), those of less than 1 in all, or of 0.001, too small for most to be clipped. A law must
hold, to within what such constants do, at the largest size at which entries do not depend on each other,
and no smaller one may show another. So clipping by a norm counts as an event that leaves what it scaled
as it was, and `eps` as nothing.
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
from growjax.errors import StateError
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
Found = Power | Literal["unknown", "unseen"] | None

STEPS = (7, 61, 257)  # the next number only if some array has not changed yet
_UNCHANGED, _NEAR = 1e-9, 0.02  # relative gaps: of rounding, and of what an eps does
_SMALL = 1e-5  # the most that an eps, or a first value like one, may leave where nothing is fed
_MANY = 40  # parameters
_UNKNOWN = Law("unknown", "unknown")


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one array of an optimizer's state holds.

    - `reach`: what an entry depends on: "nothing" that is fed (a step count), its own "entry" of the
      gradients and weights, other entries of its "leaf", or of "all" leaves.
    - `law`: how entries scale.
    - `initial`: the number that every entry starts from; None if it is not one number (the weights).
    - `shaped`: whether it is shaped like its parameter.
    - `additive`: whether it stays as it is where there are further coordinates that nothing was fed to
      (sums do, means and what depends on shapes do not).
    - `updates`: after how many updates it was looked at.
    """

    reach: Reach
    law: Law
    initial: float | None
    shaped: bool
    additive: bool
    updates: int


class Probe(NamedTuple):
    """What the arrays of an optimizer's state hold, and whether all that it does is to average."""

    cells: tuple[Cell, ...]
    kept: tuple[Kept, ...]
    averages: bool

    def of(self, wanted: Sequence[Cell]) -> list[Kept | None]:
        """What each array holds: that of its name, or all of its kind alike; None if not seen."""
        names = {cell.name: kept for cell, kept in zip(self.cells, self.kept, strict=True)}
        kinds: dict[str, set[Kept]] = {}
        for cell, kept in zip(self.cells, self.kept, strict=True):
            kinds.setdefault(cell.kind, set()).add(kept)
        alike = {kind: next(iter(held)) for kind, held in kinds.items() if len(held) == 1}
        return [names.get(cell.name, alike.get(cell.kind)) for cell in wanted]


def probe(optimizer: Any, params: Any, wanted: Sequence[Cell]) -> Probe:
    """Find out what an optimizer keeps of parameters like these, of which only the structure matters.

    `wanted` are the arrays to find out about. Nothing is traced: it runs at once, on the host, also
    inside `jit`. What was found out is remembered for each transformation.

    Raises `StateError` if the transformation cannot be run on a toy.
    """
    few = _representatives(params)
    if few is not None:
        with contextlib.suppress(
            StateError
        ):  # masks may be whole trees: then all of them are needed
            found = _of_toy(optimizer, few)
            if None not in found.of(wanted):
                return found
    return _of_toy(optimizer, params)


def _representatives(params: Any) -> Any:
    """Parameters with None in place of those that other layers have too, if that leaves few of them.

    Every parameter is a piece of program, and dozens of unrolled layers would take long to compile.
    """
    slots = leaves_of(params)
    first = {numberless(slot.path, slot): slot.steps for slot in reversed(slots)}
    if len(slots) < _MANY or 2 * len(first) > len(slots):
        return None
    kept = set(first.values())
    return put(params, {slot.steps: None for slot in slots if slot.steps not in kept})


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
    except Exception as error:  # whatever a transformation of the user's may raise
        raise StateError(
            "optimizer: its state is understood by running it on a small copy of the parameters, which "
            f"failed: {type(error).__name__}: {error}\n"
            "(it has to take gj.partition(model)[0], at any size of its axes, and no further arguments "
            "that it cannot do without; or start its state again after growing)"
        ) from error


def _probe_toy(optimizer: Any, params: Any) -> Probe:
    """Run the optimizer on a toy, for longer where something has not moved yet, and read its state."""
    slots, structure = leaves_of(params), jax.tree.structure(params)
    shapes = [slot.value.shape for slot in slots]
    # Entries are up to twice a size, so a norm of the second one is 0.9 at most
    entries = sum(np.prod(shape, dtype=int) for shape in shapes)
    sizes = (1.0, 0.45 / entries**0.5, 1e-3)
    trials = [[trial_of(shapes, size, seed) for seed in range(2)] for size in sizes]
    flat = [trial for group in trials for trial in group]
    run = Run(optimizer, structure, [lane for trial in flat for lane in trial.lanes.values()])
    wider = toy_of(params, SIZE + 1)
    wide = [padded(trial.lanes["plain"], slots, every(1)) for trial in flat]
    wide_run = Run(optimizer, jax.tree.structure(wider), wide)

    all_cells = cells(run.start, params)
    kept: dict[int, Kept] = {}
    for steps in STEPS:
        start, end = numbers(run.start), numbers(run.until(steps))
        wide_start, wide_end = numbers(wide_run.start), numbers(wide_run.until(steps))
        for i, cell in enumerate(all_cells):
            if i not in kept or kept[i].reach == "nothing":
                leaf = [slot.steps for slot in slots].index(cell.steps) if cell.steps else None
                array = _Array(cell, leaf, trials, start[i], end[i])
                slot = None if leaf is None else slots[leaf]
                kept[i] = _read(array, slot, wide_start[i], wide_end[i], steps)
        if not any(k.shaped and k.reach == "nothing" for k in kept.values()):
            break
    found = _with_differences(optimizer, run, [kept[i] for i in range(len(all_cells))])
    return Probe(tuple(all_cells), tuple(found), _averages(optimizer, structure, shapes, found))


# Reading one array ---------------------------------------------------------------------------


class _Seen(NamedTuple):
    """An array in every lane of one trial, at the start and in the end."""

    trial: Trial
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]


class _Array:
    """An array of the state in all trials, by size of the gradients; `leaf` numbers its parameter."""

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
        self.by_size: list[list[_Seen]] = []
        for group in trials:
            seen = []
            for trial in group:
                lanes = {name: first + n for n, name in enumerate(trial.lanes)}
                first += len(lanes)
                starts = {name: start[i] for name, i in lanes.items()}
                seen.append(_Seen(trial, starts, {name: end[i] for name, i in lanes.items()}))
            self.by_size.append(seen)

    @property
    def seen(self) -> list[_Seen]:
        """Of all sizes."""
        return [seen for group in self.by_size for seen in group]


def _wide(x: np.ndarray) -> np.ndarray:
    """Floating-point numbers in double precision (bfloat16 is none to numpy)."""
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _read(
    array: _Array, slot: Slot | None, wide_start: np.ndarray, wide_end: np.ndarray, steps: int
) -> Kept:
    """What an array holds; `wide_*` is the same one on a toy with a coordinate more on every axis."""
    seen, leaf = array.seen, array.leaf
    plain = seen[0].end["plain"]
    shaped = array.cell.alone and slot is not None and plain.shape == slot.value.shape
    starts = [*(x for s in seen for x in s.start.values()), *wide_start]
    first = starts[0].flat[0].item() if starts[0].size else 0
    constant = all(np.all(x == first) for x in starts)
    reaches: list[Reach] = [
        _widest(_reach(s, leaf, shaped) for s in group) for group in array.by_size
    ]
    moved: list[Any] = [each for each in reaches if each != "nothing"]
    reach: Reach = min(moved, key=_order) if moved else "nothing"
    law = _UNKNOWN
    if shaped and leaf is not None and all(_starts_as_weights(s, leaf) for s in seen):
        law = WEIGHT
    elif shaped and leaf is not None and reach == "entry":
        groups = [
            g for g, r in zip(array.by_size, reaches, strict=True) if r in ("entry", "nothing")
        ]
        law = _law(groups, leaf, first if constant else 0.0)
    ends = [s.end["plain"] for s in seen]
    additive = all(_same_old(x, y, slot) for x, y in zip(ends, _wide(wide_end), strict=True))
    additive = additive or array.cell.axis is not None
    return Kept(reach, law, first if constant else None, shaped, additive, steps)


def _order(reach: str) -> int:
    return get_args(Reach).index(reach)


def _widest(reaches: Iterable[Reach]) -> Reach:
    return max(reaches, key=_order)


def _starts_as_weights(seen: _Seen, leaf: int) -> bool:
    return all(
        np.array_equal(x, seen.trial.lanes[name].weights[leaf][0].astype(x.dtype))
        for name, x in seen.start.items()
    )


def _reach(seen: _Seen, leaf: int | None, shaped: bool) -> Reach:
    """What an entry depends on, by what does not change it."""
    end, plain = seen.end, seen.end["plain"]
    if all(_same(x, plain) for x in end.values()):
        return "nothing"
    if leaf is None:
        return "all"
    masks = {name: mask[leaf] for name, mask in seen.trial.masks.items()}
    if shaped and all(_same(end[name], plain, ~mask) for name, mask in masks.items()):
        return "entry"
    others = [name for name, mask in masks.items() if name.startswith("leaves") and not mask.any()]
    return "leaf" if all(_same(end[name], plain) for name in others) else "all"


def _same(x: np.ndarray, y: np.ndarray, where: Any = True) -> bool:
    """Whether two arrays are equal, but for rounding, at some of their entries."""
    if not np.issubdtype(y.dtype, np.inexact):
        return bool(np.all((x == y) | ~np.asarray(where)))
    near = np.abs(x - y) <= _UNCHANGED * np.max(np.abs(y), initial=0)
    return bool(np.all(near | (np.isnan(x) & np.isnan(y)) | (x == y) | ~np.asarray(where)))


def _same_old(x: np.ndarray, wide: np.ndarray, slot: Slot | None) -> bool:
    """Whether an array of a wider toy holds the same where the other one has entries."""
    if x.shape == wide.shape:
        return _same(wide, x)
    if slot is None or x.shape != slot.value.shape:
        return False
    return _same(narrowed(wide, slot, every(1)), x)


# Laws ----------------------------------------------------------------------------------------


def _law(groups: list[list[_Seen]], leaf: int, initial: float) -> Law:
    """The law that fits best: of a sum that counts from `initial`, or of what forgets it."""
    best, gap = _UNKNOWN, np.inf
    for origin in dict.fromkeys((initial, 0.0)):
        gradient, weight = (
            _agreed([[_power(seen, leaf, origin, side) for seen in group] for group in groups])
            for side in get_args(Side)
        )
        if "unknown" in (gradient, weight):
            # What one of them is mixed with is no power of the other either
            both: Any = [None if power is None else "unknown" for power in (gradient, weight)]
            best = Law(*both) if best == _UNKNOWN else best
            continue
        law = Law(gradient, weight, origin)  # pyright: ignore[reportArgumentType]
        worst = max(_misfit(seen, leaf, law) for seen in groups[0])
        if worst < min(gap, _NEAR):
            best, gap = law, worst
    return best


def _power(seen: _Seen, leaf: int, origin: float, side: Side) -> Found:
    """The power of what multiplies the gradients, or the weights, that an array scales with.

    None if it does not change with them in this trial, "unseen" if it is zero in the plain lane alone.
    """
    end = {name: x - origin for name, x in seen.end.items()}
    plain, scaled, mirrored = end["plain"], end[f"scaled {side}s"], end[f"mirrored {side}s"]
    if not np.issubdtype(plain.dtype, np.floating):
        return "unknown"  # the numbers of a code, say
    if all(
        _same(seen.end[f"{how} {side}s"], seen.end["plain"]) for how in ("other", "no", "mirrored")
    ):
        return None
    size = np.max(np.abs(plain), initial=0)
    alive = np.abs(plain) > _UNCHANGED * size
    if not alive.any():
        return "unseen"
    # Where nothing is fed it must be where it began, or more than a power goes into it
    if not np.all(np.abs(end[f"no {side}s"]) <= _SMALL * size):
        return "unknown"
    number = get_args(Side).index(side)
    by, turned = (
        np.broadcast_to(seen.trial.factors[f"{how} {side}s"][number][leaf], plain.shape)[alive]
        for how in ("scaled", "mirrored")
    )
    ratio = scaled[alive] / plain[alive]
    if not np.all(ratio > 0) or np.any(np.abs(scaled[~alive]) > _NEAR * size):
        return "unknown"
    degrees = np.log(ratio) / np.log(by)
    degree = float(np.round(6 * np.median(degrees)) / 6)  # of square and cube roots too
    if np.any(np.abs(degrees - degree) > _NEAR):
        return "unknown"
    signs = mirrored[alive] / plain[alive]
    for odd, expected in ((True, turned), (False, 1.0)):
        if np.allclose(signs, expected, rtol=0, atol=_NEAR):
            return Power(degree, odd)
    return Power(degree, None)


def _agreed(groups: list[list[Found]]) -> Power | Literal["unknown"] | None:
    """The power at the largest size of gradients that shows one, if no smaller one shows another."""
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
    seen = any(power is not None for group in groups for power in group)
    return "unknown" if agreed is None and seen else agreed


def _misfit(seen: _Seen, leaf: int, law: Law) -> float:
    """How far a law is from what becomes of an array whose gradients and weights are both multiplied."""
    expected = seen.end["plain"] - law.origin
    for power, factor in zip(law[:2], seen.trial.factors["both"], strict=True):
        if isinstance(power, Power):
            expected = expected * np.asarray(power.of(jnp.asarray(factor[leaf])))
    gap = np.abs(seen.end["both"] - law.origin - expected)
    return float(np.max(gap, initial=0) / np.max(np.abs(expected), initial=1e-300))


# The whole optimizer -------------------------------------------------------------------------


def _with_differences(optimizer: Any, run: Run, kept: list[Kept]) -> list[Kept]:
    """Arrays that the judged parameters contain are differences of weights, and move as weights do."""
    if not isinstance(optimizer, Rule) or optimizer.judged is None:
        return kept
    judged, params = optimizer.judged, jax.tree.map(lambda x: x[0], run.weights[0])
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x[0], run.state))

    def total(arrays: dict[int, Any]):
        state = structure.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return sum(jnp.sum(x) for x in jax.tree.leaves(judged(params, state)))

    slopes = jax.grad(total)(
        {i: leaves[i] for i, k in enumerate(kept) if k.shaped and k.initial == 0}
    )
    inside = {i for i, slope in slopes.items() if np.any(np.asarray(slope))}
    return [dataclasses.replace(k, law=WEIGHT) if i in inside else k for i, k in enumerate(kept)]


def _averages(
    optimizer: Any, structure: Any, shapes: list[tuple[int, ...]], kept: list[Kept]
) -> bool:
    """Whether all that the optimizer does is to average what it is fed, which may then be anything.

    If so, something constant comes out as a part of itself that does not shrink, the same for every
    entry, and something fed once as ever smaller parts of it.
    """
    if {k.law for k in kept if k.reach != "nothing"} != {FIRST}:
        return False
    rng = np.random.default_rng(0)
    fed = [rng.uniform(0.5, 2, shape) * rng.choice([-1.0, 1.0], shape) for shape in shapes]
    always = [np.broadcast_to(x, (PERIOD, *x.shape)) for x in fed]
    once = [np.concatenate([x[None], np.zeros((PERIOD - 1, *x.shape))]) for x in fed]
    lanes = [Lane(always, always), Lane(once, always)]
    run = Run(optimizer, structure, lanes, updates=True)
    parts = []  # [step, lane, entry]
    for step in range(PERIOD):
        run.until(step + 1)
        ratios = [y / x for x, y in zip(fed, numbers(run.updates), strict=True)]
        parts.append(np.concatenate([ratio.reshape(2, -1) for ratio in ratios], axis=1))
    constant, faded = np.stack(parts)[:, 0], np.stack(parts)[:, 1]
    even = np.allclose(parts, np.stack(parts)[..., :1], rtol=1e-6, atol=0)
    part = np.all((constant > 0) & (constant < 1 + 1e-6)) and np.all(
        np.diff(constant, axis=0) > -1e-6
    )
    return bool(even and part and np.all(faded > 0) and np.all(np.diff(faded, axis=0) < 0))
