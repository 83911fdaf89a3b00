"""The command line and what stands behind it: plans from files, journals, growth of checkpoints."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import train as trainer
from growjax.cli import app, main
from growjax.data import Text
from growjax.errors import (
    CheckpointError,
    DataError,
    GrowjaxError,
    GrowthError,
    PlanError,
    TrainingError,
)
from growjax.report.runs import write_report
from growjax.runs.checkpoint import read_lineage
from growjax.runs.journal import Journal, peak_flops
from growjax.runs.lineage import load_model
from growjax.select import RhoLoss
from growjax.train import CorpusFeed, Options, Run, Step, load_plan, read_journal, save_plan, watch
from growjax.train.commands import STOPPED, describe, grow_checkpoint, operator_of
from growjax.train.planfile import read_plan
from growjax.values import to_dict
from tests.runs import every_kind, feed, plan, steps


ROOT = Path(gj.__file__).parents[1]
train: Any = trainer.train


@pytest.fixture(scope="module")
def run(tmp_path_factory, programs):
    """A whole run with its journal, stopped once on the way, and what was printed."""
    whole, folder, shown = every_kind(), tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    options = Options(evaluate_every=whole.flops / 4, held_out=4, save_every=2, keep_last=99)
    console = Console(file=shown, width=120, force_terminal=False)
    for times in range(2):
        records = train(whole, feed(whole), run=folder, options=options, cache=programs)
        for record in watch(records, whole, run=folder, console=console):
            if times == 0 and isinstance(record, trainer.Step) and record.step == 7:
                break  # as if killed: two steps after the last checkpoint
        records.close()
    return whole, folder, shown.getvalue()


# Journals ----------------------------------------------------------------------------------------


def test_a_journal_has_every_step_once_whatever_happened(run):
    whole, folder, _ = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in lines if row["kind"] == "step"]) > whole.steps  # gone over again
    rows = read_journal(folder)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(whole.steps))
    assert [row["step"] for row in rows if row["kind"] == "growth"] == [3, 9]
    assert rows[-1]["kind"] == "end" and rows[-1]["finished"] and "model" not in rows[-1]
    for row in steps:
        assert row["tokens_per_second"] > 0 and row["flops_per_second"] > 0
        assert "mfu" not in row  # nobody knows the peak of this machine


def test_a_line_that_was_copied_counts_once(run, tmp_path):
    lines = (run[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [row for row in read_journal(run[1]) if row["kind"] in ("step", "growth")]
    for kind in ("step", "growth"):
        doubled = [line * (2 if f'"kind": "{kind}"' in line else 1) for line in lines]
        (tmp_path / "metrics.jsonl").write_text("".join(doubled))
        assert [r for r in read_journal(tmp_path) if r["kind"] in ("step", "growth")] == rows


def test_a_line_that_was_cut_off_is_not_a_record(run, tmp_path):
    _, folder, _ = run
    text = (folder / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-20])
    assert read_journal(tmp_path)[-1]["kind"] != "end"
    (tmp_path / "metrics.jsonl").write_text("not a record\n" + text)
    with pytest.raises(
        DataError, match="metrics.jsonl:1: expected a record in JSON, got 'not a rec"
    ):
        read_journal(tmp_path)
    with pytest.raises(DataError, match="no journal of a run"):
        read_journal(tmp_path / "nowhere")


def test_a_line_that_was_copied_is_one_step(run, tmp_path):
    rows = read_journal(run[1])
    with Journal(tmp_path) as journal:
        for row in rows:
            for _ in range(1 + (row["kind"] == "step")):
                journal.add(row)
    assert read_journal(tmp_path) == rows


def test_progress_says_what_happens(run):
    _, folder, shown = run
    shown = re.sub(r"\s+", " ", shown)
    assert (
        "before step 3: mlp 16 to 24, kv_heads 2 to 4 by msg(mlp=24, heads=4) (exact)" in shown
        or ("kv_heads 2 to 4, mlp 16 to 24 by msg(mlp=24, heads=4) (exact)" in shown)
    )
    assert f"going on from {folder}/checkpoints/00000006-01, before step 6" in shown
    assert "tokens/s" in shown and "held-out" in shown


def test_the_peak_of_a_device_is_that_of_its_longest_name():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H200 SXM") == 989e12 and peak_flops("cpu") is None


def test_trackers_get_the_numbers_of_every_step(programs, monkeypatch, tmp_path):
    from growjax.runs import watch as watching

    seen: list[Any] = []

    class Fake:
        has = 0

        def __init__(self, run, plan):
            seen.append(("open", plan.name))

        def write(self, step, numbers):
            seen.append((step, numbers["loss"]))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(watching.TRACKERS, "tensorboard", Fake)
    p = plan(steps(2))
    records = train(p, feed(p), options=Options(held_out=4), cache=programs)
    done = list(watch(records, p, run=tmp_path, trackers=["tensorboard"]))
    expected = [(r.step, r.loss) for r in done if isinstance(r, trainer.Step)]
    assert seen == [("open", "tiny"), *expected, "closed"]
    with pytest.raises(TrainingError, match="trackers: expected some of tensorboard, wandb"):
        next(watch([], p, run=tmp_path, trackers=["clearml"]))


@pytest.mark.parametrize("hosts", [True, False])
def test_hosts_that_were_asked_to_stop_leave_together(monkeypatch, hosts):
    """The first to leave would be missed by the others, whom JAX then ends with a status of its own."""
    done: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["growjax", "train"])
    monkeypatch.setattr(app, "cli", lambda **_: STOPPED)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: hosts)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("together"))
    monkeypatch.setattr(os, "_exit", done.append)
    main()
    assert done == ["together"] * hosts + [STOPPED]


# Plans from files --------------------------------------------------------------------------------


def test_a_plan_comes_from_json_or_python_and_may_be_changed(tmp_path):
    save_plan(every_kind(), tmp_path / "plan.json")
    (tmp_path / "plan.py").write_text("from tests.runs import every_kind\nplan = every_kind()\n")
    for name in ("plan.json", "plan.py"):
        assert read_plan(tmp_path / name) == every_kind()
    changes = ["batch=2", "rate.peak=1e-3", "model.dtype=bfloat16", "stages.1.ramp=3"]
    changed = read_plan(tmp_path / "plan.json", changes)
    model: Any = changed.model
    assert (changed.batch, changed.rate.peak, model.dtype) == (2, 1e-3, "bfloat16")
    assert changed.stages[1].ramp == 3


CHANGES = {
    "batch": "expected a change like batch=16",
    "bach=2": "unknown field 'bach'; expected one of is, name, model",
    "stages.9.ramp=1": "unknown field '9'; expected one of 0, 1, 2",
    "batch.x=1": "unknown field 'x'; this value has no fields",
    "batch=-1": "batch: expected a positive integer",
    "model.layers=two": "layers: expected 0 or more layers",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_cannot_be_made_is_said(change, tmp_path):
    save_plan(every_kind(), tmp_path / "plan.json")
    with pytest.raises(GrowjaxError, match=CHANGES[change]):
        read_plan(tmp_path / "plan.json", [change])


def test_a_file_without_a_plan_is_said(tmp_path):
    (tmp_path / "plan.py").write_text("plan = 3\n")
    with pytest.raises(PlanError, match="expected it to define `plan`"):
        read_plan(tmp_path / "plan.py")
    with pytest.raises(PlanError, match="No such file"):
        read_plan(tmp_path / "nowhere.py")


BROKEN = {
    "import nothing_of_this_name\n": ":1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "plan = 1\nplan = 1 / 0\n": ":2: ZeroDivisionError: division by zero",
    "plan = (\n": ":1: SyntaxError: ",
    "raise SystemExit(3)\n": ":1: SystemExit: 3",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_fault_in_a_plans_file_is_said_with_its_line(text, tmp_path):
    (tmp_path / "plan.py").write_text(text)
    with pytest.raises(PlanError) as error:
        read_plan(tmp_path / "plan.py")
    assert str(error.value).startswith(f"{tmp_path / 'plan.py'}{BROKEN[text]}")


# Growing checkpoints -----------------------------------------------------------------------------


def test_operators_are_named_by_families_and_sizes():
    model = every_kind().spans[-1].model
    assert operator_of("msg", {"mlp": 32}, model) == gj.msg(mlp=32)
    both = operator_of("msg+stack", {"layers": 8, "mlp": 32, "heads": 4}, model)
    assert both == gj.chain(gj.msg(mlp=32, heads=4), gj.stack(layers=8))
    assert operator_of("msg", {"layers": 8}, model) == gj.msg(layers=8)
    with pytest.raises(GrowthError, match="nothing in 'stack' grows mlp"):
        operator_of("stack", {"mlp": 32}, model)
    with pytest.raises(GrowthError, match="expected some of msg, stack, copy, zeros, expand"):
        operator_of("double", {"mlp": 32}, model)


def test_a_grown_checkpoint_is_certified_and_computes_the_same(run, tmp_path):
    _, folder, _ = run
    source = folder / "checkpoints" / "00000018-02"
    before = {p.name: p.stat().st_mtime_ns for p in source.rglob("*")}
    # Of the run, which means its last checkpoint
    certificate = grow_checkpoint(gj.msg(mlp=32, embed=24), folder, tmp_path / "grown")
    assert certificate.passed and certificate.exactness == "exact"
    assert before == {p.name: p.stat().st_mtime_ns for p in source.rglob("*")}
    small, old = load_model(source)
    big, new = load_model(tmp_path / "grown")
    assert gj.sizes(big)["mlp"] == 32 and new["sizes"]["embed"] == 24
    assert new["births"]["embed"] == [[0, 16], [3, 8]] and old["births"]["embed"] == [[0, 16]]
    assert new["births"]["mlp"] == [[0, 16], [1, 8], [3, 8]]
    assert new["parent"] == "00000018-02" and len(new["operators"]) == len(old["operators"]) + 1
    tokens = jax.numpy.arange(8)
    np.testing.assert_allclose(small(tokens), big(tokens), atol=1e-4)
    with pytest.raises(CheckpointError, match="exists already"):
        grow_checkpoint(gj.msg(mlp=32), source, tmp_path / "grown")
    with pytest.raises(CheckpointError, match="its gates are at 0.75"):
        grow_checkpoint(gj.msg(mlp=32), folder / "checkpoints" / "00000006-01", tmp_path / "other")


class Wrong(gj.Operator):
    """Says that it changes nothing."""

    exactness = "exact"

    def maps(self, axes):
        return [gj.AxisMap("layers", np.array([0, 1, 2, 3, 3]))]


def test_a_growth_that_fails_its_certificate_writes_nothing(run, tmp_path):
    source = run[1] / "checkpoints" / "00000018-02"
    with pytest.raises(CheckpointError, match="does not do what it promises"):
        grow_checkpoint(Wrong(), source, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_inspect_tells_the_story_of_a_checkpoint(run):
    _, folder, _ = run
    shown = io.StringIO()
    describe(folder, Console(file=shown, width=200))
    text = shown.getvalue()
    for words in (
        "step 18, stage 2",
        "growth 1: grown by msg(mlp=24, heads=4), new are kv_heads 2-3; mlp 16-23",
        "growth 2: grown by stack(layers=4, order='top'), new are layers 2-3",
        "after 00000016-02",
        "blocks.block.mlp.up",
        "(4, 16, 24)",
    ):
        assert words in text
    with pytest.raises(CheckpointError, match="no such folder"):
        describe(folder / "nowhere", Console(file=shown))


# The page and the command line -------------------------------------------------------------------


def test_a_report_of_runs(run, tmp_path):
    whole, folder, _ = run
    text = write_report([folder], tmp_path / "page.html").read_text()
    last = [row for row in read_journal(folder) if row["kind"] == "step"][-1]
    assert f"{last['held_out']:.4f}" in text and text.count("<svg") == 5
    assert "stack and paths" in text and "mlp 16 to 24" in text and "exact" in text
    # Dollar signs are no formula, neither of the run nor of its stages
    named = dataclasses.replace(
        whole, stages=(steps(3, "$$"), steps(6, "a $x$ b"), *whole.stages[2:])
    )
    shutil.copytree(folder, tmp_path / "run $y$ $$", ignore=shutil.ignore_patterns("checkpoints"))
    save_plan(named, tmp_path / "run $y$ $$" / "plan.json")
    text = write_report([tmp_path / "run $y$ $$"], tmp_path / "page.html").read_text()
    assert all(f">{name}" in text for name in ("$$<", "a $x$ b<", "run $y$ $$"))
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "plan.json", tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="nothing was evaluated in it yet"):
        write_report([tmp_path / "empty"], tmp_path / "page.html")
    # The folder of a probe or of several plans
    with pytest.raises(PlanError, match="expected the folder of one run; in it are .*empty, .*run"):
        write_report([tmp_path], tmp_path / "page.html")


def growjax(*args: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "growjax", *map(str, args)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_train_from_the_command_line_and_go_on(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text(f"{n} times {n} is {n * n}. " * 40)
    whole = plan(steps(3), steps(2, batch=8), data=Text(str(text)))
    save_plan(whole, tmp_path / "plan.json")
    command = ("train", tmp_path / "plan.json", "--run", tmp_path / "run", "--held-out", 4)
    done = growjax(*command, JAX_COMPILATION_CACHE_DIR="")
    assert done.returncode == 0, done.stderr
    assert load_plan(tmp_path / "run" / "plan.json") == whole
    assert len([r for r in read_journal(tmp_path / "run") if r["kind"] == "step"]) == whole.steps
    lineage = read_lineage(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    assert lineage["step"] == whole.steps
    # What was compiled is next to the run, unless JAX was told of a folder
    assert any((tmp_path / "cache" / "programs").iterdir())
    wrong = growjax(
        "train", tmp_path / "plan.json", "--run", tmp_path / "run", "--change", "seed=1"
    )
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert wrong.stderr.startswith("growjax: ") and "plan.seed: was 0, is 1" in wrong.stderr


def test_several_cpu_devices_get_a_thread_each(monkeypatch):
    """With a thread for each of few cores a collective can wait for ever, until XLA ends the process."""
    seen = []
    monkeypatch.setattr(app, "cli", lambda **_: seen.append(os.environ.get("PJRT_NPROC")))
    monkeypatch.setattr(sys, "argv", ["growjax", "families"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=64")
    monkeypatch.setenv("PJRT_NPROC", "7")
    main()
    assert seen.pop() == "7", "the user's own number stays"
    for flags, devices, threads in [
        ("", "", None),
        ("--xla_force_host_platform_device_count=1", "", None),
        ("--xla_dump_to=x --xla_force_host_platform_device_count=64", "", "256"),
        ("", "128", "512"),
    ]:
        monkeypatch.delenv("PJRT_NPROC", raising=False)
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", devices)
        main()
        assert seen.pop() == threads


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} times {n} is {n * n}. " * 40)
    save_plan(plan(steps(100_000), data=Text(str(tmp_path / "text"))), tmp_path / "plan.json")
    # A shell that runs the tests in the background lets its children ignore Ctrl-C
    listening = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from growjax.cli import main; main()"
    )
    command = [sys.executable, "-c", listening, "train", "plan.json", "--run", "run"]
    journal = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b'"step"') > 20):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    last = Run(tmp_path / "run").checkpoint()
    out = re.sub(r"\s+", "", out)
    step = read_lineage(last)["step"]
    assert f"stoppedbySIGINTbeforestep{step}of100000;savedin" in out and last.name in out, out
    assert "Thesamecommandgoesonfromthere" in out and not (tmp_path / "run" / "lock").exists()
    rows = read_journal(tmp_path / "run")
    assert rows[-1] == rows[-1] | {"kind": "end", "finished": False, "signal": "SIGINT"}
    assert [r["step"] for r in rows if r["kind"] == "step"] == list(range(step))


def test_rho_from_the_command_line_takes_its_second_model_from_a_run(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} times {n} is {n * n}. " * 40)
    data = Text(str(tmp_path / "text"))
    plain, chosen = plan(steps(2), data=data), plan(steps(2, select=RhoLoss()), data=data, seed=1)
    save_plan(plain, tmp_path / "plain.json")
    save_plan(chosen, tmp_path / "chosen.json")
    command = ["train", tmp_path / "chosen.json", "--run", tmp_path / "b", "--held-out", 4]
    alone = growjax(*command)
    assert alone.returncode == 1 and "--reference FOLDER" in alone.stderr
    first = growjax("train", tmp_path / "plain.json", "--run", tmp_path / "a", "--held-out", 4)
    done = growjax(*command, "--reference", tmp_path / "a")
    assert first.returncode == 0 and done.returncode == 0, first.stderr + done.stderr
    losses = [r["loss"] for r in read_journal(tmp_path / "b") if r["kind"] == "step"]
    reference = load_model(tmp_path / "a")[0]
    corpus = CorpusFeed.of(chosen, tmp_path / "cache")
    again = train(chosen, corpus, options=Options(held_out=4), reference=reference)
    assert losses == [r.loss for r in again if isinstance(r, Step)]


def test_every_command_explains_itself(capsys):
    for command in "demo prepare plan train calibrate grow certify inspect families report".split():
        with pytest.raises(SystemExit) as stop:
            app.cli(prog="growjax", args=[command, "--help"])
        assert stop.value.code == 0 and "usage: growjax" in capsys.readouterr().out


def test_a_plan_is_shown_before_it_runs(tmp_path, capsys):
    save_plan(every_kind(), tmp_path / "plan.json")
    shown = growjax("plan", tmp_path / "plan.json", "--devices", 4)
    assert shown.returncode == 0, shown.stderr
    assert "stack and paths" in shown.stdout and "exact" in shown.stdout
    save_plan(dataclasses.replace(plan(steps(1)), name="tiny [v2]"), tmp_path / "names.json")
    # The rest in this process: another takes seconds to begin
    out = tmp_path / "written.json"
    of = ["plan", str(tmp_path / "names.json"), "--change", "seed=7", "--out", str(out)]
    app.cli(prog="growjax", args=of)
    printed = capsys.readouterr().out
    assert "tiny [v2]: " in printed and " 1 device: " in printed
    assert load_plan(out).seed == 7 and load_plan(out).name == "tiny [v2]"
    changed = ["--devices", "4", "--change", "layout.fsdp=3"]
    refused = tmp_path / "refused.json"
    with pytest.raises(GrowjaxError, match="4 devices"):
        app.cli(
            prog="growjax",
            args=["plan", str(tmp_path / "plan.json"), *changed, "--out", str(refused)],
        )
    assert not refused.exists()


def test_a_warning_is_a_message_without_a_line_of_code(monkeypatch, capsys):
    def warned(**_: Any) -> None:
        warnings.showwarning(UserWarning("books: is gone"), UserWarning, "a.py", 1)

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # and put it back
    monkeypatch.setattr("growjax.cli.app", types.SimpleNamespace(cli=warned))
    monkeypatch.setattr(sys, "argv", ["growjax", "train"])
    main()
    assert capsys.readouterr().err == "growjax: warning: books: is gone\n"


def test_what_is_printed_is_what_is_saved(run):
    whole, folder, _ = run
    assert to_dict(load_plan(folder / "plan.json")) == to_dict(whole)
