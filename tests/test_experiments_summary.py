"""What the lines of a study say: its summary, its rows against the frontier, and other clocks."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import page, summary
from experiments.summary import _on_line, arms_of, cost_on, recharging
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
from growjax.errors import BudgetError, DataError
from growjax.report.rows import (
    AgainstFrontier,
    EqualCost,
    OwnCost,
    Ranking,
    SpeedUp,
    read_summary,
    select,
    write_summary,
)
from tests.lines import NTNG, line, study, summarise


def test_speed_ups_and_rankings_under_other_clocks():
    """A shallow arm gains where depth is dear and nothing where all steps cost the same."""
    base = {1: 3.0, 2: 2.8, 4: 2.6}
    runs = [line("AdamW", b, s, loss + 0.01 * s) for b, loss in base.items() for s in range(6)]
    runs += [line("shallow", 2, s, 2.79 + 0.01 * s, depth=4) for s in range(6)]
    runs += [line("dear", 2, s, 2.75 + 0.01 * s) for s in range(6)]
    runs += [line("behind", 2, s, 2.85 + 0.01 * s) for s in range(6)]
    runs += [line("either", 2, s, 2.77 + 0.01 * s + 0.1 * (s % 2)) for s in range(6)]
    about = dataclasses.replace(NTNG, clocks={"the A100, T5": A100_T5})
    rows = summarise(about, runs)
    pace = {row.arm: row for row in select(rows, SpeedUp)}
    fast = pace["shallow"]
    assert fast.question == "speed-up of shallow over all that was run of AdamW"
    cheaper = runs[6]["spent"] / runs[18]["spent"]
    assert fast.estimate == pytest.approx(2**0.05 * cheaper, rel=1e-3)
    assert fast.verdict == "faster" and fast.seeds == 6
    assert pace["behind"].verdict == "slower"
    assert pace["either"].verdict == "no difference found" and pace["either"].estimate != 1
    ranks = {(row.clock, row.budget): row for row in select(rows, Ranking)}
    flops, other = ranks["FLOPs", "2x"], ranks["the A100, T5", "2x"]
    assert flops.usual_order == ("shallow", "dear", "AdamW", "either", "behind")
    assert flops.order == ("dear", "shallow", "AdamW", "either", "behind")
    assert flops.estimate == 2 and flops.verdict == "changed"
    assert other.order == flops.usual_order and other.verdict == "unchanged"
    assert flops.left_out == other.left_out == ()
    # A clock ranks what it knows, and says what it does not; without the baseline it is silent
    ops = {depth: Op("train", depth, 16, 64, 1000) for depth in (4, 8)}
    some = {f"only {d}": MeasuredClock(f"{d}", ((op, 10**9),)) for d, op in ops.items()}
    rows = summarise(dataclasses.replace(NTNG, clocks=some), runs)
    ranks = {(row.clock, row.budget): row for row in select(rows, Ranking)}
    assert ("only 4", "2x") not in ranks
    deep = ranks["only 8", "2x"]
    assert deep.order == deep.usual_order == ("dear", "AdamW", "either", "behind")
    assert deep.left_out == ("shallow",)
    cells = [cell for table in page._last_tables(rows) for row in table.rows for cell in row]
    text = "dear, AdamW, either, behind (with operations that it does not know: shallow)"
    assert text in cells


def test_speed_ups_are_read_off_the_target_as_well():
    """It is the baseline for longer: here twice as long, at the same budget of the study."""
    runs = [line("AdamW", 1, s, 3.0 + 0.01 * s) for s in range(6)]
    runs += [line("mine", 1, s, 2.9 + 0.01 * s) for s in range(6)]
    about = dataclasses.replace(NTNG, target="whole")
    assert not select(summarise(about, runs), SpeedUp)
    runs += [line("whole", 2, s, 2.8 + 0.01 * s) | {"budget": "1x"} for s in range(6)]
    (row,) = select(summarise(about, runs), SpeedUp)
    assert (row.arm, row.baseline, row.budget) == ("mine", "AdamW", "1x")
    assert row.estimate == pytest.approx(2**0.5, rel=1e-3) and row.seeds == 6
    assert row.verdict == "faster"
    (one,) = select(summarise(about, [r for r in runs if r["seed"] == 0]), SpeedUp)
    assert one.estimate == pytest.approx(2**0.5, rel=1e-3) and one.verdict == "too few seeds"


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
    rows = summarise(NTNG, [*group, *runs("shallow", -1.0, depth=4)])
    by_arm = {(row.arm, row.measure): row for row in select(rows, EqualCost)}
    measures = {
        "held-out nats, lower is better": ("score", 1),
        "wiki, nats, lower is better": ("wiki", 1),
        "blimp, higher is better": ("blimp", -1),
    }
    assert by_arm.keys() == {(arm, m) for arm in ("mine", "level") for m in measures}
    for measure, (name, sign) in measures.items():
        outcomes = [
            dataclasses.replace(o, score=sign * o.score)
            for arm in arms_of(group, measure=name)
            for o in arm.outcomes
        ]
        values = {(o.arm, o.seed): sign * o.score for o in outcomes}
        for told in compare(outcomes, "AdamW"):
            row = by_arm[told.arm, measure]
            assert row.question == f"{told.arm} against AdamW at equal cost: {measure}"
            names = ("p", "p_t", "p_holm", "detectable", "margin", "verdict", "reason")
            assert {n: getattr(row, n) for n in names} == {n: getattr(told, n) for n in names}
            gaps = [values[told.arm, s] - values["AdamW", s] for s in range(6)]
            assert row.estimate == pytest.approx(np.mean(gaps))
            assert row.differences == pytest.approx(gaps)
            assert row.interval == pytest.approx(t_interval(gaps))
            assert row.bootstrap == pytest.approx(bca_interval(gaps), rel=0.05)
            assert row.bootstrap != row.interval
    better = [by_arm["mine", m] for m in measures]
    assert [r.verdict for r in better] == ["better", "worse", "better"]
    assert [(r.estimate or 0) > 0 for r in better] == [False, True, True]


def test_arms_are_paired_by_seed_whatever_the_order_of_their_lines():
    about = dataclasses.replace(NTNG, target="whole", clocks={})
    runs = [line("AdamW", 1, s, 3.0 + 0.1 * s) for s in range(6)]
    runs += [
        line("whole", 2, s, 2.0 + 0.1 * s, seconds=2.0 + s) | {"budget": "1x"} for s in range(6)
    ]
    mine = [line("mine", 1, s, 2.5 + 0.1 * s + 0.01 * s**2, seconds=1.0 + s) for s in range(6)]
    rows = summarise(about, [*runs, *mine])
    assert summarise(about, [*runs, *mine[::-1]]) == rows
    own = {row.arm: row for row in select(rows, OwnCost)}
    assert own["AdamW"].differences == pytest.approx([1.0] * 6)
    assert own["mine"].differences == pytest.approx([0.5 + 0.01 * s**2 for s in range(6)])
    assert own["mine"].seconds == pytest.approx(np.mean([(1 + s) / (2 + s) for s in range(6)]))


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
    about = dataclasses.replace(NTNG, baseline="none", target="whole", clocks={})
    rows = {row.arm: row for row in select(summarise(about, runs), OwnCost)}
    told = {arm: row.verdict for arm, row in rows.items()}
    verdicts = ("lower", "higher", "no difference found") if seeds == 6 else ("too few seeds",) * 3
    assert told == dict(zip(("below", "above", "level"), verdicts, strict=True))
    for row in rows.values():
        assert row.cost == row.flops == pytest.approx(2) and row.seconds == 0.25


def test_a_ranking_is_by_the_distance_from_the_baselines_line_in_the_logarithm():
    """Free variants have no place in it, and its first and last pieces go on."""
    line_of = [(0.0, 3.0), (1.0, 2.0), (2.0, 1.8)]
    heights = {-1.0: 4.0, 0.5: 2.5, 1.0: 2.0, 1.5: 1.9, 3.0: 1.6}
    assert {x: _on_line(line_of, x) for x in heights} == pytest.approx(heights)
    # The baseline falls by 1 for every doubling: between 1 and 2 it is at 2.5 by 2 ** 0.5
    base = [line("AdamW", b, s, y) for b, y in ((1, 3.0), (2, 2.0), (4, 1.0)) for s in range(2)]
    rivals = {"ahead": 2.47, "behind": 2.53, "mine, free": 1.0}
    half = [
        line(arm, 1, s, y, free="free" in arm) | {"operations": [["train", 8, 16, 64, 1000, 14]]}
        for arm, y in rivals.items()
        for s in range(2)
    ]
    half = [r | {"spent": cost_on(r, RTX3090_BERT)} for r in half]
    rows = summarise(dataclasses.replace(NTNG, clocks={}), [*base, *half])
    (rank,) = [row for row in select(rows, Ranking) if row.budget == "1x"]
    assert rank.order == rank.usual_order == ("ahead", "AdamW", "behind")


def test_what_one_seed_cannot_tell_is_null_and_not_nan(tmp_path):
    runs = [line(arm, 1, 0, 3.0) for arm in ("AdamW", "mine", "whole")]
    about = dataclasses.replace(NTNG, target="whole")
    rows = summarise(about, runs)
    assert len(rows) == 4 and all(row.interval is None for row in rows)
    write_summary(tmp_path / "summary.json", rows)
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert read_summary(tmp_path / "summary.json") == rows


def test_the_arm_that_a_study_is_about_is_compared_with_its_rivals():
    """In the held-out loss alone, and not with the baseline and the target again."""
    scores = {"AdamW": 3.0, "mine": 2.5, "rival": 2.6, "dear": 2.0}
    runs = [
        line(a, 1, s, x + 0.01 * s, downstream={"blimp": 0.5 + 0.01 * s})
        for a, x in scores.items()
        for s in range(6)
    ]
    about = dataclasses.replace(NTNG, method="mine", target="dear")
    equal = select(summarise(about, runs), EqualCost)
    (row,) = [row for row in equal if row.baseline == "mine"]
    assert row.arm == "rival" and row.verdict == "worse"
    assert row.estimate == pytest.approx(0.1)


def test_what_a_run_costs_is_counted_whole():
    """The same operation in two stages counts twice, and more FLOPs than 64 bits hold are no fewer."""
    op = Op("train", 8, 16, 64, 10**15)
    run = line("AdamW", 1, 0, 3.0) | {"operations": [[*op, 10_000], [*op, 20_000]]}
    assert cost_on(run, FlopsClock()) == 3e19
    (arm,) = arms_of([run])
    with pytest.raises(BudgetError, match="it was charged on"):
        recharging([run], A100_T5)(arm)


def test_a_run_is_charged_by_another_clock_along_its_operations(tmp_path):
    """Small steps first, which are dearer there than their FLOPs say; between them on a straight line."""
    small, large = Op("train", 2, 16, 64, 100), Op("train", 4, 16, 64, 300)
    clock = MeasuredClock("here", ((small, 10**9), (large, 2 * 10**9)))

    def run(arm: str, operations: list, curve: list) -> dict:
        return {
            **line(arm, 1, 0, curve[-1][1]),
            "operations": operations,
            "curve": curve,
            "clock": "FLOPs",
            "unit": "FLOPs",
            "spent": curve[-1][0],
        }

    grown = run("AdamW", [[*small, 10], [*large, 10]], [(500, 4.0), (2500, 3.0), (4000, 2.0)])
    whole = run("whole", [[*large, 20]], [(3000, 4.0), (6000, 3.0)])
    (arm,) = arms_of([grown])
    (charged,) = recharging([grown], clock)(arm).outcomes
    assert charged.curve == ((5.0, 4.0), (20.0, 3.0), (30.0, 2.0)) and charged.spent == 30.0
    about = dataclasses.replace(NTNG, target="whole", clocks={"here": clock})
    (row,) = select(summarise(about, [grown, whole]), OwnCost)
    assert row.cost == pytest.approx(4 / 6) and row.cost_to_reach == pytest.approx(2500 / 6000)
    assert row.clocks["here"] == {"cost": 0.75, "cost_to_reach": 0.5, "reached": (0.5,)}
    write_summary(tmp_path / "summary.json", [row])
    assert read_summary(tmp_path / "summary.json") == [row]
    # An operation that was never measured is a reason, and not a guess
    other = dataclasses.replace(about, clocks={"here": MeasuredClock("here", ((small, 10**9),))})
    (row,) = select(summarise(other, [grown, whole]), OwnCost)
    assert "never measured" in row.clocks["here"]["reason"]


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
    about = dataclasses.replace(NTNG, target="whole", clocks={"here": clock})
    speed = {row.clock: row for row in select(summarise(about, group), SpeedUp)}
    name = "speed-up of mine over all that was run of AdamW"
    assert {row.question for row in speed.values()} == {name, f"{name}, charged by here"}
    assert speed[""].estimate == pytest.approx(2**0.5)
    assert speed["here"].estimate == pytest.approx(2**0.5 * 20 / 30)
    # Of an arm that the clock does not know whole, nothing is said
    other = dataclasses.replace(about, clocks={"here": MeasuredClock("here", ((large, 10**9),))})
    assert [row.clock for row in select(summarise(other, group), SpeedUp)] == [""]


def test_an_arm_with_fewer_seeds_is_compared_over_those():
    runs = [line("AdamW", 1, s, 3.0 + 0.01 * s) for s in range(6)]
    runs += [line("few", 1, s, 2.0 + 0.01 * s) for s in (1, 3)]
    (row,) = summarise(NTNG, runs)
    assert row.seeds == 2 and row.estimate == pytest.approx(-1.0)
    assert row.verdict == "too few seeds"
    assert [arm.name for arm in summary._with_every_seed(arms_of(runs), "AdamW")] == ["AdamW"]


def test_runs_are_charged_by_the_clocks_of_the_study_and_by_those_in_its_folder(tmp_path):
    measured = [MeasuredClock(name, ((Op("train", 8, 16, 64, 1000), 1),)) for name in "ab"]
    for clock in measured:
        save_clock(clock, tmp_path / f"clock-{clock.name}.json")
    runs = [line("AdamW", b, s, 3.0 - 0.1 * b) for b in (1, 2) for s in range(6)]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    rows = study(NTNG).report(tmp_path / "small.jsonl")
    told = {row.clock for row in select(rows, Ranking)}
    published = {name for name, clock in NTNG.clocks.items() if clock != RTX3090_BERT}
    assert told == {"FLOPs"} | published | {clock.identity for clock in measured}
    command = "python -m experiments.no_train_no_gain.run --size small"
    assert {row.command for row in rows} == {command}


# The frontier ------------------------------------------------------------------------------------


def test_arms_are_held_against_the_best_fixed_size_that_costs_no_more():
    """At 1x the small one, and not the large; a free variant and what never grows have no row."""
    runs = [line("AdamW", b, s, y + 0.01 * s) for b, y in ((1, 3.0), (4, 2.0)) for s in range(6)]
    small = {"fixed": True, "parameters": 10}
    runs += [line("fixed-1x8", 1, s, 2.5 + 0.011 * s, **small) for s in range(6)]
    # With one seed it is left out, and is no size that was run
    runs += [line("fixed-1x8", 4, 0, 1.0, **small)]
    runs += [line("grown", b, s, y + 0.01 * s) for b, y in ((1, 2.6), (4, 1.9)) for s in range(6)]
    runs += [line("grown, free", 1, s, 2.0, free=True) for s in range(6)]
    rows = {row.budget: row for row in select(summarise(NTNG, runs), AgainstFrontier)}
    assert rows.keys() == {"1x", "4x"} and {row.arm for row in rows.values()} == {"grown"}
    first, last = rows["1x"], rows["4x"]
    assert first.baseline == "fixed-1x8, at its decayed end" and first.sizes == (10, 100)
    assert first.estimate == pytest.approx(0.0975) and first.verdict == "worse"
    assert last.baseline == "AdamW, at its decayed end" and last.sizes == (100,)
    assert last.estimate == pytest.approx(-0.1) and last.verdict == "better"
    # The frontier never had the second loss: the most that it was given is a bound
    assert last.bound == ">=" and last.speed_up == pytest.approx(1) and first.bound == "="
    assert first.speed_up < 1 and first.pace == "slower"
    # Of one size alone no frontier is made
    alone = [run for run in runs if not run["arm"].startswith("fixed")]
    assert not select(summarise(NTNG, alone), AgainstFrontier)


# Rows in a file ----------------------------------------------------------------------------------


def test_a_summary_is_read_as_it_was_written_and_refused_if_it_is_another(tmp_path):
    runs = [line("AdamW", b, s, 3.0 - 0.1 * b + 0.01 * s) for b in (1, 2) for s in range(6)]
    runs += [line("mine", 1, s, 2.5 + 0.011 * s, downstream={"blimp": 0.5}) for s in range(6)]
    runs += [line("fixed-1x8", 1, s, 2.0, fixed=True, parameters=10) for s in range(6)]
    runs += [line("whole", 4, s, 2.0 + 0.01 * s) | {"budget": "1x"} for s in range(6)]
    rows = summarise(dataclasses.replace(NTNG, target="whole"), runs)
    path = tmp_path / "summary.json"
    write_summary(path, rows)
    assert read_summary(path) == rows
    kinds = {"equal cost", "speed-up", "ranking", "against the frontier", "own cost"}
    assert {row.kind for row in rows} == kinds
    assert all(row.clocks for row in select(rows, OwnCost))
    path.write_text(json.dumps([{"kind": "guess", "question": "?"}]))
    with pytest.raises(DataError, match="row 0: kind: expected one of .*equal cost.* got 'guess'"):
        read_summary(path)
    path.write_text(json.dumps([{"kind": "ranking", "question": "?"}]))
    with pytest.raises(DataError, match="row 0, ranking: .*missing"):
        read_summary(path)
