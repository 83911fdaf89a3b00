"""RaPTr against the full model, stochastic depth, layer dropping and stacking, at equal FLOPs.

`python -m experiments.raptr.run --size smoke`; see the README next to this file.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

import growjax as gj
from experiments import training
from experiments.summary import Question
from experiments.text import Texts
from experiments.training import (
    COMPUTE,
    TRIALS,
    Cell,
    as_trial,
    fixed_name,
    loss_on,
    training_study,
)
from growjax.data import MLM, UL2, Causal, Denoiser, Mixture, Objective, PrefixLM
from growjax.models import BERTConfig, GPTConfig
from growjax.report.arms import fixed_size
from growjax.train import Layout, Optimizer, Plan, Schedule, Stage


Workload = Literal["bert", "ul2"]
SEEDS = {"smoke": 1, "small": 6, "paper": 1}
# Multiples of the steps of a size; a longer run shows how much of a gain is left
BUDGETS = {"smoke": (1,), "small": (1, 4), "paper": (1,)}
# Where losses along shorter paths are looked at on the way: RaPTr is then in its first, second and third
# stage (and after the last step, in its fourth)
MIDWAY = (1 / 8, 1 / 4, 1 / 2)
QUESTION = Question(
    "Is a model that was trained on random paths as good as one that was trained whole?",
    baseline="full at equal FLOPs",
    target="full",
    method="raptr",
)


@dataclasses.dataclass(frozen=True)
class Size(training.Size):
    """With a peak learning rate, and over how many devices parameters are spread."""

    rate: float
    fsdp: int = 1


SIZES: dict[str, dict[Workload, Size]] = {
    "smoke": {w: Size(4, 16, 2, 8, 32, 384, 32, 4, 12, 3e-3) for w in ("bert", "ul2")},
    # Rates are the best of the ledger, for the baseline and for RaPTr (README.md)
    "small": {
        # With longer windows and fewer predictions a BERT learns too little to compare (README.md)
        "bert": Size(12, 64, 4, 16, 256, 384, 18, 32, 1000, 1.5e-3, masked=0.3),
        "ul2": Size(12, 64, 4, 16, 256, 384, 64, 16, 400, 6e-3),
    },
    # Not all of it is in a source that was read, and what is not is said in README.md. For 16 and for
    # 256 chips
    "paper": {
        "bert": Size(12, 768, 12, 64, 3072, 30_592, 512, 256, 675_000, 1e-4),
        "ul2": Size(24, 2048, 32, 64, 5120, 32_128, 1280, 512, 400_000, 1e-2, fsdp=16),
    },
}


def objective(workload: Workload, s: Size) -> Objective:
    """Masked language modelling, or 60 % causal, 20 % prefix and 20 % span corruption in a decoder."""
    if workload == "bert":
        return MLM(s.length, s.masked)
    targets = max(s.length // 4, 8)
    spans = UL2(s.length - targets, targets, (Denoiser("R", 0.15, 3.0),), form="decoder")
    return Mixture((Causal(s.length, packing="concat"), PrefixLM(s.length), spans), (0.6, 0.2, 0.2))


def trials(size: str, workload: Workload, seed: int) -> Iterator[Cell]:
    """The tuning ledger: the arms that decide, at four learning rates."""
    for factor in TRIALS:
        for plan in plans(SIZES[size][workload], size, workload, 1000 + seed, factor):
            decides = plan.name in ("full at equal FLOPs", "raptr", "stacking")
            if decides or plan.name.startswith("fixed"):
                yield as_trial(Cell(workload, "1x", plan, fixed_size(plan)))


def cells(size: str, workload: Workload, seed: int) -> Iterator[Cell]:
    """The arms of one seed at every budget."""
    look = by_length if size != "paper" else None
    for times in BUDGETS[size]:
        s = SIZES[size][workload]
        longer = dataclasses.replace(s, steps=times * s.steps)
        for plan in plans(longer, size, workload, seed):
            fixed = fixed_size(plan)
            yield Cell(workload, f"{times}x", plan, fixed, after=look, midway=MIDWAY)


def plans(s: Size, size: str, workload: Workload, seed: int, factor: float = 1.0) -> Iterator[Plan]:
    """The plans of the arms, each worked out when it is asked for: long ones take a while.

    All but `full`, `raptr proportional` and `raptr, full first` cost what `raptr` does. `factor` is of
    learning rates.
    """
    make = functools.partial(
        Plan,
        batch=s.batch,
        objective=objective(workload, s),
        rate=Schedule(factor * s.rate, warmup=0.05),
        # A peak of 1e-2 is one of steps in proportion to their tensors, as Adafactor's are
        optimizer=Optimizer(b2=0.98, weight_decay=0.01, scale_by_parameter=s.rate >= 1e-2),
        layout=Layout(fsdp=s.fsdp),
        seed=seed,
    )
    whole = dataclasses.replace(model(workload, s), **COMPUTE[size])
    half = s.layers // 2
    # 6-8-10-12 of 12 layers: half of them and then three more stages up to all
    lengths = tuple(round(s.layers * (3 + n) / 6) for n in range(4))
    tokens = s.steps * s.batch * make.keywords["objective"].raw_length

    def path(name: str, inactive: Any = "zero_grad", **how: Any) -> Plan:
        schedule = gj.path_schedule(lengths, layers=s.layers, steps=s.steps, **how)
        return make(name, whole, (Stage(subnet=schedule, inactive=inactive),))

    def equal(name: str, *stages: Stage, config: Any = whole) -> Plan:
        return make(name, config, stages, budget=raptr.flops)

    def drawn(name: str, subnet: gj.Subnet) -> Plan:
        return equal(name, Stage("drawn", share=1.0, subnet=subnet))

    def grown(name: str, order: Any, depths: tuple[int, ...]) -> Plan:
        """Stages of equally many steps, so of costs in proportion to their depth."""
        small = dataclasses.replace(whole, layers=depths[0])
        stages = [Stage(f"{depths[0]} layers", tokens=1)] + [
            Stage(f"{d} layers", tokens=1, grow=gj.stack(layers=d, order=order)) for d in depths[1:]
        ]
        each = [span.flops[0] for span in make(name, small, tuple(stages)).spans]
        shares = [cost / sum(each) for cost in each]
        stages = [
            dataclasses.replace(stage, tokens=None, share=x)
            for stage, x in zip(stages, shares, strict=True)
        ]
        return equal(name, *stages, config=small)

    full = make("full", whole, (Stage("whole model", tokens=tokens),))
    yield full
    raptr = path("raptr")
    yield raptr
    yield equal("full at equal FLOPs", Stage("whole model", share=1.0))
    yield drawn("constant p", gj.random_path(sum(lengths) / 4, keep=(0, -1), mode="bernoulli"))
    if size == "smoke":
        return
    pld_steps = raptr.flops / (full.flops / full.steps * 0.75)
    yield drawn("PLD", gj.progressive_layer_drop(rate=100 / pld_steps))
    yield drawn("LayerDrop", gj.random_path(0.8 * s.layers, keep=(), mode="bernoulli"))
    yield grown("stacking", "top", (half, (half + s.layers) // 2, s.layers))
    yield grown("MIDAS", "middle", tuple(range(half // 2, s.layers + 1, half // 2)))
    # What MIDAS and stacking start as, and stays so for all of the cost
    for layers in (half // 2, half):
        shallow = dataclasses.replace(whole, layers=layers)
        yield equal(fixed_name(shallow), Stage("fixed size", share=1.0), config=shallow)
    yield path("raptr proportional", stages="proportional")
    yield path("raptr, sqrt scale", scale="sqrt_gap")
    yield path("raptr, no fixed layers", keep=())
    yield path("raptr, full first", warmup=s.steps // 13)
    yield path("raptr, frozen", inactive="freeze")
    yield equal("random part", *_parts(s))


def model(workload: Workload, s: Size) -> BERTConfig | GPTConfig:
    """A pre-LN encoder (whose embeddings keep BERT's norm) or decoder with all at its final size."""
    fields: dict[str, Any] = {
        k: getattr(s, k) for k in ("layers", "embed", "heads", "head_dim", "mlp", "vocab")
    }
    if workload == "bert":
        return BERTConfig(
            positions=s.length,
            post_norm=False,
            embedding_norm=True,
            pooler=False,
            nsp_head=False,
            **fields,
        )
    return GPTConfig(**fields, positions=s.length, norm="rms", bias=False, position="rotary")


def _parts(s: Size) -> list[Stage]:
    """Random heads and hidden units of every layer: half, then three stages up to all."""
    shares = [(3 + n) / 18 for n in range(4)]
    stages = []
    for n, share in enumerate(shares):
        heads, mlp = max(round(s.heads * (3 + n) / 6), 1), round(s.mlp * (3 + n) / 6)
        part = gj.random_part(heads=heads, mlp=mlp) if n < 3 else None
        stages.append(Stage(f"{mlp} units", share=share, subnet=part))
    return stages


def by_length(plan: Plan, model: Any, texts: Texts) -> dict[str, Any]:
    """The loss of a model along random paths of each length: mean and standard error."""
    layers = gj.axes_of(model).sizes["layers"]
    by_depth: dict[str, tuple[float, float]] = {}
    for k in sorted({*range(max(2, layers // 3), layers + 1, max(layers // 6, 1)), layers}):
        path = gj.random_path(k)
        draws = 1 if k == layers else 4
        losses = [
            loss_on(plan, path(model, key=jax.random.key(i)), texts.valid, 2 * plan.batch)
            for i in range(draws)
        ]
        spread = float(np.std(losses, ddof=1) / draws**0.5) if draws > 1 else 0.0
        by_depth[str(k)] = (float(np.mean(losses)), spread)
    return {"by_length": by_depth}


STUDY = training_study("raptr", QUESTION, cells, trials, workloads=("bert", "ul2"), seeds=SEEDS)


if __name__ == "__main__":
    from experiments.main import main

    main(STUDY)
