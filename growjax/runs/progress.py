"""The display of a run: a bar for each stage on a terminal, and lines of text elsewhere.

Names come from plans and paths, and may hold brackets, which Rich reads as markup: all text is printed
as `Text`, without markup.
"""

import contextlib
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from growjax.plan.plan import Plan
from growjax.runs.doing import Doing
from growjax.runs.records import Begin, End, Ended, Growth, Record, Saved, Step
from growjax.values import allow_option, to_dict


EVERY = 30.0  # seconds between two lines of loss, without a terminal
PATIENCE = 1.5  # seconds before an activity such as compiling is printed, without a terminal
ROWS = 10  # the most stages that are shown at once


class Progress:
    """Shows the records of one run; use it in a `with`.

    **Arguments**

    - `run`: the folder that the last lines name, or None.
    - `doing`: the activity of the run between records (`Training.doing`), or None.
    """

    def __init__(self, plan: Plan, console: Console, run: str | Path | None, doing: Doing | None):
        self.console, self.run, self.doing = console, run, doing
        self.done = [0] * len(plan.spans)  # steps of each stage
        self.follow(plan)
        self.stage = 0
        self.line = ""  # the numbers of the last step
        self.held_out = ""
        self.speed: float | None = None  # FLOPs a second
        self.activity = ""  # the current activity
        # The activities since the last record: when each began first, and those that were printed. The
        # programs of a growth are compiled one after the other, under the same words.
        self.since: dict[str, float] = {}
        self.announced: set[str] = set()
        self.saved: str | None = None  # the last checkpoint
        self.complete = False  # whether the run was finished before this session
        self._printed = console.get_time()  # the time of the last line of loss
        self._timer: threading.Timer | None = None
        self._live: Live | None = None  # only on a terminal

    def follow(self, plan: Plan) -> None:
        """Show this plan from now on, in which a trigger has ended a stage."""
        self.plan = plan
        # Of each stage, the FLOPs that are left after 0, 1, ... of its steps
        self.flops_left = [_remaining(span.flops) for span in plan.spans]

    def __enter__(self) -> "Progress":
        if self.doing is not None:
            self.doing.listeners.append(self._busy)
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=8)
            self._live.start()
            # `Live` hides the cursor. It is shown again, since a signal that ends the process at once
            # would leave the terminal without one.
            self.console.show_cursor(True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.doing is not None:
            self.doing.listeners.remove(self._busy)
        self._busy("")
        if self._live is not None:
            with self._drawing():
                self._live.stop()

    # Printed lines --------------------------------------------------------------------------

    def show(self, record: Record, row: dict[str, Any]) -> None:
        """Show one record; `row` is its row in the journal, with the rates of a step."""
        self.since.clear()
        self.announced.clear()
        if isinstance(record, Step):
            self._step(record, row)
        elif isinstance(record, Begin):
            self._begin(record)
        elif isinstance(record, Growth):
            grew = ", ".join(f"{axis} {a} to {b}" for axis, (a, b) in record.grew.items())
            c = record.crossing
            if c.fit is not None and c.fit.batches:
                first, last = c.fit.losses[0], c.fit.losses[-1]
                self.say(f"fitted to {c.fit.batches} batches: loss {first:.4f} to {last:.4f}")
            self.say(
                f"before step {record.step}: {grew} by {c.operator} ({c.exactness}); loss {c.before:.5f} "
                f"to {c.after:.5f}; stood still for {record.stall:.2f} s, {record.compile_wait:.2f} of "
                "them compiling"
            )
        elif isinstance(record, Ended):
            numbers = ", ".join(f"{name} {number:.5f}" for name, number in record.numbers.items())
            self.say(f"after step {record.step}: {record.trigger} ended the stage ({numbers})")
        elif isinstance(record, Saved):
            self.saved = record.path
        elif isinstance(record, End):
            self._end(record)

    def say(self, text: str) -> None:
        """Print a line; on a terminal, above the bars. Elsewhere lines are searched, and not wrapped."""
        with self._drawing():
            self.console.print(Text(text), highlight=False, soft_wrap=not self.console.is_terminal)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Show nothing from now on if the terminal, or the reader of a pipe, is gone.

        A run does not end with its display: Ctrl-C ends the `tee` of `growjax train | tee log` first.
        """
        try:
            yield
        except (OSError, SystemExit):
            # Rich asks the process to exit where a pipe was closed
            self.console.quiet = True

    def _begin(self, record: Begin) -> None:
        for note in record.notes:
            self.say(f"note: {note}")
        if record.resumed is None:
            return
        for span in self.plan.spans:
            self.done[span.index] = min(max(record.step - span.start, 0), span.steps)
        self.stage, self.saved = record.stage, record.resumed
        self.complete = record.step == self.plan.steps
        if record.forked is not None:
            self.say(f"forked from {record.resumed}, before step {record.step}")
            return
        if self.complete:
            self.say(f"finished already: {record.resumed} is after the last of {record.step} steps")
        else:
            self.say(f"going on from {record.resumed}, before step {record.step}")

    def _step(self, record: Step, row: dict[str, Any]) -> None:
        span = self.plan.spans[record.stage]
        self.stage, self.done[span.index] = span.index, record.step - span.start + 1
        if record.held_out is not None:
            self.held_out = f"  held-out {record.held_out:.4f}"
        speed = f"  {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
        mfu = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
        self.speed = row.get("flops_per_second")
        self.line = f"loss {record.loss:.4f}{self.held_out}{speed}{mfu}"
        now = self.console.get_time()
        # The time may also have gone backwards, if the clock was set
        due = record.held_out is not None or not 0 <= now - self._printed < EVERY
        if self._live is None and due:
            self._printed = now
            left = "" if self.speed is None else f"  {_duration(self._seconds_left())} left"
            self.say(f"step {record.step + 1}/{self.plan.steps}  {self.line}{left}")

    def _end(self, record: End) -> None:
        steps = self.plan.steps
        if not record.finished:
            where = "" if self.run is None else f"; saved in {self.saved or self.run}"
            self.say(
                f"stopped by {record.signal or 'request'} before step {record.step} of {steps}{where}. "
                "The same command goes on from there"
            )
            return
        if not self.complete:
            loss = f", {self.line}" if self.line else ""
            self.say(f"finished: {steps} steps{loss}")
        if record.held_out is not None:
            self.say(
                f"held-out loss {record.held_out.loss:.4f} over {record.held_out.windows:,} windows"
            )
        if self.run is not None:
            run, allowed = shlex.quote(str(self.run)), allow_option(to_dict(self.plan))
            self.say(f"the run is in {self.run}; next: growjax report {run}{allowed}")

    # The live display -----------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        """The bars, the numbers of the last step, and the current activity."""
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.add_column(no_wrap=True, max_width=14, overflow="ellipsis")
        bars.add_column(ratio=1, min_width=6)
        bars.add_column(no_wrap=True, justify="right")
        bars.add_column(no_wrap=True, justify="right")
        # The current stage stands in the middle of the rows, except near both ends of the plan
        first = max(min(self.stage - ROWS // 2, len(self.plan.spans) - ROWS), 0)
        for span in self.plan.spans[first : first + ROWS]:
            name, done = span.stage.name or f"stage {span.index}", self.done[span.index]
            left = self.flops_left[span.index][done]
            bars.add_row(
                Text(name[:14]),
                ProgressBar(span.steps, done),
                Text(f"{done}/{span.steps}"),
                Text(_duration(left / self.speed) if self.speed and left else ""),
            )
        lines: list[RenderableType] = [bars]
        if self.line:
            lines.append(Text(self.line))
        if self.activity:
            now = self.console.get_time()
            seconds = max(now - self.since.get(self.activity, now), 0.0)
            words = self._words()
            text = f"{words} ({seconds:.0f} s)" if seconds >= 1 else words
            lines.append(Spinner("dots", Text(text)))
        return Group(*lines)

    def _seconds_left(self) -> float:
        """Seconds of training that are left, at the current speed."""
        flops = sum(float(left[n]) for left, n in zip(self.flops_left, self.done, strict=True))
        return flops / self.speed if self.speed else 0.0

    def _busy(self, activity: str) -> None:
        """Take the new activity of the run; without a terminal, print it after `PATIENCE` seconds.

        It is printed once until the next record, however often it ends and begins again.
        """
        now = self.console.get_time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.activity = activity
        if not activity:
            return
        began = self.since.setdefault(activity, now)
        if self._live is None:
            announced = activity in self.announced
            self._remind(activity, EVERY if announced else max(began + PATIENCE - now, 0.0))

    def _remind(self, activity: str, seconds: float) -> None:
        """Print an activity if it still lasts after some seconds, and then every `EVERY` seconds."""

        def remind() -> None:
            if self.activity != activity:
                return
            # One that does not tell how far it is would print the same line again
            detailed = self.doing is not None and bool(self.doing.detail)
            if detailed or activity not in self.announced:
                self.say(f"{self._words()} ...")
                self.announced.add(activity)
            if detailed:
                self._remind(activity, EVERY)

        self._timer = threading.Timer(seconds, remind)
        self._timer.daemon = True
        self._timer.start()

    def _words(self) -> str:
        """The current activity, and how far it is."""
        return (self.doing.detail if self.doing is not None else "") or self.activity


def _remaining(terms: tuple[int, ...]) -> np.ndarray:
    """The rest of a sum after 0, 1, ... of its terms, for plans of millions of steps."""
    done = np.cumsum([0.0, *terms])
    return done[-1] - done


def _duration(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
