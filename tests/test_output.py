"""What the command line does when nobody reads its output, or nothing more can be written to it."""

import gc
import os
import signal
import sys
import time
import warnings
from typing import Any

import pytest

from growjax.cli import app, main
from growjax.train.commands import INTERRUPTED


@pytest.fixture
def command(monkeypatch):
    """Runs `growjax`, whose work is a function, and returns its exit status."""
    for module, name in ((warnings, "showwarning"), (sys, "unraisablehook")):
        monkeypatch.setattr(module, name, getattr(module, name))  # `main` sets them

    def run(work: Any) -> int:
        done: list[int] = []
        monkeypatch.setattr(sys, "argv", ["growjax", "train"])
        monkeypatch.setattr(app, "cli", lambda **_: work())
        monkeypatch.setattr(os, "_exit", done.append)
        main()
        (status,) = done
        return status

    return run


@pytest.fixture
def nobody():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        yield pipe


def test_an_exit_status_does_not_depend_on_who_reads(command, nobody, monkeypatch):
    """As of `growjax train | tee log`, where Ctrl-C ends `tee` first."""
    nobody.write("stopped")
    monkeypatch.setattr(sys, "stdout", nobody)
    assert command(lambda: INTERRUPTED) == INTERRUPTED


def test_an_output_may_be_closed_from_the_start(command, monkeypatch):
    """As of `growjax train >&- 2>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command(lambda: INTERRUPTED) == INTERRUPTED


def test_a_message_that_nobody_reads_changes_nothing(command, nobody, monkeypatch):
    """As of `growjax train 2>&1 | tee log`."""
    monkeypatch.setattr(sys, "stderr", nobody)

    def interrupted() -> int:
        warnings.warn("slow", stacklevel=1)  # nor does a warning
        raise KeyboardInterrupt

    warnings.simplefilter("always")
    assert command(interrupted) == INTERRUPTED


@pytest.mark.parametrize("file", [None, "model.npz"])
def test_a_full_disk_is_one_line_of_error(command, capsys, file):
    """As of `growjax inspect RUN > FILE`."""

    def full() -> int:
        raise OSError(28, "No space left on device", *([file] if file else []))

    assert command(full) == 1
    where = file or "the output"
    assert (
        capsys.readouterr().err
        == f"growjax: {where}: could not be written: No space left on device\n"
    )


def test_other_errors_of_the_system_are_not_hidden(command):
    def bug() -> int:
        raise FileNotFoundError(2, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        command(bug)


def test_ctrl_c_that_a_callback_loses_comes_again(command, capsys, monkeypatch):
    """JAX has one at every collection of garbage; Python prints what is raised in it, and goes on."""

    def callback(*_: Any) -> None:
        gc.callbacks.remove(callback)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs

    def collecting() -> int:
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(20)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command(collecting) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "growjax: interrupted; all that was saved remains\n"
