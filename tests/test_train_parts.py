"""Stages that train the new or the old part of a model, in the trainer."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import growjax as gj
from growjax.errors import PlanError
from growjax.forecast.dryrun import dry_run, work_label
from growjax.optim import Curve, Part, Parts
from growjax.runs.checkpoint import load
from growjax.runs.lineage import births_of, read_lineage
from growjax.train import Optimizer, Options, Start, load_plan, save_plan, train
from tests.runs import feed, losses, plan, programs_of, same, steps
from tests.test_hosts import start


SLOW = Parts(new=Curve(((0, 0.0), (2, 1.0))), old=Part(0.1, decay=0.0), growths=((1, 0.5),))


def three(**changes: Any) -> Any:
    """Born; grown behind gates, of which the new part trains; stacked, with rates of three parts."""
    fields: dict[str, Any] = {"optimizer": Optimizer(weight_decay=0.5)} | changes
    return plan(
        steps(2, "small"),
        steps(3, "new alone", grow=gj.msg(mlp=24), ramp=2, train="new"),
        steps(3, "slower", grow=gj.stack(layers=4, order="insert"), train=SLOW),
        **fields,
    )


@pytest.fixture(scope="module")
def trained(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    of = three()
    options = Options(save_every=1, keep_last=99)
    return of, list(train(of, feed(of), run=folder, options=options, cache=programs)), folder


def state_at(of: Any, folder: Path, step: int, stage: int) -> Any:
    shapes = programs_of(of).shapes(of.spans[stage].model)
    return load(folder / "checkpoints" / f"{step:08}-{stage:02}", shapes)


def moved(of: Any, folder: Path, steps: tuple[int, int], stage: int, part: Any) -> list[np.ndarray]:
    """How far the entries of one part moved between two steps, leaf by leaf."""
    before, after = (state_at(of, folder, step, stage).trained for step in steps)
    masks = of.spans[stage].births.masks(of.spans[stage].model, part)
    leaves = zip(*map(jax.tree.leaves, (before, after, masks)), strict=True)
    gaps = [np.asarray(b)[m].view(np.int32) - np.asarray(a)[m].view(np.int32) for a, b, m in leaves]
    return [gap for gap in gaps if gap.size]


def test_the_old_part_stays_bitwise_while_the_new_one_trains(trained):
    of, _, folder = trained
    assert not any(gap.any() for gap in moved(of, folder, (2, 5), 1, "old"))
    assert all(gap.any() for gap in moved(of, folder, (3, 5), 1, "new"))
    assert all(gap.any() for gap in moved(of, folder, (1, 2), 0, "old"))
    # Its moments go on, since it may train later
    before, after = (state_at(of, folder, step, 1).optimizer for step in (2, 5))
    masks = of.spans[1].births.masks(of.spans[1].model, "old")
    like = lambda node: hasattr(node, "blocks")  # noqa: E731
    first, last = (
        [x for x in jax.tree.leaves(o, is_leaf=like) if like(x)] for o in (before, after)
    )
    assert len(first) == 2
    for a, b in zip(first, last, strict=True):
        rows = zip(*map(jax.tree.leaves, (a, b, masks)), strict=True)
        assert all(np.any(x[m] != y[m]) for x, y, m in rows if np.any(x[m]))


def test_rates_count_from_the_growth_of_each_part(trained):
    of, _, folder = trained
    # The curve of new layers starts at 0; the first growth's part has half the rate at once
    assert not any(gap.any() for gap in moved(of, folder, (5, 6), 2, "new"))
    assert all(gap.any() for gap in moved(of, folder, (6, 7), 2, "new"))
    for part in (0, 1):
        assert all(gap.any() for gap in moved(of, folder, (5, 6), 2, part))


def test_a_run_with_parts_resumes_bitwise(trained, programs, tmp_path):
    of, records, folder = trained
    for name in ("00000003-01", "00000006-02"):
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "plan.json").write_bytes((folder / "plan.json").read_bytes())
        (run / "checkpoints" / name).symlink_to(folder / "checkpoints" / name)
        again = list(train(of, feed(of), run=run, cache=programs))
        step = int(name.split("-")[0])
        assert losses(again) == {n: x for n, x in losses(records).items() if n >= step}
        assert same(again, records)


def test_old_layers_rest_on_devices_that_share_the_model_and_in_a_run_that_goes_on(tmp_path):
    process = start("parts", tmp_path, devices=2)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    report = json.loads(out.splitlines()[-1])
    assert report["old rests"] and report["new moves"]
    whole, again = report["whole"], report["resumed"]
    assert len(whole) == 6 and again == {n: x for n, x in whole.items() if int(n) >= 4}
    np.testing.assert_allclose([*whole.values()], [*report["one"].values()], rtol=1e-5)


def test_a_stage_says_in_files_and_on_screen_what_it_trains(trained, tmp_path):
    of, _, folder = trained
    save_plan(of, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == of
    assert [s.parts for s in of.stages] == [None, Parts(old=0.0), SLOW]
    assert work_label(of.spans[1].works[0]) == "new"
    facts = dry_run(of).stages
    assert facts[1].parts == ("new",) and facts[2].parts[0].startswith("Parts(new=Curve(points=")
    lineage = read_lineage(folder / "checkpoints" / "00000006-02")
    assert births_of(lineage).ranges() == {1: {"mlp": "16-23"}, 2: {"layers": "1, 3"}}


def test_what_stays_unchanged_is_charged_as_it_is_computed(trained):
    """Its gradient is computed and its moments move, so a step costs what one that trains all costs."""
    of = trained[0]
    all_of_it = dataclasses.replace(
        of, stages=tuple(dataclasses.replace(stage, train="all") for stage in of.stages)
    )
    assert [span.ops for span in of.spans] == [span.ops for span in all_of_it.spans]
    ((op, _),) = of.spans[1].ops
    assert op.updated == sum(x.size for x in jax.tree.leaves(gj.partition(of.spans[1].model)[0]))


def test_growths_before_a_start_are_parts_too(trained):
    of, _, folder = trained
    origin = Start(str(folder), (gj.msg(mlp=24), gj.stack(layers=4, order="insert")))
    later = plan(steps(1, train="new"), start=origin)
    assert later.spans[0].births.ranges() == {1: {"mlp": "16-23"}, 2: {"layers": "1, 3"}}
    assert later.spans[0].grown_at == (0, 0, 0)


FAULTS = {
    "parts are what growth added and all else, and the model has not grown": [{"train": "new"}],
    "train: growths: there are 1 up to here, and no [2]": [
        {"grow": gj.stack(layers=4), "train": Parts(growths=((2, 0.5),))}
    ],
    "nothing is trained: all coordinates are of parts at rate 0": [
        {"grow": gj.stack(layers=4), "train": Parts(new=0.0, old=0.0)}
    ],
    "train: decay: the optimizer has no weight_decay": [
        {"grow": gj.stack(layers=4), "train": Parts(old=Part(decay=0.0))}
    ],
    "train: expected 'all', 'new', 'old'": [{"train": "newest"}],
}


@pytest.mark.parametrize("message", FAULTS)
def test_parts_that_do_not_fit_are_refused_with_the_plan(message):
    pattern = re.escape(message).replace("expected\\ 'all'", "expected .*'all'")
    with pytest.raises(PlanError, match=pattern):
        plan(*(steps(1, **fields) for fields in FAULTS[message]))


def test_rules_that_cannot_hold_a_part_are_refused_with_the_plan():
    wide = steps(1, grow=gj.msg(mlp=24), ramp=1, train="new")
    deep = steps(1, grow=gj.stack(layers=4), train="new")
    with pytest.raises(PlanError, match="train: this optimizer mixes the entries") as error:
        plan(wide, optimizer=Optimizer("muon"))
    assert "mlp.up" in str(error.value)
    plan(deep, optimizer=Optimizer("muon"))
    slow = steps(1, grow=gj.stack(layers=4), train=Parts(old=0.5))
    with pytest.raises(PlanError, match="train: rate: this rule averages its weights"):
        plan(slow, optimizer=Optimizer("schedule_free"))
    with pytest.raises(PlanError, match="mixes the entries"):
        plan(wide, optimizer=Optimizer(scale_by_parameter=True))
