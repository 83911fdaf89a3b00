"""The command line: `growjax COMMAND`, or `python -m growjax COMMAND`."""

# ruff: noqa: E402 - `require` must run before the imports below, to name a package that is missing

import _thread
import contextlib
import errno
import os
import re
import sys
import threading
import warnings
from typing import Any

from growjax import __version__
from growjax.errors import GrowjaxError
from growjax.extras import require


require("the command line", "tyro", "rich")

import tyro

from growjax.cli.checkpoints import certify, evaluate, export, families, grow, inspect
from growjax.cli.results import advise, compare, report
from growjax.cli.training import calibrate, choose, demo, plan, prepare, sweep, train


# The errors of a disk that is full, a terminal that was closed, and a reader that is gone
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO, errno.EPIPE)

app = tyro.extras.SubcommandApp()
# In the order of `growjax --help`
for _command in (demo, prepare, train, choose, plan, calibrate):
    app.command(_command)
for _command in (grow, export, certify, inspect, families):
    app.command(_command)
app.command(name="eval")(evaluate)
for _command in (sweep, advise, compare, report):
    app.command(_command)


def main() -> None:
    """Run one command; an error of growjax is printed as a message, without a traceback."""
    if sys.argv[1:] == ["--version"]:
        print(f"growjax {__version__}")
        return
    _reserve_threads()
    warnings.showwarning = _warn
    sys.unraisablehook = _unraisable
    try:
        status = app.cli(
            prog="growjax",
            description="Grow Transformers while they train. `growjax --version` prints the version.",
        )
    except GrowjaxError as error:
        if not _has_other_hosts():
            sys.exit(f"growjax: {error}")
        _say(str(error))
        status = 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        # Of the output itself, as in `growjax inspect RUN > FILE`: files that commands write are named
        _say(f"{error.filename or 'the output'}: could not be written: {error.strerror}")
        status = 1
    except KeyboardInterrupt:
        _say("interrupted; all that was saved remains")
        status = 130
    else:
        if status and _has_other_hosts():
            # All were asked to stop, and have saved. Process 0 serves the others: JAX ends those that are
            # still there when it leaves.
            sys.modules["jax"].distributed.shutdown()
    _flush()
    if status:
        # At once, without waiting for other hosts, or for threads that still compile a program
        os._exit(status)


def _warn(message: Warning | str, *_: object) -> None:
    """Print a warning as a message, without the line of code that gave it."""
    _say(f"warning: {message}")


def _say(text: str) -> None:
    """Print a message to where errors go; nobody may be there, as in `growjax train 2>&1 | head`."""
    with contextlib.suppress(OSError):
        print(f"growjax: {text}", file=sys.stderr, flush=True)


def _unraisable(lost: Any) -> None:
    """Press Ctrl-C again if it was lost: Python prints what a callback raises, and goes on.

    JAX has a callback at every collection of garbage, and the first line of Python that runs after a
    long call is often in it.
    """
    if lost.exc_type is KeyboardInterrupt:
        # Later: what is raised before this returns is lost as well
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def _reserve_threads() -> None:
    """Ask XLA for threads enough for several CPU devices, unless `PJRT_NPROC` says how many.

    A device waits for the others of a collective on a thread of a pool that has one for each core. On
    few cores all threads may wait for a device that has none, until XLA ends the process.
    """
    flag = re.search(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    asked = flag[1] if flag else os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if asked.isdecimal() and int(asked) > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(4 * int(asked), os.cpu_count() or 1)))


def _has_other_hosts() -> bool:
    """Whether `growjax.parallel.connect` has joined a pod, which only a command that loads JAX does."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _flush() -> None:
    """Write what is buffered; the exit status does not depend on a reader or terminal that is gone."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue  # closed from the start, as in `growjax train >&-`
        try:
            stream.flush()
        except OSError:
            # Python would try again at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
