"""The seconds of a run: those spent training, those spent on other activities, and when to save."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax

from growjax.runs import hosts


class Stopwatch:
    """Measures the seconds of training, without those of other activities such as saving.

    Times never decrease: setting the machine's clock changes nothing, and if the counter jumps back, as
    on some virtual machines, time stands still until it has caught up.
    """

    def __init__(self):
        self.latest = -math.inf  # the latest time that `now` returned
        self.start = self.now()
        self.earlier = 0.0  # seconds of training in earlier sessions of the run
        self.most = 0.0  # the most that `training` returned
        self.last_lap = 0.0  # seconds of training in this session, at the last lap
        self.spent: defaultdict[str, float] = defaultdict(float)  # seconds of each other activity

    def now(self) -> float:
        """Seconds since some time in the past, never fewer than before."""
        self.latest = max(self.latest, time.perf_counter())
        return self.latest

    def training(self) -> float:
        """Seconds of training, over all sessions; never fewer than before."""
        seconds = self.earlier + self.now() - self.start - sum(self.spent.values())
        # Sums of large times are rounded, and could go back by that
        self.most = max(self.most, seconds)
        return self.most

    def lap(self) -> float:
        """Seconds of training since the last call of `lap`."""
        now = self.training() - self.earlier
        seconds, self.last_lap = now - self.last_lap, now
        return max(seconds, 0.0)

    @contextlib.contextmanager
    def apart(self, activity: str, running: Any = ()) -> Iterator[None]:
        """Count the seconds of a `with` block as another activity, not as training.

        `running` are arrays of training steps that may still run on the device; they are waited for
        first, since their time is training.
        """
        jax.block_until_ready(running)
        start = self.now()
        try:
            yield
        finally:
            self.spent[activity] += self.now() - start


class SaveTimer:
    """Decides when a checkpoint by time is due, before the same step on all hosts.

    Hosts' clocks differ, so process 0 decides and sends its answer to the others. To make this cheap,
    they communicate at few steps: each answer is the number of steps until the next one, and 0 to save.
    """

    def __init__(self, minutes: float | None, stopwatch: Stopwatch):
        self.seconds = None if minutes is None else 60 * minutes
        self.stopwatch = stopwatch
        # The time and the step of the last checkpoint, and the next step at which hosts communicate
        self.start, self.first, self.meeting = stopwatch.now(), 0, 0

    def restart(self, step: int) -> None:
        """Begin to count the time, at the beginning of the run or after a checkpoint before `step`."""
        # After 8 steps, the speed is known well enough
        self.start, self.first, self.meeting = self.stopwatch.now(), step, step + 8

    def due(self, step: int) -> bool:
        """Whether to save before `step`."""
        if self.seconds is None:
            return False
        if jax.process_count() == 1:
            return self._left() <= 0
        if step < self.meeting:
            return False
        wait = hosts.number_of_first(self._steps_left(step))
        self.meeting = step + wait
        return wait == 0

    def _left(self) -> float:
        """Seconds until a checkpoint is due; not positive if it is."""
        assert self.seconds is not None
        return self.seconds - (self.stopwatch.now() - self.start)

    def _steps_left(self, step: int) -> int:
        """Half of the steps until a checkpoint is due, at the current speed; 0 if it is due.

        Half, since later steps may be slower: a sequence of halves does not miss the time.
        """
        left = self._left()
        if left <= 0:
            return 0
        step_seconds = max(self.stopwatch.now() - self.start, 1e-3) / max(step - self.first, 1)
        return int(min(max(left / step_seconds / 2, 1), 4096))
