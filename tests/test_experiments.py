"""The studies at their smallest size: every arm runs, costs what it should, and is reported."""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import pytest

from experiments import page, study
from experiments.main import main
from experiments.msg import run as msg
from experiments.msg.run import released_order
from experiments.msg.search import choices, probe
from experiments.no_train_no_gain import run as ntng
from experiments.page import write_summary
from experiments.raptr import run as raptr
from experiments.study import Cell
from experiments.summary import on_clock, outcome, summarise, whole_arms
from experiments.text import BETWEEN, Texts, load_texts
from growjax.budget import A100_T5, RTX3090_BERT, FlopsClock, MeasuredClock, Op, save_clock
from growjax.data import MLM, ByteTokenizer, Corpus
from growjax.errors import BudgetError, DataError
from growjax.models import BERTConfig
from growjax.train import load_plan, save_plan
from growjax.train.plan import build
from tests.runs import TEXT


STUDIES = {
    "raptr": (raptr, ("bert", "ul2")),
    "msg": (msg, ("bert", "gpt")),
    "no_train_no_gain": (ntng, ("bert", "t5")),
}
# What the tests train; the others are worked out, and their programs are the same
ARMS = {
    ("raptr", "ul2"): {"full", "raptr", "full at equal FLOPs", "constant p"},
    ("msg", "bert"): {"scratch", "control", "msg"},
    ("no_train_no_gain", "bert"): {"AdamW", "stacking", "RHO", "sophia"},
}


@pytest.fixture(scope="module")
def texts() -> Texts:
    documents, tokenizer = TEXT.split(". "), ByteTokenizer()
    parts = documents[100:], documents[50:100], documents[:50]
    training, proxy, valid = (Corpus.of(part, tokenizer) for part in parts)
    return Texts(training, proxy, valid, {"same": valid}, "numbers")


@functools.cache
def cells(name: str, size: str, workload: str, seed: int = 0) -> dict[str, Cell]:
    """The cells of the smallest budget: working out those of the others takes as long again."""
    found = STUDIES[name][0].cells(size, workload, seed)
    first = itertools.takewhile(lambda cell: cell.budget == "1x", found)
    return {cell.plan.name: cell for cell in first}


@pytest.mark.parametrize("name, workload", ARMS)
def test_a_study_runs_in_pieces_and_is_reported(name, workload, texts, tmp_path):
    about = STUDIES[name][0].STUDY
    wanted = [
        c for c in cells(name, "smoke", workload).values() if c.plan.name in ARMS[name, workload]
    ]
    out = tmp_path / "smoke.jsonl"
    judge = {"blimp": 0.5}
    study.run(wanted[:1], texts, out, judge=lambda model: judge)
    study.run(wanted, texts, out, judge=lambda model: judge)
    with out.open("a") as file:
        file.write('{"workload": "cut of')  # killed while it wrote
    rows = study.read(out)
    assert [study.key_of(r) for r in rows] == [c.key for c in wanted]
    by_arm = {r["arm"]: r for r in rows}
    for cell in wanted:
        row = by_arm[cell.plan.name]
        assert row["score"] == row["curve"][-1][1] and row["decayed"]
        assert row["spent"] == pytest.approx(cell.plan.cost / cell.plan.clock.per_unit)
        assert row["texts"]["same"] > 0 and row["downstream"] == judge
        looks = list(row.get("midway", {}).values()) + [row] * bool(cell.midway)
        assert len(looks) == len(cell.midway) + bool(cell.midway)
        assert len({tuple(x["by_length"]["4"]) for x in looks}) == len(looks)
        assert row["stages"][-1]["stop"] == pytest.approx(row["spent"])
        assert sum(n for *_, n in row["operations"]) >= row["steps"]
        assert on_clock(row, FlopsClock()) == pytest.approx(row["flops"])
    ops = dict.fromkeys(Op(*op) for r in rows for *op, _ in r["operations"])
    clock = MeasuredClock("here", tuple((op, 10**9) for op in ops))
    save_clock(clock, tmp_path / "clock.json")
    summary = write_summary(out, about)
    for row in (r for r in summary if "reached" in r):
        assert row["clocks"][clock.identity]["cost"] == pytest.approx(
            by_arm[row["question"].partition(" against ")[0]]["steps"]
            / by_arm[about.target]["steps"]
        )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    page = (tmp_path / "report.html").read_text()
    assert all(arm in page for arm in by_arm)
    assert all(f"{share:g} of the cost" in page for cell in wanted for share in cell.midway)
    command = (
        f"python -m experiments.{name}.run --size smoke --text numbers --also same=same --data DATA"
    )
    assert {r["command"] for r in summary} == {command}
    # One seed decides nothing
    equal = [r for r in summary if "p_holm" in r]
    assert equal and {r["verdict"] for r in equal} == {"undecided"}
    assert {r["question"].split(": ")[1].split(",")[0] for r in equal} == {
        "held-out nats",
        "same",
        "blimp",
    }
    for row in equal:
        arm = row["question"].split(" against ")[0]
        gap = {r["arm"]: r["score"] for r in rows}
        if "held-out" in row["question"]:
            assert row["estimate"] == pytest.approx(gap[arm] - gap[about.baseline])
        elif "blimp" in row["question"]:
            assert row["estimate"] == 0


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", ["smoke", "small"])
def test_arms_that_are_compared_cost_the_same(name, size):
    module, (workload, _) = STUDIES[name]
    found = cells(name, size, workload)
    base = found[module.STUDY.baseline].plan
    for key, cell in found.items():
        if key in (module.STUDY.target, "raptr proportional", "raptr, full first"):
            continue
        step = max(max(span.costs) for span in cell.plan.spans)
        assert abs(cell.plan.cost - base.cost) <= max(step, 0.03 * base.cost), key
        assert (cell.clock or cell.plan.clock).identity == base.clock.identity


@pytest.mark.parametrize("name", STUDIES)
def test_seeds_differ_in_nothing_but_the_seed(name):
    workload = STUDIES[name][1][1]
    one, two = (cells(name, "smoke", workload, seed) for seed in (0, 1))
    for key, cell in one.items():
        other = two[key].plan
        assert dataclasses.replace(other, seed=0) == cell.plan or "scale" in key


@pytest.mark.parametrize("name", STUDIES)
def test_every_plan_survives_the_trip_through_json(name, tmp_path):
    for cell in cells(name, "smoke", STUDIES[name][1][1]).values():
        save_plan(cell.plan, tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == cell.plan


def test_raptr_saves_a_quarter_of_its_blocks():
    """Paths of 6, 8, 10 and 12 of 12 layers: four thirds of the whole model's block FLOPs saved."""
    arms = itertools.islice(raptr.cells("small", "bert", 0), 2)
    whole, plan = (cell.plan for cell in arms)
    assert (whole.name, plan.name) == ("full", "raptr")
    assert plan.steps == whole.steps
    lengths = [s.path.length for s in plan.stages[0].subnet.stages]  # type: ignore
    assert lengths == [6, 8, 10, 12]
    (span,) = plan.spans
    layers = {w.part.length: f for w, f in zip(span.works, span.flops, strict=True)}  # type: ignore
    block = (layers[12] - layers[6]) / 6
    outside = layers[12] - 12 * block
    rest = outside * plan.steps
    assert (whole.flops - rest) / (plan.flops - rest) == pytest.approx(4 / 3, rel=0.01)


def test_losses_along_shorter_paths_are_looked_at_in_every_stage_of_raptr(texts):
    """And of a stack that grows, at the depth that it has by then."""
    cell = cells("raptr", "smoke", "bert")["raptr"]
    cuts = [stage["start"] / cell.plan.cost for stage in study._stages(cell.plan)]
    assert [sum(cut < share for cut in cuts) for share in (*cell.midway, 1.0)] == [1, 2, 3, 4]
    small = build(dataclasses.replace(cell.plan.model, layers=2), jax.random.key(0))
    assert cell.after and list(cell.after(cell.plan, small, texts)["by_length"]) == ["2"]


def test_msg_grows_in_the_released_order():
    for workload in ("bert", "gpt"):
        plan = cells("msg", "smoke", workload)["msg"].plan
        sizes = [span.sizes for span in plan.spans]
        changed = [[axis for axis in a if a[axis] != b[axis]] for a, b in itertools.pairwise(sizes)]
        heads = [["kv_heads"], ["heads"]]
        assert changed[:3] == [["mlp"], ["layers"], ["embed"]] and changed[4] == ["layers"]
        assert changed[3] in heads
        scratch = cells("msg", "smoke", workload)["scratch"].plan
        assert sizes[-1] == scratch.spans[0].sizes
        assert all(span.stage.ramp for span in plan.spans[1:])


def test_the_bert_of_msg_is_post_norm_as_published_but_for_the_small_one():
    for size, post_norm, predicted in (("paper", True, MLM(128)), ("small", False, MLM(18, 0.3))):
        s = msg.SIZES[size]["bert"]
        config = msg.model("bert", s, -1)
        assert isinstance(config, BERTConfig) and config.post_norm == post_norm
        assert config.embedding_norm == (not post_norm)
        assert msg.objective_of("bert", s) == predicted


def test_arms_of_msg_that_do_not_grow_have_the_rate_that_suits_them():
    peaks = {arm: cell.plan.rate.peak for arm, cell in cells("msg", "small", "bert").items()}
    assert peaks.pop("scratch") == peaks.pop("control") == 1.5e-3
    assert set(peaks.values()) == {3e-3}


@pytest.mark.parametrize("name, whole", [("msg", "scratch"), ("raptr", "full")])
def test_a_longer_budget_takes_as_many_times_the_steps(name, whole, monkeypatch):
    monkeypatch.setitem(STUDIES[name][0].BUDGETS, "smoke", (1, 4))
    found = {(c.budget, c.plan.name): c.plan for c in STUDIES[name][0].cells("smoke", "bert", 0)}
    arms = {arm for _, arm in found}
    assert found.keys() == {(budget, arm) for budget in ("1x", "4x") for arm in arms}
    for arm in (whole, name):
        assert found["4x", arm].steps == 4 * found["1x", arm].steps
        assert len(found["4x", arm].stages) == len(found["1x", arm].stages)


def test_a_search_tries_the_next_growth_of_every_dimension_at_the_same_cost():
    left = released_order(msg.SIZES["smoke"]["gpt"])
    assert sorted(choices(left)) == [("embed", 16), ("heads", 2), ("layers", 2), ("mlp", 32)]
    assert ("layers", 4) in choices([x for x in left if x != ("layers", 2)])
    plans = [
        probe("smoke", "gpt", 0, [("mlp", 32)], c, 4) for c in (("layers", 2), ("heads", 2), None)
    ]
    step = max(max(span.costs) for plan in plans for span in plan.spans)
    assert max(p.cost for p in plans) - min(p.cost for p in plans) <= 3 * step
    assert [p.spans[-1].sizes["layers"] for p in plans] == [2, 1, 1]
    assert [len(p.spans) for p in plans] == [3, 3, 2] and all(p.rate.decayed for p in plans)


def test_no_train_no_gain_charges_the_papers_clock():
    found = cells("no_train_no_gain", "small", "bert")
    plan, stacking = found["AdamW"].plan, found["stacking"].plan
    steps = ntng.SIZES["small"]["bert"].steps
    assert plan.clock == RTX3090_BERT and plan.steps == steps
    shares = [sum(span.costs) / stacking.cost for span in stacking.spans]
    assert shares == pytest.approx([0.125, 0.175, 0.7], abs=0.02)
    free, paid = (found[n].plan for n in ("RHO, free", "RHO"))
    assert free.steps == plan.steps and paid.steps == pytest.approx(plan.steps / 1.824, abs=1)
    for times in (2, 4):
        more = next(ntng.arms("small", "bert", 0, times, ntng.RATES["small"]["bert"]))
        assert more.plan.steps == steps * times and more.budget == f"{times}x"
    trial = list(ntng.trials("smoke", "bert", 0))
    lion = [c.plan for c in trial if c.plan.name.startswith("lion")]
    assert [p.rate.peak for p in lion] == [0.0005, 0.001, 0.002, 0.004] and len(trial) == 4 * 7
    assert lion[0].name == "lion at 0.0005"
    assert {c.budget for c in trial} == {"tuning"} and trial[0].plan.seed == 1000


def test_the_crammed_bert_is_that_of_the_paper_but_for_what_a_small_one_predicts():
    for size, objective in [
        ("paper", MLM(128, 0.15, frame=False)),
        ("small", MLM(16, 0.3, frame=False)),
    ]:
        # The first alone: working out the others of the paper's size takes minutes
        plan = next(ntng.cells(size, "bert", 0)).plan
        assert plan.name == "AdamW" and plan.objective == objective
        config = plan.model
        assert isinstance(config, BERTConfig) and config.embedding_norm and config.glu
        assert not (config.post_norm or config.bias or config.pooler or config.nsp_head)


@pytest.mark.parametrize("size, objective", [("paper", MLM(512, 0.15)), ("small", MLM(18, 0.3))])
def test_the_bert_of_raptr_is_pre_norm_and_keeps_berts_norm_on_its_embeddings(size, objective):
    plan = next(iter(raptr.cells(size, "bert", 0))).plan
    assert plan.objective == objective
    config = plan.model
    assert isinstance(config, BERTConfig) and config.embedding_norm and not config.post_norm


@pytest.mark.parametrize("name", STUDIES)
def test_paper_presets_can_be_planned(name):
    for workload in STUDIES[name][1]:
        first = next(iter(STUDIES[name][0].cells("paper", workload, 0)))
        assert jax.tree.leaves(first.plan.spans[0].model) and first.plan.steps > 1000


def test_plans_are_written_with_those_of_second_models(tmp_path, monkeypatch):
    command = ["run", "--size", "smoke", "--workload", "bert", "--plans", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    main(ntng.STUDY, ntng.cells, ntng.SEEDS, ("bert", "t5"))
    wanted = cells("no_train_no_gain", "smoke", "bert")
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"bert-1x-{name.replace(' ', '_')}.json" for name in wanted),
        *(
            f"bert-1x-{n.replace(' ', '_')}.reference.json"
            for n, c in wanted.items()
            if c.reference
        ),
    }
    rho = wanted["RHO"]
    assert load_plan(tmp_path / "bert-1x-RHO.json") == rho.plan
    assert load_plan(tmp_path / "bert-1x-RHO.reference.json") == rho.reference


# Rows out of made-up lines -----------------------------------------------------------------------


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


def test_an_arm_looks_the_same_in_every_figure_and_like_no_other(monkeypatch, tmp_path):
    """And the legend has them in the order of their ends, from the top."""
    arms = [f"arm {n}" for n in range(18)]
    first = [line(arm, 1, 0, 3.0 - 0.1 * (n % 5)) for n, arm in enumerate(arms)]
    second = [line(arm, 2, 0, 2.0 - 0.1 * (n % 3)) for n, arm in enumerate(arms[::-2])]
    runs = [{"steps": 1, "stages": []} | r for r in [*first, *second]]
    plots: list[Any] = []
    monkeypatch.setattr(page, "write_page", lambda path, name, found, *_: plots.extend(found))
    page.write_report(tmp_path / "report.html", ntng.STUDY, runs, [])
    assert [plot.title.partition(":")[0] for plot in plots] == ["bert, 1x", "bert, 2x", "bert"]
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
    assert {len(found) for found in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(arms)


def test_texts_share_no_document(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("train", "valid"):
        articles = [f"{name} article {n}, " + "word " * (n % 7 + 3) for n in range(60)]
        (folder / f"{name}.txt").write_text(BETWEEN.join(articles))
    found = load_texts(folder, tmp_path / "cache", {"more": folder / "valid.txt"})
    tokenizer = ByteTokenizer()

    def titles(corpus: Corpus) -> set[str]:
        ends = [*corpus.starts[1:].tolist(), len(corpus)]
        pairs = zip(corpus.starts.tolist(), ends, strict=True)
        return {tokenizer.decode(corpus.read(a, b)).split(",")[0] for a, b in pairs}

    parts = [titles(c) for c in (found.training, found.proxy, found.valid)]
    assert all(parts) and not parts[0] & parts[1] and len(parts[2]) == 60
    assert len(parts[0] | parts[1]) == 60 and len(found.others["more"]) == len(found.valid)
    with pytest.raises(DataError, match="expected valid.txt"):
        (folder / "valid.txt").unlink()
        load_texts(folder, tmp_path / "cache")
