"""The study of the frontier: its ledger, its trees of plans, and what its lines are turned into."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import study
from experiments.frontier.analysis import (
    Index,
    Parabola,
    chosen,
    family_share,
    first_below,
    forecasts,
    retention,
    rho,
)
from experiments.frontier.calibration import Calibration
from experiments.frontier.design import (
    DECAY,
    DESIGNS,
    WORKLOAD,
    Design,
    Growing,
    Setting,
    Shape,
    fixed_name,
    pilot_name,
)
from experiments.frontier.report import page
from experiments.frontier.run import run
from experiments.frontier.summary import PRIMARY, summarise
from experiments.frontier.tree import Member, Shared, budget_name, members, pilots
from experiments.frontier.tuning import losses_of, neighbours, search, settled, trial_name
from experiments.study import Line, read
from experiments.text import Texts
from experiments.windows import WindowFile
from growjax.data import ByteTokenizer, Corpus
from growjax.errors import DataError
from growjax.report.rows import AgainstFrontier, Answer, read_summary, select
from tests.runs import TEXT
from tests.test_experiments_claims import as_committed, claims_in, is_of


SMALL = DESIGNS["small"]
SHAPE = SMALL.shapes[0]


# The ledger ---------------------------------------------------------------------------------------


def trial(shape: Shape, setting: Setting, score: float | None) -> Line:
    return {
        "workload": WORKLOAD,
        "budget": "tuning",
        "arm": trial_name(shape, setting),
        "seed": SMALL.tuning_seed,
        "score": score,
        "text": "numbers",
    }


def bowl(setting: Setting, rate: float, batch: float, warmup: float) -> float:
    """A loss with one lowest setting; rates above 0.1 diverge."""
    away = (setting.rate / rate, setting.batch / batch, setting.warmup / warmup)
    return math.inf if setting.rate > 0.1 else 2 + sum(math.log2(x) ** 2 for x in away)


@pytest.mark.parametrize("lowest", [(0.003, 16, 0.1), (0.048, 4, 0.1), (0.0007, 64, 0.05)])
def test_a_search_ends_where_every_neighbour_is_higher(lowest):
    losses: dict[str, float] = {}
    for _ in range(100):
        best, missing = search(SMALL, SHAPE, losses)
        if missing is None:
            break
        losses[trial_name(SHAPE, missing)] = bowl(missing, *lowest)
    around = [bowl(setting, *lowest) for setting in neighbours(best)]
    assert missing is None and bowl(best, *lowest) <= min(around)
    assert all(0.5 < a / b < 2 for a, b in zip(dataclasses.astuple(best), lowest, strict=True))
    assert len(losses) < 40


def test_a_trial_that_diverged_turns_the_search_back():
    lines = [trial(SHAPE, SMALL.start, 2.0)]
    fast = next(neighbours(SMALL.start))
    assert search(SMALL, SHAPE, losses_of(lines)) == (SMALL.start, fast)
    lines.append(trial(SHAPE, fast, None))
    assert losses_of(lines)[trial_name(SHAPE, fast)] == math.inf
    best, missing = search(SMALL, SHAPE, losses_of(lines))
    assert best == SMALL.start and missing is not None and missing.rate < best.rate
    assert settled(SMALL, lines) == {}


def test_a_setting_at_a_bound_is_bracketed_on_the_other_side_alone():
    edge = Setting(0.003, 2, 0.4)
    assert {(n.batch, n.warmup) for n in neighbours(edge)} == {(2, 0.4), (4, 0.4), (2, 0.2)}


# Trees --------------------------------------------------------------------------------------------


TINY = Design(
    "smoke",
    shapes=(Shape(1, 8), Shape(2, 8)),
    head_dim=8,
    vocab=384,
    length=8,
    unit=2e6,
    growings=(Growing("stack", Shape(1, 8), Shape(2, 8)),),
    family=None,
    budgets=(2, 4, 8),
    times=(0.5,),
    pilots_at=(8,),
    held_out=16,
    seeds=(0,),
    fresh=(100,),
    least=0.0,
    windows=(8, 32),
    start=Setting(0.02, 4, 0.1),
)
TUNED = {TINY.shapes[0]: TINY.start, TINY.shapes[1]: dataclasses.replace(TINY.start, rate=0.01)}


def test_a_tree_trains_shared_steps_once():
    tree = members(TINY, TUNED, seed=0)
    forks = {str(m.branch.run): m.branch.plan.fork for m in tree}
    trunk = {m.budget: m.branch for m in tree if m.key[2] == fixed_name(TINY.shapes[0])}
    for short, long in (("2x", "4x"), ("4x", "8x")):
        fork = trunk[long].plan.fork
        assert fork is not None and fork.step is not None
        assert fork.run == str(trunk[short].run) and fork.step in trunk[short].save_at
        # Where the rate of the shorter one begins to fall
        assert abs(fork.step / trunk[short].plan.steps - (1 - DECAY)) < 0.1
    pilot = next(m for m in tree if m.piece == "pilots")
    fork = forks[str(pilot.branch.run)]
    assert fork is not None and fork.step == pilot.branch.plan.spans[1].start
    # From its growth on it has the rate of the large size
    step = pilot.branch.plan.spans[1].stage
    assert step.train.new == step.train.old == 0.5  # type: ignore[union-attr]


def test_the_pilots_of_the_study_end_at_the_cost_of_its_trunks():
    settings = dict.fromkeys(SMALL.shapes, SMALL.start)
    for growing, time, budget in pilots(SMALL)[:10:4]:
        plan = SMALL.grown(growing, time, budget, settings, 0)
        assert plan.cost / (budget * SMALL.unit) == pytest.approx(1, rel=2e-3)
        assert plan.spans[1].spent / plan.cost == pytest.approx(time, rel=2e-3)
    wanted = {shape: SMALL.budgets_of(shape) for shape in SMALL.shapes}
    assert [len(budgets) for budgets in wanted.values()] == [4, 4, 4, 4, 3, 3]


@pytest.mark.slow
def test_a_tree_is_trained_and_goes_on_where_it_was_stopped(tmp_path):
    documents, tokenizer = TEXT.split(". "), ByteTokenizer()
    parts = [Corpus.of(part, tokenizer) for part in (documents[50:], documents[:50])]
    texts = Texts(parts[0], parts[0], parts[1], {}, "numbers")
    results = tmp_path / "smoke.jsonl"
    shared = Shared(TINY, texts, tmp_path / "runs", WindowFile(results))
    tree = members(TINY, TUNED, 0)
    pilot = next(m for m in tree if m.piece == "pilots")
    # The pilot first: what it forks from is trained without a line
    line = pilot.run(shared)
    assert line["growths"][0]["tokens"] == line["stage_tokens"][1] > 0
    assert [x for x, _ in line["curve"]] == sorted({x for x, _ in line["curve"]})
    assert line["curve"][0][0] < line["stages"][0]["stop"] < line["curve"][-1][0] == line["spent"]
    whole = {m.key: m.run(shared) for m in tree}
    assert whole[pilot.key] == line
    alone = tmp_path / "alone"
    trunk = next(m for m in tree if m.budget == "8x" and m.piece == "trunks")
    plan = dataclasses.replace(trunk.branch.plan, fork=None)
    lone = Member(trunk.piece, "8x", trunk.branch._replace(plan=plan), trunk.shapes, trunk.tuned)
    again = dataclasses.replace(shared, runs=alone)
    assert lone.run(again)["score"] == whole[trunk.key]["score"]
    moved = {**TUNED, TINY.shapes[0]: Setting(0.04, 4, 0.1)}
    study.run([trunk], shared, results)
    with pytest.raises(DataError, match=r"1x8 is rate 0\.02"):
        study.run(members(TINY, moved, 0), shared, results)
    assert len(read(results)) == 1


# Lines --------------------------------------------------------------------------------------------

# A loss falls by this for each doubling of tokens
SLOPE = 0.05


def at_peak(shape: Shape, tokens: float) -> float:
    """The loss of a made-up size at its peak rate: larger ones begin higher and never lower."""
    return 3.4 + 0.02 * SMALL.shapes.index(shape) - SLOPE * math.log2(tokens / 1e6)


def at_end(shape: Shape, tokens: float) -> float:
    return at_peak(shape, tokens) - 0.1


def run_line(arm: str, budget: float, seed: int, score: float, tokens: float, **more: Any) -> Line:
    spent = budget * SMALL.unit
    return {
        "workload": WORKLOAD,
        "budget": budget_name(budget),
        "arm": arm,
        "seed": seed,
        "piece": "trunks",
        "fixed": arm.startswith("fixed"),
        "free": False,
        "clock": "FLOPs",
        "unit": "FLOPs",
        "spent": spent,
        "score": score,
        "decayed": True,
        "curve": [],
        "tokens": tokens,
        "flops": spent,
        "seconds": 1.0,
        "parameters": 1000 + len(arm),
        "stages": [{"label": "", "start": 0.0, "stop": spent}],
        "text": "numbers",
        **more,
    }


def fixed_line(shape: Shape, budget: float, seed: int) -> Line:
    tokens = SMALL.tokens(shape, budget)
    spent = budget * SMALL.unit
    shares = np.linspace(0.02, 1 - DECAY, 30)
    curve = [[share * spent, at_peak(shape, share * tokens)] for share in shares]
    score = at_end(shape, tokens) + 0.01 * seed
    more = {"curve": curve, "stage_tokens": [0]}
    return run_line(fixed_name(shape), budget, seed, score, tokens, **more)


def fixed_lines(seeds=(0, 1, 2)) -> list[Line]:
    return [
        fixed_line(shape, budget, seed)
        for shape in SMALL.shapes
        for budget in SMALL.budgets_of(shape)
        for seed in seeds
    ]


GROWING = SMALL.growings[0]  # stack 2x64 to 4x64


def pilot_line(share: float, seed: int = 0, budget: int = 8, time: float = 0.6) -> Line:
    """A pilot that keeps a share of its tokens, and recovers in a twentieth of those after its growth."""
    small, large = GROWING.small, GROWING.large
    before = time * SMALL.tokens(small, budget)
    after = (1 - time) * SMALL.tokens(large, budget)
    loss = at_peak(small, before)
    fresh = 2 ** (-(loss - at_peak(large, 1e6)) / SLOPE) * 1e6
    counted = fresh + share * (before - fresh)
    score = at_end(large, counted + 0.95 * after) + 0.01 * seed
    spent = budget * SMALL.unit
    start, rest = time * spent, (1 - time) * spent
    stages = [
        {"label": "", "start": 0.0, "stop": start},
        {"label": "", "start": start, "stop": spent},
    ]
    more = {
        "piece": "pilots",
        "curve": [
            [start + 0.02 * rest, loss + 1],
            [start + 0.05 * rest, loss - 1e-9],
            [spent, score],
        ],
        "stages": stages,
        "stage_tokens": [0, before],
    }
    return run_line(pilot_name(GROWING, time), budget, seed, score, before + after, **more)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_token_retention_is_what_the_lines_were_made_with(share):
    index = Index([*fixed_lines((0,)), pilot_line(share)])
    measured = retention(SMALL, index, GROWING, 0.6, 8, 0)
    assert measured is not None and not measured.reason
    assert rho([measured]) == pytest.approx(share, abs=1e-2)
    net = rho([measured], net=True)
    after = 0.4 * SMALL.tokens(GROWING.large, 8)
    assert net is not None and measured.span is not None
    assert share - net == pytest.approx(0.05 * after / measured.span, abs=1e-2)


def test_there_is_no_retention_without_recovery_or_trunks():
    line = pilot_line(0.5)
    line["curve"] = [
        [x, y + (0.5 if x > line["stages"][1]["start"] else 0)] for x, y in line["curve"]
    ]
    lost = retention(SMALL, Index([*fixed_lines((0,)), line]), GROWING, 0.6, 8, 0)
    assert lost is not None and lost.kept is None and "come back" in lost.reason
    assert rho([lost]) is None and rho([]) is None
    assert retention(SMALL, Index([pilot_line(0.5)]), GROWING, 0.6, 8, 0) is None


def test_a_parabola_finds_its_falling_branch():
    fit = Parabola.through([(x, 2 + (math.log(x) - 3) ** 2) for x in (1.0, 4.0, 10.0)])
    assert fit is not None and fit.where(3) == pytest.approx(math.exp(2))
    assert fit.where(2 + 5**2) is None  # further than twice outside of its points
    assert fit.where(1.9) is None and Parabola.through([(1.0, 2.0), (2.0, 1.0)]) is None
    assert first_below([(1.0, 3.0), (4.0, 1.0)], 2.0) == pytest.approx(2.0)
    assert first_below([(1.0, 3.0), (4.0, 2.5)], 2.0) is None


def test_a_family_costs_its_trunk_as_a_share_of_three_runs():
    assert SMALL.family is not None
    lines = fixed_lines((0,))
    for member, budget in (("M", 16), ("L", 32)):
        shape = SMALL.family["SML".index(member)]
        # As good as the fixed size at half of the cost
        score = at_end(shape, SMALL.tokens(shape, budget / 2))
        lines.append(run_line(f"family, {member}", budget, 0, score, 1.0, fixed=False))
    share = family_share(SMALL, Index(lines), 0)
    assert share == pytest.approx((32 + 0.2 * (8 + 16)) / (8 + 8 + 16), rel=1e-3)
    assert family_share(SMALL, Index(lines[:-1]), 0) is None


def pilot_lines(gain: float) -> list[Line]:
    """Every pilot: the first growth is `gain` below the size that it grows into, others 0.1 above."""
    lines = []
    for growing, time, budget in pilots(SMALL):
        for seed in SMALL.seeds:
            tokens = SMALL.tokens(growing.large, budget)
            gap = -gain if growing == GROWING and time == 0.6 else 0.1
            score = at_end(growing.large, tokens) + 0.01 * seed + gap
            spent = budget * SMALL.unit
            parts = [(0.0, time * spent), (time * spent, spent)]
            stages = [{"label": "", "start": a, "stop": b} for a, b in parts]
            tokens_before = time * SMALL.tokens(growing.small, budget)
            more = {"piece": "pilots", "stages": stages, "stage_tokens": [0, tokens_before]}
            lines.append(run_line(pilot_name(growing, time), budget, seed, score, tokens, **more))
    return lines


def test_the_held_out_arms_are_the_best_forecasts_once_all_runs_are_there():
    fixed, grown = fixed_lines(), pilot_lines(0.02)
    assert chosen(SMALL, Index(fixed)) is None
    assert chosen(SMALL, Index([*fixed, *grown[:-1]])) is None
    picked = chosen(SMALL, Index([*fixed, *grown]))
    assert picked is not None
    # The smallest size is forecast best here, so that its neighbours are the two next ones
    assert [f.arm for f in picked] == [*map(fixed_name, SMALL.shapes[:3]), pilot_name(GROWING, 0.6)]
    tokens = SMALL.tokens(SHAPE, SMALL.held_out)
    assert picked[0].values[0] == pytest.approx(at_end(SHAPE, tokens), abs=1e-6)
    assert picked[3].loss == pytest.approx(
        at_end(GROWING.large, SMALL.tokens(GROWING.large, 64)) + 0.01 - 0.02, abs=1e-6
    )
    interval = picked[0].interval(8)
    assert interval is not None and interval[0] < picked[0].loss < interval[1]
    assert len(forecasts(SMALL, Index(fixed))) == len(SMALL.shapes)


def test_held_out_runs_are_of_the_seeds_that_are_asked_for(tmp_path, monkeypatch):
    """So that several processes share them, and no tree is ever born of a fresh seed."""
    done: list[Any] = []
    monkeypatch.setattr(study, "run", lambda cells, *_: done.extend(c.key for c in cells))
    monkeypatch.setattr("experiments.frontier.run.load_texts", lambda *_: None)
    monkeypatch.setattr("experiments.frontier.run.report", lambda *_: [])
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    ledger = [
        trial(s, x, 2.0) for s in SMALL.shapes for x in (SMALL.start, *neighbours(SMALL.start))
    ]
    lines = [*ledger, *fixed_lines(), *pilot_lines(0.02)]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("small", out=tmp_path, piece=("trunks", "held-out"), seed=(103, 101))
    assert [key[3] for key in done] == 4 * [101] + 4 * [103]
    assert {key[1] for key in done} == {"64x"}
    with pytest.raises(SystemExit, match=r"expected some of \[0, 1, 2\] or .* got \[99\]"):
        run("small", out=tmp_path, seed=(0, 99))


@pytest.mark.parametrize("gain, message", [(0.3, "yes"), (-0.3, "no"), (None, "not run yet")])
def test_the_primary_question_is_answered_on_fresh_seeds(tmp_path, gain, message, monkeypatch):
    monkeypatch.setattr(
        "experiments.frontier.summary.calibration", lambda *_: Calibration([], [], [])
    )
    lines = [*fixed_lines(), *pilot_lines(0.02)]
    rng = np.random.default_rng(0)
    file = WindowFile(tmp_path / "small.jsonl")
    picked = chosen(SMALL, Index(lines))
    assert picked is not None
    for forecast in picked if gain is not None else ():
        for seed in SMALL.fresh:
            below = (
                float(gain or 0)
                if forecast.growing is not None
                else 0.1 * (forecast.arm == "fixed-4x32")
            )
            score = 1.5 - below + 0.01 * rng.normal()
            lines.append(
                run_line(forecast.arm, 64, seed, score, 1.0, piece="held-out", stage_tokens=[0])
            )
            pairs = np.stack([score * np.full(16, 64.0), np.full(16, 64.0)], axis=1)
            file.write((WORKLOAD, "64x", forecast.arm, seed), score, pairs, "same")
    rows = summarise(tmp_path / "small.jsonl", lines)
    (row,) = (row for row in select(rows, Answer) if row.question == PRIMARY)
    assert row.verdict.startswith(message)
    if gain is not None:
        # Against the fixed size that ends lowest, whatever was forecast
        assert "minus fixed-4x32" in row.verdict and row.seeds == 8
        assert row.estimate is not None
        assert abs(row.estimate - (0.1 - gain)) < 0.02
    shown = page(tmp_path / "small.jsonl", lines, rows)
    assert message in shown.answer[0].lower() and "ends" in shown.pictures


def test_the_page_says_whether_a_larger_size_is_missing(monkeypatch):
    monkeypatch.setattr(
        "experiments.frontier.summary.calibration", lambda *_: Calibration([], [], [])
    )
    lines, path = [*fixed_lines(), *pilot_lines(0.02)], Path("nowhere/small.jsonl")
    largest = max(SMALL.shapes, key=SMALL.parameters)
    missing = f"The largest size, {largest}, is forecast best, so that a larger one is missing."
    said = []
    for below in (-1.0, 1.0):
        moved = [
            line | {"score": line["score"] + below} if line["arm"] == fixed_name(largest) else line
            for line in lines
        ]
        said.append(missing in page(path, moved, summarise(path, moved)).answer)
    assert said == [True, False]


def test_a_summary_of_no_lines_says_that_nothing_was_run():
    rows = summarise(Path("nowhere/small.jsonl"), [])
    (row,) = (row for row in rows if row.question == PRIMARY)
    assert row.estimate is None and row.verdict == "not run yet"
    shown = page(Path("nowhere/small.jsonl"), [], rows)
    assert "trunks: 0 of 66" in shown.answer[1] and "pilots: 0 of 60" in shown.answer[1]


# What is committed --------------------------------------------------------------------------------

FOLDER = Path(__file__).parents[1] / "experiments" / "frontier"
RESULTS = FOLDER / "results" / "small.jsonl"


def test_the_committed_summary_is_that_of_the_committed_lines():
    committed = read_summary(FOLDER / "results" / "summary.json")
    assert as_committed(summarise(RESULTS, read(RESULTS)), committed)


def test_the_readme_says_what_is_there():
    lines, rows = read(RESULTS), read_summary(FOLDER / "results" / "summary.json")
    text = " ".join((FOLDER / "README.md").read_text().split())
    for sentence in page(RESULTS, lines, rows).answer:
        assert sentence in text
    # Each size of the ledger with its best setting so far, as a row of the table
    for row in select(rows, Answer):
        if row.question.startswith("setting of"):
            setting, _, state = row.verdict.partition(": ")
            size = row.question.removeprefix("setting of fixed-")
            assert f"| {size} | {setting} | {row.estimate:.3f} | {state} |" in text
    claims = claims_in(text.partition("## What was seen")[2])
    assert not [claim for claim in claims if not is_of(claim, rows)]


def test_the_tables_of_the_readme_have_the_ends_that_are_there():
    rows = read_summary(FOLDER / "results" / "summary.json")
    lines = (FOLDER / "README.md").read_text().partition("## What was seen")[2].splitlines()
    (header,) = [line for line in lines if line.startswith("| size | 2x")]
    budgets = header.strip("| ").split(" | ")[1:]
    ends = {}
    for row in select(rows, Answer):
        head, _, rest = row.question.partition("held-out nats of fixed-")
        if not head and row.estimate is not None:
            ends[rest.removesuffix(" at its end"), row.budget] = row.estimate
    for size in dict.fromkeys(size for size, _ in ends):
        cells = [ends.get((size, budget)) for budget in budgets]
        lowest = [min(x for (_, b), x in ends.items() if b == budget) for budget in budgets]
        texts = ["" if x is None else f"{x:.3f}" for x in cells]
        bold = [
            f"**{t}**" if x == low else t for x, t, low in zip(cells, texts, lowest, strict=True)
        ]
        assert f"| {size} | {' | '.join(bold)} |" in lines
    grown = select(rows, AgainstFrontier)
    for row in grown:
        assert row.loss is not None and row.estimate is not None
        assert f"| {row.arm} | {row.budget} | {row.loss:.3f} | {row.estimate:+.3f} |" in lines
    worse = sum(row.estimate > 0 for row in grown if row.estimate is not None)
    count = (
        f"Of the {len(grown)} grown arms that ended so far, {worse} end above the best fixed size"
    )
    assert any(line.startswith(count) for line in lines)
