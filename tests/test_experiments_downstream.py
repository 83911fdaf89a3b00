"""The smallest size of the downstream experiment: made-up files, read and run like any others."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

import growjax as gj
from experiments import study
from experiments.downstream import run
from experiments.downstream.made_up import make_up
from growjax.errors import DataError, EvalError
from growjax.evals import GLUE, Example
from growjax.report.rows import read_summary


TASKS = ("glue/rte", "glue/cola")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_up(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, made):
    data, model = made
    return study.Inputs("smoke", tmp_path_factory.mktemp("out"), data=data, model=model)


def cells(seeds, tasks=TASKS):
    every = [c for seed in seeds for task in tasks for c in run.cells("smoke", task, seed)]
    return [cell for cell in every if not cell.optional]


@pytest.fixture(scope="module")
def rows(inputs):
    study.run(cells((0, 1)), run.Shared(inputs), inputs.results)
    return run.STUDY.report(inputs.results)


def test_every_run_is_a_line_with_its_settings(inputs, rows):
    lines = study.read(inputs.results)
    assert [study.key_of(line) for line in lines] == [
        (task, "8 epochs", arm, seed)
        for seed in (0, 1)
        for task in TASKS
        for arm in ("ungrown", "grown")
    ]
    for line in lines:
        assert line["settings"]["examples"] == 64 and line["settings"]["rate"] == 1e-2
        assert line["score"] == pytest.approx(np.mean([*line["metrics"].values()]))


def test_the_rows_say_what_the_lines_say(inputs, rows):
    lines = {study.key_of(line): line["score"] for line in study.read(inputs.results)}
    assert len(rows) == 6 and read_summary(inputs.out / "summary.json") == rows
    page = (inputs.out / "report.html").read_text()
    assert "glue/rte, 3 questions: 3 yes." in page and (inputs.out / "differences.svg").exists()
    for task in TASKS:
        scores = {arm: [lines[task, "8 epochs", arm, s] for s in (0, 1)] for arm in run.ARMS[:2]}
        ungrown, grown, gap = [row for row in rows if row.workload == task]
        for row, arm in ((ungrown, "ungrown"), (grown, "grown")):
            assert row.estimate == pytest.approx(np.median(scores[arm]), abs=1e-4)
            assert row.interval == pytest.approx([min(scores[arm]), max(scores[arm])], abs=1e-4)
            assert row.verdict == "yes", row  # what is made up can be learnt
        gaps = np.subtract(scores["grown"], scores["ungrown"])
        assert gap.interval == pytest.approx([min(gaps), max(gaps)], abs=1e-4)
        assert gap.verdict == ("yes" if max(map(abs, gaps)) <= 0.02 else "no")


def test_the_table_has_medians_and_spreads():
    lines = [
        {"workload": "t", "budget": "", "arm": arm, "seed": seed, "score": score, "constant": 0.5}
        for arm, scores in {"a": [0.25, 0.75, 0.5], "b": [1.0]}.items()
        for seed, score in enumerate(scores)
    ]
    lines.append({**lines[0], "workload": "u", "score": 0.0, "constant": 0.0})
    assert run.table(lines).rows == [
        ["t", "0.500", "0.500 (0.250 to 0.750; 3 seeds)", "1.000 (1.000 to 1.000; 1 seed)"],
        ["u", "0.000", "0.000 (0.000 to 0.000; 1 seed)", ""],
    ]


def test_the_grown_model_is_larger_and_computes_the_same(inputs, rows, made):
    grown = [line for line in study.read(inputs.results) if line["arm"] == "grown"]
    assert {line["moved"] < 1e-5 for line in grown} == {True}
    small = gj.hf.load(made[1])
    big = gj.grow(run.growth(small), small, key=jax.random.key(0))
    assert gj.sizes(big)["kv_heads"] == 4 and gj.sizes(big)["mlp"] == 32
    spoilt = gj.grow(gj.msg(mlp=32), small, key=jax.random.key(0))
    assert run.moved(small, gj.ramp(spoilt, 1.0)) > 1e-5


def test_finished_runs_are_not_run_again(inputs, rows, monkeypatch):
    before = inputs.results.read_text()
    ran = []
    monkeypatch.setattr(
        run.Cell, "run", lambda self, shared: ran.append(self.key) or {"score": 1.0}
    )
    study.run(cells((0, 1), TASKS[:1]), run.Shared(inputs), inputs.results)
    assert not ran and inputs.results.read_text() == before


def test_lines_of_another_run_are_not_mixed_in(inputs, rows):
    other = run.Shared(dataclasses.replace(inputs, examples=32))
    with pytest.raises(DataError, match="name another --out") as caught:
        study.run(cells((0,), TASKS[:1]), other, inputs.results)
    assert "glue/rte 8 epochs ungrown 0: examples is 64 there, 32 here" in str(caught.value)


def test_a_part_is_always_the_same_and_in_order():
    rows = [Example(((str(i),),), "0") for i in range(50)]
    assert run.part(rows, 10) == run.part(rows, 10)
    numbers = [int(x.choices[0][0]) for x in run.part(rows, 10)]
    assert len(set(numbers)) == 10 and numbers == sorted(numbers) and numbers != list(range(10))
    assert run.part(rows, None) == run.part(rows, 60) == rows


def test_the_best_constant_answer_by_hand():
    dev = [Example((("a",),), label) for label in "1110"]
    # F1 of all positive is 6/7, accuracy 3/4; of none 0 and 1/4
    assert run.constant(GLUE["glue/mrpc"], dev) == pytest.approx((6 / 7 + 3 / 4) / 2)
    assert run.constant(GLUE["glue/cola"], dev) == 0.0


def test_what_is_lacking_is_said_before_anything_runs(inputs, tmp_path, monkeypatch):
    with pytest.raises(EvalError) as caught:
        run.Shared(study.Inputs("small", tmp_path, data=tmp_path / "no"))
    assert "--data: expected a folder" in str(caught.value) and "--model" in str(caught.value)
    monkeypatch.setitem(sys.modules, "torch", None)
    (peer,) = [cell for cell in run.cells("smoke", "glue/rte", 0) if cell.optional]
    with pytest.raises(EvalError, match=r"needs torch and transformers .*growjax\[parity\]"):
        study.run([peer], run.Shared(inputs), tmp_path / "smoke.jsonl")
    assert not (tmp_path / "smoke.jsonl").exists()


def test_the_sizes_are_of_the_same_tasks():
    assert {tuple(size.examples) for size in run.SIZES.values()} == {run.NAMES}
    paper = run.SIZES["paper"]
    assert dataclasses.replace(paper.recipe, rate=5e-5) == run.Recipe()
    assert set(paper.examples.values()) == {None} and paper.seeds == 5
