"""What a person sees of a run: a bar a stage on a terminal, a line every so often elsewhere.

Names come from plans and paths, so nothing here is markup: all text is printed as it is.
"""

import threading
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
from growjax.runs.records import Begin, End, Growth, Record, Saved, Step


EVERY = 30.0  # seconds between two lines of loss where there is no terminal
PATIENCE = 1.5  # seconds that something may take there before it is named
ROWS = 10  # stages that are shown at once


class Progress:
    """Shows the records of one run; use it in a `with`.

    **Arguments**

    - `run`: the folder that closing words point to, or None.
    - `doing`: what the run does between records (`Training.doing`), or None.
    """

    def __init__(self, plan: Plan, console: Console, run: str | Path | None, doing: Doing | None):
        self.plan, self.console, self.run = plan, console, run
        self.doing = doing
        self.done = [0] * len(plan.spans)
        # FLOPs of each stage that are left after so many of its steps
        self.after = [_left_after(span.flops) for span in plan.spans]
        self.stage = 0
        self.line = ""  # the numbers of the last step
        self.held_out = ""
        self.speed: float | None = None  # FLOPs a second
        self.words, self.since = "", 0.0  # what is being done, and from when on
        self.saved: str | None = None
        self.complete = False  # the run was finished before this session
        self._printed = console.get_time()
        self._timer: threading.Timer | None = None
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.doing is not None:
            self.doing.listeners.append(self._busy)
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=8)
            self._live.start()
            # A signal that ends the process at once must not leave the terminal without a cursor
            self.console.show_cursor(True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.doing is not None:
            self.doing.listeners.remove(self._busy)
        self._busy("")
        if self._live is not None:
            self._live.stop()

    # What is said ---------------------------------------------------------------------------

    def show(self, record: Record, row: dict[str, Any]) -> None:
        """Take one record and its row in the journal."""
        if isinstance(record, Step):
            self._step(record, row)
        elif isinstance(record, Begin):
            self._begin(record)
        elif isinstance(record, Growth):
            grew = ", ".join(f"{axis} {a} to {b}" for axis, (a, b) in record.grew.items())
            c = record.crossing
            self.say(
                f"before step {record.step}: {grew} by {c.operator} ({c.exactness}); loss {c.before:.5f} "
                f"to {c.after:.5f}; stood still for {record.stall:.2f} s, {record.compile_wait:.2f} of "
                "them compiling"
            )
        elif isinstance(record, Saved):
            self.saved = record.path
        elif isinstance(record, End):
            self._end(record)

    def say(self, text: str) -> None:
        """Print a line, above the bars if there are some."""
        self.console.print(Text(text), highlight=False)

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
        due = record.held_out is not None or not 0 <= now - self._printed < EVERY
        if self._live is None and due:
            self._printed = now
            left = "" if self.speed is None else f"  {clock(self._left())} left"
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
            self.say(f"the run is in {self.run}; next: growjax report {self.run}")

    # What is drawn --------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        """The bars, the numbers of the last step, and what is being done."""
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.add_column(no_wrap=True, max_width=14, overflow="ellipsis")
        bars.add_column(ratio=1, min_width=6)
        bars.add_column(no_wrap=True, justify="right")
        bars.add_column(no_wrap=True, justify="right")
        first = max(min(self.stage - ROWS // 2, len(self.plan.spans) - ROWS), 0)
        for span in self.plan.spans[first : first + ROWS]:
            name, done = span.stage.name or f"stage {span.index}", self.done[span.index]
            left = self.after[span.index][done]
            bars.add_row(
                Text(name[:14]),
                ProgressBar(span.steps, done),
                Text(f"{done}/{span.steps}"),
                Text(clock(left / self.speed) if self.speed and left else ""),
            )
        lines: list[RenderableType] = [bars]
        if self.line:
            lines.append(Text(self.line))
        if self.words:
            seconds = max(self.console.get_time() - self.since, 0.0)
            words = Text(f"{self.words} ({seconds:.0f} s)" if seconds >= 1 else self.words)
            lines.append(Spinner("dots", words))
        return Group(*lines)

    def _left(self) -> float:
        """Seconds of training that are left, at the speed of the last ones."""
        flops = sum(float(left[n]) for left, n in zip(self.after, self.done, strict=True))
        return flops / self.speed if self.speed else 0.0

    def _busy(self, words: str) -> None:
        """Note what the run does now; without a terminal, say it if it takes long."""
        self.words, self.since = words, self.console.get_time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if words and self._live is None:
            self._timer = threading.Timer(PATIENCE, self.say, [f"{words} ..."])
            self._timer.daemon = True
            self._timer.start()


def _left_after(flops: tuple[int, ...]) -> np.ndarray:
    """What is left of a sum after 0, 1, ... of its terms: a plan has millions of steps."""
    done = np.cumsum([0.0, *flops])
    return done[-1] - done


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
