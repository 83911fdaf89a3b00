"""The studies at their smallest size: every arm runs, costs what it should, and is reported."""

import dataclasses
import datetime
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import study, training
from experiments.bench._record import HEADING, recorded
from experiments.main import main
from experiments.msg import run as msg
from experiments.msg.run import released_order
from experiments.msg.search import choices, probe
from experiments.no_train_no_gain import run as ntng
from experiments.raptr import run as raptr
from experiments.summary import cost_on
from experiments.text import BETWEEN, Texts, load_texts
from experiments.training import Cell, Trainer
from experiments.windows import WindowFile
from growjax.budget import A100_T5, RTX3090_BERT, FlopsClock, MeasuredClock, Op, decayed, save_clock
from growjax.data import MLM, ByteTokenizer, Corpus, SpanCorruption, Text
from growjax.errors import DataError
from growjax.models import BERTConfig
from growjax.report.arms import fixed_size
from growjax.report.rows import EqualCost, OwnCost, read_summary, select
from growjax.select import RhoLoss
from growjax.train import Plan, load_plan, save_plan
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
    every = STUDIES[name][0].cells(size, workload, seed)
    first = itertools.takewhile(lambda cell: cell.budget == "1x", every)
    return {cell.plan.name: cell for cell in first}


def with_loss(cell: Cell) -> Cell:
    """The cell, whose further numbers say the held-out loss, too, and so when they were asked for."""
    after = cell.after
    if after is None:
        return cell

    def more(plan: Plan, model: Any, texts: Texts) -> dict[str, Any]:
        return after(plan, model, texts) | {"loss": training.loss_on(plan, model, texts.valid)}

    return dataclasses.replace(cell, after=more)


@pytest.mark.parametrize("name, workload", ARMS)
def test_a_study_runs_in_pieces_and_is_reported(name, workload, texts, tmp_path):
    about, question = STUDIES[name][0].STUDY, STUDIES[name][0].QUESTION
    wanted = [
        with_loss(c)
        for c in cells(name, "smoke", workload).values()
        if c.plan.name in ARMS[name, workload]
    ]
    out = tmp_path / "smoke.jsonl"
    judge = {"blimp": 0.5}
    shared = Trainer(texts, WindowFile(out), judge=lambda model: judge)
    study.run(wanted[:1], shared, out)
    study.run(wanted, shared, out)
    with out.open("a") as file:
        file.write('{"workload": "cut of')  # killed while it wrote
    rows = study.read(out)
    assert [study.key_of(r) for r in rows] == [c.key for c in wanted]
    by_arm = {r["arm"]: r for r in rows}
    for cell in wanted:
        row = by_arm[cell.plan.name]
        assert row["score"] == row["curve"][-1][1] and row["decayed"]
        assert row["fixed"] == fixed_size(cell.plan) or name == "no_train_no_gain"
        assert row["free"] == (cell.clock is not None)
        assert row["spent"] == pytest.approx(cell.plan.cost / cell.plan.clock.per_unit)
        assert row["texts"]["same"] > 0 and row["downstream"] == judge
        assert list(row.get("midway", {})) == [f"{share:g}" for share in cell.midway]
        for share, numbers in row.get("midway", {}).items():
            due = float(share) * cell.plan.cost / cell.plan.clock.per_unit
            loss = next(loss for spent, loss in row["curve"] if spent >= due)
            assert numbers["loss"] == pytest.approx(loss, rel=1e-5)
            assert [x for _, x in row["curve"]].count(loss) == 1
        assert row["stages"][-1]["stop"] == pytest.approx(row["spent"])
        assert sum(n for *_, n in row["operations"]) >= row["steps"]
        assert cost_on(row, FlopsClock()) == pytest.approx(row["flops"])
    ops = dict.fromkeys(Op(*op) for r in rows for *op, _ in r["operations"])
    clocks = [MeasuredClock(n, tuple((op, 10**9) for op in ops)) for n in ("here", "there")]
    save_clock(clocks[0], tmp_path / "clock.json")
    save_clock(clocks[1], tmp_path / "clock-there.json")
    summary = about.report(out)
    for row in select(summary, OwnCost):
        steps = by_arm[row.arm]["steps"]
        share = pytest.approx(steps / by_arm[question.target]["steps"])
        assert {name: c["cost"] for name, c in row.clocks.items()} == {
            clock.identity: share for clock in clocks
        }
    assert json.loads((tmp_path / "summary.json").read_text())[0]["kind"] == summary[0].kind
    assert len(read_summary(tmp_path / "summary.json")) == len(summary)
    page = (tmp_path / "report.html").read_text()
    assert all(arm in page for arm in by_arm)
    assert all(f"{share:g} of the cost" in page for cell in wanted for share in cell.midway)
    command = (
        f"python -m experiments.{name}.run --size smoke --text numbers --also same=same --data DATA"
    )
    assert {r.command for r in summary} == {command}
    # One seed decides nothing
    equal = [row for row in select(summary, EqualCost) if row.baseline == question.baseline]
    assert equal and {row.verdict for row in equal} == {"too few seeds"}
    measures = {row.measure.split(",")[0] for row in equal}
    assert measures == {"held-out nats", "same", "blimp"}
    scores = {r["arm"]: r["score"] for r in rows}
    for row in equal:
        if "held-out" in row.measure:
            gap = scores[row.arm] - scores[question.baseline]
            assert row.estimate == pytest.approx(gap)
        elif "blimp" in row.measure:
            assert row.estimate == 0


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", ["smoke", "small"])
def test_arms_that_are_compared_cost_the_same(name, size):
    module, (workload, _) = STUDIES[name]
    arms = cells(name, size, workload)
    base = arms[module.QUESTION.baseline].plan
    for key, cell in arms.items():
        if key in (module.QUESTION.target, "raptr proportional", "raptr, full first"):
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
    cuts = [stage["start"] / cell.plan.cost for stage in training._stages(cell.plan)]
    assert [sum(cut < share for cut in cuts) for share in (*cell.midway, 1.0)] == [1, 2, 3, 4]
    config: Any = cell.plan.model
    small = dataclasses.replace(config, layers=2).build(jax.random.key(0))
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


def test_the_small_model_of_msg_trains_for_what_growing_costs():
    plans = {arm: cell.plan for arm, cell in cells("msg", "small", "gpt").items()}
    small, grown = plans["stays small"], plans["msg"]
    assert small.spans[-1].sizes == grown.spans[0].sizes and len(small.spans) == 1
    assert small.steps > 2 * grown.steps
    assert abs(small.cost - grown.cost) <= small.spans[0].costs[0]
    assert "stays small at 0.003" in {c.plan.name for c in msg.trials("small", "gpt", 0)}


@pytest.mark.parametrize("name, whole", [("msg", "scratch"), ("raptr", "full")])
def test_a_longer_budget_takes_as_many_times_the_steps(name, whole, monkeypatch):
    monkeypatch.setitem(STUDIES[name][0].BUDGETS, "smoke", (1, 4))
    plans = {(c.budget, c.plan.name): c.plan for c in STUDIES[name][0].cells("smoke", "bert", 0)}
    arms = {arm for _, arm in plans}
    assert plans.keys() == {(budget, arm) for budget in ("1x", "4x") for arm in arms}
    for arm in (whole, name):
        assert plans["4x", arm].steps == 4 * plans["1x", arm].steps
        assert len(plans["4x", arm].stages) == len(plans["1x", arm].stages)


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
    assert [len(p.spans) for p in plans] == [3, 3, 2] and all(
        decayed(p.learning_rate(p.cost), p.rate.peak) for p in plans
    )


def test_no_train_no_gain_charges_the_papers_clock():
    arms = cells("no_train_no_gain", "small", "bert")
    plan, stacking = arms["AdamW"].plan, arms["stacking"].plan
    steps = ntng.SIZES["small"]["bert"].steps
    assert plan.clock == RTX3090_BERT and plan.steps == steps
    shares = [sum(span.costs) / stacking.cost for span in stacking.spans]
    assert shares == pytest.approx([0.125, 0.175, 0.7], abs=0.02)
    free, paid = (arms[n].plan for n in ("RHO, free", "RHO"))
    assert free.steps == plan.steps and paid.steps == pytest.approx(plan.steps / 1.824, abs=1)
    for times in (2, 4):
        more = next(ntng.arms("small", "bert", 0, times, ntng.RATES["small"]["bert"]))
        assert more.plan.steps == steps * times and more.budget == f"{times}x"
    trial = list(ntng.trials("smoke", "bert", 0))
    lion = [c.plan for c in trial if c.plan.name.startswith("lion")]
    assert [p.rate.peak for p in lion] == [0.0005, 0.001, 0.002, 0.004] and len(trial) == 4 * 7
    assert lion[0].name == "lion at 0.0005"
    assert {c.budget for c in trial} == {"tuning"} and trial[0].plan.seed == 1000


@pytest.mark.parametrize(
    "workload, gamma, clock", [("bert", 100, RTX3090_BERT), ("t5", 20, A100_T5)]
)
def test_the_methods_are_those_of_the_paper(workload, gamma, clock):
    arms: dict[str, Any] = dict(cells("no_train_no_gain", "small", workload))
    steps = ntng.SIZES["small"][workload].steps
    for name, carry in {"stacking": "zero", "stacking, moments copied": "dual"}.items():
        assert [stage.carry for stage in arms[name].plan.stages[1:]] == [carry, carry]
    for name, inverse in {"layer dropping": False, "layer dropping, 1/p": True}.items():
        (drop,) = (stage.subnet for stage in arms[name].plan.stages)
        assert drop.inverse == inverse and drop.floor == 0.5
        # Over the steps that the budget buys at the plateau, where three layers of four run
        assert drop.rate * steps / 0.75 == pytest.approx(gamma)
    sophia, lion, adamw = (arms[n].plan.optimizer for n in ("sophia", "lion", "AdamW"))
    assert (sophia.b1, sophia.b2, sophia.rho, sophia.weight_decay) == (0.965, 0.99, 0.01, 0.015)
    assert (lion.b1, lion.b2, lion.weight_decay) == (0.9, 0.99, 0.1)
    assert (adamw.b2, adamw.weight_decay, adamw.clip) == (0.98, 0.01, 0.5 if gamma == 100 else 1.0)
    assert all(cell.plan.clock == clock for name, cell in arms.items() if "free" not in name)
    free = [arms[f"{name}, free"] for name in ("RHO", "selective backprop", "sophia")]
    assert all(cell.clock == clock for cell in free)
    assert [(c.plan.clock.forward, c.plan.clock.curvature) for c in free] == [
        (0.0, clock.curvature),
        (0.0, clock.curvature),
        (clock.forward, 0.0),
    ]
    longer = ntng.arms("small", workload, 0, 4, ntng.RATES["small"][workload])
    rho = next(cell for cell in longer if cell.reference)
    assert rho.budget == "4x" and rho.reference and rho.reference.steps == steps
    (select,) = (stage.select for stage in rho.plan.stages)
    assert isinstance(select, RhoLoss) and select.offers == 2
    rate = arms["AdamW"].plan.rate
    if workload == "t5":
        assert (rate.shape, rate.start, rate.final) == ("cosine", 0.5, 1e-5)
        assert rate.warmup == pytest.approx(10_000 / 65_536, rel=1e-4)
    else:
        assert (rate.shape, rate.warmup) == ("linear", 0.5)


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


def test_the_t5_of_the_paper_takes_steps_in_proportion_to_its_tensors_and_decays_nothing(
    monkeypatch,
):
    plan = next(ntng.cells("paper", "t5", 0)).plan
    assert plan.rate.peak == 2e-2 and plan.objective == SpanCorruption(512)
    # Working out all arms of the paper's size takes minutes; their rules are the same for a small one
    monkeypatch.setitem(ntng.SIZES["paper"], "t5", ntng.SIZES["smoke"]["t5"])
    rules = {
        name: c.plan.optimizer
        for name, c in cells.__wrapped__("no_train_no_gain", "paper", "t5").items()
    }
    assert rules["AdamW"] == plan.optimizer and plan.optimizer.b2 == 0.999
    for rule in rules.values():
        assert rule.scale_by_parameter and (rule.weight_decay, rule.clip) == (0.0, 1.0)


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
    command = [
        "run",
        "--size",
        "smoke",
        "--workload",
        "bert",
        "--text",
        "runs/text",
        "--seeds",
        "2",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--plans", str(tmp_path)])
    main(ntng.STUDY)
    wanted = cells("no_train_no_gain", "smoke", "bert")
    for folder, second in ((tmp_path, False), (tmp_path / "second", True)):
        names = [n.replace(" ", "_") for n, c in wanted.items() if bool(c.reference) == second]
        ends = [".json", ".reference.json"] if second else [".json"]
        assert {path.name for path in folder.glob("*.json")} == {
            f"bert-1x-{name}{seed}{end}" for name in names for seed in ("", "-1") for end in ends
        }
    rho, second = wanted["RHO"], tmp_path / "second"
    text = Text(str(Path("runs/text/train.txt")), split=BETWEEN)
    valid = Text(str(Path("runs/text/valid.txt")), split=BETWEEN)
    for name, plan in (("RHO", rho.plan), ("RHO.reference", rho.reference)):
        assert plan is not None
        written = load_plan(second / f"bert-1x-{name}.json")
        assert written == dataclasses.replace(plan, data=text, validation=valid)
    assert load_plan(second / "bert-1x-RHO-1.json").seed == rho.plan.seed + 1


# Rows out of made-up lines -----------------------------------------------------------------------


def test_a_benchmark_adds_its_result_to_the_history():
    folder = Path(recorded.__code__.co_filename).parent
    page = (folder / "README.md").read_text()
    names = {path.stem for path in folder.glob("[a-z]*.py")}
    assert all(f"| `{name}` |" in page for name in names), names
    before, day = page.count("\n"), datetime.date(2026, 11, 30)
    for ratio in (1.01, 1.02):
        page = recorded(page, "gates", {"ratio": ratio, "goal": 1.03, "why": "a|b"}, day, "2 | 4")
    lines = page.partition(f"{HEADING}\n")[2].strip().splitlines()
    assert page.count("| day |") == 1 and page.count("\n") <= before + 5
    assert {line.count("|") for line in lines} == {8}
    first, last = (line.split(" | ") for line in lines[-2:])
    assert (first[0], first[2:5]) == ("| 2026-11-30", ["gates", "1.01", "1.03"])
    assert last[3] == "1.02" and json.loads(last[6].strip(" |`")) == {"why": "a/b"}
    with pytest.raises(ValueError, match="no line '## History'"):
        recorded("# Benchmarks", "gates", {}, day, "")


def test_texts_share_no_document(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("train", "valid"):
        articles = [f"{name} article {n}, " + "word " * (n % 7 + 3) for n in range(60)]
        (folder / f"{name}.txt").write_text(BETWEEN.join(articles))
    loaded = load_texts(folder, tmp_path / "cache", {"more": folder / "valid.txt"})
    tokenizer = ByteTokenizer()

    def titles(corpus: Corpus) -> set[str]:
        ends = [*corpus.starts[1:].tolist(), len(corpus)]
        pairs = zip(corpus.starts.tolist(), ends, strict=True)
        return {tokenizer.decode(corpus.read(a, b)).split(",")[0] for a, b in pairs}

    parts = [titles(c) for c in (loaded.training, loaded.proxy, loaded.valid)]
    assert all(parts) and not parts[0] & parts[1] and len(parts[2]) == 60
    assert len(parts[0] | parts[1]) == 60 and len(loaded.others["more"]) == len(loaded.valid)
    with pytest.raises(DataError, match="expected valid.txt"):
        (folder / "valid.txt").unlink()
        load_texts(folder, tmp_path / "cache")
