"""What the lines of a study say: its summary, other clocks, and the figures of its page."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from experiments import page
from experiments.no_train_no_gain import run as ntng
from experiments.summary import _on_line, on_clock, outcome, summarise, whole_arms
from growjax.budget import (
    A100_T5,
    RTX3090_BERT,
    FlopsClock,
    MeasuredClock,
    Op,
    compare,
    save_clock,
    t_interval,
)
from growjax.budget.statistics import bca_interval
from growjax.errors import BudgetError
from growjax.report.figures import look


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
    fast = speed["speed-up of shallow over all that was run of AdamW"]
    cheaper = runs[6]["spent"] / runs[18]["spent"]
    assert fast["estimate"] == pytest.approx(2**0.05 * cheaper, rel=1e-3)
    assert fast["verdict"] == "faster" and fast["seeds"] == 6
    pace = {
        arm: speed[f"speed-up of {arm} over all that was run of AdamW"]
        for arm in ("behind", "either")
    }
    assert pace["behind"]["verdict"] == "slower"
    assert pace["either"]["verdict"] == "no difference found" and pace["either"]["estimate"] != 1
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
    assert (
        found["question"] == "speed-up of mine over all that was run of AdamW"
        and found["budget"] == "1x"
    )
    assert found["estimate"] == pytest.approx(2**0.5, rel=1e-3) and found["seeds"] == 6
    assert found["verdict"] == "faster"
    (one,) = [
        r for r in summarise(about, [r for r in runs if r["seed"] == 0], "here") if "naive" in r
    ]
    assert one["estimate"] == pytest.approx(2**0.5, rel=1e-3) and one["verdict"] == "too few seeds"


def test_rows_at_equal_cost_are_what_compare_says_of_every_measure():
    """Where more is better, differences and their intervals keep their sign, and verdicts their sense."""
    rng = np.random.default_rng(0)

    def runs(arm: str, shift: float, depth: int = 8) -> list[dict]:
        scores = 3 + shift + 0.05 * rng.normal(size=6)
        tasks = [{"blimp": 0.5 - shift + 0.05 * rng.normal()} for _ in range(6)]
        texts = [{"wiki": 4 - shift + 0.05 * rng.normal()} for _ in range(6)]
        return [
            line(arm, 1, s, float(scores[s]), depth, downstream=tasks[s], texts=texts[s])
            for s in range(6)
        ]

    group = [*runs("AdamW", 0.0), *runs("mine", -0.3), *runs("level", 0.02)]
    rows = summarise(ntng.STUDY, [*group, *runs("shallow", -1.0, depth=4)], "here")
    found = {r["question"]: r for r in rows if "p_holm" in r}
    measures = {
        "held-out nats, lower is better": (1, lambda r: r["score"]),
        "wiki, nats, lower is better": (1, lambda r: r["texts"]["wiki"]),
        "blimp, higher is better": (-1, lambda r: r["downstream"]["blimp"]),
    }
    asked = "{} against AdamW at equal cost: {}".format
    assert found.keys() == {asked(arm, m) for arm in ("mine", "level") for m in measures}
    for measure, (sign, value) in measures.items():
        outcomes = [outcome(r | {"score": sign * value(r)}, group[0]["spent"]) for r in group]
        for told in compare(outcomes, "AdamW"):
            row = found[asked(told.arm, measure)]
            names = ("p", "p_t", "p_holm", "detectable", "margin", "verdict", "reason")
            assert {n: row[n] for n in names} == {n: getattr(told, n) for n in names}
            gaps = [value(r) for r in group if r["arm"] == told.arm]
            gaps = [a - value(b) for a, b in zip(gaps, group[:6], strict=True)]
            assert row["estimate"] == pytest.approx(np.mean(gaps))
            assert row["interval"] == pytest.approx(t_interval(gaps))
            assert row["bootstrap"] == pytest.approx(bca_interval(gaps), rel=0.05)
            assert row["bootstrap"] != row["interval"]
    better = [found[asked("mine", m)] for m in measures]
    assert [r["verdict"] for r in better] == ["better", "worse", "better"]
    assert [r["estimate"] > 0 for r in better] == [False, True, True]


@pytest.mark.parametrize("seeds", [6, 5])
def test_an_arm_is_told_from_the_target_by_its_whole_interval(seeds):
    shifts = {"whole": 0.0, "below": -0.2, "above": 0.2, "level": 0.001}
    noise = [0.03, -0.02, 0.01, -0.03, 0.02, -0.01]
    runs = [
        line(arm, 1 if arm == "whole" else 2, s, 3 + shift + (noise[s] if shift else 0.0))
        | {"budget": "1x", "seconds": 8.0 if arm == "whole" else 2.0}
        for arm, shift in shifts.items()
        for s in range(seeds)
    ]
    about = dataclasses.replace(ntng.STUDY, baseline="none", target="whole", clocks={})
    rows = {r["question"].partition(" ")[0]: r for r in summarise(about, runs, "here")}
    told = {arm: row["verdict"] for arm, row in rows.items()}
    said = ("lower", "higher", "not told apart") if seeds == 6 else ("undecided",) * 3
    assert told == dict(zip(("below", "above", "level"), said, strict=True))
    for row in rows.values():
        assert row["cost"] == row["flops"] == pytest.approx(2) and row["seconds"] == 0.25


def test_a_ranking_is_by_the_distance_from_the_baselines_line_in_the_logarithm():
    """Free variants have no place in it, and its first and last pieces go on."""
    line_of = [(0.0, 3.0), (1.0, 2.0), (2.0, 1.8)]
    heights = {-1.0: 4.0, 0.5: 2.5, 1.0: 2.0, 1.5: 1.9, 3.0: 1.6}
    assert {x: _on_line(line_of, x) for x in heights} == pytest.approx(heights)
    # The baseline falls by 1 for every doubling: between 1 and 2 it is at 2.5 by 2 ** 0.5
    base = [line("AdamW", b, s, y) for b, y in ((1, 3.0), (2, 2.0), (4, 1.0)) for s in range(2)]
    rivals = {"ahead": 2.47, "behind": 2.53, "mine, free": 1.0}
    half = [
        line(arm, 1, s, y) | {"operations": [["train", 8, 16, 64, 1000, 14]]}
        for arm, y in rivals.items()
        for s in range(2)
    ]
    half = [r | {"spent": on_clock(r, RTX3090_BERT)} for r in half]
    rows = summarise(dataclasses.replace(ntng.STUDY, clocks={}), [*base, *half], "here")
    (rank,) = [r for r in rows if "order" in r and r["budget"] == "1x"]
    assert rank["order"] == rank["usual_order"] == ["ahead", "AdamW", "behind"]


def test_what_one_seed_cannot_tell_is_null_and_not_nan():
    runs = [line(arm, 1, 0, 3.0) for arm in ("AdamW", "mine", "whole")]
    about = dataclasses.replace(ntng.STUDY, target="whole")
    rows = summarise(about, runs, "here")
    assert len(rows) == 4 and all(r["interval"] is None for r in rows)
    json.dumps(rows, allow_nan=False)


def test_the_arm_that_a_study_is_about_is_compared_with_its_rivals():
    """In the held-out loss alone, and not with the baseline and the target again."""
    scores = {"AdamW": 3.0, "mine": 2.5, "rival": 2.6, "dear": 2.0}
    runs = [
        line(a, 1, s, x + 0.01 * s, downstream={"blimp": 0.5 + 0.01 * s})
        for a, x in scores.items()
        for s in range(6)
    ]
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
    name = "speed-up of mine over all that was run of AdamW"
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
    assert row["verdict"] == "too few seeds" and row["command"] == "here"
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
        | {"spent": 5 * 10**9, "curve": [((1 + x) * 10**9, 3.0 + y), (3 * 10**9, 2.0), (5e9, 1.0)]}
        for seed, x, y in ((0, 0.0, 0.0), (0, 0.5, 1.0), (1, 1.0, 0.8))
    ]
    plot = page._loss_plot("", runs, {"msg": look(0)})
    (axes,) = plot.figure.axes
    line, *_ = axes.lines
    (bar,) = [line for line in axes.lines if line.get_marker() == "|"]
    assert np.asarray(line.get_xydata()) == pytest.approx(np.array([[1.5, 3.6], [3, 2], [5, 1]]))
    (at,) = np.asarray(bar.get_xydata())
    assert at == pytest.approx([2, 3.6 - 1.6 / 3])  # in gigaFLOPs
    assert "at most 2 seeds" in plot.caption


def test_the_tables_of_a_page_say_what_the_runs_and_the_rows_do():
    runs = [
        line("AdamW", 1, s, 2.0 + s, seconds=5.0 + s, downstream={"blimp": 0.5 + 0.1 * s}, steps=7)
        for s in range(3)
    ]
    trial = {**line("AdamW at 1", 1, 0, 2.5), "budget": "tuning"}
    (cells,) = page._runs_table([*runs, trial]).rows
    spent = f"{runs[0]['spent']:.4g}"
    assert cells == ["bert, 1x, AdamW", "3", "3.0000", "1.0000", "4.3281", spent, "7", "6"]
    (judged,) = page._downstream_table(runs)
    assert judged.rows == [["bert, 1x, AdamW", "3", "0.6000"]]
    (ledger,) = page._ledger([*runs, trial])
    assert ledger.rows == [["bert, AdamW at 1", "2.5000"]] and page._ledger(runs) == []
    where = {"workload": "bert", "budget": "1x", "seeds": 3, "interval": [-0.2, 0.1]}
    clock = {"cost": 0.5, "cost_to_reach": 0.25, "reached": [0.2, None, 0.3]}
    row = where | {"question": "mine against whole, so", "estimate": -0.1, "verdict": "lower"}
    row |= {"p_holm": 0.04, "cost_to_reach": 0.375, "clocks": {"here": clock}}
    fast = where | {"question": "speed-up", "estimate": 1.5, "naive": 2.5, "verdict": "undecided"}
    said, clocks, speeds = page._row_tables([row, fast])
    assert said.rows == [
        ["bert, 1x: mine against whole, so", "-0.1000", "-0.2000 to +0.1000"]
        + ["0.040", "0.38", "3", "lower"]
    ]
    assert clocks.rows == [["bert, 1x: mine against whole", "here", "0.50", "0.25", "2 of 3"]]
    assert speeds.rows == [["bert, 1x: speed-up", "1.50", "-0.20 to 0.10", "2.50", "3"]]


def test_ends_are_means_and_the_baseline_is_the_thick_line_with_the_ticks():
    runs = [
        line(arm, b, s, y + 0.2 * s)
        for arm, ends in {"lion": {2: 3.0, 8: 2.0}, "AdamW": {1: 3.1, 4: 2.4}}.items()
        for b, y in ends.items()
        for s in range(2)
    ]
    (plot,) = page._frontier_plot("bert", runs, ntng.STUDY, {"AdamW": look(0), "lion": look(1)})
    (axes,) = plot.figure.axes
    drawn = {line.get_label(): line for line in axes.lines}
    one = runs[-1]["spent"] / 4
    wanted = {"lion": [[2 * one, 3.1], [8 * one, 2.1]], "AdamW": [[one, 3.2], [4 * one, 2.5]]}
    for arm, ends in wanted.items():
        assert np.asarray(drawn[arm].get_xydata()) == pytest.approx(np.array(ends))
    assert drawn["AdamW"].get_linewidth() > 2 * drawn["lion"].get_linewidth()
    assert list(axes.get_xticks()) == pytest.approx([one, 4 * one])
    assert axes.get_xlabel() == "reference seconds"


def test_pictures_of_a_workload_are_its_smallest_budget_and_the_ends_of_all(tmp_path):
    runs = [line(arm, budget, 0, budget / 4) for budget in (16, 2) for arm in ("AdamW", "lion")]
    runs += [{**line("AdamW", 1, 0, 3.0), "workload": "t5"}]
    runs = [{"steps": 1, "stages": []} | r for r in runs]
    page.write_report(tmp_path / "report.html", ntng.STUDY, runs, [])
    pictures = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert pictures.keys() == {"bert-loss.svg", "bert-ends.svg", "t5-loss.svg"}
    assert "lion  0.500" in pictures["bert-loss.svg"] and "AdamW  3.000" in pictures["t5-loss.svg"]
    assert "at the end" in pictures["bert-ends.svg"]
    assert all("fill: #ffffff" in picture for picture in pictures.values())  # no page is behind it
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
