"""A run that is asked to stop saves and ends, whenever that is: Ctrl-C, SIGTERM, a closed terminal."""

import contextlib
import dataclasses
import gc
import io
import os
import signal
import time
from typing import Any

import pytest
from rich.console import Console

from growjax import train as trainer
from growjax.programs.ahead import Ahead
from growjax.runs import checkpoint
from growjax.train import Begin, End, Options, Plan, Run, Saved, Step, commands
from growjax.train.stop import Stop
from tests.runs import feed, plan, same, steps


train: Any = trainer.train  # tests know which record comes where; the checker does not


def test_a_signal_saves_and_ends_and_the_run_goes_on(run, programs, tmp_path):
    whole, seen = run[0], []
    for record in train(whole, feed(whole), run=tmp_path, cache=programs):
        seen.append(record)
        if isinstance(record, Step) and record.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not seen[-1].finished and isinstance(seen[-2], Saved)
    last = seen[-2].step
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and 5 <= last <= 7
    records = list(train(whole, feed(whole), run=tmp_path, cache=programs))
    assert records[0].step == last and same(records, run[1])


def test_a_signal_at_the_first_record_is_caught(run, programs, tmp_path):
    """While whoever reads the records still opens its trackers."""
    whole, seen = run[0], []
    for record in train(whole, feed(whole), run=tmp_path, cache=programs):
        seen.append(record)
        if isinstance(record, Begin):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)
    assert not seen[-1].finished and seen[-1].signal == "SIGTERM"
    assert not any(isinstance(record, Step) for record in seen)


def test_a_run_that_is_over_stays_over(run, programs, tmp_path, monkeypatch):
    """A signal after its last record, while it is closed, is no end of another kind."""
    whole, close = run[0], Ahead.close

    def closed(self: Ahead) -> None:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Ahead, "close", closed)
    records = train(whole, feed(whole), run=tmp_path, cache=programs)
    *_, end = records
    assert end.finished and records.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loop_that_is_left_gives_back_signals_and_folder_at_once(run, programs, tmp_path):
    """With nothing left that holds the records, whenever garbage is collected next."""
    whole = run[0]
    before = signal.getsignal(signal.SIGTERM)
    gc.collect()
    gc.disable()
    try:
        for record in train(whole, feed(whole), run=tmp_path, cache=programs):
            if isinstance(record, Step):
                break
        assert signal.getsignal(signal.SIGTERM) == before
        assert not (tmp_path / "lock").exists()
    finally:
        gc.enable()


def test_a_signal_while_a_run_closes_keeps_the_next_from_starting(monkeypatch, tmp_path):
    """In a tree of plans, where a run that is over is not all that there is to do."""
    started: list[str] = []

    class Over(list[End]):
        signal = "SIGTERM"

    def over(of: Plan, **_: Any) -> Over:
        started.append(of.name)
        return Over([End(None, True, 0, 0.0, 0.0)])

    monkeypatch.setattr(commands, "train", over)
    options, console = Options(), Console(file=io.StringIO())
    plans = [dataclasses.replace(plan(steps(n)), name=str(n)) for n in (2, 3)]
    assert commands.train_plans(plans, tmp_path, options, console=console) == commands.STOPPED
    assert started == ["2"]
    # After the last one there is nothing left
    assert commands.train_plans(plans[:1], tmp_path, options, console=console) == 0


def test_ctrl_c_while_a_checkpoint_is_read_is_not_lost(run, monkeypatch):
    """Orbax's event loop prints whatever its callbacks raise, and goes on."""
    path, real = Run(run[2]).checkpoint(), checkpoint.ocp.metadata

    def metadata(*args: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs
        return real(*args)

    monkeypatch.setattr(checkpoint.ocp, "metadata", metadata)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            checkpoint.read_lineage(path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_terminal_that_is_closed_asks_once_however_often():

    def ends(*_: Any) -> None:
        raise AssertionError("the terminal has ended the run")

    before = signal.signal(signal.SIGHUP, ends)
    try:
        with Stop(enabled=True) as stop:
            stop.catch()
            assert not stop.before(1)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.before(1) and stop.signal == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) is ends
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_is_evaluated_though_the_run_is_asked_to_stop(run, programs, tmp_path, monkeypatch):
    """While the evaluation is compiled: a run that goes on does not come back to the step."""
    whole, get = run[0], Ahead.get

    def stopped(self: Ahead, need: Any, meanwhile: Any = None) -> Any:
        if need[0] == "evaluate":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler runs
        return get(self, need, meanwhile)

    monkeypatch.setattr(Ahead, "get", stopped)
    options = Options(evaluate_at=(1,), held_out=6, background=False)
    first = list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    (last,) = [r for r in first if isinstance(r, Step) and r.held_out is not None]
    assert not first[-1].finished and first[-1].step == last.step + 1
    monkeypatch.undo()
    records = list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    assert records[0].step == last.step + 1 and same([*first[:-1], *records], run[1])
