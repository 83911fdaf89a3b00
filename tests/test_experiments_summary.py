"""What the lines of a study say: its summary, other clocks, and the figures of its page."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from experiments import page
from experiments.no_train_no_gain import run as ntng
from experiments.summary import on_clock, outcome, summarise, whole_arms
from growjax.budget import A100_T5, RTX3090_BERT, FlopsClock, MeasuredClock, Op, save_clock
from growjax.errors import BudgetError
from growjax.report.page import look


def line(arm: str, budget: int, seed: int, score: float, depth: int = 8, **more: Any) -> dict:
    """A run of 10 steps per unit of budget; on the published clocks it costs what its depth does."""
    op = ["train", depth, 16, 64, 1000]
    run = {"operations": [[*op, 10 * budget]], "arm": arm, "budget": f"{budget}x", "seed": seed}
    spent = on_clock(run, RTX3090_BERT)
    curve = [(spent / 2, score + 1), (spent, score)]
    return run | {
        "workload": "bert",
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


def test_speed_ups_and_rankings_under_other_clocks():
    """A shallow arm gains where depth is dear and nothing where all steps cost the same."""
    base = {1: 3.0, 2: 2.8, 4: 2.6}
    runs = [line("AdamW", b, s, loss + 0.01 * s) for b, loss in base.items() for s in range(6)]
    runs += [line("shallow", 2, s, 2.79 + 0.01 * s, depth=4) for s in range(6)]
    runs += [line("dear", 2, s, 2.75 + 0.01 * s) for s in range(6)]
    runs += [line("behind", 2, s, 2.85 + 0.01 * s) for s in range(6)]
    runs += [line("either", 2, s, 2.77 + 0.01 * s + 0.1 * (s % 2)) for s in range(6)]
    about = dataclasses.replace(ntng.STUDY, clocks={"the A100, T5": A100_T5})
    rows = summarise(about, runs, "here")
    speed = {r["question"]: r for r in rows if "naive" in r}
    fast = speed["speed-up of shallow over decayed AdamW"]
    cheaper = runs[6]["spent"] / runs[18]["spent"]
    assert fast["estimate"] == pytest.approx(2**0.05 * cheaper, rel=1e-3)
    assert fast["verdict"] == "faster" and fast["seeds"] == 6
    pace = {arm: speed[f"speed-up of {arm} over decayed AdamW"] for arm in ("behind", "either")}
    assert pace["behind"]["verdict"] == "slower"
    assert pace["either"]["verdict"] == "undecided" and pace["either"]["estimate"] != 1
    ranks = {(r["question"].rpartition(" by ")[2], r["budget"]): r for r in rows if "order" in r}
    flops, other = ranks["FLOPs", "2x"], ranks["the A100, T5", "2x"]
    assert flops["usual_order"] == ["shallow", "dear", "AdamW", "either", "behind"]
    assert flops["order"] == ["dear", "shallow", "AdamW", "either", "behind"]
    assert flops["estimate"] == 2 and flops["verdict"] == "changed"
    assert other["order"] == flops["usual_order"] and other["verdict"] == "unchanged"
    assert flops["left_out"] == other["left_out"] == []
    # A clock ranks what it knows, and says what it does not; without the baseline it is silent
    ops = {depth: Op("train", depth, 16, 64, 1000) for depth in (4, 8)}
    some = {f"only {d}": MeasuredClock(f"{d}", ((op, 10**9),)) for d, op in ops.items()}
    rows = summarise(dataclasses.replace(ntng.STUDY, clocks=some), runs, "here")
    ranks = {(r["question"].rpartition(" by ")[2], r["budget"]): r for r in rows if "order" in r}
    assert ("only 4", "2x") not in ranks
    deep = ranks["only 8", "2x"]
    assert deep["order"] == deep["usual_order"] == ["dear", "AdamW", "either", "behind"]
    assert deep["left_out"] == ["shallow"]
    cells = [cell for table in page._row_tables(rows) for row in table.rows for cell in row]
    assert "dear, AdamW, either, behind (not known to it: shallow)" in cells


def test_speed_ups_are_read_off_the_target_as_well():
    """It is the baseline for longer: here twice as long, at the same budget of the study."""
    runs = [line("AdamW", 1, s, 3.0 + 0.01 * s) for s in range(6)]
    runs += [line("mine", 1, s, 2.9 + 0.01 * s) for s in range(6)]
    about = dataclasses.replace(ntng.STUDY, target="whole")
    assert not [r for r in summarise(about, runs, "here") if "naive" in r]
    runs += [line("whole", 2, s, 2.8 + 0.01 * s) | {"budget": "1x"} for s in range(6)]
    (found,) = [r for r in summarise(about, runs, "here") if "naive" in r]
    assert found["question"] == "speed-up of mine over decayed AdamW" and found["budget"] == "1x"
    assert found["estimate"] == pytest.approx(2**0.5, rel=1e-3) and found["seeds"] == 6
    assert found["verdict"] == "faster"
    (one,) = [
        r for r in summarise(about, [r for r in runs if r["seed"] == 0], "here") if "naive" in r
    ]
    assert one["estimate"] == pytest.approx(2**0.5, rel=1e-3) and one["verdict"] == "undecided"


def test_the_arm_that_a_study_is_about_is_compared_with_its_rivals():
    scores = {"AdamW": 3.0, "mine": 2.5, "rival": 2.6, "dear": 2.0}
    runs = [line(a, 1, s, x + 0.01 * s) for a, x in scores.items() for s in range(6)]
    about = dataclasses.replace(ntng.STUDY, method="mine", target="dear")
    found = {r["question"]: r for r in summarise(about, runs, "here") if "p_holm" in r}
    (question,) = (q for q in found if " against mine " in q)
    assert question.startswith("rival") and found[question]["verdict"] == "worse"
    assert found[question]["estimate"] == pytest.approx(0.1)


def test_what_a_run_costs_is_counted_whole():
    """The same operation in two stages counts twice, and more FLOPs than 64 bits hold are no fewer."""
    op = Op("train", 8, 16, 64, 10**15)
    run = line("AdamW", 1, 0, 3.0) | {"operations": [[*op, 10_000], [*op, 20_000]]}
    assert on_clock(run, FlopsClock()) == 3e19
    with pytest.raises(BudgetError, match="expected a run charged its FLOPs"):
        outcome(run, 1.0, A100_T5)


def test_a_run_is_charged_by_another_clock_along_its_operations():
    """Small steps first, which are dearer there than their FLOPs say; between them on a straight line."""
    small, large = Op("train", 2, 16, 64, 100), Op("train", 4, 16, 64, 300)
    clock = MeasuredClock("here", ((small, 10**9), (large, 2 * 10**9)))

    def run(arm: str, operations: list, curve: list) -> dict:
        return {
            **line(arm, 1, 0, curve[-1][1]),
            "operations": operations,
            "curve": curve,
            "clock": "FLOPs",
            "spent": curve[-1][0],
        }

    grown = run("AdamW", [[*small, 10], [*large, 10]], [(500, 4.0), (2500, 3.0), (4000, 2.0)])
    whole = run("whole", [[*large, 20]], [(3000, 4.0), (6000, 3.0)])
    found = outcome(grown, 1.0, clock)
    assert found.curve == ((5.0, 4.0), (20.0, 3.0), (30.0, 2.0)) and found.spent == 30.0
    about = dataclasses.replace(ntng.STUDY, target="whole", clocks={"here": clock})
    rows = {r["question"].partition(",")[0]: r for r in summarise(about, [grown, whole], "here")}
    row = rows["AdamW against whole"]
    assert row["cost"] == pytest.approx(4 / 6) and row["cost_to_reach"] == pytest.approx(
        2500 / 6000
    )
    assert row["clocks"]["here"] == {"cost": 0.75, "cost_to_reach": 0.5, "reached": [0.5]}
    # An operation that was never measured is a reason, and not a guess
    other = dataclasses.replace(about, clocks={"here": MeasuredClock("here", ((small, 10**9),))})
    rows = {r["question"].partition(",")[0]: r for r in summarise(other, [grown, whole], "here")}
    assert "never measured" in rows["AdamW against whole"]["clocks"]["here"]["reason"]


def test_a_speed_up_on_another_clock_is_that_of_its_charges():
    small, large = Op("train", 2, 16, 64, 100), Op("train", 4, 16, 64, 300)
    clock = MeasuredClock("here", ((small, 10**9), (large, 2 * 10**9)))

    def runs(arm: str, op: Op, count: int, score: float) -> list[dict]:
        flops = float(op.flops * count)
        charged = {"operations": [[*op, count]], "spent": flops, "clock": "FLOPs"}
        curve = [(flops / 2, score + 1), (flops, score)]
        return [line(arm, 1, s, score) | charged | {"curve": curve} for s in range(6)]

    group = [*runs("AdamW", large, 10, 3.0), *runs("whole", large, 20, 2.8)]
    group += runs("mine", small, 30, 2.9)
    about = dataclasses.replace(ntng.STUDY, target="whole", clocks={"here": clock})
    speed = {r["question"]: r for r in summarise(about, group, "here") if "naive" in r}
    name = "speed-up of mine over decayed AdamW"
    assert speed.keys() == {name, f"{name}, charged by here"}
    assert speed[name]["estimate"] == pytest.approx(2**0.5)
    assert speed[f"{name}, charged by here"]["estimate"] == pytest.approx(2**0.5 * 20 / 30)
    # Of an arm that the clock does not know whole, nothing is said
    other = dataclasses.replace(about, clocks={"here": MeasuredClock("here", ((large, 10**9),))})
    assert {r["question"] for r in summarise(other, group, "here") if "naive" in r} == {name}


def test_an_arm_with_fewer_seeds_is_compared_over_those():
    runs = [line("AdamW", 1, s, 3.0 + 0.01 * s) for s in range(6)]
    runs += [line("few", 1, s, 2.0 + 0.01 * s) for s in (1, 3)]
    (row,) = summarise(ntng.STUDY, runs, "here")
    assert row["seeds"] == 2 and row["estimate"] == pytest.approx(-1.0)
    assert row["verdict"] == "undecided" and row["command"] == "here"
    assert whole_arms(runs, "AdamW") == runs[:6]


def test_runs_are_charged_by_the_clocks_of_the_study_and_by_those_in_its_folder(
    monkeypatch, tmp_path
):
    measured = [MeasuredClock(name, ((Op("train", 8, 16, 64, 1000), 1),)) for name in "ab"]
    for clock in measured:
        save_clock(clock, tmp_path / f"clock-{clock.name}.json")
    runs = [line("AdamW", b, s, 3.0 - 0.1 * b) for b in (1, 2) for s in range(6)]
    lines = "".join(json.dumps({"steps": 1, "stages": [], **run}) + "\n" for run in runs)
    (tmp_path / "small.jsonl").write_text(lines)
    monkeypatch.setattr(page, "command_for", lambda *_: "here")
    monkeypatch.setattr(page, "write_report", lambda *_: None)
    rows = page.write_summary(tmp_path / "small.jsonl", ntng.STUDY)
    told = {r["question"].rpartition(" charged by ")[2] for r in rows if "order" in r}
    published = {name for name, clock in ntng.STUDY.clocks.items() if clock != RTX3090_BERT}
    assert told == {"FLOPs"} | published | {clock.identity for clock in measured}


def test_an_arm_looks_the_same_in_every_figure_and_like_no_other(monkeypatch, tmp_path):
    """And the legend has them in the order of their ends, from the top."""
    arms = [f"arm {n}" for n in range(18)]
    first = [line(arm, 1, 0, 3.0 - 0.1 * (n % 5)) for n, arm in enumerate(arms)]
    second = [line(arm, 16, 0, 2.0 - 0.1 * (n % 3)) for n, arm in enumerate(arms[::-2])]
    runs = [{"steps": 1, "stages": []} | r for r in [*first, *second]]
    plots: list[Any] = []
    monkeypatch.setattr(page, "write_page", lambda path, name, found, *_: plots.extend(found))
    page.write_report(tmp_path / "report.html", ntng.STUDY, runs, [])
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
    assert [x.get_label() for x in axes.get_lines()] == arms[1::2]
    assert {len(found) for found in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(arms)


def test_bars_are_on_the_mean_line_where_its_stages_begin():
    stages = [{"start": 0}, {"start": 2 * 10**9}]
    runs = [
        {"arm": "msg", "budget": "1x", "seed": seed, "unit": "FLOPs", "stages": stages}
        | {
            "spent": 4 * 10**9,
            "curve": [(10**9, 3.0 + seed), (3 * 10**9, 2.0 - seed), (4 * 10**9, 1.0)],
        }
        for seed in range(2)
    ]
    (axes,) = page._loss_plot("", runs, {"msg": look(0)}).figure.axes
    (bar,) = [line for line in axes.lines if line.get_marker() == "|"]
    assert np.asarray(bar.get_xydata()).tolist() == [[2, 2.5]]  # in gigaFLOPs


def test_pictures_of_a_workload_are_its_smallest_budget_and_the_ends_of_all(tmp_path):
    runs = [line(arm, budget, 0, budget / 4) for budget in (16, 2) for arm in ("AdamW", "lion")]
    runs += [{**line("AdamW", 1, 0, 3.0), "workload": "t5"}]
    runs = [{"steps": 1, "stages": []} | r for r in runs]
    page.write_report(tmp_path / "report.html", ntng.STUDY, runs, [])
    pictures = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert pictures.keys() == {"bert-loss.svg", "bert-ends.svg", "t5-loss.svg"}
    assert "lion  0.500" in pictures["bert-loss.svg"] and "AdamW  3.000" in pictures["t5-loss.svg"]
    assert "at the end" in pictures["bert-ends.svg"]
    page.write_report(tmp_path / "report.html", ntng.STUDY, runs, [])
    assert {path.name: path.read_text() for path in tmp_path.glob("*.svg")} == pictures


def test_every_look_along_shorter_paths_has_a_panel_with_the_runs_that_were_looked_at():
    def numbers(*losses):
        return {"by_length": {str(k): (x, 0.0) for k, x in zip((2, 10), losses, strict=True)}}

    one = {"arm": "one", "budget": "1x", **numbers(3, 2)}
    two = {"arm": "two", "budget": "1x", **numbers(5, 4)}
    one["midway"] = {"0.5": numbers(7, 6), "0.125": numbers(9, 8)}
    looks: page.Looks = {"one": {}, "two": {}}
    (plot,) = page._length_plot("", [one, two], looks)
    drawn = [
        [np.asarray(line.get_ydata()).tolist() for line in axes.lines] for axes in plot.figure.axes
    ]
    assert drawn == [[[9, 8]], [[7, 6]], [[3, 2], [5, 4]]]
    titles = [axes.get_title() for axes in plot.figure.axes]
    assert titles == ["0.125 of the cost", "0.5 of the cost", "the end"]
    (plot,) = page._length_plot("", [two], looks)
    assert [axes.get_title() for axes in plot.figure.axes] == [""]
