"""Stacking, layer dropping, batch selection and optimizers against a baseline that is fully decayed.

`python -m experiments.no_train_no_gain.run --size smoke`; see the README next to this file.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import growjax as gj
from experiments import training
from experiments.summary import Question
from experiments.training import COMPUTE, TRIALS, Cell, as_trial, fixed_name, training_study
from growjax.budget import A100_T5, RTX3090_BERT, DepthClock, Op
from growjax.data import MLM, Objective, SpanCorruption
from growjax.models import BERTConfig, T5Config
from growjax.select import RhoLoss, SelectiveBackprop
from growjax.train import Optimizer, Plan, Schedule, Stage


Workload = Literal["bert", "t5"]
SEEDS = {"smoke": 1, "small": 6, "paper": 3}
QUESTION = Question(
    "What is left of efficient training once the baseline's learning rate is decayed?",
    baseline="AdamW",
    clocks={"the RTX 3090, BERT": RTX3090_BERT, "the A100, T5": A100_T5},
)
BUDGETS = {"smoke": (1,), "small": (1, 2, 4), "paper": (1, 2, 4)}


@dataclasses.dataclass(frozen=True)
class Size(training.Size):
    """At the smallest budget, with the number of parts that a batch is computed in."""

    accumulate: int = 1


SIZES: dict[str, dict[Workload, Size]] = {
    "smoke": {w: Size(4, 16, 2, 8, 32, 384, 32, 4, 12) for w in ("bert", "t5")},
    "small": {
        # With longer windows and fewer predictions it learns too little to compare (README.md)
        "bert": Size(8, 64, 4, 16, 128, 384, 16, 32, 500, masked=0.3),
        "t5": Size(4, 64, 4, 16, 128, 384, 64, 16, 100),
    },
    # 6, 12 and 24 hours of one RTX 3090 (BERT) and one A100 (T5), whatever they are run on; for 16 chips
    "paper": {
        "bert": Size(16, 768, 12, 64, 1536, 32_768, 128, 1536, 7_989, accumulate=4),
        "t5": Size(12, 768, 12, 64, 2048, 32_128, 512, 144, 20_951),
    },
}
# Peak learning rates: of the paper its own, the others the best of the ledger (README.md)
RATES: dict[str, dict[Workload, dict[str, float]]] = {
    "paper": {
        "bert": {"adamw": 1e-3, "lion": 7e-4, "sophia": 4e-4, "muon": 1e-3, "schedule_free": 1e-3},
        "t5": {
            **{"adamw": 2e-2, "dropping": 1e-2, "lion": 7.5e-4, "sophia": 1e-3},
            **{"muon": 2e-2, "schedule_free": 2e-2},
        },
    },
    "small": {
        "bert": {
            "adamw": 6e-3,
            "lion": 1e-3,
            "sophia": 5e-4,
            "muon": 1.6e-2,
            "schedule_free": 3e-3,
        },
        "t5": {"adamw": 8e-3, "lion": 2e-3, "sophia": 2e-3, "muon": 1.6e-2, "schedule_free": 8e-3},
    },
}
RATES["smoke"] = RATES["small"]


def cells(size: str, workload: Workload, seed: int) -> Iterator[Cell]:
    """Every method at every budget, for one seed."""
    for times in BUDGETS[size]:
        yield from arms(size, workload, seed, times, RATES[size][workload])


def trials(size: str, workload: Workload, seed: int) -> Iterator[Cell]:
    """The tuning ledger: every method at four learning rates and the smallest budget."""
    for factor in TRIALS:
        rates = {name: factor * rate for name, rate in RATES[size][workload].items()}
        for cell in arms(size, workload, 1000 + seed, 1, rates):
            yield as_trial(cell)


def arms(
    size: str, workload: Workload, seed: int, times: int, rates: dict[str, float]
) -> Iterator[Cell]:
    """The methods at one budget, each fully decayed at its end (but Schedule-Free, by design)."""
    s, bert = SIZES[size][workload], workload == "bert"
    clock: DepthClock = RTX3090_BERT if bert else A100_T5
    objective: Objective = (
        MLM(s.length, s.masked, frame=False) if bert else SpanCorruption(s.length)
    )
    stacks = ("layers",) if bert else ("encoder_layers", "decoder_layers")
    step = clock.cost(Op("train", s.layers, s.batch, objective.raw_length, 0)) / 1e9
    budget = times * s.steps * step
    decayed = Schedule(rates["adamw"], "linear", warmup=0.5)
    if not bert:
        decayed = Schedule(rates["adamw"], "cosine", warmup=0.1526, start=0.5, final=1e-5)
    adamw = Optimizer(b2=0.98, weight_decay=0.01, clip=0.5 if bert else 1.0)
    scaled = dataclasses.replace(adamw, b2=0.999, weight_decay=0.0, scale_by_parameter=True)
    # The paper's T5 takes steps in proportion to its tensors and decays nothing, whatever the rule
    published = size == "paper" and not bert
    base = scaled if published else adamw
    whole = dataclasses.replace(model(workload, s, s.layers), **COMPUTE[size])
    plan = functools.partial(
        Plan,
        model=whole,
        batch=s.batch,
        objective=objective,
        rate=decayed,
        optimizer=base,
        clock=clock,
        budget=budget,
        accumulate=s.accumulate,
        seed=seed,
    )
    everything = (Stage("whole model", share=1.0),)
    cell = functools.partial(Cell, workload, f"{times}x")

    def by(name: str, **changes: Any) -> Plan:
        """The baseline with another rule of updates, at its own rate."""
        return plan(
            name.replace("_", "-"),
            stages=everything,
            optimizer=dataclasses.replace(base, name=name, **changes),
            rate=dataclasses.replace(decayed, peak=rates[name]),
        )

    def stacked(name: str, carry: Any) -> Plan:
        depths = [s.layers // 4, s.layers // 2, s.layers]
        stages = [Stage(f"{depths[0]} layers", share=0.125)]
        for depth, share in zip(depths[1:], (0.175, 0.7), strict=True):
            grow = gj.stack(**dict.fromkeys(stacks, depth))
            stages.append(Stage(f"{depth} layers", share=share, grow=grow, carry=carry))
        small = dataclasses.replace(model(workload, s, depths[0]), **COMPUTE[size])
        return plan(name, stages=tuple(stages), model=small)

    # At its plateau layer dropping runs three layers of four
    gamma = (100 if bert else 20) / (times * s.steps / 0.75)

    def dropping(name: str, inverse: bool) -> Plan:
        drop = gj.progressive_layer_drop(rate=gamma, inverse=inverse, axis=stacks)
        rate = dataclasses.replace(decayed, peak=rates.get("dropping", rates["adamw"]))
        return plan(name, stages=(Stage("dropping", share=1.0, subnet=drop),), rate=rate)

    def selecting(name: str, select: Any, **changes: Any) -> Plan:
        return plan(name, stages=(Stage("selecting", share=1.0, select=select),), **changes)

    # The second model of RHO: trained on text of its own, charged to nobody
    second = plan("irreducible", stages=everything, budget=s.steps * step)
    free = dataclasses.replace(clock, forward=0.0)
    yield cell(plan("AdamW", stages=everything), fixed=True)
    yield cell(stacked("stacking", "zero"))
    yield cell(dropping("layer dropping", inverse=False))
    yield cell(selecting("selective backprop", SelectiveBackprop(1.0)))
    yield cell(selecting("RHO", RhoLoss(2)), reference=second)
    decay = {"lion": 0.0 if published else 0.1, "sophia": 0.0 if published else 0.015}
    sophia = by("sophia", b1=0.965, b2=0.99, weight_decay=decay["sophia"], rho=0.01)
    yield cell(by("lion", b2=0.99, weight_decay=decay["lion"]))
    yield cell(sophia)
    if size == "smoke":
        return
    # What stacking starts as and grows to next, and stays so for all of the cost
    for layers in (s.layers // 4, s.layers // 2):
        shallow = dataclasses.replace(model(workload, s, layers), **COMPUTE[size])
        yield cell(plan(fixed_name(shallow), stages=everything, model=shallow), fixed=True)
    yield cell(stacked("stacking, moments copied", "dual"))
    yield cell(dropping("layer dropping, 1/p", inverse=True))
    yield cell(
        selecting("selective backprop, free", SelectiveBackprop(1.0), clock=free), clock=clock
    )
    yield cell(selecting("RHO, free", RhoLoss(2), clock=free), reference=second, clock=clock)
    bare = dataclasses.replace(clock, curvature=0.0)
    yield cell(dataclasses.replace(sophia, name="sophia, free", clock=bare), clock=clock)
    yield cell(by("muon"))
    free_of_schedules = by("schedule_free")
    constant = Schedule(rates["schedule_free"], "constant", warmup=0.05)
    yield cell(dataclasses.replace(free_of_schedules, rate=constant))
    to_zero = Schedule(rates["adamw"], "linear", warmup=0.05)
    yield cell(plan("decay to zero", stages=everything, rate=to_zero))
    yield cell(plan("WSD", stages=everything, rate=dataclasses.replace(to_zero, shape="wsd")))
    if not bert and not published:
        # A step of a share of each tensor's size needs a rate that is larger by about that size
        rate = dataclasses.replace(decayed, peak=2e-2)
        yield cell(plan("AdamWScale", stages=everything, optimizer=scaled, rate=rate))


def model(workload: Workload, s: Size, layers: int) -> BERTConfig | T5Config:
    """The crammed BERT or T5 v1.1, with so many layers (in each stack)."""
    fields: dict[str, Any] = {
        k: getattr(s, k) for k in ("embed", "heads", "head_dim", "mlp", "vocab")
    }
    if workload == "t5":
        return T5Config.v1_1(encoder_layers=layers, decoder_layers=layers, **fields)
    return BERTConfig(
        layers=layers,
        positions=s.length,
        post_norm=False,
        embedding_norm=True,
        bias=False,
        glu=True,
        pooler=False,
        nsp_head=False,
        **fields,
    )


STUDY = training_study(
    "no_train_no_gain", QUESTION, cells, trials, workloads=("bert", "t5"), seeds=SEEDS
)


if __name__ == "__main__":
    from experiments.main import main

    main(STUDY)
