"""Runs for tests: a plan through every kind of stage that takes a second once it is compiled."""

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np

import growjax as gj
from growjax.data import ByteTokenizer, Causal, Corpus, Text
from growjax.models import GPTConfig
from growjax.programs.step import Programs
from growjax.train import (
    CorpusFeed,
    End,
    Plan,
    Schedule,
    Stage,
    Step,
    Warmup,
    cross_entropy,
    save_plan,
)


# As tests/conftest.py does, for the processes that tests start: a fifth of their time
gc.set_threshold(200_000, 20, 100)

# Without biases, which would double the arrays and so the time that every program takes to compile
SMALL = GPTConfig(
    layers=2, embed=16, heads=2, head_dim=8, mlp=16, vocab=384, positions=16, bias=False
)
BATCH, LENGTH = 4, 8
TOKENS = BATCH * LENGTH
TEXT = "".join(f"{n} and {n * n % 97} is {n + n * n % 97}. " for n in range(700))


def steps(n: int, name: str = "", **fields: Any) -> Stage:
    return Stage(name, tokens=n * TOKENS, **fields)


def plan(*stages: Stage, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": SMALL,
        "batch": BATCH,
        "objective": Causal(LENGTH, packing="concat"),
        "rate": Schedule(1e-2),
    }
    return Plan("tiny", stages=stages, **fields | changes)


def plan_file(folder: Path) -> Path:
    """A plan of eight steps on a text of its own, both as files in a folder."""
    (folder / "text.txt").write_text(TEXT)
    short = plan(
        steps(8),
        rate=Schedule(1e-2, "wsd", warmup=Warmup(steps=2), decay=0.25),
        data=Text(str(folder / "text.txt"), split=". "),
    )
    save_plan(short, folder / "plan.json")
    return folder / "plan.json"


def every_kind(**changes: Any) -> Plan:
    """Growth behind gates, stacking, and paths of three lengths: 3 + 6 + 9 steps."""
    return plan(
        steps(3, "small"),
        steps(6, "ramp", grow=gj.msg(mlp=24, heads=4), ramp=4),
        Stage(
            "stack and paths",
            grow=gj.stack(layers=4, order="top"),
            subnet=gj.path_schedule((3, 3.5, 4), layers=4, steps=9),
        ),
        **changes,
    )


def feed(of: Plan) -> CorpusFeed:
    tokenizer, documents = ByteTokenizer(), TEXT.split(". ")
    return CorpusFeed(
        of, Corpus.of(documents[50:], tokenizer), Corpus.of(documents[:50], tokenizer)
    )


def losses(records: Any) -> dict[int, float]:
    return {r.step: r.loss for r in records if isinstance(r, Step)}


def weights(records: list[Any]) -> list[np.ndarray]:
    assert isinstance(records[-1], End)
    return [np.asarray(x) for x in jax.tree.leaves(records[-1].model)]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def programs_of(plan: Plan) -> Programs:
    """What the trainer compiles for a plan, on one device."""
    mesh = plan.layout.mesh(jax.devices()[:1])
    return Programs(plan.optimizer.build(), cross_entropy, mesh, plan.layout)
