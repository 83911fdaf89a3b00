"""An optimizer as data: the fields that a plan holds, and the optax chain that they describe."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import optax

from growjax.cards import Card, Paper
from growjax.errors import PlanError
from growjax.optim.age import matrices, not_biases, scale_by_adam, scale_by_ademamix
from growjax.optim.divided import decayed_weights
from growjax.optim.muon import scale_by_muon
from growjax.optim.rules import Rule as Rule
from growjax.optim.rules import rule, schedule_free
from growjax.optim.scale import scale_by_parameter, scale_new
from growjax.optim.sophia import scale_by_sophia
from growjax.values import at_least, base, check, positive, ranged, register


Name = Literal["adamw", "nadamw", "ademamix", "lion", "sophia", "muon", "schedule_free", "sgd"]
Decayed = Literal["matrices", "weights", "all"]
# The decay rate of an exponential moving average: the share of the average that stays at each step
Forgetting = Annotated[float, ranged(0, 1, "a rate", below=True)]


_ADAMW = Paper(
    "Decoupled Weight Decay Regularization",
    "Loshchilov, Ilya and Hutter, Frank",
    2019,
    "International Conference on Learning Representations",
    "1711.05101",
)
_NADAM = Paper(
    "Incorporating Nesterov Momentum into Adam",
    "Dozat, Timothy",
    2016,
    "International Conference on Learning Representations, Workshop Track",
)
_ADEMAMIX = Paper(
    "The AdEMAMix Optimizer: Better, Faster, Older",
    "Pagliardini, Matteo and Ablin, Pierre and Grangier, David",
    2025,
    "International Conference on Learning Representations",
    "2409.03137",
)
_LION = Paper(
    "Symbolic Discovery of Optimization Algorithms",
    "Chen, Xiangning and Liang, Chen and Huang, Da and Real, Esteban and Wang, Kaiyuan and Liu, Yao and "
    "Pham, Hieu and Dong, Xuanyi and Luong, Thang and Hsieh, Cho-Jui and Lu, Yifeng and Le, Quoc V.",
    2023,
    "Advances in Neural Information Processing Systems",
    "2302.06675",
)
_SOPHIA = Paper(
    "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
    "Liu, Hong and Li, Zhiyuan and Hall, David and Liang, Percy and Ma, Tengyu",
    2024,
    "International Conference on Learning Representations",
    "2305.14342",
)
_MUON = Paper(
    "Muon: An optimizer for hidden layers in neural networks",
    "Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz and "
    "Newhouse, Laker and Bernstein, Jeremy",
    2024,
    url="https://kellerjordan.github.io/posts/muon/",
)
_SCALABLE_MUON = Paper(
    "Muon is Scalable for LLM Training",
    "Liu, Jingyuan and Su, Jianlin and Yao, Xingcheng and Jiang, Zhejun and Lai, Guokun and others",
    2025,
    arxiv="2502.16982",
)
_SCHEDULE_FREE = Paper(
    "The Road Less Scheduled",
    "Defazio, Aaron and Yang, Xingyu Alice and Mehta, Harsh and Mishchenko, Konstantin and Khaled, "
    "Ahmed and Cutkosky, Ashok",
    2024,
    "Advances in Neural Information Processing Systems",
    "2405.15682",
)
_NANO_T5 = Paper(
    "nanoT5: A PyTorch Framework for Pre-training and Fine-tuning T5-style Models with Limited Resources",
    "Nawrot, Piotr",
    2023,
    "Workshop for Natural Language Processing Open Source Software",
    "2309.02373",
)


@base("an optimizer such as Optimizer(b2=0.95)")
@register
@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates, apart from the learning rate.

    **Fields**

    - `name`: "adamw" (with an age for every coordinate), "nadamw", "ademamix", "lion", "sophia",
      "muon", "schedule_free" (AdamW, averaged) or "sgd" (with momentum `b1`).
    - `b1`, `b2`, `eps`: Adam's decay rates of the averages of gradients and of their squares, and the
      constant in the denominator; short runs want a lower `b2`.
    - `weight_decay`: per unit of learning rate, applied to the parameters that `decayed` names: the
      "matrices", all "weights" (gains of norms as well, but no biases) or "all".
    - `scale_by_parameter`: multiply the step of each tensor by the root mean square of its entries, or
      by 0.001 if that is larger; its weight decay is not scaled. AdamWScale is "adamw" with this.
    - `clip`: the largest norm of the whole gradient; None does not clip.
    - `new_rate`, `new_steps`: coordinates that growth added less than `new_steps` steps ago move at this
      multiple of the learning rate.
    - `b3`, `alpha`: the decay rate of AdEMAMix's slow average, and its weight.
    - `rho`, `refresh_every`: the weight of the curvature in Sophia's step, and the number of steps
      between two estimates of it.
    - `momentum`: for Muon's matrices; all other parameters take Adam's step, by `b1`, `b2` and `eps`.

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
    card: ClassVar[Card] = Card(
        by={
            "name": {
                "adamw": (_ADAMW,),
                "nadamw": (_NADAM, _ADAMW),
                "ademamix": (_ADEMAMIX,),
                "lion": (_LION,),
                "sophia": (_SOPHIA,),
                "muon": (_MUON, _SCALABLE_MUON),
                "schedule_free": (_SCHEDULE_FREE,),
            },
            "scale_by_parameter": (_NANO_T5,),
        }
    )

    def __post_init__(self):
        check(self, PlanError, "this optimizer cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if (self.new_rate != 1) != (self.new_steps > 0):
            yield (
                "new_rate, new_steps: the factor of the learning rate and the steps that it lasts; give "
                "both or neither"
            )
        if self.name == "schedule_free" and self.b1 == 0:
            yield "b1: schedule_free trains between an average and its goal; give b1 above 0"

    @property
    def curvature_every(self) -> int | None:
        """The steps between two gradients on labels that the model draws; None for most optimizers."""
        return self.refresh_every if self.name == "sophia" else None

    def build(self) -> Rule:
        """The rule of one update, which takes the learning rate; equal optimizers share one object."""
        return _built(self)

    def _rule(self) -> Rule:
        # How the gradient becomes a direction; functions, since only one of them is built
        rescale = {
            "adamw": lambda: scale_by_adam(self.b1, self.b2, self.eps),
            "nadamw": lambda: scale_by_adam(self.b1, self.b2, self.eps, nesterov=True),
            "ademamix": lambda: scale_by_ademamix(self.b1, self.b2, self.b3, self.alpha, self.eps),
            "lion": lambda: optax.scale_by_lion(self.b1, self.b2),
            "sophia": lambda: scale_by_sophia(self.b1, self.b2, self.rho),
            "muon": lambda: scale_by_muon(self.b1, self.b2, self.eps, momentum=self.momentum),
            # Its `b1` interpolates between two sequences, in the wrapper below, and is no momentum
            "schedule_free": lambda: scale_by_adam(0.0, self.b2, self.eps),
            "sgd": lambda: optax.trace(self.b1),
        }[self.name]()
        decayed = {"matrices": matrices, "weights": not_biases, "all": None}[self.decayed]
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts.append(rescale)
        if self.scale_by_parameter:
            parts.append(scale_by_parameter())
        # After the rescaling: decoupled weight decay, as in AdamW
        parts.append(decayed_weights(self.weight_decay, decayed))
        if self.new_steps:
            parts.append(scale_new(self.new_rate, self.new_steps))
        chained = rule(optax.chain(*parts))
        return schedule_free(chained, self.b1) if self.name == "schedule_free" else chained


@functools.cache
def _built(optimizer: Optimizer) -> Rule:
    # A rule is hashed by its functions, which differ with each `_rule()`: only one shared object lets
    # `jax.jit` and `growjax.optim.probe` reuse the cached results of an equal optimizer
    return optimizer._rule()
