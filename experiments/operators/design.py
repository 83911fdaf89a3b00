"""The design of the contest: sizes, operators, when they grow, and the plans that follow from them."""

import dataclasses
from typing import Any, Literal

import growjax as gj
from experiments.frontier.design import DESIGNS as FRONTIERS
from experiments.frontier.design import Design, Setting, Settings, Shape
from growjax.growth import Operator, between
from growjax.optim import Curve, Parts
from growjax.plan.stages import Carry
from growjax.train import Plan, Stage


Direction = Literal["depth", "width"]
DIRECTIONS: tuple[Direction, ...] = ("depth", "width")
# The workload of lines of fixed sizes, which both directions are held against
FIXED = "fixed"
# The arm that the others of a direction are compared with, besides the fixed sizes
REFERENCE: dict[Direction, str] = {"depth": "stack", "width": "copy"}
# SPARKLING: the rate of what is new, as a multiple of the rate, over steps since the growth
_SPARKLING = ((0, 1.0), (250, 1.3), (1000, 1.0))


@dataclasses.dataclass(frozen=True)
class Entry:
    """An operator of the contest, and how its stage trains.

    - `name`: of the arm; `paper`: the method that it stands for.
    - `grow`: the operator; two of them grow one after the other. None is LiGO, which is fitted to the
      model that grows.
    - `carry`, `ramp`: as the fields of a `Stage`.
    - `curve`: the rate of new coordinates over the steps since the growth, as a multiple.
    - `floor`: it keeps nothing of the small model, or nothing of its function on purpose: a control.
    """

    name: str
    paper: str
    grow: tuple[Operator, ...] | None
    carry: Carry = "dual"
    ramp: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    floor: bool = False

    @property
    def settings(self) -> str:
        """What a line of results must agree with."""
        grow = "a fit" if self.grow is None else ", then ".join(map(str, self.grow))
        extra = f", ramp {self.ramp}" if self.ramp else ""
        return f"{grow}, carry {self.carry}{extra}" + (
            f", new rate {self.curve}" * bool(self.curve)
        )


@dataclasses.dataclass(frozen=True)
class Contest:
    """What the contest runs.

    - `base`: the models and the budget, as a design of the frontier.
    - `small`: the shape that grows; `large`: what it grows into, by direction.
    - `settings`: the tuned setting of every fixed size.
    - `budget`: in units of `base`; `time`: the share of it at which operators grow.
    - `second`: the share at which those that grow twice do so again.
    - `after`: the numbers of steps after the growth at which there is a held-out loss.
    - `windows`: of held-out text on the way and at the end.
    - `ramps`: steps over which gates open, together and in turn.
    - `fit`: the batches and windows a batch of LiGO's fit.
    """

    base: Design
    small: Shape
    large: dict[Direction, Shape]
    settings: Settings
    budget: float = 1.5
    time: float = 0.6
    second: float = 0.7
    after: tuple[int, ...] = (0, 10, 30, 100, 300, 700)
    windows: tuple[int, int] = (1024, 4096)
    ramps: tuple[int, int] = (50, 500)
    fit: tuple[int, int] = (50, 8)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)

    @property
    def budget_name(self) -> str:
        """The name of the budget, such as "2x"."""
        return f"{self.budget:g}x"

    def sizes(self, direction: Direction) -> dict[str, int]:
        """The axes that grow in a direction, and their new sizes."""
        shape = self.large[direction]
        if direction == "depth":
            return {"layers": shape.layers}
        heads = shape.embed // self.base.head_dim
        return {"embed": shape.embed, "mlp": 4 * shape.embed, "heads": heads}

    def entries(self, direction: Direction) -> list[Entry]:
        """The operators of a direction."""
        return self._depth() if direction == "depth" else self._width(self.sizes(direction))

    def _depth(self) -> list[Entry]:
        old, new = self.small.layers, self.large["depth"].layers
        middle, ramp, turn = (old + new) // 2, *self.ramps
        last = (*range(old), *[old - 1] * (new - old))
        return [
            Entry("stack", "StackedBERT, G_stack", (gj.stack(layers=new),)),
            Entry(
                "interleave", "multi-level networks", (gj.stack(layers=new, order="interleave"),)
            ),
            Entry(
                "interleave, split",
                "a finer depth flow: every branch over its copies",
                (gj.stack(layers=new, order="interleave", branch="split"),),
            ),
            Entry("copy the last", "copies of one layer", (gj.stack(layers=last),)),
            Entry(
                "gradual, middle",
                "MIDAS and LIDAS",
                (
                    gj.stack(layers=middle, order="middle"),
                    gj.stack(layers=new, order="middle"),
                ),
            ),
            Entry("stack, closed", "LEMON's depth", (gj.stack(layers=new, branch="zero"),)),
            Entry(
                "insert, closed",
                "LLaMA-Pro",
                (gj.stack(layers=new, order="insert", branch="zero"),),
            ),
            Entry(
                "between, closed",
                "OpT-DeUS",
                (
                    gj.chain(
                        between(layers=middle, fill="transport"),
                        between(layers=new, fill="transport"),
                    ),
                ),
            ),
            Entry("fresh on top", "zero/one-layer training", (gj.fresh(layers=new),)),
            Entry("gates, copies", "MSG", (gj.msg(layers=new),), ramp=ramp),
            Entry("gates, fresh", "MSG", (gj.msg(layers=new, init="matched"),), ramp=ramp),
            Entry(
                "gates, fresh, in turn",
                "ProRes",
                (gj.msg(layers=new, init="matched", opens="in turn"),),
                ramp=turn,
            ),
            Entry("LiGO", "LiGO", None, "reset"),
            Entry(
                "drawn anew",
                "control: the small model is thrown away",
                (gj.warm(shrink=0.0, layers=new),),
                "reset",
                floor=True,
            ),
        ]

    def _width(self, sizes: Any) -> list[Entry]:
        ramp = self.ramps[0]
        even = gj.copy(shares="equal", **sizes)
        return [
            Entry("copy", "Net2Net, FPI with unequal shares", (gj.copy(**sizes),), "reset"),
            Entry("copy, even", "FPI: copies stay equal for ever", (even,)),
            Entry("copy, even, new state", "FPI, moments of copies from 0", (even,), "zero"),
            Entry(
                "copy, noise",
                "HyperCloning",
                (gj.copy(shares="equal", noise=0.1, **sizes),),
                "reset",
            ),
            Entry("LEMON", "LEMON", (gj.lemon(**sizes),), "reset"),
            Entry("AKI", "bert2BERT's AKI", (gj.aki(**sizes),), "reset"),
            Entry("diagonal", "staged training", (gj.copy(shares="diagonal", **sizes),)),
            Entry(
                "SPARKLING",
                "SPARKLING",
                (gj.copy(scale="rms", **sizes),),
                "zero",
                curve=_SPARKLING,
            ),
            Entry("gates, copies", "MSG", (gj.msg(init="copy", **sizes),), ramp=ramp),
            # Added once the others were seen; the README says so
            Entry("gates, small", "MSG, deviation 0.02", (gj.msg(**sizes),), ramp=ramp),
            Entry("gates, matched", "MSG", (gj.msg(init="matched", **sizes),), ramp=ramp),
            Entry("LiGO", "LiGO", None, "reset"),
            Entry("shrink and perturb", "warm starting", (gj.warm(**sizes),), "reset"),
            Entry(
                "drawn anew",
                "control: the small model is thrown away",
                (gj.warm(shrink=0.0, **sizes),),
                "reset",
                floor=True,
            ),
        ]

    # Plans ----------------------------------------------------------------------------------

    def fixed(self, shape: Shape, seed: int) -> Plan:
        """One size from the first step to the last."""
        return self.base.fixed(shape, self.budget, self.settings[shape], seed)

    def grown(
        self,
        direction: Direction,
        entry: Entry,
        seed: int,
        fitted: Operator | None = None,
        charge: float = 0.0,
    ) -> Plan:
        """The small size until `time`, then what an operator makes of it, with the large one's setting.

        `fitted` is the operator of an entry that has none, and `charge` what its fit cost.
        """
        shape, born = self.large[direction], self.settings[self.small]
        setting = self.settings[shape]
        operators = entry.grow or (() if fitted is None else (fitted,))
        ends = [self.time, self.second, 1.0] if len(operators) > 1 else [self.time, 1.0]
        stages = [Stage(str(self.small), share=self.time)]
        for n, operator in enumerate(operators):
            stages.append(
                Stage(
                    str(shape),
                    share=ends[n + 1] - ends[n],
                    grow=operator,
                    carry=entry.carry,
                    ramp=entry.ramp,
                    batch=setting.batch,
                    train=_rates(setting.rate / born.rate, entry.curve),
                    charge=charge,
                )
            )
        return self.base.staged(entry.name, self.budget, self.small, born, tuple(stages), seed)


def _rates(times: float, curve: tuple[tuple[int, float], ...]) -> Any:
    """The rates of a stage, as multiples of the plan's one peak, which is that of the small size."""
    if not curve:
        return "all" if times == 1 else Parts(old=times, new=times)
    return Parts(old=times, new=Curve(tuple((step, times * rate) for step, rate in curve)))


# The designs --------------------------------------------------------------------------------------

_LOWEST, _SMALL, _DEEP, _WIDE = Shape(1, 32), Shape(2, 32), Shape(4, 32), Shape(2, 64)
_TINY = Shape(2, 16)
_TINY_LARGE: dict[Direction, Shape] = {"depth": Shape(4, 16), "width": Shape(2, 32)}
DESIGNS = {
    # Shows that all of it runs, and decides nothing
    "smoke": Contest(
        dataclasses.replace(
            FRONTIERS["smoke"], shapes=(_TINY, *_TINY_LARGE.values()), budgets=(1.5,), unit=4e8
        ),
        _TINY,
        _TINY_LARGE,
        dict.fromkeys((_TINY, *_TINY_LARGE.values()), Setting(0.024, 8, 0.1)),
        after=(0, 2, 4),
        windows=(64, 64),
        ramps=(2, 4),
        fit=(2, 8),
        seeds=(0, 1),
    ),
    "small": Contest(
        dataclasses.replace(
            FRONTIERS["small"], shapes=(_LOWEST, _SMALL, _DEEP, _WIDE), budgets=(1.5,)
        ),
        _SMALL,
        {"depth": _DEEP, "width": _WIDE},
        {
            # Not in the ledger: the setting of the size next to it
            _LOWEST: Setting(0.006, 2, 0.1),
            _SMALL: Setting(0.006, 2, 0.1),
            _DEEP: Setting(0.006, 4, 0.1),
            _WIDE: Setting(0.0015, 2, 0.2),
        },
    ),
}
