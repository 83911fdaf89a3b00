"""Where the seconds of a run go."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax


class Clock:
    """Tells the seconds spent training from those spent on other things.

    All of them only ever grow: setting the machine's clock changes nothing, and a counter that jumps
    back, as some virtual machines' do, stands still until it has caught up. `before` are the seconds that
    earlier sessions of the run spent training.
    """

    def __init__(self):
        self.latest = -math.inf
        self.start = self.now()
        self.before = self.last = 0.0
        self.spent: defaultdict[str, float] = defaultdict(float)

    def now(self) -> float:
        """Seconds since some time in the past, never fewer than before."""
        self.latest = max(self.latest, time.perf_counter())
        return self.latest

    def training(self) -> float:
        """Seconds spent training, over all sessions."""
        return self.before + self.now() - self.start - sum(self.spent.values())

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = self.training() - self.before
        took, self.last = now - self.last, now
        return took

    @contextlib.contextmanager
    def apart(self, what: str, running: Any = ()) -> Iterator[None]:
        """Time something that is not training, once the steps that are still running are done."""
        jax.block_until_ready(running)
        start = self.now()
        try:
            yield
        finally:
            self.spent[what] += self.now() - start
