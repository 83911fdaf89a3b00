"""Fixed sizes of the studies, and losses by window of held-out text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study
from experiments.msg import run as msg
from experiments.no_train_no_gain import run as ntng
from experiments.raptr import run as raptr
from experiments.text import Texts
from experiments.training import Cell, Trainer, as_trial
from experiments.windows import WindowFile, digest_of, losses_by_window, token_losses, windows_of
from growjax.data import MLM, ByteTokenizer, Causal, Corpus
from growjax.models import BERT, BERTConfig, GPTConfig
from growjax.train import Plan, Schedule, Stage
from tests.runs import TEXT


@pytest.fixture(scope="module")
def texts() -> Texts:
    documents, tokenizer = TEXT.split(". "), ByteTokenizer()
    parts = documents[100:], documents[50:100], documents[:50]
    training, proxy, valid = (Corpus.of(part, tokenizer) for part in parts)
    return Texts(training, proxy, valid, {}, "numbers")


def cell(name: str = "arm", budget: str = "1x", batch: int = 4) -> Cell:
    config = GPTConfig(
        layers=2, embed=8, heads=1, head_dim=8, mlp=16, vocab=384, positions=16, remat="nothing"
    )
    plan = Plan(
        name,
        config,
        (Stage("whole model", tokens=3 * batch * 16),),
        batch=batch,
        objective=Causal(16, packing="concat"),
        rate=Schedule(1e-3),
    )
    return Cell("gpt", budget, plan)


# Fixed sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, workload, base, grown, layers",
    [
        (msg, "gpt", "msg", "stacking", (3, 6)),
        (msg, "bert", "msg", "stacking", (3, 6)),
        (raptr, "ul2", "raptr", "MIDAS", (3, 6)),
        (raptr, "bert", "raptr", "stacking", (3, 6)),
        (ntng, "bert", "AdamW", "stacking", (2, 4)),
        (ntng, "t5", "AdamW", "stacking", (1, 2)),
    ],
)
def test_fixed_sizes_differ_from_the_whole_model_in_depth_alone(
    module, workload, base, grown, layers
):
    plans = {}
    for c in module.cells("small", workload, 0):
        if c.budget != "1x":
            break
        plans[c.plan.name] = c.plan
    whole = plans[base].spans[-1].sizes
    fixed = [plan for name, plan in plans.items() if name.startswith("fixed")]
    assert [plan.name for plan in fixed] == [f"fixed-{n}x64" for n in layers]
    for n, plan in zip(layers, fixed, strict=True):
        (span,) = plan.spans
        assert span.sizes == {
            axis: n if axis.endswith("layers") else size for axis, size in whole.items()
        }
        assert abs(plan.cost - plans[base].cost) <= span.costs[0] / 2 + plan.clock.per_unit * 1e-9
        # Whatever they are compared with has the same rate, text and rule of updates
        for field in ("rate", "batch", "objective", "optimizer", "clock", "seed"):
            assert getattr(plan, field) == getattr(plans[grown], field), field


@pytest.mark.parametrize(
    "module, workload, lowest", [(msg, "gpt", 1.5e-3), (raptr, "bert", 7.5e-4)]
)
def test_fixed_sizes_are_in_the_ledger(module, workload, lowest):
    trials = (c.plan for c in module.trials("small", workload, 0))
    first = next(plan for plan in trials if plan.name.startswith("fixed"))
    assert first.name == f"fixed-3x64 at {lowest:g}" and first.rate.peak == lowest


# Windows -----------------------------------------------------------------------------------------


def test_windows_are_many_and_apart_and_depend_on_text_and_objective_alone(texts):
    objective = Causal(16, packing="concat")
    some = windows_of(texts.valid, objective, 20)
    assert len(some["targets"]) == 20 and digest_of(some) == digest_of(
        windows_of(texts.valid, objective, 20)
    )
    most = windows_of(texts.valid, objective, 10**9)
    assert len(most["targets"]) == len(texts.valid) // (objective.raw_length + objective.lookahead)
    longer = windows_of(texts.valid, Causal(17, packing="concat"), 20)
    other = windows_of(texts.proxy, objective, 20)
    assert len({digest_of(x) for x in (some, most, longer, other)}) == 4


@pytest.mark.parametrize("rows", [5, 64, 70])
def test_losses_by_window_are_those_of_each_window_alone(rows, texts):
    objective = MLM(16, 0.3)
    config = BERTConfig(layers=1, embed=8, heads=1, head_dim=8, mlp=16, vocab=384, positions=16)
    model = BERT(config, key=jax.random.key(0))
    windows = windows_of(texts.training, objective, rows)
    sums, counts = losses_by_window(model, windows).T
    assert counts.shape == sums.shape == (rows,)
    for row in (0, rows // 2, rows - 1):
        one = {name: jnp.asarray(value[row : row + 1]) for name, value in windows.items()}
        losses, weights = map(np.asarray, token_losses(model, one))
        assert counts[row] == weights.sum() == (windows["weights"][row] > 0).sum()
        assert sums[row] == pytest.approx((losses * weights).sum(), rel=1e-5)


def test_a_file_of_windows_gives_back_what_was_judged(texts, tmp_path):
    file = WindowFile(tmp_path / "small.jsonl")
    assert file.keys() == set() and file.read() == {}
    config = BERTConfig(layers=1, embed=8, heads=1, head_dim=8, mlp=16, vocab=384, positions=16)
    # One prediction a window, or any number from none on
    sets = [windows_of(texts.valid, MLM(16, 0.1, mode=m), 60) for m in ("exact", "bernoulli")]
    wanted = {}
    for seed, windows in enumerate([*sets, sets[0]]):
        model = BERT(config, key=jax.random.key(seed))
        file.add(("bert", "1x", "arm", seed), 5.5 + seed, model, windows)
        wanted["bert", "1x", "arm", seed] = losses_by_window(model, windows)
    with file.path.open("a") as lines:
        lines.write('{"workload": "cut of')  # killed while it wrote
    assert file.path.name == "small-windows.jsonl" and file.keys() == wanted.keys()
    read = file.read()
    assert read.keys() == wanted.keys()
    for key, pairs in wanted.items():
        np.testing.assert_array_equal(read[key][:, 1], pairs[:, 1])
        np.testing.assert_allclose(read[key][:, 0], pairs[:, 0], rtol=2**-11)
    assert (wanted["bert", "1x", "arm", 1][:, 1] == 0).any()
    rows = [json.loads(line) for line in file.path.read_text().splitlines()[:-1]]
    assert ["counts" in row for row in rows] == [True, False, True, False, False]
    for row in (row for row in rows if "losses" in row):
        sums, counts = wanted[row["workload"], row["budget"], row["arm"], row["seed"]].T
        assert row["score"] == 5.5 + row["seed"]
        assert row["mean"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)


def test_a_study_keeps_losses_by_window_and_adds_those_that_are_missing(texts, tmp_path):
    out = tmp_path / "small.jsonl"
    file = WindowFile(out)
    first, other, trial = cell(), cell("other"), as_trial(cell())
    study.run([first], Trainer(texts, file), out)
    assert not file.path.exists()
    # A line that is there is left alone, unless it is asked for again
    shared = Trainer(texts, file, windows=30)
    study.run([first, other, trial], shared, out)
    assert file.keys() == {other.key}
    before = out.read_text()
    study.run([first, other, trial], shared, out, again=shared.lacks)
    assert file.keys() == {first.key, other.key} and out.read_text() == before
    lines = file.path.read_text()
    study.run([first, other, trial], shared, out, again=shared.lacks)
    assert file.path.read_text() == lines and out.read_text() == before

    scores = {study.key_of(row): row["score"] for row in study.read(out)}
    finished = {study.key_of(r): r for r in map(json.loads, lines.splitlines()) if "losses" in r}
    assert {key: row["score"] for key, row in finished.items()} == {
        key: scores[key] for key in (first.key, other.key)
    }
    # The windows are those of the text, whatever the batch, and so is the mean
    study.run([cell("wide", batch=8)], shared, out)
    windows = file.read()
    assert len({row["windows"] for row in map(json.loads, file.path.read_text().splitlines())}) == 1
    assert windows.keys() == {first.key, other.key, ("gpt", "1x", "wide", 0)}
    assert all(pairs[:, 1].tolist() == [16] * 30 for pairs in windows.values())
    for key, score in scores.items():
        if key in windows:
            assert windows[key][:, 0].sum() / (16 * 30) == pytest.approx(score, abs=0.05)
    # The same run but for its name
    np.testing.assert_array_equal(windows[first.key], windows[other.key])
