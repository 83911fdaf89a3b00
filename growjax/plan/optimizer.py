"""An optimizer as data: what a plan says, and the optax chain that it means."""

import dataclasses
import functools
from typing import Literal, get_args

import optax

from growjax.errors import PlanError, raise_all
from growjax.optim.age import matrices, not_biases, scale_by_adam, scale_by_ademamix
from growjax.optim.muon import scale_by_muon
from growjax.optim.rules import Rule as Rule
from growjax.optim.rules import rule, schedule_free
from growjax.optim.scale import scale_by_parameter, scale_new
from growjax.optim.sophia import scale_by_sophia


Name = Literal["adamw", "nadamw", "ademamix", "lion", "sophia", "muon", "schedule_free", "sgd"]
Decayed = Literal["matrices", "weights", "all"]


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
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: Decayed = "matrices"
    scale_by_parameter: bool = False
    clip: float | None = 1.0
    new_rate: float = 1.0
    new_steps: int = 0
    b3: float = 0.999
    alpha: float = 5.0
    rho: float = 0.04
    refresh_every: int = 10
    momentum: float = 0.95

    def __post_init__(self):
        positive = self.clip is None or self.clip > 0
        kinds = get_args(Decayed)
        checks = [
            ("name", f"one of {', '.join(get_args(Name))}", self.name, self.name in get_args(Name)),
            ("b1", "a rate from 0 to below 1", self.b1, 0 <= self.b1 < 1),
            ("b2", "a rate from 0 to below 1", self.b2, 0 <= self.b2 < 1),
            ("eps", "a positive number", self.eps, self.eps > 0),
            ("weight_decay", "0 or more", self.weight_decay, self.weight_decay >= 0),
            ("decayed", f"one of {', '.join(kinds)}", self.decayed, self.decayed in kinds),
            ("clip", "a positive norm, or None", self.clip, positive),
            ("new_rate", "0 or more", self.new_rate, self.new_rate >= 0),
            ("new_steps", "0 or more", self.new_steps, self.new_steps >= 0),
            ("b3", "a rate from 0 to below 1", self.b3, 0 <= self.b3 < 1),
            ("alpha", "0 or more", self.alpha, self.alpha >= 0),
            ("rho", "a positive number", self.rho, self.rho > 0),
            ("refresh_every", "1 or more steps", self.refresh_every, self.refresh_every >= 1),
            ("momentum", "a rate from 0 to below 1", self.momentum, 0 <= self.momentum < 1),
        ]
        faults = [
            f"{name}: expected {what}, got {got!r}" for name, what, got, ok in checks if not ok
        ]
        if not faults and (self.new_rate != 1) != (self.new_steps > 0):
            faults.append(
                "new_rate, new_steps: one says how much and the other how long; give both"
            )
        if not faults and self.name == "schedule_free" and self.b1 == 0:
            faults.append(
                "b1: schedule_free trains between an average and its goal; give b1 above 0"
            )
        raise_all(PlanError, "this optimizer cannot be used:", faults)

    @property
    def curvature_every(self) -> int | None:
        """Every how many steps it wants the gradient of a loss on labels of the model's own drawing."""
        return self.refresh_every if self.name == "sophia" else None

    def build(self) -> Rule:
        """The rule of one update, the same object for equal ones; the learning rate is an argument of each."""
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
