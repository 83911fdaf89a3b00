"""The smallest size of the downstream experiment: made-up files, read and run like any others."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

import growjax as gj
from experiments.downstream import run
from experiments.downstream.made_up import make_up
from growjax.errors import EvalError
from growjax.evals import GLUE, Example


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_up(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def out(tmp_path_factory, made):
    out = tmp_path_factory.mktemp("out")
    run.glue("smoke", *made, out=out, tasks=("glue/rte", "glue/cola"))
    return out


def read(out):
    return [json.loads(line) for line in (out / "glue-smoke.jsonl").read_text().splitlines()]


def test_every_run_is_a_line_and_whole_seeds_come_first(out):
    lines = read(out)
    assert [line["cell"] for line in lines] == [
        [task, arm, seed]
        for seed in (0, 1)
        for task in ("glue/rte", "glue/cola")
        for arm in ("ungrown", "grown")
    ]
    for line in lines:
        assert line["settings"]["examples"] == 64 and line["settings"]["rate"] == 1e-2
        assert line["score"] == pytest.approx(np.mean([*line["metrics"].values()]))


def test_the_rows_say_what_the_lines_say(out):
    lines = {tuple(line["cell"]): line["score"] for line in read(out)}
    rows = json.loads((out / "summary.json").read_text())["glue-smoke"]
    assert len(rows) == 6
    assert len((out / "glue-smoke.md").read_text().splitlines()) == 4
    for task in ("glue/rte", "glue/cola"):
        ungrown, grown, gap = [row for row in rows if row["question"].startswith(task)]
        for row, arm in ((ungrown, "ungrown"), (grown, "grown")):
            scores = [lines[task, arm, seed] for seed in (0, 1)]
            assert row["estimate"] == pytest.approx(np.median(scores), abs=1e-4)
            assert row["interval"] == pytest.approx([min(scores), max(scores)], abs=1e-4)
            assert row["verdict"] == "yes", row  # what is made up can be learnt
        gaps = [lines[task, "grown", seed] - lines[task, "ungrown", seed] for seed in (0, 1)]
        assert gap["interval"] == pytest.approx([min(gaps), max(gaps)], abs=1e-4)
        assert gap["verdict"] == ("yes" if max(map(abs, gaps)) <= 0.02 else "no")


def test_the_table_has_medians_and_spreads():
    lines = [
        {"cell": ["t", arm, seed], "score": score, "constant": 0.5}
        for arm, scores in {"a": [0.25, 0.75, 0.5], "b": [1.0]}.items()
        for seed, score in enumerate(scores)
    ]
    lines.append({"cell": ["u", "a", 0], "score": 0.0, "constant": 0.0})
    assert run.table(lines).splitlines() == [
        "| task | constant | a | b |",
        "| --- | --- | --- | --- |",
        "| t | 0.500 | 0.500 (0.250 to 0.750; 3 seeds) | 1.000 (1.000 to 1.000; 1 seed) |",
        "| u | 0.000 | 0.000 (0.000 to 0.000; 1 seed) |  |",
    ]


def test_the_grown_model_is_larger_and_computes_the_same(out, made):
    assert {line["moved"] < 1e-5 for line in read(out) if line["cell"][1] == "grown"} == {True}
    small = gj.hf.load(made[1])
    big = gj.grow(run.growth(small), small, key=jax.random.key(0))
    assert gj.sizes(big)["kv_heads"] == 4 and gj.sizes(big)["mlp"] == 32
    spoilt = gj.grow(gj.msg(mlp=32), small, key=jax.random.key(0))
    assert run.moved(small, gj.ramp(spoilt, 1.0)) > 1e-5


def test_finished_runs_are_not_run_again(out, made, monkeypatch):
    before = (out / "glue-smoke.jsonl").read_text()
    ran = []
    monkeypatch.setattr(run.Cell, "run", lambda self, *cell: ran.append(cell) or {"score": 1.0})
    rows = run.glue("smoke", *made, out=out, tasks=("glue/rte",))
    assert not ran and len(rows) == 6  # those of the other task stay
    assert (out / "glue-smoke.jsonl").read_text() == before


def test_lines_of_another_run_are_not_mixed_in(out, made):
    with pytest.raises(EvalError, match="name another --out") as caught:
        run.glue("smoke", *made, out=out, tasks=("glue/rte",), examples=32)
    assert "glue/rte, ungrown, seed 0: examples is 64 there, 32 here" in str(caught.value)


def test_a_part_is_always_the_same_and_in_order():
    rows = [Example(((str(i),),), "0") for i in range(50)]
    assert run.part(rows, 10) == run.part(rows, 10)
    found = [int(x.choices[0][0]) for x in run.part(rows, 10)]
    assert len(set(found)) == 10 and found == sorted(found) and found != list(range(10))
    assert run.part(rows, None) == run.part(rows, 60) == rows


def test_the_best_constant_answer_by_hand():
    dev = [Example((("a",),), label) for label in "1110"]
    # F1 of all positive is 6/7, accuracy 3/4; of none 0 and 1/4
    assert run.constant(GLUE["glue/mrpc"], dev) == pytest.approx((6 / 7 + 3 / 4) / 2)
    assert run.constant(GLUE["glue/cola"], dev) == 0.0


def test_what_is_lacking_is_said_before_anything_runs(tmp_path, made, monkeypatch):
    with pytest.raises(EvalError) as caught:
        run.glue("small", tmp_path / "no", None, out=tmp_path)
    assert "--data: expected a folder" in str(caught.value) and "--model" in str(caught.value)
    with pytest.raises(EvalError, match="glue/sts-b: expected one of glue/cola"):
        run.glue("smoke", *made, out=tmp_path, tasks=("glue/sts-b",))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EvalError, match=r"needs torch and transformers .*growjax\[parity\]"):
        run.glue("smoke", *made, out=tmp_path, with_transformers=True)
    assert not (tmp_path / "glue-smoke.jsonl").exists()


def test_the_sizes_are_of_the_same_tasks():
    assert {tuple(size.examples) for size in run.SIZES.values()} == {run.NAMES}
    paper = run.SIZES["paper"]
    assert dataclasses.replace(paper.recipe, rate=5e-5) == run.Recipe()
    assert set(paper.examples.values()) == {None} and paper.seeds == 5
