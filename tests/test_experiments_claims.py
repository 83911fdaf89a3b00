"""What the READMEs claim of the studies is what their committed summaries say, number by number."""

import dataclasses
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.frontier.summary import CALIBRATION, GROWN, LEFT
from experiments.study import by, read
from growjax.report.rows import Row, read_summary


ROOT = Path(__file__).parents[1]
EQUAL = "{} against {} at equal cost: held-out nats, lower is better"
SPEED = "speed-up of {} over all that was run of {}"
FRONTIER = "{} against the best fixed size at equal cost"
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
    ("msg", "gpt", "1x", FRONTIER.format("msg"), False),
    ("msg", "gpt", "4x", FRONTIER.format("msg"), False),
    ("msg", "gpt", "16x", FRONTIER.format("msg"), False),
    ("msg", "bert", "1x", FRONTIER.format("msg"), False),
    ("msg", "bert", "4x", FRONTIER.format("msg"), False),
    ("raptr", "ul2", "1x", FRONTIER.format("raptr"), False),
    ("raptr", "ul2", "4x", FRONTIER.format("raptr"), False),
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


def as_committed(again: Any, committed: Any) -> bool:
    """Whether a value, or the rows of a summary but for their commands, is what was committed.

    Numbers are compared to seven digits: in what order a library adds depends on the machine.
    """
    if dataclasses.is_dataclass(again):
        names = [field.name for field in dataclasses.fields(again) if field.name != "command"]
        values = [[getattr(row, name, None) for name in names] for row in (again, committed)]
        return type(again) is type(committed) and as_committed(*values)
    if isinstance(again, (list, tuple)):
        return len(again) == len(committed) and all(map(as_committed, again, committed))
    if isinstance(again, float) and isinstance(committed, float):
        return committed == pytest.approx(again, rel=1e-7, abs=1e-9, nan_ok=True)
    return again == committed


def test_a_number_that_differs_is_not_as_committed():
    row: Any = next(row for row in summary("msg") if isinstance(row.estimate, float))
    other: Any = dataclasses.replace(row, command="another")
    assert as_committed([row], [other]) and not as_committed([row], [])
    assert not as_committed(row, dataclasses.replace(other, estimate=row.estimate * (1 + 1e-6)))
    assert not as_committed(row, dataclasses.replace(other, budget="another"))


def summary(study: str) -> list[Row]:
    return read_summary(STUDIES[study] / "results" / "summary.json")


def row(study: str, workload: str, budget: str, question: str) -> Any:
    """The one row of a committed summary that answers a question."""
    (only,) = (
        row
        for row in summary(study)
        if (row.workload, row.budget, row.question) == (workload, budget, question)
    )
    return only


def written(row: Any) -> str:
    """The number as the READMEs write it: a difference, a speed-up or a bound of one."""
    low, high = row.interval
    if getattr(row, "bound", "=") != "=" and row.kind == "speed-up":
        return f"{row.bound} {row.estimate:.2f}"
    if row.kind == "speed-up":
        return f"{row.estimate:.2f} ({low:.2f} to {high:.2f})"
    return f"{row.estimate:+.3f} ({low:.3f} to {high:.3f})"


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
        for word in (
            "level with",
            "has the full model's loss at 0.76",
            "not told apart",
            "undecided",
        ):
            assert word not in text, f"{page}: {word!r}"


def test_stacking_is_the_only_method_of_no_train_no_gain_that_gains_on_bert():
    for budget in ("1x", "2x", "4x"):
        stacking = row("no_train_no_gain", "bert", budget, EQUAL.format("stacking", "AdamW"))
        assert stacking.verdict == "better"
    muon = [
        row("no_train_no_gain", "bert", budget, EQUAL.format("muon", "AdamW")).verdict
        for budget in ("1x", "2x", "4x")
    ]
    assert muon == ["better", "better", "no difference found"]


# Every number with an interval -------------------------------------------------------------------

NUMBER = r"([-+]?\d+\.\d+)"
# 0.443 (0.417 to 0.469), also with a few words in between; and (+0.010, -0.018 to 0.037)
INTERVALS = [
    re.compile(rf"{NUMBER}[^().|,]{{0,40}} \({NUMBER} to {NUMBER}[;)]"),
    re.compile(rf"{NUMBER}, (?:from )?{NUMBER} to {NUMBER}[;)]"),
    re.compile(rf"{NUMBER}[^().|,]{{0,40}} \(from {NUMBER}[a-z ]* to {NUMBER}"),
]


def intervals_of(rows: list[Row]) -> Iterator[tuple[float, float, float]]:
    """Every number of some rows with its interval, and with its sign turned around."""
    for row in rows:
        for name, ends in (
            ("estimate", "interval"),
            ("cost_to_reach", "cost_to_reach_interval"),
            ("speed_up", "speed_up_interval"),
        ):
            value, interval = getattr(row, name, None), getattr(row, ends, None)
            if value is not None and interval is not None and None not in interval:
                low, high = interval
                yield value, low, high
                yield -value, -high, -low


def is_of(texts: tuple[str, ...], rows: list[Row]) -> bool:
    """Whether three numbers as they are written are those of a row, rounded, whatever their signs."""
    digits = len(texts[0].partition(".")[2])
    numbers = [abs(float(text)) for text in texts]
    # What lies between two roundings may have gone either way
    near = 0.5 * 10**-digits + 10**-4
    return any(
        all(abs(a - abs(b)) <= near for a, b in zip(numbers, known, strict=True))
        for known in intervals_of(rows)
    )


def claims_in(text: str) -> list[tuple[str, ...]]:
    """The numbers with intervals in a text."""
    return [match.groups() for pattern in INTERVALS for match in pattern.finditer(text)]


@pytest.mark.parametrize("study, least", [("msg", 90), ("raptr", 70), ("no_train_no_gain", 65)])
def test_every_number_with_an_interval_is_that_of_a_row(study, least):
    text = " ".join((STUDIES[study] / "README.md").read_text().split())
    claims, rows = claims_in(text), summary(study)
    assert len(claims) >= least
    wrong = [claim for claim in claims if not is_of(claim, rows)]
    assert not wrong, f"{study}: no row has {wrong}"


def test_an_interval_that_no_row_has_is_found():
    rows = summary("msg")
    (claim,) = claims_in("it ends +0.443 (0.417 to 0.469) against the best fixed size")
    assert is_of(claim, rows)
    for n, text in enumerate(("+0.445", "0.427", "0.459")):
        assert not is_of((*claim[:n], text, *claim[n + 1 :]), rows)
    assert claims_in("(+0.010, -0.018 to 0.037)") == [("+0.010", "-0.018", "0.037")]
    assert claims_in("ends 0.006 above (from 0.088 below to 0.100 above)")


@pytest.mark.parametrize("study", STUDIES)
def test_every_bound_is_that_of_a_row(study):
    rows: list[Any] = summary(study)
    known = {
        f"{row.bound} {value:.2f}"
        for row in rows
        for value in (getattr(row, "speed_up", row.estimate),)
        if getattr(row, "bound", "=") != "=" and value is not None
    }
    text = " ".join((STUDIES[study] / "README.md").read_text().split())
    bounds = set(re.findall(r"[<>]= \d+\.\d+", text))
    assert bounds and bounds <= known, bounds - known


@pytest.mark.parametrize("study", STUDIES)
def test_every_loss_in_a_table_is_the_mean_of_an_arms_seeds(study):
    lines = read(STUDIES[study] / "results" / "small.jsonl")
    means: dict[str, set[str]] = {}
    for (_, _, arm), runs in by(lines, "workload", "budget", "arm").items():
        means.setdefault(arm, set()).add(f"{statistics.fmean(r['score'] for r in runs):.3f}")
    checked = 0
    for text in (STUDIES[study] / "README.md").read_text().splitlines():
        match = re.match(r"\| `([^`]+)`(?:, \d+x)? \| (\d\.\d{3}) \|", text)
        if match:
            arm, loss = match.groups()
            assert loss in means[arm], f"{arm}: {loss} is none of {means[arm]}"
            checked += 1
    assert checked >= 20


def test_the_calibration_of_advice_is_what_the_frontier_says():
    rows: Any = read_summary(ROOT / "experiments/frontier/results/summary.json")
    held = {row.question: row.verdict.partition(":")[0] for row in rows if row.kind == "answer"}
    fixed, grown, left = (held[question] for question in (CALIBRATION, GROWN, LEFT))
    for path, *sentences in (
        (
            "experiments/frontier/README.md",
            f"{fixed} are inside its 90% intervals",
            f"Of plans that grow, {grown} ends are inside",
            f"by the pilots of two seeds): {left}.",
        ),
        (
            "docs/comparing.md",
            f"{fixed} ends of fixed sizes were inside the 90% intervals, and {grown} ends of plans",
        ),
    ):
        text = " ".join((ROOT / path).read_text().split())
        assert all(words in text for words in sentences), path
