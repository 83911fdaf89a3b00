"""What the READMEs claim of the studies is what their committed summaries say, number by number."""

import json
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[1]
EQUAL = "{} against {} at equal cost: held-out nats, lower is better"
SPEED = "speed-up of {} over all that was run of {}"
FULL = "full at equal FLOPs"
STUDIES = {name: ROOT / "experiments" / name for name in ("msg", "raptr", "no_train_no_gain")}
# Study, workload, budget, question; whether the front page says it too
CLAIMS = [
    ("msg", "gpt", "1x", EQUAL.format("fixed-3x64", "msg"), True),
    ("msg", "gpt", "4x", EQUAL.format("fixed-3x64", "msg"), True),
    ("msg", "gpt", "1x", EQUAL.format("stays small", "msg"), False),
    ("msg", "gpt", "4x", EQUAL.format("stays small", "msg"), False),
    ("msg", "gpt", "16x", EQUAL.format("stays small", "msg"), False),
    ("msg", "bert", "1x", EQUAL.format("fixed-3x64", "msg"), False),
    ("msg", "gpt", "1x", SPEED.format("msg", "control"), True),
    ("msg", "gpt", "4x", SPEED.format("msg", "control"), True),
    ("msg", "gpt", "4x", SPEED.format("fixed-3x64", "control"), False),
    ("msg", "bert", "1x", SPEED.format("msg", "control"), True),
    ("msg", "bert", "4x", SPEED.format("msg", "control"), False),
    ("raptr", "ul2", "1x", EQUAL.format("fixed-3x64", "raptr"), True),
    ("raptr", "ul2", "1x", EQUAL.format("fixed-6x64", "raptr"), False),
    ("raptr", "ul2", "1x", EQUAL.format("MIDAS", "raptr"), False),
    ("raptr", "ul2", "1x", SPEED.format("raptr", FULL), True),
    ("raptr", "ul2", "4x", SPEED.format("raptr", FULL), True),
    ("raptr", "ul2", "1x", SPEED.format("MIDAS", FULL), False),
    ("raptr", "ul2", "4x", SPEED.format("MIDAS", FULL), False),
    ("no_train_no_gain", "bert", "1x", EQUAL.format("stacking", "AdamW"), True),
    ("no_train_no_gain", "bert", "2x", EQUAL.format("stacking", "AdamW"), True),
    ("no_train_no_gain", "bert", "4x", EQUAL.format("stacking", "AdamW"), True),
    ("no_train_no_gain", "bert", "1x", SPEED.format("stacking", "AdamW"), False),
    ("no_train_no_gain", "bert", "2x", SPEED.format("muon", "AdamW"), False),
]


def row(study: str, workload: str, budget: str, question: str) -> dict[str, Any]:
    """The one row of a committed summary that answers a question."""
    rows = json.loads((STUDIES[study] / "results" / "summary.json").read_text())
    (found,) = (
        r
        for r in rows
        if (r.get("workload"), r.get("budget"), r["question"]) == (workload, budget, question)
    )
    return found


def written(row: dict[str, Any]) -> str:
    """The number as the READMEs write it: a difference, a speed-up or a bound of one."""
    low, high = row["interval"]
    if row.get("bound", "=") != "=":
        return f"{row['bound']} {row['estimate']:.2f}"
    if row["question"].startswith("speed-up"):
        return f"{row['estimate']:.2f} ({low:.2f} to {high:.2f})"
    return f"{row['estimate']:+.3f} ({low:.3f} to {high:.3f})"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: " ".join(claim[:4])[:70])
def test_a_claim_has_the_number_of_the_summary(claim):
    *where, in_front = claim
    number = written(row(*where))
    pages = [STUDIES[where[0]] / "README.md", *([ROOT / "README.md"] if in_front else [])]
    for page in pages:
        text = " ".join(page.read_text().split())
        assert number in text, f"{page}: expected {number} for {where[-1]} ({where[1]}, {where[2]})"


def test_no_page_words_a_difference_that_was_not_found_as_an_equality():
    for page in [ROOT / "README.md", *(folder / "README.md" for folder in STUDIES.values())]:
        text = " ".join(page.read_text().split())
        for word in ("level with it at", "has the full model's loss at 0.76", "not told apart"):
            assert word not in text, f"{page}: {word!r}"


def test_stacking_is_the_only_method_of_no_train_no_gain_that_gains_on_bert():
    for budget in ("1x", "2x", "4x"):
        found = row("no_train_no_gain", "bert", budget, EQUAL.format("stacking", "AdamW"))
        assert found["verdict"] == "better"
    muon = [
        row("no_train_no_gain", "bert", budget, EQUAL.format("muon", "AdamW"))["verdict"]
        for budget in ("1x", "2x", "4x")
    ]
    assert muon == ["better", "better", "no difference found"]
