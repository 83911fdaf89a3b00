"""Made-up lines of a study, and what is made of them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from experiments import page, summary
from experiments.no_train_no_gain import run as ntng
from experiments.study import Study
from experiments.summary import Question, cost_on
from growjax.budget import RTX3090_BERT
from growjax.report.rows import Row


NTNG = ntng.QUESTION


def summarise(question: Question, lines: list[dict]) -> list[Row]:
    """Rows of lines that are in no folder."""
    return summary.summarise(question, Path("nowhere/small.jsonl"), lines)


def study(question: Question) -> Study:
    """A study with this question, which nobody runs."""
    return dataclasses.replace(
        ntng.STUDY,
        summarise=functools.partial(summary.summarise, question),
        page=functools.partial(page.page, question),
        flags=lambda lines: "",
    )


def line(arm: str, budget: int, seed: int, score: float, depth: int = 8, **more: Any) -> dict:
    """A run of 10 steps per unit of budget; on the published clocks it costs what its depth does."""
    op = ["train", depth, 16, 64, 1000]
    run = {"operations": [[*op, 10 * budget]], "arm": arm, "budget": f"{budget}x", "seed": seed}
    spent = cost_on(run, RTX3090_BERT)
    curve = [(spent / 2, score + 1), (spent, score)]
    return run | {
        "workload": "bert",
        "fixed": arm == "AdamW",
        "free": False,
        "stages": [],
        "steps": 1,
        "parameters": 100,
        "clock": RTX3090_BERT.identity,
        "unit": "seconds",
        "spent": spent,
        "score": score,
        "decayed": True,
        "curve": curve,
        "flops": spent,
        "seconds": 1.0,
        **more,
    }
