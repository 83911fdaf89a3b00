"""Masked structural growth over all dimensions, against training the large model from scratch.

`python -m experiments.msg.run --size smoke`; see the README next to this file.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import growjax as gj
from experiments.summary import Question
from experiments.training import COMPUTE, TRIALS, Cell, as_trial, fixed_name, training_study
from growjax.data import MLM, Causal, Objective
from growjax.growth import Operator
from growjax.models import BERTConfig, GPTConfig
from growjax.report.arms import fixed_size
from growjax.train import Optimizer, Plan, Schedule, Stage


Workload = Literal["bert", "gpt", "bert-large"]
SEEDS = {"smoke": 1, "small": 6, "paper": 1}
# Multiples of the steps of a size; a longer run shows how much of a gain is left
BUDGETS = {"smoke": (1,), "small": (1, 4, 16), "paper": (1,)}
QUESTION = Question(
    "Does masked structural growth reach the large model's loss for less?",
    baseline="control",
    target="scratch",
    method="msg",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a schedule in its order: mlp, layers, embed, heads, layers; and its training.

    `whole_rate` is the peak learning rate of arms that do not grow, where the ledger says another one.
    """

    layers: tuple[int, int, int]
    embed: tuple[int, int]
    mlp: tuple[int, int]
    heads: tuple[int, int]
    head_dim: int
    vocab: int
    length: int
    batch: int
    steps: int
    rate: float
    whole_rate: float | None = None
    masked: float = 0.15
    post_norm: bool = True


SMALL = ((3, 6, 12), (32, 64), (64, 256), (2, 4), 16, 384)
SIZES: dict[str, dict[Workload, Size]] = {
    "smoke": {
        w: Size((1, 2, 4), (8, 16), (16, 32), (1, 2), 8, 384, 32, 4, 12, 3e-3)
        for w in ("bert", "gpt")
    },
    # A post-LN BERT, or one of longer windows and fewer predictions, learns too little to compare
    "small": {
        "bert": Size(*SMALL, 18, 32, 1000, 3e-3, whole_rate=1.5e-3, masked=0.3, post_norm=False),
        "gpt": Size(*SMALL, 64, 16, 600, 3e-3),
    },
    # The released orders and shapes of BERT-base and -large. Step numbers were not released, and nothing
    # is known of GPT-2's stages: README.md
    "paper": {
        "bert": Size(
            (3, 6, 12), (512, 768), (768, 3072), (8, 12), 64, 30_592, 128, 256, 1_000_000, 1e-4
        ),
        "bert-large": Size(
            (6, 12, 24), (512, 1024), (1024, 4096), (8, 16), 64, 30_592, 128, 256, 1_000_000, 5e-5
        ),
        "gpt": Size(
            (3, 6, 12), (512, 768), (768, 3072), (8, 12), 64, 50_304, 1024, 256, 300_000, 6e-4
        ),
    },
}


def trials(size: str, workload: Workload, seed: int) -> Iterator[Cell]:
    """The tuning ledger: the arms that decide, at four learning rates."""
    if workload not in SIZES[size]:
        return
    for factor in TRIALS:
        for plan in plans(SIZES[size][workload], size, workload, 1000 + seed, factor):
            decides = plan.name in ("scratch", "control", "msg", "stays small")
            if decides or plan.name.startswith("fixed"):
                yield as_trial(Cell(workload, "1x", plan, fixed_size(plan)))


def cells(size: str, workload: Workload, seed: int) -> Iterator[Cell]:
    """The arms of one seed at every budget."""
    if workload not in SIZES[size]:
        return
    for times in BUDGETS[size]:
        s = SIZES[size][workload]
        longer = dataclasses.replace(s, steps=times * s.steps)
        for plan in plans(longer, size, workload, seed):
            yield Cell(workload, f"{times}x", plan, fixed_size(plan))


def plans(s: Size, size: str, workload: Workload, seed: int, factor: float = 1.0) -> Iterator[Plan]:
    """The plans of the arms, each worked out when it is asked for: long ones take a while.

    All but `scratch` cost what `msg` does. `factor` is of learning rates.
    """
    objective = objective_of(workload, s)

    def rate(peak: float) -> Schedule:
        return Schedule(factor * peak, warmup=0.05)

    make = functools.partial(
        Plan,
        batch=s.batch,
        objective=objective,
        rate=rate(s.rate),
        optimizer=Optimizer(b2=0.98, weight_decay=0.01),
        seed=seed,
    )
    compute = COMPUTE[size]
    small, whole = (dataclasses.replace(model(workload, s, n), **compute) for n in (0, -1))
    sixth = s.steps // 6
    tokens = sixth * s.batch * objective.raw_length
    ramp = max(sixth // 10, 1)

    def grown(name: str, grow: Any, ramp: int = 0, rewind: Any = "stretch") -> Plan:
        """The released order: mlp, layers, embed, heads, layers, in stages of equally many steps."""
        stages = [Stage("small", tokens=tokens)]
        for n, (axis, new) in enumerate(released_order(s)):
            # The published rule goes back to the peak at the first two growths
            back = rewind if n < 2 else None
            stage = Stage(
                f"{axis} {new}", tokens=tokens, grow=grow(axis, new), rewind=back, ramp=ramp
            )
            if grow is copied and axis == "embed":
                # Norms mix the gradients of unequal copies, which then do not follow from the old ones
                stage = dataclasses.replace(stage, carry="reset")
            stages.append(stage)
        return make(name, small, tuple(stages))

    def masked(axis: str, new: int, init: Any = "normal") -> Operator:
        sizes: dict[str, Any] = {axis: new}
        return gj.msg(init=init, **sizes)

    def copied(axis: str, new: int) -> Operator:
        # Uneven shares: equal copies would receive equal gradients for ever
        sizes: dict[str, Any] = {axis: new}
        return gj.stack(**sizes) if axis == "layers" else gj.copy(shares="random", **sizes)

    def equal(name: str, *stages: Stage, config: Any = whole, **more: Any) -> Plan:
        return make(name, config, stages, budget=msg.flops, **more)

    everything = s.steps * s.batch * objective.raw_length
    at_its_own = rate(s.whole_rate or s.rate)
    yield make("scratch", whole, (Stage("whole model", tokens=everything),), rate=at_its_own)
    msg = grown("msg", masked, ramp)
    yield equal("control", Stage("whole model", share=1.0), rate=at_its_own)
    yield msg
    if size == "smoke":
        return
    # Growing is for those who want the large model: with what it costs the small one trains far longer
    yield equal("stays small", Stage("small", share=1.0), config=small)
    # Nor for those who want the best loss at this cost, unless it beats the best size between the two.
    # The first of these is what `stacking` starts as
    for layers in s.layers[:-1]:
        between = dataclasses.replace(whole, layers=layers)
        yield equal(fixed_name(between), Stage("fixed size", share=1.0), config=between)
    yield grown("no mask", masked, 1)
    depths = [Stage(f"{s.layers[0]} layers", share=0.2)] + [
        Stage(f"{n} layers", share=share, grow=gj.stack(layers=n))
        for n, share in zip(s.layers[1:], (0.3, 0.5), strict=True)
    ]
    yield equal("stacking", *depths, config=dataclasses.replace(whole, layers=s.layers[0]))
    # A norm averages over embed, so only a whole multiple can be copied without a change
    if s.embed[1] % s.embed[0] == 0:
        yield grown("bert2BERT-like", copied)
    yield grown("msg, no rewind", masked, ramp, rewind=None)
    yield grown("msg, copies", functools.partial(masked, init="copy"), ramp)
    yield grown("msg, matched", functools.partial(masked, init="matched"), ramp)
    yield grown("no mask, copies", functools.partial(masked, init="copy"), 1)


def released_order(s: Size) -> list[tuple[str, int]]:
    """The growths of the released plans, in their order."""
    return [
        ("mlp", s.mlp[1]),
        ("layers", s.layers[1]),
        ("embed", s.embed[1]),
        ("heads", s.heads[1]),
        ("layers", s.layers[2]),
    ]


def objective_of(workload: Workload, s: Size) -> Objective:
    """What is predicted: the next token, or masked ones."""
    return Causal(s.length, packing="concat") if workload == "gpt" else MLM(s.length, s.masked)


def model(workload: Workload, s: Size, n: int) -> BERTConfig | GPTConfig:
    """The smallest model of a schedule (`n` = 0) or the largest (-1)."""
    fields: dict[str, Any] = {
        "layers": s.layers[n],
        "embed": s.embed[n],
        "mlp": s.mlp[n],
        "heads": s.heads[n],
        "head_dim": s.head_dim,
        "vocab": s.vocab,
        "positions": s.length,
    }
    if workload == "gpt":
        return GPTConfig(**fields)
    fields |= {"post_norm": s.post_norm, "embedding_norm": not s.post_norm}
    return BERTConfig(**fields, pooler=False, nsp_head=False)


STUDY = training_study(
    "msg", QUESTION, cells, trials, workloads=("bert", "gpt", "bert-large"), seeds=SEEDS
)


if __name__ == "__main__":
    from experiments.main import main

    main(STUDY)
