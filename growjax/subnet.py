"""Sub-networks: train a random part of the model at each step, and always keep the whole.

A sub-network is the same kind of value as a growth operator, but its maps select: parameters in,
fewer parameters out, in the same tree, so one loss serves both. Drawing is a function of the key; the
number of layers or units kept is static, so one compilation serves every draw, and a step at k of L
layers costs k of L. Gradients flow back into the whole model; what was left out gets exact zeros.

RaPTr: Panigrahi et al., "Efficient Stagewise Pretraining via Progressive Subnetworks", ICLR 2025.
Progressive layer dropping: Zhang & He, NeurIPS 2020. Constant `random_path(mode="bernoulli")` is
stochastic depth (Huang et al. 2016) or LayerDrop (Fan et al. 2020).
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax import maps
from growjax.axes import Axes, axes_of
from growjax.errors import SubnetError, expect_one_of, raise_all
from growjax.maps import AxisMap, fold_in_name


Scale = Literal["none", "sqrt_gap", "linear_gap", "sqrt_global", "linear_global", "inverse_p"]

Model = TypeVar("Model")


class Subnet(eqx.Module):
    """A sub-network of a model: subclass it and write `maps`."""

    @abc.abstractmethod
    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> Sequence[AxisMap]:
        """The selections for one draw."""

    def __call__(self, model: Model, *, key: PRNGKeyArray, step: int | Int[Array, ""] = 0) -> Model:
        """The smaller model for this key (and, if the method has a schedule, this step)."""
        for move in self.maps(axes_of(model), key=key, step=step):
            model = maps.apply(move, model, None)
        return model

    def running(
        self, model, *, key: PRNGKeyArray, step: int | Int[Array, ""] = 0
    ) -> dict[str, Bool[Array, " layers"]]:
        """Of each stack that loses layers, which of them run for this key; see `growjax.optim.freeze`."""
        table, found = axes_of(model), {}
        for move in self.maps(table, key=key, step=step):
            if "stack" in table.roles(move.axis):
                chosen = jnp.zeros(table.size(move.axis), bool).at[move.source].set(True)
                found[move.axis] = chosen if move.active is None else move.active
        return found


class Coins(Subnet):
    """A sub-network that skips each layer by a coin of its own: subclass it and write `chances`.

    All layers' weights stay in the program, and `lax.cond` skips those that the coins leave out, so one
    program serves every draw. `tossed` gives the draws of many steps at once, to charge a run for what
    it draws.
    """

    @property
    def tosses(self) -> bool:
        """Whether there are coins at all."""
        return True

    @property
    @abc.abstractmethod
    def stacks(self) -> tuple[str, ...]:
        """The stacks of layers that share the coins."""

    @abc.abstractmethod
    def chances(self, layers: int, step) -> Any:
        """The probability [layers] of running each layer, at a step or its traced number."""

    @abc.abstractmethod
    def branches(self, on: Bool[Array, " layers"], step) -> Float[Array, " layers"] | None:
        """The multiplier of each layer's branches, given which run; None multiplies nothing."""

    def coins(self, layers: int, *, key: PRNGKeyArray) -> Float[Array, " layers"]:
        """A uniform number for each layer; it runs where this is below its chance."""
        return jax.random.uniform(fold_in_name(key, "coins"), (layers,))

    def flags(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """The maps of one draw: the same flags along every stack."""
        layers = {axis: _depth(axes, axis) for axis in self.stacks}
        if len(set(layers.values())) > 1:
            raise SubnetError(f"axis: stacks that share their coins are equally deep, got {layers}")
        n = layers[self.stacks[0]]
        on = self.toss(n, key=key, step=step)
        branch = self.branches(on, step)
        return [AxisMap(axis, np.arange(n), active=on, branch=branch) for axis in self.stacks]

    def toss(self, layers: int, *, key: PRNGKeyArray, step) -> Bool[Array, " layers"]:
        """Which layers run, for one draw."""
        return self.coins(layers, key=key) < jnp.asarray(self.chances(layers, step), jnp.float32)

    def tossed(
        self, layers: int, seed: int, first: int, count: int
    ) -> Bool[np.ndarray, "count layers"]:
        """Which layers run at each of the steps from `first` on."""
        steps = jnp.arange(first, first + count)
        return np.asarray(
            jax.vmap(lambda i: self.toss(layers, key=step_key(seed, i), step=i))(steps)
        )


def step_key(seed: int, step: int | Int[Array, ""]) -> PRNGKeyArray:
    """The key of one training step: the same on every host and after every restart."""
    return jax.random.fold_in(fold_in_name(jax.random.key(seed), "subnet"), step)


def _depth(axes: Axes, axis: str) -> int:
    """The number of layers along a stack axis."""
    size = axes.size(axis)
    if "stack" not in axes.roles(axis):
        raise SubnetError(f"axis: expected a stack of blocks such as 'layers', got {axis!r}")
    return size


class RandomPath(Coins):
    """A random path through the layers; see `random_path`."""

    length: int | float = eqx.field(static=True)
    keep: tuple[int, ...] = eqx.field(static=True, default=(0, -1))
    scale: Scale = eqx.field(static=True, default="none")
    mode: Literal["fixed", "bernoulli"] = eqx.field(static=True, default="fixed")
    axis: str = eqx.field(static=True, default="layers")

    def at(self, step: int, *, seed: int = 0) -> "RandomPath":
        """The path of whole length for one step: a fractional length rounds up or down by chance.

        Runs on the host, so that each of the two lengths keeps its own compiled step.
        """
        if self.mode == "bernoulli" or float(self.length).is_integer():
            return self if self.mode == "bernoulli" else self._with_length(int(self.length))
        draw = np.random.default_rng([seed, step, 0x9A7]).uniform()
        low = math.floor(self.length)
        return self._with_length(low + int(draw < self.length - low))

    def steady(self, step: int) -> float:
        """The step before which `at` says what it says of `step`, as far as is known without drawing."""
        by_chance = self.mode == "fixed" and not float(self.length).is_integer()
        return step + 1 if by_chance else math.inf

    def _with_length(self, length: int) -> "RandomPath":
        return RandomPath(length, self.keep, self.scale, self.mode, self.axis)

    def kept(self, layers: int) -> tuple[int, ...]:
        """The layers that are on every path; raises `SubnetError` if the path does not fit."""
        bad = [i for i in self.keep if not -layers <= i < layers]
        complaints = [f"keep: {bad} are not among {layers} layers"] if bad else []
        kept = tuple(sorted({i % layers for i in self.keep})) if not bad else ()
        if not len(kept) <= self.length <= layers or self.length <= 0:
            complaints.append(
                f"length: expected between {max(len(kept), 1)} (the fixed layers) and {layers}, got "
                f"{self.length}"
            )
        if self.scale not in get_args(Scale):
            complaints.append(f"scale: expected one of {get_args(Scale)}, got {self.scale!r}")
        if self.mode not in ("fixed", "bernoulli"):
            complaints.append(f"mode: expected 'fixed' or 'bernoulli', got {self.mode!r}")
        elif self.mode == "fixed" and not isinstance(self.length, int):
            complaints.append(
                f"length: {self.length} is not whole; take path.at(step, seed=...) first, which rounds "
                "it up or down by chance"
            )
        raise_all(SubnetError, f"this path does not fit {layers} {self.axis}:", complaints)
        return kept

    def probability(self, layers: int) -> float:
        """The chance of each layer that is not fixed: `(length - fixed) / (layers - fixed)`."""
        fixed = len({i % layers for i in self.keep})
        return 1.0 if layers == fixed else (self.length - fixed) / (layers - fixed)

    def sample(self, layers: int, *, key: PRNGKeyArray) -> Int[Array, " length"]:
        """The layers of one path of fixed length, ascending."""
        kept = self.kept(layers)
        free = np.setdiff1d(np.arange(layers), kept)
        drawn = jax.random.permutation(fold_in_name(key, "path"), jnp.asarray(free, jnp.int32))
        path = jnp.concatenate([jnp.asarray(kept, jnp.int32), drawn[: self.length - len(kept)]])
        return jnp.sort(path)

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A selection of layers, or flags for each of them, with multipliers for their branches."""
        layers = _depth(axes, self.axis)
        self.kept(layers)  # raises if the path does not fit
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
        fixed = np.isin(np.arange(layers), self.kept(layers))
        return np.where(fixed, 1.0, self.probability(layers)).astype(np.float32)

    def _scales(self, path: Int[Array, " k"], layers: int) -> Float[Array, " k"] | None:
        gaps = jnp.diff(path, append=layers)
        return self._multiplier(
            gaps, path.shape[0], jnp.isin(path, np.asarray(self.kept(layers))), layers
        )

    def branches(self, on: Bool[Array, " layers"], step) -> Float[Array, " layers"] | None:
        """The scale of each layer that runs."""
        layers = on.shape[0]
        index = jnp.where(on, jnp.arange(layers), layers)
        after = jax.lax.cummin(jnp.append(index[1:], layers), reverse=True)
        fixed = np.isin(np.arange(layers), self.kept(layers))
        return self._multiplier(after - jnp.arange(layers), jnp.sum(on), fixed, layers)

    def _multiplier(self, gaps, count, fixed, layers: int) -> Array | None:
        """The residual multiplier of each kept layer; exactly 1 on a full path."""
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
    - `scale`: a multiplier for the residual branches of kept layers: the square root or the value of
      the gap to the next kept layer, of layers/length, or of one over the layer's probability.

    Raises `SubnetError` when the path does not fit the model.

    **Example**

        path = gj.random_path(6)
        loss = lambda model, key: next_token_loss(path(model, key=key), batch)
    """
    return RandomPath(length, tuple(keep), scale, mode, axis)


class RandomPart(Subnet):
    """Random heads and hidden units of every layer; see `random_part`."""

    counts: tuple[tuple[str, int], ...] = eqx.field(static=True)
    scale: Literal["none", "sqrt", "linear"] = eqx.field(static=True, default="none")
    per_layer: bool = eqx.field(static=True, default=True)

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A selection along each axis, layer by layer."""
        counts, complaints = dict(self.counts), []
        if "heads" in counts and "heads" not in axes.sizes and "group" in axes.sizes:
            heads, group = counts.pop("heads"), axes.size("group")
            counts["kv_heads"] = heads // group
            if heads % group:
                complaints.append(f"heads: {heads} are not whole groups of {group} queries")
        expect_one_of(SubnetError, "scale", self.scale, ("none", "sqrt", "linear"))
        moves = []
        for axis, count in counts.items():
            size = axes.size(axis)
            if not 0 < count <= size:
                complaints.append(f"{axis}: expected between 1 and {size}, got {count}")
            elif axes.normalised(axis) or axes.roles(axis) & {"stack", "lookup"}:
                complaints.append(
                    f"{axis}: only units that norms do not average over can be left out"
                )
            elif count < size:
                moves.append(self._map(axes, axis, count, key))
        raise_all(SubnetError, "this part does not fit the model:", complaints)
        return moves

    def _map(self, axes: Axes, axis: str, count: int, key: PRNGKeyArray) -> AxisMap:
        size, key = axes.size(axis), fold_in_name(key, f"part:{axis}")

        def draw(key):
            return jnp.sort(jax.random.permutation(key, size)[:count])

        stacks = {slot.dims[0].axis for slot in axes.having(axis) if slot.dims[0].role == "stack"}
        if self.per_layer and len(stacks) == 1:
            source = jax.vmap(draw)(jax.random.split(key, axes.size(stacks.pop())))
        else:
            source = draw(key)
        factor = {"none": None, "sqrt": (size / count) ** 0.5, "linear": size / count}[self.scale]
        share = None if factor is None else np.full(count, factor)
        return AxisMap(axis, source, share=share)


def random_part(
    *,
    scale: Literal["none", "sqrt", "linear"] = "none",
    per_layer: bool = True,
    **counts: int,
) -> RandomPart:
    """Random heads and hidden units (RaPTr's width form): `random_part(heads=4, mlp=512)`.

    The residual stream, embeddings and norms stay whole, and output biases are added once. Grouped
    queries are chosen by whole groups. `scale` multiplies what consumes the chosen units by the
    square root or the value of size/count. `per_layer=False` (always so where layers of several
    stacks share the axis) chooses the same units in every layer.

    **Example**

        part, path = gj.random_part(heads=4, mlp=512), gj.random_path(6)
        smaller = part(path(model, key=key), key=key)
    """
    return RandomPart(tuple(counts.items()), scale, per_layer)


class ProgressiveLayerDrop(Coins):
    """Layers dropped more and more often, deeper ones first; see `progressive_layer_drop`."""

    floor: float = eqx.field(static=True)
    rate: float = eqx.field(static=True)
    inverse: bool = eqx.field(static=True, default=True)
    axis: str | tuple[str, ...] = eqx.field(static=True, default="layers")

    @property
    def stacks(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    def theta(self, step) -> Float[Array, ""]:
        """The keep probability of the deepest layer: from 1 down to `floor`."""
        return (1 - self.floor) * jnp.exp(-self.rate * jnp.asarray(step, jnp.float32)) + self.floor

    def chances(self, layers: int, step) -> Float[Array, " layers"]:
        """`p_l = 1 - l/L (1 - theta)` for l = 1..L."""
        return 1 - jnp.arange(1, layers + 1) / layers * (1 - self.theta(step))

    def branches(self, on: Bool[Array, " layers"], step) -> Float[Array, " layers"] | None:
        """One over its chance for each layer, if asked for."""
        return 1 / self.chances(on.shape[0], step) if self.inverse else None

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A flag for every layer and, if asked for, one over its probability on its branches."""
        raise_all(
            SubnetError,
            "this schedule of layer dropping is not one:",
            [
                f"{name}: expected {what}, got {value}"
                for name, what, value, ok in [
                    ("floor", "a probability above 0", self.floor, 0 < self.floor <= 1),
                    ("rate", "a positive number", self.rate, self.rate > 0),
                    ("axis", "a stack or more than one", self.axis, len(self.stacks) > 0),
                ]
                if not ok
            ],
        )
        return self.flags(axes, key=key, step=step)


def progressive_layer_drop(
    *,
    floor: float = 0.5,
    rate: float = 1e-3,
    inverse: bool = True,
    axis: str | Sequence[str] = "layers",
) -> ProgressiveLayerDrop:
    """Progressive layer dropping: keep probabilities fall from 1 to `floor` as `exp(-rate * step)`.

    **Arguments**

    - `rate`: DeepSpeed's is 1e-3; the paper's is 100 over the number of steps, No Train No Gain's 100
      (BERT) or 20 (T5) over it.
    - `inverse`: divide the branches of kept layers by their probability, as published. No Train No Gain's
      code does not (`inverse=False`). Evaluation uses the whole model.
    - `axis`: the stack of layers, or several equally deep ones that share their coins.

    **Example**

        drop = gj.progressive_layer_drop(rate=100 / steps)
        loss = lambda model, key, step: next_token_loss(drop(model, key=key, step=step), batch)
    """
    return ProgressiveLayerDrop(
        floor, rate, inverse, axis if isinstance(axis, str) else tuple(axis)
    )


class PathStage(NamedTuple):
    """Steps `start` to `stop` (exclusive) run this path."""

    start: int
    stop: int
    path: RandomPath


class PathSchedule(NamedTuple):
    """RaPTr's stages, in order; made by `path_schedule`."""

    layers: int
    stages: tuple[PathStage, ...]

    def at(self, step: int, *, seed: int = 0) -> RandomPath:
        """The path of one step, of whole length."""
        return self._stage(step).path.at(step, seed=seed)

    def steady(self, step: int) -> float:
        """The step before which `at` says what it says of `step`, as far as is known without drawing."""
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
    lengths: Sequence[int | float],
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
    complaints = []
    if not lengths or list(lengths) != sorted(lengths) or lengths[-1] != layers:
        complaints.append(
            f"lengths: expected a rising list that ends at {layers} layers, got {tuple(lengths)}"
        )
    if stages not in ("equal", "proportional"):
        complaints.append(f"stages: expected 'equal' or 'proportional', got {stages!r}")
    if not 0 <= warmup <= steps - len(lengths):
        complaints.append(
            f"warmup: {warmup} of {steps} steps leave fewer than one for each of {len(lengths)} stages"
        )
    raise_all(SubnetError, "this schedule does not fit:", complaints)
    paths = [random_path(n, keep=keep, scale=scale, mode=mode) for n in lengths]
    for path in paths:
        (path if mode == "bernoulli" else path.at(0)).kept(layers)
    weights = np.arange(1, len(paths) + 1) if stages == "proportional" else np.ones(len(paths))
    ends = warmup + np.round((steps - warmup) * np.cumsum(weights) / weights.sum()).astype(int)
    starts = [warmup, *ends[:-1]]
    if min(ends - starts) < 1:
        raise SubnetError(
            f"steps: {steps} are too few, a stage would have none; its lengths are {tuple(lengths)}"
        )
    spans = [PathStage(int(a), int(b), p) for a, b, p in zip(starts, ends, paths, strict=True)]
    if warmup:
        spans.insert(
            0, PathStage(0, warmup, random_path(layers, keep=keep, scale=scale, mode=mode))
        )
    return PathSchedule(layers, tuple(spans))
