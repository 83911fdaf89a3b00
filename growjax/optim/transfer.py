"""Learning rates that transfer over width and depth, as multiples of initial weights and of updates.

muP (Yang et al. 2022) and CompleteP (Dey et al. 2025) multiply the output of a model, its residual
branches and the rates of its matrices by powers of width and depth, so that the best learning rate of a
small model is that of a large one. A multiplier `m` in front of a weight does the same as none, with the
weight and its updates `m` times as large (rules whose updates have a size of their own, such as Adam's).
So every multiplier is folded into the weights here, for good: the model computes without any, growth
operators keep its function as before, and what a growth changes is the rates alone, which follow from the
sizes of the grown model.

For a leaf of the axis table, with `r` the size of an axis over that of the base model:

    consumes axes of features                  rate / r of each          (1 / fan-in)
    ... and produces none (a head)             initial weights / sqrt(r)
    ... as the norm before a tied head         initial weights / r       (the head's multiplier)
    in a stack, produces the residual stream   rate / r, initial weights / r     of the stack (1 / depth)
    weight decay                               times 1 / the multiple of the rate

An axis of features is one that some leaf produces and another consumes, such as `embed`, `mlp` or
`heads`; neither words and positions, which are looked up, nor layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from growjax.axes import Axes, Slot, axes_of, find, put
from growjax.cards import Card, Paper
from growjax.errors import StateError
from growjax.models.protocol import Config
from growjax.optim.divided import Decays
from growjax.optim.rules import Rule
from growjax.values import check, register


_MUP = Paper(
    "Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    "Yang, Greg and Hu, Edward J. and Babuschkin, Igor and Sidor, Szymon and Liu, Xiaodong and "
    "Farhi, David and Ryder, Nick and Pachocki, Jakub and Chen, Weizhu and Gao, Jianfeng",
    2021,
    "Advances in Neural Information Processing Systems",
    "2203.03466",
)
_COMPLETEP = Paper(
    "Don't be lazy: CompleteP enables compute-efficient deep transformers",
    "Dey, Nolan and Zhang, Bin Claire and Noci, Lorenzo and Li, Mufan and Bordelon, Blake and "
    "Bergsma, Shane and Pehlevan, Cengiz and Hanin, Boris and Hestness, Joel",
    2025,
    "Advances in Neural Information Processing Systems",
    "2505.01618",
)


class Multiples(NamedTuple):
    """The multiples of a leaf: of its initial weights, and of its learning rate."""

    init: float = 1.0
    rate: float = 1.0


@register
@dataclasses.dataclass(frozen=True)
class Transfer:
    """The model whose learning rate transfers to the models of a plan, whatever their width and depth.

    **Fields**

    - `base`: a configuration of the same kind of model, such as the one that the rate was tuned for. A
      model of its size trains as it would without a transfer.
    - `depth`: whether the residual branches are divided by the depth (CompleteP). If not, only width
      counts (muP), and the rate has to be tuned again for another depth.

    The rule must be one whose updates have a size of their own: "adamw", "nadamw", "ademamix" or "lion".
    Adam's `eps` is not scaled, so it should be far below the gradients. The size of a head stays that of
    the base model, and blocks that end in a norm (post-LN) have no depth multiplier.

    **Example**

        small = GPTConfig(layers=2, embed=64, heads=4, head_dim=16, mlp=256, vocab=384, positions=64)
        Plan("large", dataclasses.replace(small, layers=8, embed=256, heads=16, mlp=1024), stages,
             batch=16, objective=Causal(64), rate=Schedule(4e-3), transfer=Transfer(small))

    Yang et al., "Tensor Programs V", 2022; Dey et al., "Don't be lazy: CompleteP
    enables compute-efficient deep transformers", 2025.
    """

    base: Config
    depth: bool = True
    card: ClassVar[Card] = Card(papers=(_MUP,), by={"depth": (_COMPLETEP,)})

    def __post_init__(self):
        check(self, StateError)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The sizes of the base model's axes."""
        return _sizes(self.base)

    def multiples(self, params: Any) -> dict[tuple, Multiples]:
        """The multiples of a model's (or its parameters') leaves by their steps, without those of 1."""
        table = axes_of(params)
        every = {slot.steps: self._of(slot, table) for slot in table.params()}
        return {steps: each for steps, each in every.items() if each != Multiples()}

    def born(self, model: Any) -> Any:
        """A model at its birth: its initial weights times their multiples."""
        scaled = {
            steps: find(model, steps) * jnp.asarray(each.init, find(model, steps).dtype)
            for steps, each in self.multiples(model).items()
            if each.init != 1
        }
        return put(model, scaled)

    def updating(self, update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        """The update of a `growjax.optim.Rule`, with every leaf at its own rate and decay.

        **Example**

            updates, state = Transfer(small).updating(rule.update)(gradient, state, params, rate=1e-3)
        """

        def updated(gradient, state, params, *, decays: Decays | None = None, **more):
            rates = {
                steps: each.rate for steps, each in self.multiples(params).items() if each.rate != 1
            }
            # The decay of a step, rate times decay, is the same share of a weight at every size
            merged = dict(decays.multiples) if decays is not None else {}
            for steps, rate in rates.items():
                merged[steps] = merged.get(steps, 1.0) / rate
            own = Decays(merged)
            updates, state = update(gradient, state, params, decays=own, **more)
            if decays is not None:
                decays.used = own.used
            scaled = {}
            for steps, rate in rates.items():
                u = find(updates, steps)
                scaled[steps] = u * jnp.asarray(rate, u.dtype)
            return put(updates, scaled), state

        return updated

    def rule(self, rule: Rule) -> Rule:
        """The rule with every leaf at its own rate and decay; its state is the same.

        Weights have to be decayed by `growjax.optim.decayed_weights`, as the optimizers of plans do: any
        other decay stays that of the base.
        """
        return rule._replace(update=self.updating(rule.update))

    def faults(self, model: Any) -> Iterator[str]:
        """Why the rates of the base do not transfer to a model, from shapes alone."""
        table = axes_of(model)
        unknown = sorted(table.sizes.keys() - self.sizes.keys())
        if unknown:
            yield f"base: its model has no axis {', '.join(unknown)}"
            return
        for axis in ("head_dim", "key_dim"):
            size = table.sizes.get(axis)
            if size is not None and size != self.sizes[axis]:
                yield (
                    f"base: {axis} is {self.sizes[axis]} there and {size} here; scale the number of "
                    "heads, since attention divides by a power of their size"
                )
        stacks = _stacks(table) if self.depth else []
        if stacks and not any(_is_stream(axis, table) for axis in table.sizes):
            yield (
                "depth: no axis is a residual stream, which a lookup produces and norms average over; "
                "give depth=False"
            )
        for axis in stacks:
            if not self.sizes[axis]:
                yield f"base: its model has no {axis}, and depth transfers from one or more"
            closing = [slot.path for slot in table.having(axis, "param") if _closes(slot, table)]
            if closing:
                yield (
                    f"depth: {', '.join(sorted(closing))}: a block that ends in a norm has no depth "
                    "multiplier; give depth=False"
                )

    def _of(self, slot: Slot, table: Axes) -> Multiples:
        """The multiples of a leaf, by the axes of all of its blocks."""
        fan = slot.fan_in
        consumed = [
            dim
            for dim in slot.dims
            if (dim.role == "consumed" if fan is None else dim.axis in fan)
            and not dim.literal
            and _is_feature(dim.axis, table)
        ]
        width = math.prod(self._ratio(axis, table) for axis in {dim.axis for dim in consumed})
        produces = any(dim.role == "produced" and _is_feature(dim.axis, table) for dim in slot.dims)
        init = 1.0
        if consumed and not produces:
            # A norm's gain is 1 at birth, where a head's entries have a variance of 1 / fan-in
            init = width**-0.5 if slot.init == "normal" else 1 / width
        depth = 1.0
        if self.depth and any(
            dim.role == "produced" and _is_stream(dim.axis, table) for dim in slot.dims
        ):
            stacks = {dim.axis for dim in slot.dims if dim.role == "stack"}
            depth = math.prod(self._ratio(axis, table) for axis in stacks)
        return Multiples(init / depth, 1 / (width * depth))

    def _ratio(self, axis: str, table: Axes) -> float:
        """The size of an axis over that of the base; 1 for an axis that the base does not have."""
        base = self.sizes.get(axis)
        return table.sizes[axis] / base if base else 1.0


def _is_feature(axis: str, table: Axes) -> bool:
    roles = table.roles(axis)
    return {"produced", "consumed"} <= roles and not roles & {"lookup", "stack"}


def _is_stream(axis: str, table: Axes) -> bool:
    """Whether an axis is the residual stream, and not that of heads with a bias for each position."""
    return table.is_stream(axis) and bool(table.normalised(axis))


def _stacks(table: Axes) -> list[str]:
    return [axis for axis in table.sizes if "stack" in table.roles(axis)]


def _closes(slot: Slot, table: Axes) -> bool:
    """Whether a leaf is of a norm whose output is the residual stream itself."""
    return any(
        dim.normalised and dim.role == "produced" and _is_stream(dim.axis, table)
        for dim in slot.dims
    )


@functools.lru_cache(64)
def _sizes(base: Config) -> Mapping[str, int]:
    return dict(axes_of(eqx.filter_eval_shape(base.build, jax.random.key(0))).sizes)
