"""What a person sees of a run: on a terminal, in a narrow one, and where there is none."""

import dataclasses
import io
import re
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import train as trainer
from growjax.errors import TrainingError
from growjax.runs import progress
from growjax.runs import watch as watching
from growjax.runs.doing import Doing
from growjax.runs.journal import Rates
from growjax.train import Begin, End, HeldOut, Options, Saved, Stage, Step, watch
from growjax.values.names import allow_option
from tests.runs import TOKENS, feed, plan, steps


train: Any = trainer.train
NAMES = ("[v2]", "x [/y]", "[bold]$$[/bold]")


def console(width: int = 120, terminal: bool = False) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    # A terminal that takes no colours: what is drawn is what is read
    return Console(file=shown, width=width, force_terminal=terminal, color_system=None), shown


def step(n: int, **changes: Any) -> Step:
    fields: dict[str, Any] = dict(
        stage=0, step=n, tokens=TOKENS * (n + 1), flops=n + 1, spent=n + 1.0, seconds=n + 1.0
    )
    fields |= dict(rate=1e-3, level=1.0, loss=2.5, gradient_norm=1.0, parameter_norm=1.0)
    fields |= dict(took=1.0, waited=0.0)
    fields |= changes
    return Step(**fields)


# Names are never markup -------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_shown_as_they_are(programs, tmp_path, terminal):
    of = plan(*(steps(1, name) for name in NAMES))
    to, shown = console(terminal=terminal)
    running = train(of, feed(of), run=tmp_path, options=Options(held_out=4), cache=programs)
    list(watch(running, of, run=tmp_path, console=to))
    assert "finished: 3 steps" in re.sub(r"\s+", " ", shown.getvalue())
    if terminal:
        assert all(name[:14] in shown.getvalue() for name in NAMES)


# Widths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bars_and_numbers_fit(width):
    of = plan(steps(400, "the first of all"), steps(100_000, "deep", grow=gj.stack(layers=4)))
    to, _ = console(width, terminal=True)
    view = progress.Progress(of, to, None, None)
    row = {"tokens_per_second": 1_234_567.0, "flops_per_second": 1e9, "mfu": 0.41}
    view.show(step(299, held_out=2.25), row)
    view._busy("compiling a training step")
    with to.capture() as capture:
        to.print(view)
    lines = capture.get().splitlines()
    assert len(lines) == 4 and all(len(line) <= width for line in lines)
    first, second, numbers, busy = lines
    assert first.startswith("the first of a") and "300/400" in first and "0/100000" in second
    # There is a bar in it, three quarters of it full
    assert first.count("━") >= 6 and "━" not in second
    assert "loss 2.5000  held-out 2.2500  1,234,567 tokens/s  MFU 41%" in numbers
    assert "compiling a training step" in busy


def test_many_stages_are_shown_around_the_one_that_trains():
    of = plan(*(steps(1, f"stage {n}") for n in range(30)))
    to, _ = console(terminal=True)
    view = progress.Progress(of, to, None, None)
    for n in range(22):
        view.show(step(n, stage=n), {})
    with to.capture() as capture:
        to.print(view)
    lines = capture.get().splitlines()
    assert len(lines) == progress.ROWS + 1 and any("stage 21" in line for line in lines)


def test_large_imports_come_before_the_display(monkeypatch, tmp_path):
    """Its thread would meet modules that are half imported, and die."""
    order: list[str] = []
    real = watching.importlib.import_module
    monkeypatch.setattr(
        watching.importlib, "import_module", lambda name: order.append(name) or real(name)
    )
    enter = progress.Progress.__enter__
    monkeypatch.setattr(
        progress.Progress, "__enter__", lambda self: order.append("display") or enter(self)
    )
    list(watch([], plan(steps(1)), run=tmp_path, console=console(terminal=True)[0]))
    assert order == ["growjax.data.pipeline", "growjax.runs.saves", "display"]


# Rates --------------------------------------------------------------------------------------------


def test_rates_are_over_some_seconds_and_not_of_one_lap():
    of = plan(steps(200))
    rates, shown = Rates(of), []
    for n in range(200):
        # As the host sees steps of a tenth of a second: one late, the next at once
        rates.add(step(n, took=0.2 if n % 2 == 0 else 1e-6))
        shown.append(rates.of(1)["tokens_per_second"])
    true = TOKENS / 0.1
    assert all(abs(x / true - 1) < 0.02 for x in shown[50:]) and max(shown) < 1.1 * true
    # A change is seen once the window has passed
    for n in range(60):
        rates.add(step(n, took=1.0))
    assert rates.of(1)["tokens_per_second"] == pytest.approx(TOKENS)
    assert rates.of(1)["flops_per_second"] == pytest.approx(of.spans[0].flops[0])
    assert Rates(of).of(1) == {}


# Words --------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_every_so_often():
    now = [0.0]
    of = plan(steps(200))
    shown = io.StringIO()
    to = Console(file=shown, width=200, force_terminal=False, get_time=lambda: now[0])
    with progress.Progress(of, to, None, None) as view:
        for n in range(100):
            now[0] += 1.0
            view.show(step(n, held_out=2.0 if n == 50 else None), {"flops_per_second": 1.0})
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("step ")]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [30, 51, 81]
    assert "held-out 2.0000" in lines[1] and lines[1].endswith("left")


def test_lines_are_not_wrapped_without_a_terminal():
    """Whoever searches a log finds a sentence whole; on a terminal it is wrapped between words."""
    text = "finished already: a checkpoint with a long path is after the last step"
    for terminal in (False, True):
        shown = io.StringIO()
        to = Console(file=shown, width=40, force_terminal=terminal)
        progress.Progress(plan(steps(2)), to, None, None).say(text)
        assert (text in shown.getvalue()) == (not terminal)


def test_what_takes_long_is_named(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    of, doing = plan(steps(2)), Doing()
    to, shown = console()
    with progress.Progress(of, to, None, doing):
        with doing("reading the text"):
            pass  # too short to be named
        with doing("compiling a step"):
            time.sleep(0.3)
        with doing("outer"), doing("inner"):
            assert doing.now == "inner"
        assert doing.now == ""
    assert shown.getvalue().splitlines() == ["compiling a step ..."]
    assert not doing.listeners


def test_what_is_done_in_several_pieces_is_named_once_until_a_record(monkeypatch):
    """As the programs of one growth are compiled, some of them within the fit of its operator."""
    monkeypatch.setattr(progress, "PATIENCE", 0.04)
    of, doing = plan(steps(2)), Doing()
    to, shown = console()
    with progress.Progress(of, to, None, doing) as view:
        for n in range(2):
            with doing("fitting"):
                for _ in range(3):
                    with doing("compiling the growth"):
                        time.sleep(0.06)
            view.show(step(n), {})
        # Pieces that are short by themselves are long together
        for _ in range(8):
            with doing("saving"):
                time.sleep(0.02)
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if "growth" in line] == ["compiling the growth ..."] * 2
    assert lines.count("fitting ...") <= 2 and lines.count("saving ...") == 1


def test_how_far_a_long_activity_is(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.05)
    of, doing = plan(steps(2)), Doing()
    to, shown = console()
    with progress.Progress(of, to, None, doing) as view, doing("reading the text"):
        for done in ("10%", "60%"):
            doing.detail = f"tokenising books: {done}"
            until = time.monotonic() + 20
            while done not in shown.getvalue() and time.monotonic() < until:
                time.sleep(0.01)
        terminal, drawn = console(terminal=True)
        terminal.print(view)
    assert "tokenising books: 60%" in drawn.getvalue()
    lines = list(dict.fromkeys(shown.getvalue().splitlines()))
    assert lines == ["tokenising books: 10% ...", "tokenising books: 60% ..."]
    # The next activity begins without
    assert doing.detail == ""


def test_a_run_says_what_it_does_between_its_records(programs, tmp_path):
    of = plan(steps(2), steps(2, grow=gj.stack(layers=4, order="top")))
    seen: list[str] = []
    options = Options(held_out=4, background=False)
    for _ in range(2):
        running = trainer.train(of, feed(of), run=tmp_path, options=options)
        running.doing.listeners.append(seen.append)
        list(running)
        seen.append("---")
    first, second = " | ".join(seen).split("---")[:2]
    for words in ("reading the text", "compiling the birth", "compiling a training step"):
        assert words in first
    for words in ("compiling the growth", "evaluating", "saving", "writing the last checkpoint"):
        assert words in first
    assert f"restoring {tmp_path}" in second and "compiling the birth" not in second


# The last words -------------------------------------------------------------------------------------


def ended(*records: Any, of: Any = None) -> str:
    of = plan(steps(4)) if of is None else of
    to, shown = console(200)
    with progress.Progress(of, to, "runs/first", None) as view:
        for record in records:
            view.show(record, {})
    return shown.getvalue()


def test_the_end_says_the_loss_where_and_what_next():
    held_out = HeldOut(np.full(4096, 1.0), np.full(4096, 0.5))
    end = End(None, True, 1, 0.0, 0.0, step=4, held_out=held_out)
    text = ended(Begin(0, 0, None, 1), step(3), end)
    assert "finished: 4 steps, loss 2.5000" in text
    assert "held-out loss 2.0000 over 4,096 windows" in text
    assert "the run is in runs/first; next: growjax report runs/first" in text


def test_the_next_command_allows_the_packages_that_this_one_allowed(monkeypatch):
    monkeypatch.setattr("growjax.values.names._allowed", {"my_pkg", "another"})
    text = ended(Begin(0, 0, None, 1), step(3), End(None, True, 1, 0.0, 0.0, step=4))
    assert "next: growjax report runs/first --allow another my_pkg" in text


@gj.register
@dataclasses.dataclass(frozen=True)
class Mine:
    """A source of somebody's own."""

    def documents(self):
        yield from ()

    def fingerprint(self):
        return "mine"


def test_the_next_command_allows_the_packages_of_the_plan():
    text = ended(End(None, True, 1, 0.0, 0.0, step=4), of=plan(steps(4), data=Mine()))
    package = __name__.partition(".")[0]
    assert f"next: growjax report runs/first --allow {package}\n" in text
    function = {"is": "function", "name": "own.losses:focal"}
    data = {
        "is": "growjax:Plan",
        "name": "a: b",
        "stages": [{"loss": function}],
        "rate": {"is": "b:R"},
    }
    assert allow_option(data) == " --allow b own"


def test_a_finished_run_says_so():
    text = ended(Begin(0, 4, "runs/first/checkpoints/00000004-00", 1), End(None, True, 1, 0.0, 0.0))
    assert text.startswith("finished already: ") and "going on" not in text


def test_a_stopped_run_says_how_to_go_on():
    end = End(None, False, 1, 0.0, 0.0, step=2, signal="SIGINT")
    text = ended(Begin(0, 0, None, 1), Saved(0, 2, "runs/first/checkpoints/00000002-00"), end)
    assert text == (
        "stopped by SIGINT before step 2 of 4; saved in runs/first/checkpoints/00000002-00. The same "
        "command goes on from there\n"
    )


def test_notes_are_said():
    text = ended(Begin(0, 0, None, 1, ("took over [from] x",)))
    assert text == "note: took over [from] x\n"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SystemExit(1)])
def test_a_run_does_not_end_with_its_display(error):
    """The error of a terminal that was closed, and that of Rich where the reader of a pipe is gone."""
    to, shown = console(terminal=True)

    def gone(text: str) -> int:
        raise error

    with progress.Progress(plan(steps(4)), to, None, None) as view:
        shown.write = gone
        view.show(Begin(0, 2, "runs/first/checkpoints/00000002-00", 1), {})
        view.show(step(3), {})
    assert to.quiet


def test_an_empty_name_has_a_number():
    of = plan(Stage(tokens=TOKENS))
    to, _ = console(terminal=True)
    with to.capture() as capture:
        to.print(progress.Progress(of, to, None, None))
    assert "stage 0" in capture.get()


# Trackers ----------------------------------------------------------------------------------------


class EventsWriter:
    """That of `tensorboardX`: its events are in the file once it is closed."""

    files: list[list[Any]] = []

    def __init__(self, path: str, suffix: str):
        self.events: list[Any] = []

    def write_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.files.append(self.events)


@pytest.fixture
def tensorboard(monkeypatch):
    """The files that TensorBoard reads, and a session of a run that writes to it."""
    modules = {
        "tensorboardX.event_file_writer": types.SimpleNamespace(EventsWriter=EventsWriter),
        "tensorboardX.summary": types.SimpleNamespace(scalar=lambda *scalar: scalar),
        "tensorboardX.proto.event_pb2": types.SimpleNamespace(Event=dict, SessionLog=SessionLog),
    }
    monkeypatch.setattr(watching, "_library", modules.__getitem__)
    monkeypatch.setattr(EventsWriter, "files", [])

    def session(run: Path, first: int, stop: int, *end: End) -> None:
        begin = Begin(0, first, "runs/first" if first else None, 1)
        records = [begin, *(step(n, loss=float(n)) for n in range(first, stop)), *end]
        list(watch(records, plan(steps(9)), run=run, trackers=["tensorboard"]))

    return EventsWriter.files, session


class SessionLog(dict[str, Any]):
    START = 1


def displayed(files: list[list[Any]]) -> list[int]:
    """The steps that TensorBoard shows: a session replaces those from its first one on."""
    shown: list[int] = []
    for events in files:
        for event in events:
            if "session_log" in event:
                shown = [n for n in shown if n < event["step"]]
            elif event["summary"][0] == "loss":
                assert event["summary"][1] == event["step"]
                shown.append(event["step"])
    return shown


def test_tensorboard_has_every_step_once_though_the_run_was_killed(tensorboard, tmp_path):
    files, session = tensorboard
    stopped, finished = End(None, False, 1, 0.0, 0.0, step=3), End(None, True, 1, 0.0, 0.0, step=9)
    session(tmp_path, 0, 3, stopped)
    closed = (tmp_path / "tensorboard" / "steps").read_text()
    # Two that were killed: the numbers of one were written, those of the other were not
    session(tmp_path, 3, 6)
    session(tmp_path, 5, 8)
    files.pop()
    (tmp_path / "tensorboard" / "steps").write_text(closed)
    assert displayed(files) == [0, 1, 2, 3, 4, 5]
    session(tmp_path, 6, 9, finished)
    assert displayed(files) == list(range(9))
    # Only what may be missing is written again
    assert files[-1][0]["step"] == 3
    session(tmp_path, 9, 9, finished)
    assert len(files) == 3


def test_a_tracker_that_begins_later_gets_what_was_before(tensorboard, tmp_path):
    files, session = tensorboard
    list(watch([Begin(0, 0, None, 1), step(0), step(1)], plan(steps(9)), run=tmp_path))
    session(tmp_path, 2, 4, End(None, False, 1, 0.0, 0.0, step=4))
    assert files[0][0]["step"] == 0 and [e["step"] for e in files[0] if "summary" in e][-1] == 3


def test_a_session_without_a_tracker_is_caught_up(tensorboard, tmp_path):
    """Though it came to its end, and after one that had the tracker."""
    files, session = tensorboard
    ends = [End(None, False, 1, 0.0, 0.0, step=n) for n in range(10)]
    session(tmp_path, 0, 3, ends[3])
    without = [Begin(0, 3, "runs/first", 1), step(3, loss=3.0), step(4, loss=4.0), ends[5]]
    list(watch(without, plan(steps(9)), run=tmp_path))
    session(tmp_path, 5, 9, ends[9])
    assert displayed(files) == list(range(9)) and files[-1][0]["step"] == 3


def test_the_error_of_a_tracker_names_it(tensorboard, tmp_path, monkeypatch):
    """As of a disk that is full, on which closing it fails too."""
    _, session = tensorboard

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    monkeypatch.setattr(EventsWriter, "close", full)
    with pytest.raises(TrainingError, match="tracker tensorboard: .*No space left on device"):
        session(tmp_path, 0, 2)


def test_weights_and_biases_gets_what_its_server_lacks(tmp_path, monkeypatch):
    logged: list[int] = []

    class Run(types.SimpleNamespace):
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append(step)

        def finish(self) -> None:
            pass

    server = Run(step=2)
    library = types.SimpleNamespace(init=lambda **_: server)
    monkeypatch.setattr(watching, "_library", lambda _: library)
    list(watch([Begin(0, 0, None, 1), step(0), step(1), step(2)], plan(steps(9)), run=tmp_path))
    for has, steps_sent in ((2, [2, 3, 4]), (5, [])):
        server.step = has
        records = [Begin(0, 3, "runs/first", 1), step(3), step(4)]
        logged.clear()
        list(watch(records, plan(steps(9)), run=tmp_path, trackers=["wandb"]))
        assert logged == steps_sent
