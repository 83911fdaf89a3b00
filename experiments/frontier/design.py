"""The design of the study: shapes, budgets, growths and seeds, and the plans that follow from them."""

import dataclasses
import functools
from typing import Any, Literal

import equinox as eqx
import jax

import growjax as gj
from experiments.training import COMPUTE
from growjax.cost import parameters, training_flops_per_token
from growjax.data import Causal
from growjax.growth import Operator
from growjax.models import GPTConfig
from growjax.optim import Parts
from growjax.train import Optimizer, Plan, Schedule, Stage, Warmup


WORKLOAD = "gpt"
# The share of every plan's cost over which its learning rate falls
DECAY = 0.2
Kind = Literal["stack", "copy", "msg"]


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """A model: layers by coordinates of the residual stream. Heads and mlp follow from these."""

    layers: int
    embed: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.embed}"


@dataclasses.dataclass(frozen=True)
class Growing:
    """A growth from one shape to another by an operator."""

    kind: Kind
    small: Shape
    large: Shape

    def __str__(self) -> str:
        return f"{self.kind} {self.small} to {self.large}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is tuned for each shape: peak rate, sequences a step, and warm-up.

    `warmup` is a share of the tokens of the shape's smallest budget; at all its budgets it is as many
    tokens, so that runs of different budgets share their first steps.
    """

    rate: float
    batch: int
    warmup: float

    def __str__(self) -> str:
        return f"rate {self.rate:g}, batch {self.batch}, warm-up {self.warmup:g}"


Settings = dict[Shape, Setting]


@dataclasses.dataclass(frozen=True)
class Design:
    """What the study runs.

    **Fields**

    - `size`: how models are computed, see `COMPUTE`.
    - `shapes`: the fixed sizes.
    - `unit`: FLOPs of a budget of 1x; `budgets` are multiples of it, at which trunks are decayed.
    - `growings`: the growths of the pilots, at each of `times` (shares of the cost) and `pilots_at`.
    - `family`: three shapes, each grown from the one before by `stack`, in one trunk; their decayed
      branches end at `family_at`.
    - `held_out`: the budget of the held-out comparison, on `fresh` seeds.
    - `seeds`: those that fits are made of; `tuning_seed`: that of the ledger.
    - `least`: tokens a parameter, below which a budget is left out for a shape.
    - `windows`: of held-out text on the way and at the end.
    - `ramp`: steps over which the gates of `msg` open.
    - `start`: the setting that the searches of the ledger begin with.
    - `given`: settings that were found elsewhere; such a design has no ledger.
    """

    size: str
    shapes: tuple[Shape, ...]
    head_dim: int
    vocab: int
    length: int
    unit: float
    growings: tuple[Growing, ...]
    family: tuple[Shape, Shape, Shape] | None
    family_at: tuple[int, int, int] = (8, 16, 32)
    budgets: tuple[float, ...] = (2, 8, 16, 32)
    times: tuple[float, ...] = (0.3, 0.6)
    pilots_at: tuple[int, ...] = (8, 32)
    held_out: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    fresh: tuple[int, ...] = tuple(range(100, 108))
    tuning_seed: int = 1000
    least: float = 0.5
    windows: tuple[int, int] = (256, 4096)
    ramp: int = 50
    start: Setting = Setting(3e-3, 16, 0.1)
    given: tuple[tuple[Shape, Setting], ...] = ()

    # Models ---------------------------------------------------------------------------------

    def config(self, shape: Shape) -> GPTConfig:
        """The model of a shape: heads of one dimension, an mlp four times as wide as the stream."""
        fields: dict[str, Any] = {
            "layers": shape.layers,
            "embed": shape.embed,
            "mlp": 4 * shape.embed,
            "heads": shape.embed // self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab,
            "positions": self.length,
        }
        return GPTConfig(**fields, **COMPUTE[self.size])

    def parameters(self, shape: Shape) -> int:
        """The number of a shape's parameters."""
        return _facts(self.config(shape), self.length)[0]

    def tokens(self, shape: Shape, budget: float) -> float:
        """The training tokens that a budget pays for."""
        return budget * self.unit / _facts(self.config(shape), self.length)[1]

    def budgets_of(self, shape: Shape) -> tuple[float, ...]:
        """The budgets that a shape is run at: those with enough tokens a parameter."""
        least = self.least * self.parameters(shape)
        return tuple(b for b in self.budgets if self.tokens(shape, b) >= least)

    # Plans ----------------------------------------------------------------------------------

    def fixed(
        self, shape: Shape, budget: float, setting: Setting, seed: int, name: str = ""
    ) -> Plan:
        """One shape from the first step to the last."""
        stage = Stage(str(shape), share=1.0)
        return self.staged(name or fixed_name(shape), budget, shape, setting, (stage,), seed)

    def grown(
        self, growing: Growing, time: float, budget: float, settings: Settings, seed: int
    ) -> Plan:
        """A small shape until a share of the cost, and the large one from then on."""
        first = Stage(str(growing.small), share=time)
        setting = settings[growing.small]
        grow = self._grow(growing, 1 - time, setting, settings[growing.large])
        name = pilot_name(growing, time)
        return self.staged(name, budget, growing.small, setting, (first, grow), seed)

    def of_family(self, member: int, settings: Settings, seed: int) -> Plan:
        """The trunk of a family up to a member (1 or 2): each decays from four fifths of its budget."""
        assert self.family is not None
        first, second, _ = self.family
        ends = [(1 - DECAY) * budget for budget in self.family_at]
        budget = self.family_at[member]
        ends[member] = budget
        stages = [Stage(str(first), share=ends[0] / budget)]
        for n in range(1, member + 1):
            growing = Growing("stack", self.family[n - 1], self.family[n])
            share = (ends[n] - ends[n - 1]) / budget
            stages.append(self._grow(growing, share, settings[first], settings[self.family[n]]))
        name = f"family, {'SML'[member]}"
        return self.staged(name, budget, first, settings[first], tuple(stages), seed)

    def _grow(self, growing: Growing, share: float, born: Setting, new: Setting) -> Stage:
        """The stage that grows; the rate and the batch of the large shape hold from here on."""
        # A plan has one peak: that of the shape that it is born with
        times = new.rate / born.rate
        return Stage(
            str(growing.large),
            share=share,
            grow=self._operator(growing),
            # Norms mix the gradients of unequal copies, so their moments do not follow from the old ones
            carry="reset" if growing.kind == "copy" else "dual",
            ramp=self.ramp if growing.kind == "msg" else 0,
            batch=new.batch,
            train="all" if times == 1 else Parts(old=times, new=times),
        )

    def _operator(self, growing: Growing) -> Operator:
        small, large = growing.small, growing.large
        sizes: dict[str, Any] = {}
        if large.layers != small.layers:
            sizes["layers"] = large.layers
        if large.embed != small.embed:
            heads = large.embed // self.head_dim
            sizes |= {"embed": large.embed, "mlp": 4 * large.embed, "heads": heads}
        if growing.kind == "stack":
            return gj.stack(**sizes)
        if growing.kind == "copy":
            return gj.copy(shares="random", **sizes)
        return gj.msg(init="matched", **sizes)

    def staged(
        self,
        name: str,
        budget: float,
        shape: Shape,
        setting: Setting,
        stages: tuple[Stage, ...],
        seed: int,
    ) -> Plan:
        """A plan of some stages that is born as a shape; they may grow it."""
        warm = setting.warmup * self.tokens(shape, self.budgets_of(shape)[0])
        return Plan(
            name,
            self.config(shape),
            stages,
            batch=setting.batch,
            objective=Causal(self.length, packing="concat"),
            rate=Schedule(setting.rate, "wsd", warmup=Warmup(tokens=warm), decay=DECAY),
            optimizer=Optimizer(b2=0.98, weight_decay=0.01),
            budget=budget * self.unit,
            seed=seed,
        )


@functools.cache
def _facts(config: GPTConfig, length: int) -> tuple[int, float]:
    """Parameters, and training FLOPs a token."""
    model = eqx.filter_eval_shape(config.build, jax.random.key(0))
    return parameters(model), training_flops_per_token(model, length)


def fixed_name(shape: Shape) -> str:
    """The arm of a fixed size."""
    return f"fixed-{shape}"


def pilot_name(growing: Growing, time: float) -> str:
    """The arm of a growth at a share of the cost."""
    return f"{growing}, at {time:g}"


# The designs --------------------------------------------------------------------------------------

SMALLEST, THIN, LOW = Shape(2, 32), Shape(4, 32), Shape(2, 64)
MIDDLE, DEEP, WIDE = Shape(4, 64), Shape(8, 64), Shape(4, 128)
DESIGNS = {
    # Shows that all of it runs, and decides nothing
    "smoke": Design(
        "smoke",
        shapes=(Shape(1, 8), Shape(1, 16), Shape(2, 16), Shape(4, 16)),
        head_dim=8,
        vocab=384,
        length=16,
        unit=2.5e7,
        growings=(
            Growing("stack", Shape(1, 16), Shape(2, 16)),
            Growing("msg", Shape(1, 8), Shape(1, 16)),
            Growing("copy", Shape(1, 8), Shape(1, 16)),
        ),
        family=(Shape(1, 16), Shape(2, 16), Shape(4, 16)),
        seeds=(0,),
        fresh=(100,),
        least=0.0,
        windows=(16, 64),
        ramp=4,
        start=Setting(0.048, 8, 0.1),
    ),
    "small": Design(
        "small",
        shapes=(SMALLEST, THIN, LOW, MIDDLE, DEEP, WIDE),
        head_dim=16,
        vocab=384,
        length=64,
        unit=3e11,
        growings=(
            Growing("stack", LOW, MIDDLE),
            Growing("msg", LOW, MIDDLE),
            Growing("stack", LOW, DEEP),
            Growing("copy", THIN, MIDDLE),
            Growing("msg", THIN, MIDDLE),
        ),
        family=(LOW, MIDDLE, DEEP),
    ),
    # Whether advice holds on a text that the settings were not tuned on, at four times its pilots
    "elsewhere": Design(
        "small",
        shapes=(SMALLEST, THIN, LOW, MIDDLE),
        head_dim=16,
        vocab=384,
        length=64,
        unit=3e11,
        growings=(),
        family=None,
        budgets=(1, 4, 16),
        fresh=(),
        given=(
            (SMALLEST, Setting(0.006, 2, 0.1)),
            (THIN, Setting(0.006, 4, 0.1)),
            (LOW, Setting(0.0015, 2, 0.2)),
            (MIDDLE, Setting(0.0015, 2, 0.2)),
        ),
    ),
}
