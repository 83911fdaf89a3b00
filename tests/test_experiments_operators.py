"""The contest of operators: its plans, its runs, and what its lines are turned into."""

import dataclasses
import functools
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import study
from experiments.frontier.design import DESIGNS as FRONTIERS
from experiments.frontier.design import fixed_name
from experiments.frontier.tuning import settled
from experiments.operators.cells import Fixed, Grown, Shared, cells
from experiments.operators.design import DESIGNS, DIRECTIONS, FIXED, REFERENCE, Direction
from experiments.operators.report import page, prediction_table, sentences, tables_of
from experiments.operators.summary import (
    ALIVE,
    ALL,
    PREDICTS,
    RANDOM,
    REGRET,
    RUNS,
    recovery,
    spearman,
    summarise,
)
from experiments.study import Line, read
from experiments.text import Texts
from experiments.windows import WindowFile
from growjax.cost import parameters
from growjax.data import ByteTokenizer, Corpus
from growjax.report.rows import AgainstFrontier, Answer, EqualCost, Row, read_summary, select
from tests.runs import TEXT
from tests.test_experiments_claims import as_committed, claims_in, is_of


SMALL, SMOKE = DESIGNS["small"], DESIGNS["smoke"]
FOLDER = Path(__file__).parents[1] / "experiments" / "operators"
RESULTS = FOLDER / "results" / "small.jsonl"


# Plans --------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_ledger():
    ledger = settled(
        FRONTIERS["small"], read(FOLDER.parent / "frontier" / "results" / "small.jsonl")
    )
    untuned = SMALL.base.shapes[0]
    for shape, setting in SMALL.settings.items():
        assert setting == ledger.get(shape, SMALL.settings[SMALL.small]), shape
    assert untuned not in ledger and {*SMALL.settings} - {untuned} <= {*ledger}


def test_there_are_more_than_a_dozen_operators_with_names_of_their_own():
    for direction in DIRECTIONS:
        entries = SMALL.entries(direction)
        names = [entry.name for entry in entries]
        assert len(names) == len({*names}) >= 13 and REFERENCE[direction] in names
        assert len({entry.settings for entry in entries}) == len(entries)
        assert [e.name for e in entries if e.floor] == ["drawn anew"]


@pytest.mark.parametrize(
    "direction, name", [("depth", "gradual, middle"), ("width", "SPARKLING"), ("depth", "stack")]
)
def test_a_grown_plan_costs_what_a_fixed_size_does(direction: Direction, name: str):
    entry = next(e for e in SMALL.entries(direction) if e.name == name)
    plan = SMALL.grown(direction, entry, seed=0)
    cost = SMALL.budget * SMALL.base.unit
    assert plan.cost == pytest.approx(cost, rel=2e-3)
    span, last = plan.spans[1], plan.spans[-1]
    assert span.spent / plan.cost == pytest.approx(SMALL.time, rel=2e-3)
    assert parameters(last.model) == SMALL.base.parameters(SMALL.large[direction])
    # All steps at which there is a loss come before the rate falls
    at = span.spent + sum(span.costs[: SMALL.after[-1]])
    assert at < 0.8 * plan.cost and span.batch == SMALL.settings[SMALL.large[direction]].batch
    if name == "SPARKLING":
        parts = span.stage.parts
        assert parts is not None and parts.old == 0.25
        assert parts.new.points[1] == (250, 0.25 * 1.3)  # type: ignore[union-attr]
    if name == "stack":
        trunk = Fixed(SMALL, SMALL.small, 0)
        assert trunk.fork == span.start
        fitted = dataclasses.replace(entry, grow=None)
        charged = SMALL.grown(direction, fitted, 0, span.stage.grow, charge=0.1 * cost)
        assert charged.cost == pytest.approx(cost, rel=2e-3)
        assert charged.spans[1].steps == pytest.approx(0.75 * span.steps, rel=2e-2)


@pytest.mark.slow
def test_a_seed_is_trained_from_one_trunk_and_goes_on_where_it_was_stopped(tmp_path):
    documents, tokenizer = TEXT.split(". "), ByteTokenizer()
    parts = [Corpus.of(part, tokenizer) for part in (documents[50:], documents[:50])]
    texts = Texts(parts[0], parts[0], parts[1], {}, "numbers")
    results = tmp_path / "smoke.jsonl"
    shared = Shared(SMOKE, texts, tmp_path / "runs", WindowFile(results))
    wanted = ("stack, closed", "gates, fresh", "gradual, middle", "copy", "SPARKLING", "LiGO")
    every = [c for c in cells(SMOKE, 0) if isinstance(c, Grown) and c.entry.name in wanted]
    # An operator first: the trunk that it forks from is trained without a line
    study.run(every, shared, results)
    lines = {(line["workload"], line["arm"]): line for line in read(results)}
    assert len(lines) == len(every) == 7
    for (_, arm), line in lines.items():
        losses = dict(map(tuple, line["after"]))
        assert [*losses] == [0, 2, 4]
        if line["exactness"] != "approximate":
            assert losses[0] == pytest.approx(line["before"], abs=1e-5), arm
        assert line["charged"] > 0 if arm == "LiGO" else line["charged"] == 0
        assert line["spent"] == pytest.approx(SMOKE.budget * SMOKE.base.unit, rel=0.03)
    assert len(lines["depth", "gradual, middle"]["grew_at"]) == 2
    trunk = Fixed(SMOKE, SMOKE.small, 0)
    study.run([trunk, *every], shared, results)
    assert len(read(results)) == 8 and trunk.key in shared.file.keys()
    # The trunk is as if it had been trained alone
    alone = dataclasses.replace(
        shared, runs=tmp_path / "alone", file=WindowFile(tmp_path / "a.jsonl")
    )
    score = next(line["score"] for line in read(results) if line["workload"] == FIXED)
    assert trunk.run(alone)["score"] == score


# Lines --------------------------------------------------------------------------------------------


def made_up(gain: float = 0.05) -> list[Line]:
    """Lines of every run: the n-th operator of a direction ends n hundredths higher than the first.

    The first is `gain` below the best fixed size. Losses right after the growth are in the opposite
    order, and from 100 steps on in that of the ends.
    """
    rng, lines = np.random.default_rng(0), []
    for seed in SMALL.seeds:
        for n, shape in enumerate(SMALL.base.shapes):
            lines.append(line(FIXED, fixed_name(shape), seed, 2.0 + 0.1 * n, rng, fixed=True))
        for direction in DIRECTIONS:
            for n, entry in enumerate(SMALL.entries(direction)):
                end = 2.0 - gain + 0.01 * n
                after = [[k, 3.0 - 0.1 * n if k < 100 else end + 0.2] for k in SMALL.after]
                more = {"before": 2.45, "after": after, "exactness": "exact"}
                lines.append(line(direction, entry.name, seed, end, rng, **more))
    return lines


def line(workload: str, arm: str, seed: int, score: float, rng: Any, **more: Any) -> Line:
    spent = SMALL.budget * SMALL.base.unit
    return {
        "workload": workload,
        "budget": SMALL.budget_name,
        "arm": arm,
        "seed": seed,
        "fixed": False,
        "free": False,
        "clock": "FLOPs",
        "unit": "FLOPs",
        "spent": spent,
        "score": score + 1e-3 * rng.normal() + 0.05 * seed,
        "decayed": True,
        "curve": [],
        "flops": spent,
        "seconds": 1.0,
        "parameters": 1000,
        "stages": [{"label": "", "start": 0.0, "stop": spent}],
        "text": "numbers",
        **more,
    }


@functools.cache
def rows_of_made_up() -> list[Row]:
    return summarise(Path("nowhere/small.jsonl"), made_up())


def test_arms_are_held_against_the_best_size_the_reference_and_the_large_one():
    rows = rows_of_made_up()
    for direction in DIRECTIONS:
        entries = SMALL.entries(direction)
        against = [r for r in select(rows, AgainstFrontier) if r.workload == direction]
        assert {row.baseline for row in against} == {"fixed-1x32, at its decayed end"}
        assert {row.family for row in against} == {len(entries)}
        verdicts = {row.arm: row.verdict for row in against}
        assert verdicts[entries[0].name] == "better" and verdicts[entries[-1].name] == "worse"
        large = fixed_name(SMALL.large[direction])
        for baseline in (REFERENCE[direction], large):
            equal = [
                r
                for r in select(rows, EqualCost)
                if (r.workload, r.baseline) == (direction, baseline)
            ]
            assert len(equal) == len(entries) - (baseline != large)


def test_early_losses_predict_from_where_their_order_is_that_of_the_ends():
    rows = rows_of_made_up()
    answers = {(row.workload, row.question): row for row in select(rows, Answer)}
    for direction in DIRECTIONS:
        for n, verdict in ((0, "no"), (30, "no"), (100, "yes"), (700, "yes")):
            for words in (ALL, ALIVE):
                row = answers[direction, PREDICTS.format(n, words)]
                assert row.verdict == verdict and row.seeds == len(SMALL.seeds)
        # Operators that grow twice are not asked, and the last one is the control that is drawn anew
        once = [e for e in SMALL.entries(direction) if e.grow is None or len(e.grow) == 1]
        assert (len(once) < len(SMALL.entries(direction))) == (direction == "depth")
        last = 0.01 * (len(SMALL.entries(direction)) - 1)
        assert answers[direction, REGRET.format(0)].estimate == pytest.approx(last, abs=3e-3)
        assert answers[direction, REGRET.format(700)].estimate == pytest.approx(0, abs=3e-3)
        assert answers[direction, RANDOM].estimate == pytest.approx(last / 2, abs=8e-3)


def test_choices_that_are_tied_have_the_mean_of_their_regrets():
    lines = made_up()
    for entry in lines:
        if entry["workload"] != FIXED:
            entry["after"] = [[k, 2.5] for k in SMALL.after]
    rows = summarise(Path("nowhere/small.jsonl"), lines)
    answers = {(row.workload, row.question): row for row in select(rows, Answer)}
    regret, chance = answers["width", REGRET.format(0)], answers["width", RANDOM]
    entries = len(SMALL.entries("width"))
    assert regret.estimate == pytest.approx(0.01 * (entries - 1) / 2, abs=2e-3)
    assert chance.estimate == pytest.approx(0.01 * (entries - 2) / 2, abs=2e-3)
    # Losses that are all the same have no order
    assert answers["width", PREDICTS.format(0, ALL)].verdict == "diverged"


def test_recovery_is_from_where_the_loss_stays_below():
    def steps(*losses: float) -> int | None:
        after = [list(pair) for pair in zip((0, 10, 30, 100), losses, strict=True)]
        return recovery({"before": 2.0, "after": after})

    assert steps(3.0, 2.5, 1.9, 1.8) == 30
    assert steps(2.0, 1.9, 2.1, 1.9) == 100
    assert steps(2.0, 1.9, 1.9, 2.1) is None


def test_ranks_decide_a_correlation():
    assert spearman([1.0, 2.0, 40.0], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert spearman([3.0, 2.0, 1.0], [0.1, 0.2, 0.3]) == pytest.approx(-1)
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    assert math.isnan(spearman([1.0, 1.0], [0.1, 0.2]))


def test_nothing_is_compared_until_all_runs_are_there():
    for lines in ([], made_up()[:-1]):
        rows = summarise(Path("nowhere/small.jsonl"), lines)
        against = {row.workload for row in select(rows, AgainstFrontier)}
        assert against == ({"depth"} if lines else set())
        (runs,) = (row for row in select(rows, Answer) if row.question == RUNS)
        assert runs.verdict == f"{len(lines)} of {6 * (4 + 14 + 14)}"
    rows = summarise(Path("nowhere/small.jsonl"), [])
    assert "0 of 192" in page(Path("nowhere/small.jsonl"), [], rows).answer[0]


def test_the_page_answers_first():
    shown = page(Path("nowhere/small.jsonl"), made_up(), rows_of_made_up())
    assert "below the best fixed size (fixed-1x32)" in shown.answer[0]
    assert {*shown.pictures} == {"ends", "after", "prediction"}
    assert [section.title for section in shown.sections][-1] == "Fixed sizes"


# What is committed --------------------------------------------------------------------------------


def test_the_committed_answers_are_those_of_the_committed_lines():
    committed = select(read_summary(FOLDER / "results" / "summary.json"), Answer)
    again = summarise(RESULTS, read(RESULTS), compared=False)
    assert as_committed(again, committed) and len(again) > 200


@pytest.mark.slow
def test_the_committed_summary_is_that_of_the_committed_lines():
    committed = read_summary(FOLDER / "results" / "summary.json")
    assert as_committed(summarise(RESULTS, read(RESULTS)), committed)


def test_the_committed_lines_are_all_of_them_and_each_has_its_windows():
    keys = [study.key_of(line) for line in read(RESULTS)]
    wanted = {cell.key for seed in SMALL.seeds for cell in cells(SMALL, seed)}  # type: ignore
    assert len(keys) == len({*keys}) and {*keys} == wanted == WindowFile(RESULTS).keys()


def test_the_page_on_choosing_says_what_was_seen():
    rows = read_summary(FOLDER / "results" / "summary.json")
    text = " ".join((FOLDER.parents[1] / "docs" / "choosing.md").read_text().split())
    claims = claims_in(text)
    assert len(claims) >= 20 and not [claim for claim in claims if not is_of(claim, rows)]
    base = SMALL.base
    for shape in (SMALL.small, *SMALL.large.values()):
        assert f"{base.parameters(shape):,}" in text


def test_the_figure_of_the_first_page_is_of_the_committed_runs():
    figures = FOLDER.parents[1] / "docs" / "figures"
    script = runpy.run_path(str(figures / "results.py"))
    for theme in ("light", "dark"):
        drawn = (figures / f"results-{theme}.svg").read_text()
        assert (
            drawn == script["drawn"](theme)
            and f"results-{theme}.svg#only-{theme}" in (figures.parent / "index.md").read_text()
        )
    # The numbers of the page on choosing, which are those of the summary
    assert all(f">+{mean}<" in drawn for mean in ("0.039", "0.425", "0.449"))


def test_the_readme_says_what_was_seen():
    rows = read_summary(FOLDER / "results" / "summary.json")
    answers = {(row.workload, row.question): row for row in select(rows, Answer)}
    text = " ".join((FOLDER / "README.md").read_text().split())
    for sentence in sentences(SMALL, rows):
        assert sentence in text
    for direction in DIRECTIONS:
        for table in (
            *tables_of(SMALL, direction, rows),
            prediction_table(SMALL, direction, answers),
        ):
            for name, *numbers in table.rows:
                name = name if name.isdigit() else f"`{name}`"
                assert f"| {' | '.join([name, *numbers])} |" in text
            assert table.caption in text
    claims = claims_in(text.partition("## What was seen")[2])
    assert len(claims) >= 80 and not [claim for claim in claims if not is_of(claim, rows)]
