"""The lock on a run's folder: one run writes to it at a time, and everybody can see who.

A file names its owner: host, process, since when. While the owner lives it touches the file every
`BEAT` seconds. A process of this machine that is gone is seen at once; of another machine nothing is
known but the file's age, so that is watched: either it is touched again, or its owner counts as dead
once it has been silent for `SILENT` seconds (a preempted machine, say). Ages are measured by the file
system's own clock, since clocks of hosts differ.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from growjax.errors import CheckpointError


BEAT = 20.0  # seconds between two signs of life
SILENT = 120.0  # seconds without one after which an owner on another machine counts as dead


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    `space` tells apart machines, boots of a machine, and containers that share a host's name: process
    numbers mean nothing across them. `started` is when the process did, in ticks since boot: numbers are
    used again. `token` is drawn for each lock.
    """

    host: str
    pid: int
    since: str
    space: str
    started: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    @property
    def here(self) -> bool:
        """Whether its process number is one of this machine."""
        return self.space == _space()

    @property
    def alive(self) -> bool:
        """Whether its process runs; for an owner of this machine only."""
        status = _status(self.pid)
        if status is None:
            return False
        state, started = status
        return state not in ("Z", "X") and started == self.started


class Lock:
    """The lock in one file; use it in a `with`. Raises `CheckpointError` if somebody else holds it.

    `note` says so if it was taken over from a dead owner, and `lost` is true once somebody else took
    it from this one.

    **Example**

        with Run("runs/first").lock() as lock:
            ...
    """

    def __init__(self, file: Path):
        self.file = file
        self.note: str | None = None
        self.lost = False
        started = (_status(os.getpid()) or ("", ""))[1]
        self.owner = Owner(
            socket.gethostname(),
            os.getpid(),
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            _space(),
            started,
            secrets.token_hex(8),
        )
        self._released = threading.Event()
        self._made_folder = False

    def __enter__(self) -> "Lock":
        try:
            self._made_folder = not self.file.parent.exists()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise CheckpointError(
                f"{self.file.parent}: cannot be the folder of a run: {error.strerror}; choose one that "
                "can be written to"
            ) from error
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            if self._read() == self.owner:
                self.file.unlink()
                if self._made_folder:
                    self.file.parent.rmdir()  # only if nothing was put there

    def _acquire(self) -> None:
        text = json.dumps(dataclasses.asdict(self.owner))
        # A name of its own, linked into place: whoever sees the lock sees all of it
        mine = self.file.with_name(f"{self.file.name}.{self.owner.token}")
        mine.write_text(text + "\n", encoding="utf-8")
        try:
            try:
                _create(mine, self.file)
                return
            except FileExistsError:
                pass
            before = self._read()
            self._wait_for(before)
            os.replace(mine, self.file)
        finally:
            mine.unlink(missing_ok=True)
        # Of two that take over at once the later one has it; the other sees that here
        time.sleep(0.05)
        if self._read() != self.owner:
            raise CheckpointError(self._held_by(self._read()))
        if before is not None:
            self.note = f"took over from {before}, which is gone"

    def _wait_for(self, owner: Owner | None) -> None:
        """Return once the owner is known to be dead; raise `CheckpointError` if it lives."""
        if owner is not None and owner.here and owner.started:
            if owner.alive:
                raise CheckpointError(self._held_by(owner))
            return
        # Another machine, or a file that says nothing: its age has to tell
        first = self._age()
        while (age := self._age()) < SILENT:
            if age < first or self._read() != owner:
                raise CheckpointError(self._held_by(owner))
            time.sleep(min(1.0, BEAT / 4))

    def _held_by(self, owner: Owner | None) -> str:
        who = "another process" if owner is None else str(owner)
        return (
            f"{self.file.parent}: {who} trains in this folder. Wait for it or choose another folder; "
            f"if you know that it is gone, remove {self.file}"
        )

    def _age(self) -> float:
        """Seconds since the last sign of life, by the file system's clock; infinite without a file."""
        probe = self.file.with_name(f"{self.file.name}.{self.owner.token}")
        probe.touch()
        with contextlib.suppress(FileNotFoundError):
            return probe.stat().st_mtime - self.file.stat().st_mtime
        return float("inf")

    def _read(self) -> Owner | None:
        try:
            return Owner(**json.loads(self.file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                owner = self._read()
                if owner != self.owner and not self._released.is_set():
                    self.lost = True
                    return
                os.utime(self.file)

    def check(self) -> None:
        """Raise `CheckpointError` if somebody else has taken the folder."""
        if self.lost:
            raise CheckpointError(f"{self._held_by(self._read())}. This run ends here")


def _create(source: Path, target: Path) -> None:
    """Put a file where there must be none yet, whole; raises `FileExistsError`."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # File systems over object stores have no links
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))


def _space() -> str:
    """The machine, its boot and its space of process numbers."""
    parts: list[Any] = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _status(pid: int) -> tuple[str, str] | None:
    """State and start of a process; None if there is none, and empty words where nobody can tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "", "no ticks"
    except OSError:
        return None
    # The name stands in brackets and may hold spaces: fields count from behind it
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
