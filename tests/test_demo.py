"""The demo and its report, at sizes where a whole run takes seconds."""

import collections
import dataclasses
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import growjax as gj
from growjax import demo
from growjax.budget import Outcome
from growjax.errors import DataError
from growjax.report import (
    Arm,
    Part,
    Plot,
    Table,
    cost_figure,
    loss_figure,
    read_summary,
    write_page,
)
from growjax.report.comparisons import own_cost
from growjax.report.figures import Bar, differences_figure, ends_figure
from growjax.report.runs import arm_of, read_run


ROOT = Path(gj.__file__).parents[1]


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
    assert list(plans) == ["scratch", "control", "small", "grown", "raptr"]
    step = plans["scratch"].flops / plans["scratch"].steps
    for name in ("control", "small", "raptr"):
        assert abs(plans[name].flops - plans["grown"].flops) <= step
    assert 0.7 <= plans["grown"].flops / plans["scratch"].flops <= 0.8
    small = plans.pop("small")
    assert len(small.spans) == 1 and small.spans[0].sizes == plans["grown"].spans[0].sizes
    ends = [p.spans[-1].sizes for p in plans.values()]
    assert all(end == ends[0] for end in ends) and ends[0] != small.spans[0].sizes
    assert len(plans["grown"].spans) >= 3


def test_files_are_either_trained_on_or_held_out(tmp_path):
    (tmp_path / "text").mkdir()
    training, held_out = demo.load_text(write_files(tmp_path / "text"), tmp_path / "cache")
    assert len(training.starts) + len(held_out.starts) == 30
    assert training.text_bytes + held_out.text_bytes == 30 * 8000
    assert 0 < held_out.text_bytes < training.text_bytes


def test_the_library_is_text_enough(tmp_path):
    training, held_out = demo.load_text(None, tmp_path)
    assert len(training.starts) > 300
    assert training.text_bytes > 20 * held_out.text_bytes / 3 > 100_000


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("too short")
    with pytest.raises(DataError, match="name a folder of text files with --data"):
        demo.load_text(tmp_path / "text", tmp_path / "cache")


def arm(name, curve, parameters=100):
    spent, score = curve[-1]
    outcome = Outcome(name, 0, spent, "FLOPs", spent, score, True, tuple(curve))
    return Arm(name, (outcome,), parameters)


def test_a_loss_is_reached_where_a_run_falls_to_it_for_the_last_time():
    arms = [
        arm("scratch", [(10, 3.0), (40, 2.5)]),
        arm("early", [(10, 3.0), (20, 2.4), (30, 2.3)]),
        arm("back again", [(10, 3.0), (20, 2.5), (24, 2.7), (28, 2.3)]),
        arm("never", [(10, 3.0), (20, 2.4), (30, 2.6)]),
    ]
    rows = list(own_cost(arms, "scratch"))
    shares = [pytest.approx(18.333 / 40, abs=1e-4), pytest.approx(26 / 40), None]
    assert [row.cost_to_reach for row in rows] == shares
    cells = [row[-1] for row in demo.results_table(arms, rows).rows]
    assert cells == ["-", "46% (54% saved)", "65% (35% saved)", "not reached"]


def ends(**losses):
    sizes = {"scratch": (4, 10**6), "small": (3, 250)}
    return [
        arm(n, [(sizes.get(n, (3,))[0] * 10**12, x)], sizes.get(n, (0, 10**6))[1])
        for n, x in losses.items()
    ]


@pytest.mark.parametrize(
    "losses, words, missing",
    [
        (
            {"control": 2.4, "small": 2.0, "grown": 2.2, "raptr": 2.3},
            [
                "the best arm is small: held-out loss 2.000, 0.200 below grown.",
                "It has 250 of scratch's",
            ],
            "another seed",
        ),
        (
            {"control": 2.1, "small": 2.0, "grown": 2.2, "raptr": 2.3},
            ["best arm is small", "0.100 below control and 0.200 below grown."],
            "another seed",
        ),
        (
            {"control": 2.4, "small": 2.25, "grown": 2.2, "raptr": 2.3},
            [
                "the best arm is grown: held-out loss 2.200, 0.050 below small.",
                "It has 1,000,000 of",
            ],
            "another seed",
        ),
        (
            {"control": 2.21, "small": 2.3, "grown": 2.5, "raptr": 2.204},
            [
                "the best arm is raptr: ",
                "0.006 below control and 0.296 below grown.",
                "another seed",
            ],
            "best arm is control",
        ),
    ],
)
def test_the_verdict_names_the_best_arm_of_equal_cost_whichever_it_is(losses, words, missing):
    text = demo.verdict(ends(scratch=1.5, **losses))
    assert text.startswith("At equal cost (3 TFLOPs) ") and "1.500" not in text
    assert all(part in text for part in words) and missing not in text


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
    rows = demo.run(data, seed=3, out=out, size=TINY, console=console)
    console.file.close()

    # Every arm has the folder of a run
    runs = [read_run(out / p.name) for p in demo.arms(TINY, 3)]
    assert all(run.run.finished and run.last["flops"] == run.plan.flops for run in runs)
    assert all(len(run.steps) == run.plan.steps for run in runs)
    scratch, control, small, grown, raptr = arms = [
        arm_of([run], charge="flops", paths=True) for run in runs
    ]
    assert [g["grew"] for g in runs[3].growths] == [{"mlp": [16, 32]}, {"layers": [2, 4]}]
    assert [s.label for s in raptr.stages] == ["path 2", "path 3", "whole model"]
    for arm, run in zip(arms, runs, strict=True):
        assert arm.curve[-1] == (run.plan.flops, arm.loss) and arm.decayed
        assert arm.stages[-1].stop == run.plan.flops
        assert (arm.parameters < scratch.parameters) == (arm is small)
        assert arm.fixed == (arm.name in ("scratch", "control", "small"))

    # Each arm against scratch, from the same losses
    assert [row.arm for row in rows] == ["control", "small", "grown", "raptr"]
    assert read_summary(out / "summary.json") == rows
    for arm, row in zip(arms[1:], rows, strict=True):
        assert row.estimate == pytest.approx(arm.loss - scratch.loss)
        assert row.flops == pytest.approx(arm.cost / scratch.cost)

    printed = console.export_text()
    assert "before step" in printed and "mlp 16 -> 32" in printed and "(jump " in printed
    assert all(f"{arm.loss:.3f}" in printed for arm in arms)
    best = min(arms[1:], key=lambda arm: arm.loss)
    verdict = demo.verdict(arms)
    assert f"the best arm is {best.name}: " in verdict
    assert verdict in " ".join(printed.split())

    text = (out / "report.html").read_text()
    page = check_page(text)
    assert page.seen["svg"] == 6 and page.seen["table"] == 3
    for words in ("grown", "path 3", "nats per byte", "prefers-color-scheme:dark", "mlp 16 to 32"):
        assert words in text
    assert all(f"{arm.loss:.4f}" in text for arm in arms)
    shown = verdict.replace("'", "&#x27;")
    assert text.index(shown) < text.index("<svg") < text.index("<table")


def test_bars_are_on_the_line_where_its_stages_begin():
    stages = tuple(
        Part(label, start * 10**9, (start + 2) * 10**9)
        for label, start in (("born", 0), ("grown", 2), ("again", 4))
    )
    curve = [(0, 5.0), (3 * 10**9, 2.0), (6 * 10**9, 1.0)]
    grown = dataclasses.replace(arm("grown", curve), stages=stages)
    loss, strip = loss_figure([grown]).axes
    bars = [
        np.asarray(line.get_xydata()).tolist() for line in loss.lines if line.get_marker() == "|"
    ]
    assert bars == [[[2, pytest.approx(3)]], [[4, pytest.approx(5 / 3)]]]  # in gigaFLOPs
    assert [text.get_text() for text in strip.texts] == ["born", "grown", "again"]


def test_a_run_that_was_evaluated_once_has_a_figure():
    once = arm("once", [(2 * 10**9, 5.0)])
    with warnings.catch_warnings():
        # Matplotlib warns of an axis from 5 to 5, and whoever asks for a report would read it
        warnings.simplefilter("error")
        axes = loss_figure([once]).axes[0], ends_figure([once], []).axes[0]
    assert all(low < 5.0 < high for low, high in (each.get_ylim() for each in axes))


def test_the_cost_of_a_step_is_that_of_the_plan():
    plans = demo.arms(TINY)[:1]
    (axes,) = cost_figure(plans).axes
    (line,) = axes.lines
    flops = plans[0].flops / plans[0].steps
    assert np.asarray(line.get_ydata()) * 1e6 == pytest.approx([flops, flops])
    assert np.asarray(line.get_xdata()).tolist() == [0, plans[0].steps]


def test_the_words_of_a_figure_fit_into_it_at_the_width_of_a_phone(tmp_path):
    row = Bar("gpt, 1x", "msg, matched, copies", 0.4, (0.3, 0.5), [0.3, 0.5], "worse")
    figure = differences_figure([row], "the best fixed size (fixed-2x32) at its cost")
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert 0 <= box.x0 and box.x1 <= figure.get_figwidth()
    # Between the margins of a phone's page are 358 pixels: letters of 8 pixels or more
    assert 10 / 72 * 358 / figure.get_figwidth() > 8
    text = write_page(tmp_path / "page.html", "Phone", [Plot("x", figure, "y")]).read_text()
    assert "svg{display:block;width:100%;height:auto}" in text and "min-width" not in text


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
