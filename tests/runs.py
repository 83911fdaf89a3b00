"""Runs for tests: a plan through every kind of stage that takes a second once it is compiled."""

from typing import Any

import growjax as gj
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.models import GPTConfig
from growjax.train import CorpusFeed, Plan, Schedule, Stage


SMALL = GPTConfig(layers=2, embed=16, heads=2, head_dim=8, mlp=16, vocab=384, positions=16)
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
