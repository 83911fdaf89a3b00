"""Plans, the loop and the demo, at sizes where a whole run takes seconds."""

import collections
import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import growjax as gj
from growjax import demo
from growjax.errors import DataError, PlanError, TrainingError
from growjax.report import Plot, Table, write_page
from growjax.train import End, Growth, Plan, Stage, Step, loop, train


ROOT = Path(gj.__file__).parents[1]
SMALL = gj.models.GPTConfig(
    layers=2, embed=16, heads=2, head_dim=8, mlp=16, vocab=256, positions=16
)
BATCH, LENGTH = 2, 8
TOKENS = BATCH * LENGTH


def plan(*stages, **changes):
    fields: dict[str, Any] = dict(model=SMALL, batch=BATCH, length=LENGTH, peak=1e-2) | changes
    return Plan("tiny", stages=stages, **fields)


def steps(n, **fields):
    return Stage(tokens=n * TOKENS, **fields)


def batch(n):
    return np.random.default_rng([7, n]).integers(0, 64, (BATCH, LENGTH + 1)).astype(np.int32)


HELD_OUT = np.random.default_rng(8).integers(0, 64, (3, LENGTH + 1)).astype(np.int32)


# Plans -------------------------------------------------------------------------------------------

FAULTS = {
    "batch: expected a positive integer": lambda: plan(steps(1), batch=0),
    "peak: expected a positive": lambda: plan(steps(1), peak=0.0),
    "warmup: expected a share": lambda: plan(steps(1), warmup=1.0),
    "b2: expected a rate": lambda: plan(steps(1), b2=1.0),
    "weight_decay: expected 0 or more": lambda: plan(steps(1), weight_decay=-1.0),
    "length: 99 is longer than the model's 16": lambda: plan(steps(1), length=99),
    "stages: expected at least one": lambda: plan(),
    "budget: the stages are shares": lambda: plan(Stage(share=1.0)),
    "budget: no stage is a share": lambda: plan(steps(1), budget=1e9),
    "budget: expected a positive": lambda: plan(Stage(share=1.0), budget=-1.0),
    "all together 1, got [0.5, 0.4]": lambda: plan(Stage(share=0.5), Stage(share=0.4), budget=1e9),
    "every one must have a share": lambda: plan(Stage(share=1.0), steps(1), budget=1e9),
    "either tokens or share, got neither": lambda: plan(Stage()),
    "either tokens or share, got tokens and share": lambda: plan(steps(1, share=1.0), budget=1e9),
    "tokens: expected a positive": lambda: plan(Stage(tokens=0)),
    "share: expected a positive": lambda: plan(Stage(share=-1.0), Stage(share=2.0), budget=1e9),
    "grow: expected an operator": lambda: plan(steps(1, grow={"mlp": 32})),
    "subnet: expected one such as": lambda: plan(steps(1, subnet=3)),
    "ramp: expected a number of steps": lambda: plan(steps(1, ramp=-1)),
    "ramp of 5 steps is longer than its 4 steps": lambda: plan(
        steps(4, grow=gj.msg(mlp=32), ramp=5)
    ),
    "ramp: it grows mlp behind gates": lambda: plan(steps(4, grow=gj.msg(mlp=32))),
    "ramp: it grows nothing behind gates": lambda: plan(
        steps(4, grow=gj.stack(layers=3, order="top"), ramp=2)
    ),
    "'mlp' is still ramping": lambda: plan(
        steps(4, grow=gj.chain(gj.msg(mlp=32), gj.msg(mlp=48)), ramp=2)
    ),
    "mlp=8 is smaller than the model's 16": lambda: plan(steps(4, grow=gj.msg(mlp=8), ramp=2)),
    "'top' copies the last 3 layers, but there are 2": lambda: plan(
        steps(4, grow=gj.stack(layers=5, order="top"))
    ),
    "expected between 2 (the fixed layers) and 2, got 3": lambda: plan(
        steps(4, subnet=gj.random_path(3))
    ),
    "paths are made for 4 layers, and the model has 2": lambda: plan(
        Stage(subnet=gj.path_schedule((3, 4), layers=4, steps=6))
    ),
    "path schedule says how long it is; leave tokens out": lambda: plan(
        steps(6, subnet=gj.path_schedule((2,), layers=2, steps=6))
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_plan_that_cannot_be_run_is_refused(message):
    with pytest.raises(PlanError, match=re.escape(message)):
        FAULTS[message]()


def test_all_faults_come_in_one_error():
    with pytest.raises(PlanError) as error:
        plan(
            steps(4),
            steps(3, name="wide", grow=gj.msg(mlp=32), ramp=4),
            steps(3, name="narrow", grow=gj.msg(mlp=8), ramp=2),
            peak=-1.0,
        )
    faults = re.findall(r"^  - (.*)$", str(error.value), re.MULTILINE)
    assert [fault[:16] for fault in faults] == [
        "peak: expected a",
        "stage 1 'wide': ",
        "stage 2 'narrow'",
    ]


def test_a_plan_knows_its_cost_before_it_runs():
    run = plan(
        steps(3),
        steps(4, grow=gj.msg(mlp=32), ramp=4),
        steps(2, grow=gj.stack(layers=3, order="top")),
        Stage(subnet=gj.path_schedule((2, 2.5, 3), layers=3, steps=12)),
    )
    assert [span.start for span in run.spans] == [0, 3, 7, 9]
    assert [(s.sizes["layers"], s.sizes["mlp"]) for s in run.spans] == [
        (2, 16),
        (2, 32),
        (3, 32),
        (3, 32),
    ]
    narrow, wide, deep, *_ = (set(span.flops) for span in run.spans)
    assert len(narrow) == len(wide) == len(deep) == 1 and max(narrow) < max(wide) < max(deep)
    paths = run.spans[3].flops
    assert set(paths[:4]) == wide and set(paths[4:8]) == wide | deep and set(paths[8:]) == deep
    assert run.flops == sum(map(sum, (span.flops for span in run.spans))) and run.steps == 21


def test_shares_of_a_budget_are_kept_to_within_half_a_step():
    one = plan(steps(1)).flops
    run = plan(
        Stage(share=0.3),
        Stage(share=0.45, grow=gj.stack(layers=4, order="top")),
        Stage(share=0.25, subnet=gj.random_path(3)),
        budget=50.3 * one,
    )
    spent = np.cumsum([sum(span.flops) for span in run.spans])
    step = [span.flops[-1] for span in run.spans]
    assert np.all(np.abs(spent - np.array([0.3, 0.75, 1.0]) * 50.3 * one) <= np.array(step) / 2)


def test_the_learning_rate_follows_cost_up_and_down_to_zero():
    run = plan(steps(5), steps(5, grow=gj.stack(layers=4, order="top")), warmup=0.1, peak=3e-3)
    assert run.learning_rate(0) == 0.0 == run.learning_rate(run.flops)
    assert run.learning_rate(0.1 * run.flops) == pytest.approx(3e-3)
    assert run.learning_rate(0.55 * run.flops) == pytest.approx(1.5e-3)
    flat = plan(steps(10), warmup=0.0, peak=3e-3)
    assert flat.learning_rate(0) == 3e-3


# The loop ----------------------------------------------------------------------------------------

EVERY_KIND = (
    steps(3, name="small"),
    steps(6, name="ramp", grow=gj.msg(mlp=24, heads=3), ramp=4),
    Stage(
        "stack and paths",
        grow=gj.stack(layers=4, order="top"),
        subnet=gj.path_schedule((3, 3.5, 4), layers=4, steps=18),
    ),
)


@pytest.fixture(scope="module")
def run():
    """The records of a run through every kind of stage, and how often each loss was traced."""
    original, traces = loop.next_token_loss, collections.Counter()

    def counted(model, tokens):
        traces["step" if tokens.shape[0] == BATCH else "held out"] += 1
        return original(model, tokens)

    every = plan(*EVERY_KIND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "next_token_loss", counted)
        return every, list(train(every, batch, HELD_OUT, every=every.flops / 6)), traces


def test_every_step_is_reported_once_and_in_order(run):
    run, records, _ = run
    done = [r for r in records if isinstance(r, Step)]
    assert [r.step for r in done] == list(range(run.steps))
    assert [r.tokens for r in done] == [TOKENS * (n + 1) for n in range(run.steps)]
    assert done[-1].flops == run.flops and isinstance(records[-1], End)
    assert [r.stage for r in done] == [0] * 3 + [1] * 6 + [2] * 18
    assert all(a.seconds <= b.seconds for a, b in zip(done, done[1:], strict=False))
    marks = [r.step for r in done if r.held_out is not None]
    assert len(marks) in (6, 7) and marks[-1] == run.steps - 1
    assert all(math.isfinite(r.loss) for r in done)
    assert done[-1].loss < done[0].loss


def test_growth_is_reported_between_the_steps_with_its_jump(run):
    _, records, _ = run
    places = [i for i, r in enumerate(records) if isinstance(r, Growth)]
    assert [(records[i - 1].step, records[i + 1].step) for i in places] == [(2, 3), (8, 9)]
    behind_gates, stacked = (records[i] for i in places)
    assert behind_gates.grew == {"mlp": (16, 24), "kv_heads": (2, 3)}
    assert behind_gates.after == pytest.approx(behind_gates.before, rel=1e-5)
    assert stacked.grew == {"layers": (2, 4)} and stacked.after != stacked.before


def test_ramps_open_in_their_steps_and_leave_no_gates(run):
    _, records, _ = run
    levels = [r.level for r in records if isinstance(r, Step) and r.stage == 1]
    assert levels == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    model = records[-1].model
    assert not any(slot.arrays() for slot in gj.axes_of(model).of_kind("gate"))
    assert gj.sizes(model) == {**gj.sizes(model), "layers": 4, "mlp": 24, "kv_heads": 3}


def test_one_program_for_each_stage_and_path_length(run):
    """Nothing recompiles along a ramp or for another path of the same length."""
    _, records, traces = run
    assert records[-1].programs == 1 + 1 + 2
    assert traces["step"] == records[-1].programs


def test_a_rerun_is_bitwise_the_same():
    stage = steps(6, grow=gj.msg(mlp=24, layers=3), ramp=4, subnet=gj.random_part(mlp=12))
    first, second = (list(train(plan(stage), batch, HELD_OUT)) for _ in range(2))
    assert len(first) == len(second) == 1 + 6 + 1
    for a, b in zip(first[:-1], second[:-1], strict=True):
        if isinstance(a, Step):
            a, b = (dataclasses.replace(r, seconds=0.0) for r in (a, b))
        assert a == b
    models = [r.model for r in (first[-1], second[-1]) if isinstance(r, End)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        assert np.array_equal(a, b)


def test_a_loss_that_is_not_finite_stops_with_its_step(monkeypatch):
    original = loop.next_token_loss

    def poisoned(model, tokens):
        return original(model, tokens) * jax.numpy.where(tokens[0, 0] == 255, np.nan, 1.0)

    def batch_with_poison(n):
        return np.where(n == 4, 255, batch(n)).astype(np.int32)

    monkeypatch.setattr(loop, "next_token_loss", poisoned)
    seen = []
    with pytest.raises(TrainingError, match=r"the loss of step 4 \(stage 0 'only', .* is nan"):
        for record in train(plan(steps(7, name="only")), batch_with_poison, HELD_OUT):
            seen.append(record)
    assert [r.step for r in seen] == [0, 1, 2, 3]


# The demo ----------------------------------------------------------------------------------------

TINY = demo.Size(
    steps=12,
    layers=4,
    embed=16,
    heads=2,
    head_dim=8,
    mlp=32,
    length=16,
    batch=2,
    held_out=4,
    marks=4,
)


def write_files(folder: Path, files: int = 30, size: int = 8000) -> Path:
    for n in range(files):
        (folder / f"{n:02}.txt").write_bytes(bytes((i * i + n) % 64 + 32 for i in range(size)))
    return folder


def test_the_arms_cost_the_same():
    plans = {p.name: p for p in demo.arms(demo.Size())}
    assert list(plans) == ["scratch", "control", "grown", "raptr"]
    step = plans["scratch"].flops / plans["scratch"].steps
    for name in ("control", "raptr"):
        assert abs(plans[name].flops - plans["grown"].flops) <= step
    assert 0.7 <= plans["grown"].flops / plans["scratch"].flops <= 0.8
    ends = [p.spans[-1].sizes for p in plans.values()]
    assert all(end == ends[0] for end in ends)
    assert len(plans["grown"].spans) >= 3


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    text = demo.load_text(write_files(tmp_path))
    again = demo.load_text(tmp_path)
    assert text.digest == again.digest
    assert np.array_equal(text.batch(1, 5, 4, 16), again.batch(1, 5, 4, 16))
    assert not np.array_equal(text.batch(1, 5, 4, 16), text.batch(1, 6, 4, 16))
    assert not np.array_equal(text.batch(1, 5, 4, 16), text.batch(2, 5, 4, 16))
    assert text.sample(4, 16).shape == (4, 17)


def test_files_are_either_trained_on_or_held_out(tmp_path):
    text = demo.load_text(write_files(tmp_path))
    assert text.files == 30
    separators = (text.training == 0).sum() + (text.held_out == 0).sum()
    assert len(text.training) + len(text.held_out) == 30 * 8000 + separators
    assert 0 < len(text.held_out) < len(text.training)


def test_the_library_is_text_enough():
    text = demo.load_text()
    assert text.files > 300 and len(text.training) > 20 * len(text.held_out) / 3 > 100_000


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="found 0 and 0 bytes; name a folder"):
        demo.load_text(tmp_path)


def test_what_a_run_cost_to_reach_a_loss():
    curve = [(10, 3.0), (20, 2.5), (30, 2.6), (40, 2.0)]
    assert demo.reached(curve, 2.5, 40) == 0.5
    assert demo.reached(curve, 2.0, 40) == 1.0
    assert demo.reached(curve, 1.9, 40) is None


class Page(HTMLParser):
    """Checks that tags close, and gathers what a page refers to."""

    VOID = {"meta", "br", "img", "link", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.seen = [], [], [], collections.Counter()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and "url(http" not in text and "@import" not in text
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.seen["script"] == page.seen["link"] == page.seen["img"] == 0
    assert {name for name in re.findall(r"var\(--(\w+)\)", text)} <= set(
        re.findall(r"--(\w+):", text)
    )
    return page


def test_the_demo_end_to_end(tmp_path):
    (tmp_path / "text").mkdir()
    data, out = write_files(tmp_path / "text"), tmp_path / "out"
    console = Console(record=True, width=120, file=open(tmp_path / "log", "w"))
    results = demo.run(data, seed=3, out=out, size=TINY, console=console)
    console.file.close()

    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    scratch, control, grown, raptr = results["arms"]
    assert [g["grew"] for g in grown["growths"]] == [{"mlp": (16, 32)}, {"layers": (2, 4)}]
    assert [s["label"] for s in raptr["stages"]] == ["path 2", "path 3", "whole model"]
    assert scratch["reached"] is not None and scratch["reached"] <= 1
    for arm in results["arms"]:
        flops = [f for f, _ in arm["loss"]]
        assert len(flops) == arm["steps"] and flops[-1] == arm["flops"]
        assert arm["held_out"][-1] == (arm["flops"], arm["final"])
        assert arm["stages"][-1]["stop"] == arm["flops"] and arm["costs"][0][0] == 0
        assert arm["parameters"] == scratch["parameters"]

    printed = console.export_text()
    assert "before step" in printed and "mlp 16 -> 32" in printed and "(jump " in printed
    assert all(f"{arm['final']:.3f}" in printed for arm in results["arms"])

    text = (out / "report.html").read_text()
    page = check_page(text)
    assert page.seen["svg"] == 2 and page.seen["table"] == 2
    for words in ("grown", "path 3", "nats per byte", "prefers-color-scheme:dark", "mlp 16 to 32"):
        assert words in text
    assert all(f"{arm['final']:.3f}" in text for arm in results["arms"])


def test_a_page_escapes_what_it_is_given(tmp_path):
    figure = Figure()
    figure.subplots().plot([0, 1], [1, 0], label="<b>")
    path = write_page(
        tmp_path / "deep" / "page.html",
        "a < b & c",
        [Plot("x < y", figure, 'say "so"')],
        [Table("t", ["<k>"], [["1 & 2"]])],
        ["<note>"],
    )
    text = path.read_text()
    assert check_page(text).seen["svg"] == 1
    assert "a &lt; b &amp; c" in text and "<note>" not in text and "&lt;k&gt;" in text


def test_the_command_line_helps_and_complains(tmp_path):
    def growjax(*args):
        return subprocess.run(
            [sys.executable, "-m", "growjax", *args], capture_output=True, text=True, cwd=ROOT
        )

    helped = growjax("demo", "--help")
    assert helped.returncode == 0
    assert all(flag in helped.stdout for flag in ("--data", "--seed", "--out", "--steps"))
    wrong = growjax("demo", "--data", str(tmp_path))
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert wrong.stderr.startswith("growjax: ") and "name a folder" in wrong.stderr
