"""How a run is asked to stop: by SIGTERM, by Ctrl-C, or by notice that a machine will be taken away."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop while it waited for something else than a step."""


class Stop:
    """Whether a run was asked to stop; use it in a `with`.

    **Arguments**

    - `enabled`: False leaves signals alone (a run that saves nothing has nothing to finish).

    The first SIGTERM or SIGINT is noted, and a second one does what it always did: it ends the process.
    With many hosts JAX's own service listens for SIGTERM and lets all of them stop before the same step;
    SIGINT is passed on to it. Signals can be caught in a program's main thread alone.
    """

    def __init__(self, enabled: bool):
        self.many = jax.process_count() > 1
        self.signal: str | None = None
        main = threading.current_thread() is threading.main_thread()
        self.enabled = enabled and main
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in _SIGNALS if self.enabled else ():
            if self.many and number == signal.SIGTERM:
                continue
            usual = signal.getsignal(number)
            # What is ignored stays ignored: nohup, or a job in the background
            if usual not in (signal.SIG_IGN, None):
                self._usual[number] = usual
                signal.signal(number, self._once)
        return self

    def __exit__(self, *_: object) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual = {}

    def _once(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        for other, usual in self._usual.items():
            # Python would only look at Ctrl-C between two lines of its own, which can take a step
            at_once = usual is signal.default_int_handler and not hasattr(sys, "ps1")
            signal.signal(other, signal.SIG_DFL if at_once else usual)
        self._usual = {n: usual for n, usual in self._usual.items() if n == signal.SIGINT}
        if self.many:
            os.kill(os.getpid(), signal.SIGTERM)

    def before(self, step: int) -> bool:
        """Whether to stop before this step; on every host the same. Must be asked before every step."""
        if not self.many:
            return self.signal is not None
        try:
            stop = multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:
            # JAX's service was switched off: nobody can stop all hosts at the same step
            return False
        if stop and self.signal is None:
            self.signal = "SIGTERM"
        return stop

    def check(self) -> None:
        """Raise `Stopped` if this process alone can decide that, and was asked to."""
        if self.signal is not None and not self.many:
            raise Stopped
