"""The page of a study: verdicts, figures, tables and pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import page
from experiments.summary import Question, arms_of
from growjax.report.figures import look
from growjax.report.rows import OwnCost, SpeedUp
from tests.lines import NTNG, line, study, summarise


def test_a_page_begins_with_the_verdicts_and_says_what_was_not_run():
    runs = [line("AdamW", 1, s, 3.0 + 0.01 * s) for s in range(6)]
    runs += [line("mine", 1, s, 2.5 + 0.011 * s) for s in range(6)]
    (sentence,) = page._answer(arms_of(runs), summarise(NTNG, runs), NTNG)
    assert sentence.startswith("At bert, 1x, better than AdamW at equal cost: mine by 0.49")
    assert "No smaller fixed size was run" in sentence
    runs += [line("fixed-1x8", 1, s, 2.0 + 0.01 * s, fixed=True, parameters=10) for s in range(6)]
    (sentence,) = page._answer(arms_of(runs), summarise(NTNG, runs), NTNG)
    assert "worse than the best fixed size at equal cost: mine by 0.50" in sentence
    assert "That fixed size is fixed-1x8, at its decayed end" in sentence
    assert "10 and 100 parameters" not in sentence and "0k and 0k" in sentence


def shown(lines: list[dict], question: Question = NTNG) -> page.Page:
    return page.page(question, Path("nowhere/small.jsonl"), lines, [])


def test_an_arm_looks_the_same_in_every_figure_and_like_no_other():
    """And the legend has them in the order of their ends, from the top."""
    arms = [f"arm {n}" for n in range(18)]
    first = [line(arm, 1, 0, 3.0 - 0.1 * (n % 5)) for n, arm in enumerate(arms)]
    second = [line(arm, 16, 0, 2.0 - 0.1 * (n % 3)) for n, arm in enumerate(arms[::-2])]
    sections = shown([*first, *second]).sections
    plots: list[Any] = [x for x in sections[0].blocks if isinstance(x, page.Plot)]
    assert [plot.title.partition(":")[0] for plot in plots] == ["bert, 1x", "bert, 16x", "bert"]
    looks: dict[str, set[tuple[Any, ...]]] = {arm: set() for arm in arms}
    for plot in plots:
        (axes,), (legend,) = plot.figure.axes, plot.figure.legends
        ends = {x.get_label(): x.get_ydata()[-1] for x in axes.get_lines()}
        labels = [text.get_text() for text in legend.get_texts()]
        assert [ends[x] for x in labels] == sorted((ends[x] for x in labels), reverse=True)
        for drawn in axes.get_lines():
            name = drawn.get_label().partition("  ")[0]
            if name in looks:
                looks[name].add((drawn.get_color(), str(drawn._unscaled_dash_pattern)))
    (axes,) = plots[-1].figure.axes  # the ends of arms that have more than one
    names = [x.get_label() for x in axes.get_lines() if x.get_label() in arms]
    assert sorted(names) == sorted(arms[1::2])
    assert {len(each) for each in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(arms)


def test_bars_are_on_the_mean_line_where_its_stages_begin():
    stages = [{"label": "", "start": 0, "stop": 2e9}, {"label": "", "start": 2e9, "stop": 5e9}]
    runs = [
        line("msg", 1, seed, 1.0, unit="FLOPs", stages=stages, spent=5e9)
        | {"curve": [((1 + x) * 10**9, 3.0 + y), (3 * 10**9, 2.0), (5e9, 1.0)]}
        for seed, x, y in ((0, 0.0, 0.0), (2, 0.5, 1.0), (1, 1.0, 0.8))
    ]
    plot = page._loss_plot("", arms_of(runs), {"msg": look(0)})
    (axes,) = plot.figure.axes
    drawn, *_ = axes.lines
    (bar,) = [x for x in axes.lines if x.get_marker() == "|"]
    assert np.asarray(drawn.get_xydata()) == pytest.approx(np.array([[1.5, 3.6], [3, 2], [5, 1]]))
    (at,) = np.asarray(bar.get_xydata())
    assert at == pytest.approx([2, 3.6 - 1.6 / 3])  # in gigaFLOPs
    assert "at most 3 seeds" in plot.caption


def test_the_tables_of_a_page_say_what_the_runs_and_the_rows_do():
    runs = [
        line("AdamW", 1, s, 2.0 + s, seconds=5.0 + s, downstream={"blimp": 0.5 + 0.1 * s}, steps=7)
        for s in range(3)
    ]
    trial = {**line("AdamW at 1", 1, 0, 2.5), "budget": "tuning"}
    table, judged = page._run_tables([*runs, trial])
    spent = f"{runs[0]['spent']:.4g}"
    assert table.rows == [["AdamW", "3", "3.0000", "1.0000", "4.3281", spent, "7", "6"]]
    assert judged.columns == ("arm", "blimp") and judged.rows == [["AdamW", "0.6000"]]
    (ledger,) = page._ledger([*runs, trial])
    assert ledger.rows == [["AdamW at 1", "2.5000"]] and page._ledger(runs) == []
    where: dict[str, Any] = {"workload": "bert", "budget": "1x", "seeds": 3, "arm": "mine"}
    where |= {"interval": (-0.2, 0.1), "baseline": "whole", "question": "?"}
    clock = {"cost": 0.5, "cost_to_reach": 0.25, "reached": (0.2, None, 0.3)}
    own = OwnCost(
        **where,
        estimate=-0.1,
        verdict="lower",
        p=0.04,
        cost=0.39,
        flops=0.39,
        seconds=0.8,
        cost_to_reach=0.375,
        cost_to_reach_interval=None,
        reached=(0.3, 0.4, 0.425),
        clocks={"here": clock},
    )
    fast = SpeedUp(**where, estimate=1.5, verdict="open", bound=">=", naive=2.5)
    table, clocks = page._tables([own, fast])
    cells = ["mine", "-0.1000 (-0.2000 to +0.1000)", "0.39", "0.80", "0.38", "3 of 3", "lower"]
    assert table.rows == [cells]
    assert clocks.rows == [["mine", "here", "0.50", "0.25", "2 of 3"]]
    (speeds,) = page._last_tables([own, fast])
    assert speeds.rows == [["mine", "1x", "its own", ">= 1.50", "2.50", "3"]]


def test_ends_have_a_dot_for_every_seed_and_the_frontier_as_wide_steps():
    runs = [
        line(arm, b, s, y + 0.2 * s)
        for arm, ends in {"lion": {2: 3.0, 8: 2.0}, "AdamW": {1: 3.1, 4: 2.4}}.items()
        for b, y in ends.items()
        for s in range(2)
    ]
    (plot,) = page._ends_plot("bert", arms_of(runs), NTNG, {"AdamW": look(0), "lion": look(1)})
    (axes,) = plot.figure.axes
    drawn = {x.get_label(): x for x in axes.lines}
    one = runs[-1]["spent"] / 4
    wanted = {"lion": [[2 * one, 3.1], [8 * one, 2.1]], "AdamW": [[one, 3.2], [4 * one, 2.5]]}
    for arm, ends in wanted.items():
        assert np.asarray(drawn[arm].get_xydata()) == pytest.approx(np.array(ends))
    dots = [np.asarray(x.get_xydata()).tolist() for x in axes.lines if x.get_markersize() == 2]
    seeds = [[x, y] for pairs in dots for x, y in pairs]
    assert sorted(seeds) == sorted([r["spent"], r["score"]] for r in runs)
    edge = drawn["frontier of AdamW"]
    assert edge.get_linewidth() > 2 * drawn["lion"].get_linewidth()
    steps = np.asarray(edge.get_xydata())
    # Halfway to its end the first run has 4.2, at its end 3.2; the longer one is never higher after that
    assert steps[:2] == pytest.approx(np.array([[one / 2, 4.2], [one, 3.2]]))
    assert steps[-1] == pytest.approx([8 * one, 2.5])
    assert list(axes.get_xticks()) == pytest.approx([one, 2 * one, 4 * one, 8 * one])
    assert axes.get_xlabel() == "reference seconds"


def test_pictures_of_a_workload_are_its_smallest_budget_and_the_ends_of_all(tmp_path):
    runs = [line(arm, budget, 0, budget / 4) for budget in (16, 2) for arm in ("AdamW", "lion")]
    runs += [{**line("AdamW", 1, 0, 3.0), "workload": "t5"}]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    study(NTNG).report(tmp_path / "small.jsonl")
    pictures = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert pictures.keys() == {"bert-loss.svg", "bert-ends.svg", "t5-loss.svg"}
    assert "lion  0.500" in pictures["bert-loss.svg"] and "AdamW  3.000" in pictures["t5-loss.svg"]
    assert "at the end" in pictures["bert-ends.svg"]
    assert all("fill: #ffffff" in picture for picture in pictures.values())  # no page is behind it
    study(NTNG).report(tmp_path / "small.jsonl")
    assert {path.name: path.read_text() for path in tmp_path.glob("*.svg")} == pictures


def test_every_look_along_shorter_paths_has_a_panel_with_the_runs_that_were_looked_at():
    def numbers(*losses):
        return {"by_length": {str(k): (x, 0.0) for k, x in zip((2, 10), losses, strict=True)}}

    one = {"arm": "one", "budget": "1x", **numbers(3, 2)}
    two = {"arm": "two", "budget": "1x", **numbers(5, 4)}
    one["midway"] = {"0.5": numbers(7, 6), "0.125": numbers(9, 8)}
    looks: page.Looks = {"one": {}, "two": {}}
    plot = page._length_plot("", [one, two], looks)
    assert plot is not None
    drawn = [
        [np.asarray(line.get_ydata()).tolist() for line in axes.lines] for axes in plot.figure.axes
    ]
    assert drawn == [[[9, 8]], [[7, 6]], [[3, 2], [5, 4]]]
    titles = [axes.get_title() for axes in plot.figure.axes]
    assert titles == ["0.125 of the cost", "0.5 of the cost", "the end"]
    plot = page._length_plot("", [two], looks)
    assert plot is not None
    assert [axes.get_title() for axes in plot.figure.axes] == [""]
