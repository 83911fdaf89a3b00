"""The demo and its report, at sizes where a whole run takes seconds."""

import collections
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import growjax as gj
from growjax import demo
from growjax.errors import DataError
from growjax.report import Plot, Table, write_page
from growjax.report.figures import arms_figure


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


def arm(name, held_out, parameters=100):
    flops, final = held_out[-1]
    return {
        "name": name,
        "held_out": held_out,
        "flops": flops,
        "final": final,
        "parameters": parameters,
    }


def test_a_loss_is_reached_where_a_run_falls_to_it_for_the_last_time():
    arms = [
        arm("scratch", [(10, 3.0), (40, 2.5)]),
        arm("early", [(10, 3.0), (20, 2.4), (30, 2.3)]),
        arm("back again", [(10, 3.0), (20, 2.5), (24, 2.7), (28, 2.3)]),
        arm("never", [(10, 3.0), (20, 2.4), (30, 2.6)]),
    ]
    shares = demo.reached(arms)
    assert shares == [1.0, pytest.approx(18.333 / 40, abs=1e-4), pytest.approx(26 / 40), None]


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
    results = demo.run(data, seed=3, out=out, size=TINY, console=console)
    console.file.close()

    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    scratch, control, small, grown, raptr = results["arms"]
    assert [g["grew"] for g in grown["growths"]] == [{"mlp": (16, 32)}, {"layers": (2, 4)}]
    assert [s["label"] for s in raptr["stages"]] == ["path 2", "path 3", "whole model"]
    assert scratch["reached"] is not None and scratch["reached"] <= 1
    for arm in results["arms"]:
        flops = [f for f, _ in arm["loss"]]
        assert len(flops) == arm["steps"] and flops[-1] == arm["flops"]
        assert arm["held_out"][-1] == (arm["flops"], arm["final"])
        assert arm["stages"][-1]["stop"] == arm["flops"] and arm["costs"][0][0] == 0
        assert arm["parameters"] == scratch["parameters"] or arm is small
    assert small["parameters"] < scratch["parameters"]
    assert [arm["reached"] for arm in results["arms"]] == demo.reached(results["arms"])
    best = min((arm for arm in results["arms"] if arm is not scratch), key=lambda arm: arm["final"])

    printed = console.export_text()
    assert "before step" in printed and "mlp 16 -> 32" in printed and "(jump " in printed
    assert all(f"{arm['final']:.3f}" in printed for arm in results["arms"])
    verdict = demo.verdict(results["arms"])
    assert f"the best arm is {best['name']}: " in verdict
    assert verdict in " ".join(printed.split())

    text = (out / "report.html").read_text()
    page = check_page(text)
    assert page.seen["svg"] == 2 and page.seen["table"] == 2
    for words in ("grown", "path 3", "nats per byte", "prefers-color-scheme:dark", "mlp 16 to 32"):
        assert words in text
    assert all(f"{arm['final']:.3f}" in text for arm in results["arms"])
    assert verdict.replace("'", "&#x27;") in text


def test_bars_are_on_the_line_where_its_stages_begin():
    stages = [
        {"label": label, "start": start * 10**9, "stop": (start + 2) * 10**9}
        for label, start in (("born", 0), ("grown", 2), ("again", 4))
    ]
    held_out = [[0, 5.0], [3 * 10**9, 2.0], [6 * 10**9, 1.0]]
    arm = {"name": "grown", "held_out": held_out, "final": 1.0, "stages": stages}
    loss, strip = arms_figure([arm]).axes
    bars = [
        np.asarray(line.get_xydata()).tolist() for line in loss.lines if line.get_marker() == "|"
    ]
    assert bars == [[[2, pytest.approx(3)]], [[4, pytest.approx(5 / 3)]]]  # in gigaFLOPs
    assert [text.get_text() for text in strip.texts] == ["born", "grown", "again"]


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
