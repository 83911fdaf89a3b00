"""An optimizer as data: what a plan says, and the optax chain that it means."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Literal

import optax

from growjax.errors import PlanError
from growjax.optim.age import matrices, not_biases, scale_by_adam, scale_by_ademamix
from growjax.optim.muon import scale_by_muon
from growjax.optim.rules import Rule as Rule
from growjax.optim.rules import rule, schedule_free
from growjax.optim.scale import scale_by_parameter, scale_new
from growjax.optim.sophia import scale_by_sophia
from growjax.values import at_least, base, check, positive, ranged, register


Name = Literal["adamw", "nadamw", "ademamix", "lion", "sophia", "muon", "schedule_free", "sgd"]
Decayed = Literal["matrices", "weights", "all"]
# How much of an average stays at each step
Forgetting = Annotated[float, ranged(0, 1, "a rate", below=True)]


@base("an optimizer such as Optimizer(b2=0.95)")
@register
@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates, apart from the learning rate.

    **Fields**

    - `name`: "adamw" (with an age for every coordinate), "nadamw", "ademamix", "lion", "sophia",
      "muon", "schedule_free" (AdamW, averaged) or "sgd" (with momentum `b1`).
    - `b1`, `b2`, `eps`: its memories of gradients and of their squares; short runs want a short `b2`.
    - `weight_decay`: per unit of learning rate, of what `decayed` says: the "matrices", all "weights"
      (gains of norms as well, but no biases) or "all".
    - `scale_by_parameter`: the step of each tensor is multiplied by the root mean square of its entries,
      or by a thousandth; its decay is not. AdamWScale is "adamw" with this.
    - `clip`: the largest norm of the whole gradient; None does not clip.
    - `new_rate`, `new_steps`: coordinates younger than `new_steps` steps that were not there at birth
      move at this multiple of the learning rate.
    - `b3`, `alpha`: AdEMAMix's slow memory and its weight.
    - `rho`, `refresh_every`: how much Sophia minds curvature, and every how many steps it looks.
    - `momentum`: of Muon's matrices; `b1`, `b2` and `eps` are for all else.

    Raises `PlanError` that lists every field out of range.

    **Example**

        Optimizer(b2=0.95, weight_decay=0.1).build().init(gj.partition(model)[0])
    """

    name: Name = "adamw"
    b1: Forgetting = 0.9
    b2: Forgetting = 0.95
    eps: Annotated[float, positive()] = 1e-8
    weight_decay: Annotated[float, at_least(0)] = 0.0
    decayed: Decayed = "matrices"
    scale_by_parameter: bool = False
    clip: Annotated[float, positive("norm")] | None = 1.0
    new_rate: Annotated[float, at_least(0)] = 1.0
    new_steps: Annotated[int, at_least(0, "steps")] = 0
    b3: Forgetting = 0.999
    alpha: Annotated[float, at_least(0)] = 5.0
    rho: Annotated[float, positive()] = 0.04
    refresh_every: Annotated[int, at_least(1, "steps")] = 10
    momentum: Forgetting = 0.95

    def __post_init__(self):
        check(self, PlanError, "this optimizer cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if (self.new_rate != 1) != (self.new_steps > 0):
            yield "new_rate, new_steps: one says how much and the other how long; give both"
        if self.name == "schedule_free" and self.b1 == 0:
            yield "b1: schedule_free trains between an average and its goal; give b1 above 0"

    @property
    def curvature_every(self) -> int | None:
        """Every how many steps it wants the gradient of a loss on labels of the model's own drawing."""
        return self.refresh_every if self.name == "sophia" else None

    def build(self) -> Rule:
        """The rule of one update, one object for equal ones; each update is given the learning rate."""
        return _built(self)

    def _rule(self) -> Rule:
        rescale = {
            "adamw": lambda: scale_by_adam(self.b1, self.b2, self.eps),
            "nadamw": lambda: scale_by_adam(self.b1, self.b2, self.eps, nesterov=True),
            "ademamix": lambda: scale_by_ademamix(self.b1, self.b2, self.b3, self.alpha, self.eps),
            "lion": lambda: optax.scale_by_lion(self.b1, self.b2),
            "sophia": lambda: scale_by_sophia(self.b1, self.b2, self.rho),
            "muon": lambda: scale_by_muon(self.b1, self.b2, self.eps, momentum=self.momentum),
            "schedule_free": lambda: scale_by_adam(0.0, self.b2, self.eps),
            "sgd": lambda: optax.trace(self.b1),
        }[self.name]()
        decayed = {"matrices": matrices, "weights": not_biases, "all": None}[self.decayed]
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts.append(rescale)
        if self.scale_by_parameter:
            parts.append(scale_by_parameter())
        parts.append(optax.add_decayed_weights(self.weight_decay, decayed))
        if self.new_steps:
            parts.append(scale_new(self.new_rate, self.new_steps))
        one = rule(optax.chain(*parts))
        return schedule_free(one, self.b1) if self.name == "schedule_free" else one


@functools.cache
def _built(optimizer: Optimizer) -> Rule:
    # What is known of a rule (its programs, what its state holds) is remembered by the object
    return optimizer._rule()
