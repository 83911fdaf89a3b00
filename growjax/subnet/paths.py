"""Random paths through the layers, and RaPTr's stages of them.

RaPTr: Panigrahi et al., "Efficient Stagewise Pretraining via Progressive Subnetworks", ICLR 2025.
Constant `random_path(mode="bernoulli")` is stochastic depth (Huang et al. 2016) or LayerDrop (Fan et al.
2020).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import SubnetError, raise_all
from growjax.maps import fold_in_name
from growjax.subnet.base import Coins, check_draw, depth_of
from growjax.values import Size, at_least, check, faults, positive, register, tuples


Scale = Literal["none", "sqrt_gap", "linear_gap", "sqrt_global", "linear_global", "inverse_p"]


RAPTR = Paper(
    "Efficient Stagewise Pretraining via Progressive Subnetworks",
    "Panigrahi, Abhishek and Saunshi, Nikunj and Lyu, Kaifeng and Miryoosefi, Sobhan and Reddi, "
    "Sashank and Kale, Satyen and Kumar, Sanjiv",
    2025,
    "International Conference on Learning Representations",
    "2402.05913",
)
_STOCHASTIC_DEPTH = Paper(
    "Deep Networks with Stochastic Depth",
    "Huang, Gao and Sun, Yu and Liu, Zhuang and Sedra, Daniel and Weinberger, Kilian Q.",
    2016,
    "European Conference on Computer Vision",
    "1603.09382",
)
_LAYERDROP = Paper(
    "Reducing Transformer Depth on Demand with Structured Dropout",
    "Fan, Angela and Grave, Edouard and Joulin, Armand",
    2020,
    "International Conference on Learning Representations",
    "1909.11556",
)


@register
class RandomPath(Coins):
    """A random path through the layers; see `random_path`."""

    length: Annotated[int | float, positive()] = eqx.field(static=True)
    keep: tuple[int, ...] = eqx.field(static=True, default=(0, -1))
    scale: Scale = eqx.field(static=True, default="none")
    mode: Literal["fixed", "bernoulli"] = eqx.field(static=True, default="fixed")
    axis: str = eqx.field(static=True, default="layers")
    card: ClassVar[Card] = Card(
        use="A model of the final size from the first step, at the cost of `length` of its layers a "
        "step; most often in stages of growing length (`gj.path_schedule`).",
        traps=(
            "The whole model is what counts: evaluate it, not the path, and train all of it at the end.",
            "First and last layer should stay on every path (`keep`).",
            "With momentum and weight decay left-out layers move as well; `Stage(inactive='freeze')` "
            "holds them.",
        ),
        example="random_path(2)",
        by={"mode": {"fixed": (RAPTR,), "bernoulli": (_STOCHASTIC_DEPTH, _LAYERDROP)}},
    )

    def at(self, step: int, *, seed: int = 0) -> "RandomPath":
        """The path of whole length for one step: a fractional length rounds up or down by chance.

        Runs on the host, so that each of the two lengths keeps its own compiled step.
        """
        check_draw(step, seed)
        if self.mode == "bernoulli":
            return self
        if float(self.length).is_integer():
            return dataclasses.replace(self, length=int(self.length))
        draw = np.random.default_rng([seed, step, 0x9A7]).uniform()
        low = math.floor(self.length)
        return dataclasses.replace(self, length=low + int(draw < self.length - low))

    def steady(self, step: int) -> float:
        """The step up to which `at` surely gives the path that it gives at `step` (exclusive)."""
        certain = self.mode == "bernoulli" or float(self.length).is_integer()
        return math.inf if certain else step + 1

    def fixed_layers(self, layers: int) -> tuple[int, ...]:
        """The layers that are on every path; raises `SubnetError` if the path does not fit."""
        bad = [i for i in self.keep if not -layers <= i < layers]
        complaints = [f"keep: {bad} are not among {layers} layers"] if bad else []
        fixed = tuple(sorted({i % layers for i in self.keep})) if not bad else ()
        if not len(fixed) <= self.length <= layers or self.length <= 0:
            complaints.append(
                f"length: expected between {max(len(fixed), 1)} (the fixed layers) and {layers}, got "
                f"{self.length}"
            )
        if self.mode == "fixed" and not isinstance(self.length, int):
            complaints.append(
                f"length: {self.length} is not whole; take path.at(step, seed=...) first, which rounds "
                "it up or down by chance"
            )
        raise_all(SubnetError, f"this path does not fit {layers} {self.axis}:", complaints)
        return fixed

    def probability(self, layers: int) -> float:
        """The chance of each layer that is not fixed: `(length - fixed) / (layers - fixed)`."""
        fixed = len({i % layers for i in self.keep})
        return 1.0 if layers == fixed else (self.length - fixed) / (layers - fixed)

    def sample(self, layers: int, *, key: PRNGKeyArray) -> Int[Array, " length"]:
        """The layers of one path of fixed length, ascending."""
        fixed = self.fixed_layers(layers)
        free = np.setdiff1d(np.arange(layers), fixed)
        drawn = jax.random.permutation(fold_in_name(key, "path"), jnp.asarray(free, jnp.int32))
        path = jnp.concatenate([jnp.asarray(fixed, jnp.int32), drawn[: self.length - len(fixed)]])
        return jnp.sort(path)

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A selection of layers, or flags for each of them, with multipliers for their branches."""
        layers = depth_of(axes, self.axis)
        self.fixed_layers(layers)  # raises if the path does not fit
        if self.length == layers:
            return []
        if self.mode == "fixed":
            path = self.sample(layers, key=key)
            return [AxisMap(self.axis, path, branch=self._scales(path, layers))]
        return self.flags(axes, key=key, step=step)

    @property
    def tosses(self) -> bool:
        return self.mode == "bernoulli"

    @property
    def stacks(self) -> tuple[str, ...]:
        return (self.axis,)

    def chances(self, layers: int, step) -> np.ndarray:
        """1 for the layers that are always run, the same `probability` for the others."""
        fixed = np.isin(np.arange(layers), self.fixed_layers(layers))
        return np.where(fixed, 1.0, self.probability(layers)).astype(np.float32)

    def _scales(self, path: Int[Array, " k"], layers: int) -> Float[Array, " k"] | None:
        gaps = jnp.diff(path, append=layers)
        return self._multiplier(
            gaps, path.shape[0], jnp.isin(path, np.asarray(self.fixed_layers(layers))), layers
        )

    def branches(self, on: Bool[Array, " layers"], step) -> Float[Array, " layers"] | None:
        """The scale of each layer that runs."""
        layers = on.shape[0]
        index = jnp.where(on, jnp.arange(layers), layers)
        after = jax.lax.cummin(jnp.append(index[1:], layers), reverse=True)
        fixed = np.isin(np.arange(layers), self.fixed_layers(layers))
        return self._multiplier(after - jnp.arange(layers), jnp.sum(on), fixed, layers)

    def _multiplier(self, gaps, count, fixed, layers: int) -> Array | None:
        """The residual multiplier of each layer on the path; exactly 1 on a full path."""
        gaps = gaps.astype(jnp.float32)
        ratio = jnp.asarray(layers / count, jnp.float32)
        return {
            "none": lambda: None,
            "sqrt_gap": lambda: jnp.sqrt(gaps),
            "linear_gap": lambda: gaps,
            "sqrt_global": lambda: jnp.full(gaps.shape, jnp.sqrt(ratio)),
            "linear_global": lambda: jnp.full(gaps.shape, ratio),
            "inverse_p": lambda: jnp.where(fixed, 1.0, 1 / self.probability(layers)),
        }[self.scale]()


def random_path(
    length: int | float,
    *,
    keep: Sequence[int] = (0, -1),
    scale: Scale = "none",
    mode: Literal["fixed", "bernoulli"] = "fixed",
    axis: str = "layers",
) -> RandomPath:
    """A random path of `length` layers (RaPTr), drawn afresh for every key.

    **Arguments**

    - `length`: how many layers are run. In mode `"fixed"` exactly that many, at a cost of
      `length / layers`; in `"bernoulli"` that many on average, each layer by its own coin, skipped
      by `lax.cond`. A fractional length of a fixed path needs `path.at(step, seed=...)`.
    - `keep`: layers that are always run (negative counts from the end).
    - `scale`: a multiplier for the residual branches of layers on the path: the square root or the value
      of the gap to the next such layer, of layers/length, or of one over the layer's probability.

    Raises `SubnetError` when the path does not fit the model.

    **Example**

        path = gj.random_path(6)
        loss = lambda model, key: next_token_loss(path(model, key=key), batch)
    """
    return RandomPath(length, tuples(keep), scale, mode, axis)


@register
@dataclasses.dataclass(frozen=True)
class PathStage:
    """Steps `start` to `stop` (exclusive) run this path."""

    start: Annotated[int, at_least(0, "steps")]
    stop: Annotated[int, at_least(1, "steps")]
    path: RandomPath

    def __post_init__(self):
        check(self, SubnetError)


@register
@dataclasses.dataclass(frozen=True)
class PathSchedule:
    """RaPTr's stages, each from where the one before it stops; made by `path_schedule`."""

    layers: Size
    stages: tuple[PathStage, ...]
    card: ClassVar[Card] = Card(papers=(RAPTR,))

    def __post_init__(self):
        check(self, SubnetError, "these stages are no schedule:", self._faults)

    def _faults(self) -> Iterator[str]:
        if not self.stages:
            yield "stages: expected at least one"
        at = 0
        for n, stage in enumerate(self.stages):
            if stage.start != at or stage.stop <= at:
                yield f"stages[{n}]: expected steps from {at} on, got {stage.start} to {stage.stop}"
            at = stage.stop

    def at(self, step: int, *, seed: int = 0) -> RandomPath:
        """The path of one step, of whole length."""
        check_draw(step, seed)
        return self._stage(step).path.at(step, seed=seed)

    def steady(self, step: int) -> float:
        """The step up to which `at` surely gives the path that it gives at `step` (exclusive)."""
        stage = self._stage(step)
        return min(stage.path.steady(step), stage.stop)

    def _stage(self, step: int) -> PathStage:
        for stage in self.stages:
            if stage.start <= step < stage.stop:
                return stage
        raise SubnetError(f"step {step} is outside the schedule's {self.stages[-1].stop} steps")

    @property
    def saving(self) -> float:
        """Full-model block FLOPs over this schedule's: 4/3 for 6-8-10-12 in equal stages."""
        steps = self.stages[-1].stop
        return self.layers * steps / sum((s.stop - s.start) * s.path.length for s in self.stages)


def path_schedule(
    lengths: Sequence[float],
    *,
    layers: int,
    steps: int,
    stages: Literal["equal", "proportional"] = "equal",
    warmup: int = 0,
    keep: Sequence[int] = (0, -1),
    scale: Scale = "none",
    mode: Literal["fixed", "bernoulli"] = "fixed",
) -> PathSchedule:
    """RaPTr's stages: path lengths that never shrink and end at the whole model.

    **Arguments**

    - `lengths`: a mean path length for each stage, such as `(6, 8, 10, 12)`.
    - `stages`: how steps are shared out: equally, or in proportion 1 : 2 : 3 : ...
    - `warmup`: steps of the whole model first (taken from `steps`).

    Raises `SubnetError` that lists everything that does not fit.

    **Example**

        schedule = path_schedule((6, 8, 10, 12), layers=12, steps=675_000)
        schedule.saving                                       # 1.333
    """
    given = tuples(lengths)
    types = {
        "lengths": (tuple[float, ...], given),
        "layers": (Size, layers),
        "steps": (Size, steps),
        "stages": (Literal["equal", "proportional"], stages),
        "warmup": (int, warmup),
    }
    complaints = [
        line for name, (hint, value) in types.items() for line in faults(hint, value, name)
    ]
    raise_all(SubnetError, "this schedule does not fit:", complaints)
    if not given or list(given) != sorted(given) or given[-1] != layers:
        complaints.append(
            f"lengths: expected a rising list that ends at {layers} layers, got {given}"
        )
    if not 0 <= warmup <= steps - len(given):
        complaints.append(
            f"warmup: {warmup} of {steps} steps leave fewer than one for each of {len(given)} stages"
        )
    raise_all(SubnetError, "this schedule does not fit:", complaints)
    path_of = functools.partial(random_path, keep=keep, scale=scale, mode=mode)
    paths = [path_of(n) for n in given]
    for path in paths:  # raises if one does not fit
        path.at(0).fixed_layers(layers)
    weights = np.arange(1, len(paths) + 1) if stages == "proportional" else np.ones(len(paths))
    ends = warmup + np.round((steps - warmup) * np.cumsum(weights) / weights.sum()).astype(int)
    starts = [warmup, *ends[:-1]]
    if min(ends - starts) < 1:
        raise SubnetError(f"steps: {steps} are too few for {given}, a stage would have none")
    spans = [PathStage(int(a), int(b), p) for a, b, p in zip(starts, ends, paths, strict=True)]
    if warmup:
        spans.insert(0, PathStage(0, warmup, path_of(layers)))
    return PathSchedule(layers, tuple(spans))
