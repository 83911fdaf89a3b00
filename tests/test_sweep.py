"""`growjax sweep`: combinations of a plan's fields, trained in folders of their own, and what it says."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import growjax as gj
from growjax.errors import PlanError
from growjax.report.sweep import combinations, sweep
from growjax.train import Options, Run
from growjax.values import to_dict
from tests.runs import plan_file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_file(tmp_path_factory.mktemp("sweep"))


def test_every_combination_has_a_plan_and_a_folder(file):
    made = combinations(file, ["rate.peak=1e-3,2e-3", "seed=0,1", "rate.shape=cosine,wsd"])
    assert len(made) == 8
    assert made[0].folder == "rate.peak=0.001,seed=0,rate.shape=cosine"
    assert made[0].plan.name == "tiny rate.peak=0.001 rate.shape=cosine"
    assert (made[0].plan.rate.peak, made[0].plan.seed) == (1e-3, 0)
    assert len({c.plan.name for c in made}) == 4
    grow = json.dumps([None, to_dict(gj.stack(layers=4))])
    stages = combinations(file, [f"stages.0.grow={grow}"])
    assert [c.plan.stages[0].grow is None for c in stages] == [True, False]
    assert all(set("[]*? ").isdisjoint(c.folder) for c in stages)


def test_what_cannot_be_swept_is_said_at_once(file):
    with pytest.raises(PlanError) as caught:
        combinations(file, ["rate.peak", "seed=0,1", "seed=2"])
    for part in ("'rate.peak': expected a field once", "'seed=2': expected a field once"):
        assert part in str(caught.value)
    with pytest.raises(PlanError, match="rate.peak: expected a positive learning rate, got -1"):
        combinations(file, ["rate.peak=1e-3,-1"])
    with pytest.raises(PlanError, match="two combinations would have this folder"):
        combinations(file, ["rate.peak=0.001,0.0010000001"])


def test_a_sweep_trains_compares_and_says_where_the_best_is(file, tmp_path):
    options, shown = Options(held_out=8, held_out_end=16), io.StringIO()
    console = Console(file=shown, width=160)
    over = ["stages.0.tokens=256,512", "seed=0,1"]
    status, compared = sweep(file, over, tmp_path, options, evaluations=2, console=console)
    assert status == 0 and compared is not None
    assert [arm.name for arm in compared.arms] == [
        "tiny stages.0.tokens=256",
        "tiny stages.0.tokens=512",
    ]
    assert all(len(arm.outcomes) == 2 for arm in compared.arms)
    best = min(compared.arms, key=lambda arm: arm.loss)
    text = " ".join(shown.getvalue().split())
    assert f"Lowest: {best.name}, {best.loss:.4f} nats over 2 seeds." in text
    assert "stages.0.tokens=512 is the highest value that was tried" in text
    assert (tmp_path / "sweep.html").exists()
    # The longer one begins with the state of the shorter one, at the step where that lets its rate fall
    sessions = {
        p.name: Run(p).sessions() for p in sorted(tmp_path.iterdir()) if (p / "plan.json").exists()
    }
    assert {name: s[0].step for name, s in sessions.items()} == {
        "stages.0.tokens=256,seed=0": 0,
        "stages.0.tokens=256,seed=1": 0,
        "stages.0.tokens=512,seed=0": 6,
        "stages.0.tokens=512,seed=1": 6,
    }
    assert sweep(file, over, tmp_path, options, evaluations=2, console=console)[0] == 0
    assert [Run(tmp_path / name).sessions()[-1].step for name in sorted(sessions)] == [8, 8, 16, 16]
