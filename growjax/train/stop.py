"""Requests to stop a run: Ctrl-C, SIGTERM, a closed terminal, or the notice of a preemption."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


# Of a terminal that was closed, or a connection that broke; None on Windows
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([_HANGUP] if _HANGUP else []))


class Stopped(Exception):
    """Raised when the run is asked to stop between two steps, or while it waits for a program."""


class Stop:
    """Catches the signals that ask a run to stop, from `catch` until its `with` ends.

    **Arguments**

    - `enabled`: False leaves signals alone (a run that saves nothing has nothing to finish).

    The first SIGTERM, SIGINT or SIGHUP is recorded in `signal`; a second one ends the process, as it
    would without this class. Only a second SIGHUP is ignored: a terminal that is closed sends several.
    With many hosts, JAX's preemption service listens for SIGTERM and chooses the step before which all of
    them stop; the others are passed on to it. Python can catch signals in the main thread only, so in
    another thread nothing is caught.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.many_hosts = enabled, False
        self.signal: str | None = None  # the name of the signal that came, such as "SIGTERM"
        self._earlier: dict[int, Any] = {}  # signal -> its handler before, to be restored

    def __enter__(self) -> "Stop":
        # Of the thread that trains, which need not be the one that made this
        main = threading.current_thread() is threading.main_thread()
        self.enabled, self.many_hosts = self.enabled and main, jax.process_count() > 1
        return self

    def catch(self) -> None:
        """Catch signals from now on."""
        for number in _SIGNALS if self.enabled else ():
            if self.many_hosts and number == signal.SIGTERM:
                continue
            earlier = signal.getsignal(number)
            # A signal that is ignored (under nohup, or in a background job) stays ignored
            if earlier not in (signal.SIG_IGN, None):
                self._earlier[number] = earlier
                signal.signal(number, self._first)

    def __exit__(self, *_: object) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)
        self._earlier = {}

    def _first(self, number: int, _: FrameType | None) -> None:
        """Handle the first signal: record it, and let the next one end the process."""
        self.signal = signal.Signals(number).name
        for other, earlier in self._earlier.items():
            # Python's own handler of Ctrl-C runs between two bytecodes, which may be a whole step away.
            # The system's ends the process at once; an interactive session keeps Python's.
            at_once = earlier is signal.default_int_handler and not hasattr(sys, "ps1")
            second = signal.SIG_DFL if at_once else earlier
            signal.signal(other, signal.SIG_IGN if other == _HANGUP else second)
        # These differ from their handlers before, and are restored at the end
        changed = (signal.SIGINT, _HANGUP)
        self._earlier = {n: h for n, h in self._earlier.items() if n in changed}
        if self.many_hosts:
            os.kill(os.getpid(), signal.SIGTERM)

    def before(self, step: int) -> bool:
        """Whether to stop before this step: the same on every host. Call it before every step."""
        if not self.many_hosts:
            return self.signal is not None
        try:
            stop = multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:
            # JAX's service is switched off, so hosts cannot agree on a step
            return False
        if stop and self.signal is None:
            self.signal = "SIGTERM"
        return stop

    def check(self) -> None:
        """Raise `Stopped` if this process was asked to stop and is the only one.

        With many hosts it does nothing: they can stop only before the same step.
        """
        if self.signal is not None and not self.many_hosts:
            raise Stopped
