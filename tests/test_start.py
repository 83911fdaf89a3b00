"""Plans that start from a trained model: what is refused, what is the same, and what lineages say."""

import dataclasses
import io
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import train as trainer
from growjax.errors import CheckpointError, PlanError
from growjax.forecast.dryrun import dry_run
from growjax.gates import ungated
from growjax.models import GPTConfig
from growjax.runs.checkpoint import load, read_lineage
from growjax.runs.lineage import load_model, model_of, pretrained_folder
from growjax.train import Begin, Growth, Options, Plan, Schedule, Start, Step
from growjax.train.commands import describe
from growjax.values import from_dict, to_dict
from tests.runs import SMALL, every_kind, feed, losses, plan, programs_of, same, steps


train: Any = trainer.train
QUICK = Options(held_out=4, save_every=2, keep_last=99)
# The model at the end of the run of every kind, told by what it grew by
GREW = tuple(stage.grow for stage in every_kind().stages if stage.grow is not None)


def arrays(model: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(gj.partition(model)[0])
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def equal(a: Any, b: Any) -> bool:
    a, b = arrays(a), arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def at(folder: Path, name: str) -> str:
    return str(folder / "checkpoints" / name)


def started(of: Plan, programs: Any, **kwargs: Any) -> list[Any]:
    return list(train(of, feed(of), options=QUICK, cache=programs, **kwargs))


@pytest.fixture(scope="module")
def second(run, programs, tmp_path_factory):
    """From the parameters before the first growth, grown behind gates at once, then trained."""
    folder = tmp_path_factory.mktemp("runs") / "second"
    of = plan(
        steps(4, "wide", grow=gj.msg(mlp=24), ramp=3),
        steps(2, "deep", grow=gj.stack(layers=4, order="top")),
        start=Start(at(run[2], "00000003-00")),
    )
    return of, started(of, programs, run=folder), folder


def test_the_first_stage_begins_with_the_parameters_of_the_checkpoint(run, programs, tmp_path):
    """And with nothing else: where the rate moves nothing, the model at the end is that of the start."""
    still = Schedule(1e-30, "constant", warmup=0.0)
    of = plan(steps(2), start=Start(at(run[2], "00000003-00")), rate=still)
    records = started(of, programs, run=tmp_path)
    parent, _ = load_model(at(run[2], "00000003-00"))
    assert equal(records[-1].model, parent) and losses(records).keys() == {0, 1}
    first = load(at(tmp_path, "00000000-00"), programs_of(of).shapes(parent))
    assert equal(first.model, parent)
    fresh = of.optimizer.build().init(gj.partition(parent)[0])
    pairs = zip(jax.tree.leaves(first.optimizer), jax.tree.leaves(fresh), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_the_first_stage_grows_what_it_starts_from(second, run):
    of, records, folder = second
    growths = [r for r in records if isinstance(r, Growth)]
    assert [(g.stage, g.step, g.grew) for g in growths] == [
        (0, 0, {"mlp": (16, 24)}),
        (1, 4, {"layers": (2, 4)}),
    ]
    first = growths[0].crossing
    assert first.exactness == "exact" and first.change < 1e-5
    # The loss before is that of the parent, which the old run saw on the same tokens
    old = next(r for r in run[1] if isinstance(r, Growth)).crossing
    assert first.before == pytest.approx(old.before, rel=1e-5)
    model, _ = load_model(at(folder, "00000000-00"))
    parent, _ = load_model(at(run[2], "00000003-00"))
    old = arrays(parent)
    for name, new in arrays(ungated(model)).items():
        part = new[tuple(slice(0, n) for n in old[name].shape)]
        assert np.array_equal(part, old[name]), name


def test_resume_is_bitwise_whatever_became_of_the_folder(second, programs, tmp_path):
    """From before the first step, on the ramp, and around the second growth."""
    of, records, folder = second
    gone = dataclasses.replace(of, start=Start("it is gone"))
    for name in ("00000000-00", "00000002-00", "00000004-01"):
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        shutil.copytree(at(folder, name), at(run, name))
        shutil.copy(folder / "plan.json", run)
        again = started(gone, programs, run=run)
        step, stage = map(int, name.split("-"))
        assert again[0] == Begin(stage, step, at(run, name), 1)
        assert losses(again) == {n: x for n, x in losses(records).items() if n >= step}
        assert same(again, records)
        last = read_lineage(at(run, "00000006-01"))
        assert last["start"] == read_lineage(at(folder, "00000006-01"))["start"]


def test_lineage_records_what_a_run_started_from(second, run, programs, tmp_path):
    of, _, folder = second
    parent = read_lineage(at(run[2], "00000003-00"))
    for name in ("00000000-00", "00000004-01", "00000006-01"):
        lineage = read_lineage(at(folder, name))
        assert lineage["start"]["folder"] == at(run[2], "00000003-00")
        assert lineage["start"]["is"] == "00000003-00"
        assert lineage["start"]["tokens"] == parent["tokens"] > 0
        assert lineage["start"]["flops"] == parent["flops"] > 0
        sizes = gj.sizes(load_model(at(folder, name))[0])
        assert sizes == gj.sizes(model_of(lineage)) == lineage["sizes"]
    assert read_lineage(at(folder, "00000006-01"))["flops"] == of.flops  # its own budget
    # A third run says what all before it took, and what its model is made of
    third = plan(
        steps(1),
        start=Start(str(folder), (of.stages[0].grow, of.stages[1].grow)),  # type: ignore[arg-type]
    )
    started(third, programs, run=tmp_path)
    lineage = read_lineage(at(tmp_path, "00000001-00"))
    assert lineage["start"]["is"] == "00000006-01"
    assert lineage["start"]["flops"] == parent["flops"] + of.flops
    assert [op["is"] for op in lineage["operators"]] == ["growjax:MSG", "growjax:Stack"]
    assert lineage["births"] == read_lineage(at(folder, "00000006-01"))["births"]
    assert lineage["births"]["mlp"][-1][0] == 1 and lineage["births"]["layers"][-1][0] == 2
    shown = io.StringIO()
    describe(tmp_path, Console(file=shown, width=200))
    assert f"started from {folder} (00000006-01), which took" in shown.getvalue()
    other = read_lineage(at(folder, "00000006-01"))["start"]["digest"]
    assert (
        re.fullmatch(r"[0-9a-f]{16}", lineage["start"]["digest"])
        and lineage["start"]["digest"] != other
    )


def test_the_folder_that_all_began_with_is_in_every_lineage(tmp_path):
    """The run between may be gone, and its path counts from another folder."""
    start = {"folder": "runs/between", "is": "00000006-01", "digest": "0" * 16}
    assert pretrained_folder({"start": None}) is None
    assert pretrained_folder({"start": start | {"pretrained": "/models/gpt2"}}) == "/models/gpt2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pretrained_folder({"start": start | {"pretrained": None}}) is None
    with pytest.warns(UserWarning, match="taken for one from scratch; if it began"):
        assert pretrained_folder({"start": start}) is None


def test_a_smaller_model_becomes_a_larger_one_by_its_operator_alone(run, programs, monkeypatch):
    from growjax.train import session

    monkeypatch.setattr(session.Session, "train", lambda *_: pytest.fail("a step was taken"))
    large = dataclasses.replace(SMALL, layers=4, mlp=24)
    of = plan(steps(1), model=large, start=Start(at(run[2], "00000003-00")))
    with pytest.raises(CheckpointError) as error:
        started(of, programs)
    text = str(error.value)
    assert (
        "blocks.block.mlp.up: float32[2, 16, 16] in the folder, float32[4, 16, 24] in the plan"
        in text
    )
    assert "blocks.block.mlp.down: " in text and "blocks.block.attention.q: " in text
    assert "by the first stage's `grow`" in text and "grew by nothing" in text
    assert dry_run(of).refusals and "blocks.block.mlp.up" in "\n".join(dry_run(of).refusals)


REFUSED = {
    "no such folder": ("nowhere", {}),
    "its gates are at 0.75; start from a checkpoint from after its ramp": (
        "00000006-01",
        {"model": dataclasses.replace(SMALL, mlp=24, heads=4)},
    ),
    r"grew by msg\(mlp=24, heads=4\), stack": ("00000018-02", {}),
    "activation.*'silu' in the plan": (
        "00000003-00",
        {"model": dataclasses.replace(SMALL, activation="silu")},
    ),
    "tokenizer: it was trained on 'bytes', and the plan says 'words.json'": (
        "00000003-00",
        {"tokenizer": "words.json"},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_started_from_is_refused(run, message):
    name, changes = REFUSED[message]
    of = plan(steps(1), start=Start(at(run[2], name)), **changes)
    with pytest.raises(CheckpointError, match=message):
        next(train(of, feed(of)))
    with pytest.raises(PlanError, match=message):
        dry_run(of).check()


def test_a_grown_model_is_told_by_its_operators_or_by_an_equal_configuration(run, programs):
    folder = str(run[2])
    told = plan(steps(1), start=Start(folder, GREW))
    equal_one = dataclasses.replace(SMALL, layers=4, mlp=24, heads=4)
    records = started(told, programs)
    assert gj.sizes(records[-1].model)["layers"] == 4
    again = started(plan(steps(1), model=equal_one, start=Start(folder)), programs)
    assert losses(again) == losses(records)
    assert losses(records)[0] < losses(run[1])[0] - 0.5  # it was trained


def test_plans_with_a_start_are_data(run):
    of = plan(steps(4, grow=gj.msg(mlp=64), ramp=2), start=Start(str(run[2]), GREW))
    assert from_dict(json.loads(json.dumps(to_dict(of)))) == of
    assert of.spans[0].sizes["mlp"] == 64 and of.spans[0].sizes["layers"] == 4
    shown = io.StringIO()
    forecast = dry_run(of)
    forecast.check()
    Console(file=shown, width=200).print(forecast)
    assert f"starts from the model in {run[2]}" in shown.getvalue()
    assert forecast.stages[0].growing_bytes and forecast.stages[0].grows == "msg(mlp=64)"


WRONG = {
    "start: expected a Start or None, got": lambda: plan(steps(1), start="runs/small"),
    "folder: expected the name of a folder": lambda: plan(steps(1), start=Start("")),
    r"operators\[0\]: expected an operator such as": lambda: plan(steps(1), start=Start("a", (3,))),  # type: ignore
    r"start: (.|\n)*mlp=8 is smaller than": lambda: plan(
        steps(1), start=Start("a", (gj.msg(mlp=8),))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_start_that_makes_no_sense_is_refused_with_the_plan(message):
    with pytest.raises(PlanError, match=message):
        WRONG[message]()


def test_a_new_model_may_grow_before_its_first_step(programs, tmp_path):
    of = plan(steps(2, grow=gj.stack(layers=4, order="top")))
    records = started(of, programs, run=tmp_path)
    assert [r.grew for r in records if isinstance(r, Growth)] == [{"layers": (2, 4)}]
    assert [r.step for r in records if isinstance(r, Step)] == [0, 1]
    shutil.rmtree(at(tmp_path, "00000002-00"))
    again = started(of, programs, run=tmp_path)
    assert again[0].resumed == at(tmp_path, "00000000-00") and same(again, records)


def test_a_hugging_face_folder_is_a_start_as_well(programs, tmp_path):
    config = GPTConfig(**{**vars(SMALL), "bias": True})
    model = gj.models.GPT(config, key=jax.random.key(3))
    gj.hf.save(model, tmp_path / "stock")
    stock = gj.hf.config(tmp_path / "stock")
    of = plan(
        steps(2, grow=gj.stack(layers=4, order="top")),
        model=stock,
        start=Start(str(tmp_path / "stock")),
    )
    dry_run(of).check()
    records = started(of, programs, run=tmp_path / "run")
    lineage = read_lineage(at(tmp_path / "run", "00000000-00"))
    assert lineage["start"]["is"] == "Hugging Face" and lineage["start"]["flops"] is None
    assert pretrained_folder(lineage) == str(tmp_path / "stock")
    grown, _ = load_model(at(tmp_path / "run", "00000000-00"))
    assert np.array_equal(grown.blocks.block.mlp.up[:2], model.blocks.block.mlp.up)
    assert gj.sizes(records[-1].model)["layers"] == 4
    with pytest.raises(CheckpointError, match="table: float32"):
        next(train(dataclasses.replace(of, model=dataclasses.replace(stock, vocab=400)), feed(of)))
