"""The lock on a run's folder: one run at a time, with a clear owner, and dead owners do not matter."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from growjax import train as trainer
from growjax.errors import CheckpointError
from growjax.runs import lock
from growjax.runs.run import Run
from growjax.train import Options
from tests.runs import feed, plan, steps


train: Any = trainer.train  # tests know which record comes where; the checker does not


def owner(**changes: Any) -> lock.Owner:
    return dataclasses.replace(lock.Lock(Path("lock")).owner, **changes)


def held_by(folder: Path, who: lock.Owner, age: float = 0.0) -> Path:
    file = folder / "lock"
    file.write_text(json.dumps(dataclasses.asdict(who)))
    now = time.time()
    os.utime(file, (now - age, now - age))
    return file


def gone() -> int:
    """The number of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_two_runs_in_one_folder_are_refused_with_the_owners_name(programs, tmp_path):
    of = plan(steps(2))
    options = Options(held_out=4)
    first = train(of, feed(of), run=tmp_path, options=options, cache=programs)
    next(first)
    who = f"process {os.getpid()} on .* trains in this folder.*remove .*lock"
    with pytest.raises(CheckpointError, match=who):
        next(train(of, feed(of), run=tmp_path, options=options, cache=programs))
    # The refusal harms nothing, and the folder is free once the first is closed
    assert len(list(first)) > 2 and not (tmp_path / "lock").exists()
    assert list(train(of, feed(of), run=tmp_path, options=options, cache=programs))[-1].finished


def test_the_lock_of_a_dead_process_is_taken_over_and_that_is_said(programs, tmp_path):
    of, dead = plan(steps(2)), gone()
    held_by(tmp_path, owner(pid=dead))
    records = train(of, feed(of), run=tmp_path, options=Options(held_out=4), cache=programs)
    (note,) = next(records).notes
    assert f"took over from process {dead} on" in note and "which is gone" in note
    records.close()


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path):
    """Process numbers come again; the time at which a process started does not."""
    held_by(tmp_path, owner(started="1"))
    with Run(tmp_path).lock() as mine:
        assert mine.note is not None and f"process {os.getpid()}" in mine.note


def test_a_process_that_is_dead_but_not_reaped_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while (lock._status(process.pid) or ("", ""))[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    state, started = lock._status(process.pid) or ("", "")
    assert state == "Z"
    held_by(tmp_path, owner(pid=process.pid, started=started))
    with Run(tmp_path).lock() as mine:
        assert mine.note is not None
    process.wait()


def test_an_owner_on_another_machine_counts_as_dead_once_it_is_silent(tmp_path, monkeypatch):
    elsewhere = owner(space="another boot", host="t1v-n-0", pid=os.getpid())
    held_by(tmp_path, elsewhere, age=lock.SILENT + 5)
    with Run(tmp_path).lock() as mine:
        assert mine.note is not None and "on t1v-n-0" in mine.note
    # One that was heard of lately is waited for
    monkeypatch.setattr(lock, "SILENT", 1.0)
    held_by(tmp_path, elsewhere, age=0.5)
    begin = time.monotonic()
    with Run(tmp_path).lock() as mine:
        assert mine.note is not None and time.monotonic() - begin > 0.3


def test_an_owner_on_another_machine_that_lives_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT", 30.0)
    monkeypatch.setattr(lock, "BEAT", 0.4)
    file = held_by(tmp_path, owner(space="another boot", host="t1v-n-0"), age=5)
    touch = threading.Timer(0.5, os.utime, [file])
    touch.start()
    with pytest.raises(CheckpointError, match="on t1v-n-0 .* trains in this folder"):
        with Run(tmp_path).lock():
            pass
    touch.join()


def test_a_lock_that_says_nothing_is_judged_by_its_age(tmp_path, monkeypatch):
    file = held_by(tmp_path, owner(), age=lock.SILENT + 5)
    file.write_text("")
    os.utime(file, (1, 1))
    with Run(tmp_path).lock():
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("released", [False, True])
def test_of_two_processes_that_take_over_one_has_the_lock(tmp_path, monkeypatch, released):
    """However long one of them pauses between finding the owner dead and taking over."""
    held_by(tmp_path, owner(pid=gone()))
    first, second = Run(tmp_path).lock(), Run(tmp_path).lock()
    wait = lock.Lock._wait_for

    def slow(self: lock.Lock, who: lock.Owner | None, file: Path) -> None:
        wait(self, who, file)
        monkeypatch.setattr(lock.Lock, "_wait_for", wait)
        if released:
            file.unlink()
        first.__enter__()

    monkeypatch.setattr(lock.Lock, "_wait_for", slow)
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on .* trains in this folder"):
        second.__enter__()
    assert json.loads((tmp_path / "lock").read_text())["token"] == first.owner.token
    first.__exit__()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_released_meanwhile_is_taken_by_one(tmp_path, monkeypatch):
    """It was held at the first attempt, is free at the second, and another process comes first."""
    first, second = Run(tmp_path).lock(), Run(tmp_path).lock()
    attempts, create = [], lock._create

    def held_then_free(source: Path, target: Path) -> None:
        if target.name == "lock":
            attempts.append(target)
            if len(attempts) == 1:
                raise FileExistsError(target)
            monkeypatch.setattr(lock, "_create", create)
            first.__enter__()
        create(source, target)

    monkeypatch.setattr(lock, "_create", held_then_free)
    with pytest.raises(CheckpointError, match="trains in this folder"):
        second.__enter__()
    assert json.loads((tmp_path / "lock").read_text())["token"] == first.owner.token
    first.__exit__()


def test_a_process_killed_while_it_takes_over_does_not_keep_the_folder(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    held_by(tmp_path, owner(pid=gone()))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lock.os, "replace", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing is cleaned up
        Run(tmp_path).lock().__enter__()
    (claim,) = tmp_path.glob("lock.from-*")
    who = owner(pid=gone())
    claim.write_text(json.dumps(dataclasses.asdict(who)))
    with pytest.raises(CheckpointError, match=f"process {who.pid} on .* was killed .*; try again"):
        Run(tmp_path).lock().__enter__()
    with Run(tmp_path).lock() as mine:
        assert mine.note is not None


def test_a_process_that_cannot_be_seen_lives(tmp_path, monkeypatch):
    """Where `/proc` shows each user only processes of their own."""
    held_by(tmp_path, owner(pid=1))
    read = Path.read_text

    def hidden(path: Path, *args: Any, **options: Any) -> str:
        if path == Path("/proc/1/stat"):
            raise FileNotFoundError(path)
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", hidden)
    with pytest.raises(CheckpointError, match="process 1 on"):
        Run(tmp_path).lock().__enter__()
    held_by(tmp_path, owner(pid=gone()))
    with Run(tmp_path).lock() as mine:
        assert mine.note is not None


def test_a_run_whose_folder_is_taken_away_ends(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    of = plan(steps(400))
    records = train(of, feed(of), run=tmp_path, options=Options(held_out=4), cache=programs)
    next(records)
    held_by(tmp_path, owner(pid=1, token="another"))
    with pytest.raises(CheckpointError, match="process 1 on .* This run ends here"):
        for _ in records:
            time.sleep(0.005)
    # What another owns stays as it is
    assert json.loads((tmp_path / "lock").read_text())["pid"] == 1


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_in_what_is_no_folder_is_a_typed_error(programs, tmp_path, name):
    (tmp_path / "file").write_text("")
    of = plan(steps(2))
    with pytest.raises(CheckpointError, match="cannot be the folder of a run"):
        next(train(of, feed(of), run=tmp_path / name, cache=programs))


@pytest.mark.parametrize("name", ["run [x]", "what?", "a*"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(programs, tmp_path, name):
    """It would write checkpoints there that have no arrays, and say nothing."""
    of = plan(steps(2))
    with pytest.raises(CheckpointError, match="expected a path without"):
        next(train(of, feed(of), run=tmp_path / name, cache=programs))
    assert not (tmp_path / name).exists()


def test_a_folder_that_cannot_be_written_to_is_a_typed_error(programs, tmp_path, monkeypatch):
    """Tests may run as root, whom no mode stops, so the refusal is made up."""

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    of = plan(steps(2))
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CheckpointError, match="Permission denied; choose one that can be written"):
        next(train(of, feed(of), run=tmp_path, cache=programs))


def test_a_full_disk_leaves_no_file_of_a_lock(tmp_path, monkeypatch):
    def full(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device"), Run(tmp_path).lock():
        pass
    assert not any(tmp_path.iterdir())
