"""The seconds of a run: those spent training, and those spent on other activities."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax


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
