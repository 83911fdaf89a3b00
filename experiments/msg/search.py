"""Which dimension should grow next? Try each for the same cost, keep the best, and ask again.

`python -m experiments.msg.search --size small`; the published order came from such a comparison of
dimensions by hand (README.md).
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

import growjax as gj
from experiments.msg.run import SIZES, Size, Workload, model, objective_of, released_order
from experiments.study import Inputs, read, run
from experiments.training import COMPUTE, Cell, Trainer
from growjax.train import Optimizer, Plan, Schedule, Stage


Growth = tuple[str, int]
STAY = "no growth"


def choices(left: list[Growth]) -> list[Growth]:
    """What can grow next: the first growth that is left of every dimension."""
    return list(dict(reversed(left)).items())[::-1]


def probe(
    size: str, workload: Workload, seed: int, order: list[Growth], next_: Growth | None, steps: int
) -> Plan:
    """The growths so far and then one more, or none, each for the cost of `steps` of the whole model.

    All probes of a round cost the same and are decayed at their ends, so their losses compare.
    """
    s = SIZES[size][workload]
    small, whole = (dataclasses.replace(model(workload, s, n), **COMPUTE[size]) for n in (0, -1))
    make = {
        "batch": s.batch,
        "objective": objective_of(workload, s),
        "rate": Schedule(s.rate, "wsd", warmup=0.05, decay=0.3),
        "optimizer": Optimizer(b2=0.98, weight_decay=0.01),
        "seed": seed,
    }
    one = Plan("step", whole, (Stage(tokens=1),), **make).flops
    ramp = max(steps // 10, 1)
    growths = [*order, *([] if next_ is None else [next_])]
    stages = [Stage("small", flops=one * steps)]
    for axis, new in growths:
        sizes: dict[str, Any] = {axis: new}
        stages.append(Stage(f"{axis} {new}", flops=one * steps, grow=gj.msg(**sizes), ramp=ramp))
    if next_ is None:
        stages[-1] = dataclasses.replace(stages[-1], flops=2 * one * steps)
    name = STAY if next_ is None else f"{next_[0]} {next_[1]}"
    return Plan(name, small, tuple(stages), **make)


def search(
    size: str, workload: Workload, seed: int, shared: Trainer, results: Path, steps: int
) -> list[dict[str, Any]]:
    """The rounds of a greedy search: the loss of every choice, and the choice made."""
    order: list[Growth] = []
    left = released_order(SIZES[size][workload])
    rounds = []
    while left:
        budget = f"round {len(order) + 1}: {', '.join(f'{a} {n}' for a, n in order) or 'small'}"
        tried = [*choices(left), None]
        plans = [probe(size, workload, seed, order, choice, steps) for choice in tried]
        run([Cell(workload, budget, plan) for plan in plans], shared, results)
        losses = {
            r["arm"]: r["score"]
            for r in read(results)
            if (r["workload"], r["budget"], r["seed"]) == (workload, budget, seed)
        }
        best = min(choices(left), key=lambda g: losses[f"{g[0]} {g[1]}"])
        rounds.append({"after": list(order), "losses": losses, "taken": best})
        order.append(best)
        left.remove(best)
    return rounds


def main(
    size: Literal["smoke", "small"] = "smoke",
    workload: Workload = "gpt",
    text: Path | None = None,
    out: Path = Path("runs/msg"),
    seed: int = 0,
    steps: int | None = None,
) -> None:
    """Propose an order of growth.

    Args:
        size: of the models, as in the study.
        workload: the kind of model.
        text: a folder with train.txt and valid.txt; Python's standard library if there is none.
        out: where the results go, a line for each probe; those that are there are not run again.
        seed: of every probe.
        steps: the cost of a stage, in steps of the largest model; a tenth of the study's by default.
    """
    jax.config.update("jax_compilation_cache_dir", str((out / "cache" / "programs").absolute()))
    shared = dataclasses.replace(Trainer.open(Inputs(size, out, text)), windows=0)
    s: Size = SIZES[size][workload]
    lines = out / f"search-{size}.jsonl"
    console = Console()
    rounds = search(size, workload, seed, shared, lines, steps or max(s.steps // 10, 1))
    for number, round_ in enumerate(rounds, 1):
        stay = round_["losses"][STAY]
        drops = ", ".join(
            f"{arm} {stay - loss:+.4f}" for arm, loss in round_["losses"].items() if arm != STAY
        )
        axis, new = round_["taken"]
        console.print(f"{number}. {axis} {new}    (nats gained over no growth: {drops})")
    released = ", ".join(f"{axis} {new}" for axis, new in released_order(s))
    console.print(f"the released order: {released}")


if __name__ == "__main__":
    tyro.cli(main)
