"""The lock on a run's folder: one process writes to the folder at a time, and the file names it.

The file holds the owner's host, process number and start. While the owner lives, it touches the file
every `BEAT` seconds. Whether a process on this machine is alive can be seen at once. For an owner on
another machine only the age of the file is known: it counts as dead (a preempted machine, say) once the
file has not been touched for `SILENT` seconds. Ages are measured by the file system's clock, since the
clocks of hosts differ.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from growjax.errors import CheckpointError


BEAT = 20.0  # seconds between two touches of the file
SILENT = 120.0  # seconds without a touch after which an owner on another machine counts as dead
UNKNOWN = "no ticks"  # the start of a process whose entry in `/proc` cannot be read


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    - `space`: identifies the machine, its boot and its container: process numbers are comparable only
      within one such space, and containers may share a host's name.
    - `started`: the start of the process, in ticks since boot, since process numbers are reused.
    - `token`: a random name of this one lock.
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
        """Whether the owner is, or was, a process of this machine."""
        return self.space == _space()

    @property
    def alive(self) -> bool:
        """Whether the owner's process runs; only for an owner on this machine."""
        status = _status(self.pid)
        if status is None:
            return False
        state, started = status
        # Z is a zombie, X a dead process; another start means that its number was reused
        return state not in ("Z", "X") and started in (self.started, UNKNOWN)


class Lock:
    """The lock in one file; use it in a `with`. Raises `CheckpointError` if another process holds it.

    `note` is a sentence about the dead owner that the lock was taken over from, or None; `lost` is true
    once another process has taken it over from this one.

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
            if _read(self.file) == self.owner:
                self.file.unlink()
                if self._made_folder:
                    # Succeeds only if the folder is empty
                    self.file.parent.rmdir()

    def _acquire(self) -> None:
        text = json.dumps(dataclasses.asdict(self.owner))
        # Written under a name of its own and then linked, so that the lock is never seen half written
        mine = self.file.with_name(f"{self.file.name}.{self.owner.token}")
        try:
            mine.write_text(text + "\n", encoding="utf-8")
            try:
                _create(mine, self.file)
                return
            except FileExistsError:
                pass
            before = _read(self.file)
            self._wait_for(before, self.file)
            self._replace(before, mine)
        finally:
            mine.unlink(missing_ok=True)
        if before is not None:
            self.note = f"took over from {before}, which is gone"

    def _replace(self, before: Owner | None, mine: Path) -> None:
        """Put the file `mine` in place of the lock of a dead owner; raise if another process does so.

        Another process may have taken over since the owner was read, however little time passed. So the
        lock of an owner is replaced only by the process that holds a claim, a file named by that owner,
        and the owner is read again under the claim.
        """
        digest = hashlib.sha256(repr(before).encode()).hexdigest()[:16]
        claim = self.file.with_name(f"{self.file.name}.from-{digest}")
        try:
            _create(mine, claim)
        except FileExistsError:
            claimant = _read(claim)
            self._wait_for(claimant, claim)
            claim.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.file.parent}: {claimant or 'a process'} was killed while it took over the lock "
                "of this folder; try again"
            ) from None
        try:
            if not self.file.exists():
                # Its owner has released it meanwhile, and another process may take it now
                _create(mine, self.file)
            elif (owner := _read(self.file)) != before:
                raise CheckpointError(self._held_by(owner))
            else:
                os.replace(mine, self.file)
        except FileExistsError:
            raise CheckpointError(self._held_by(_read(self.file))) from None
        finally:
            claim.unlink(missing_ok=True)

    def _wait_for(self, owner: Owner | None, file: Path) -> None:
        """Return once the owner of a file is known to be dead; raise `CheckpointError` if it lives."""
        if owner is not None and owner.here and owner.started:
            if owner.alive:
                raise CheckpointError(self._held_by(owner))
            return
        # An owner on another machine, or a file that cannot be read: watch the age of the file
        first = self._age(file)
        while (age := self._age(file)) < SILENT:
            # An age that fell means that the owner has touched the file
            if age < first or _read(file) != owner:
                raise CheckpointError(self._held_by(owner))
            time.sleep(min(1.0, BEAT / 4))

    def _held_by(self, owner: Owner | None) -> str:
        """The message of an error that names the owner of the lock."""
        name = "another process" if owner is None else str(owner)
        return (
            f"{self.file.parent}: {name} trains in this folder. Wait for it or choose another folder; "
            f"if you know that it is gone, remove {self.file}"
        )

    def _age(self, file: Path) -> float:
        """Seconds since a file was touched, by the file system's clock; infinite without a file."""
        # A file touched now has the current time of the file system's clock
        probe = self.file.with_name(f"{self.file.name}.{self.owner.token}")
        probe.touch()
        with contextlib.suppress(FileNotFoundError):
            return probe.stat().st_mtime - file.stat().st_mtime
        return float("inf")

    def _beat(self) -> None:
        """Touch the file every `BEAT` seconds, until the lock is released or lost."""
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                owner = _read(self.file)
                if owner != self.owner and not self._released.is_set():
                    self.lost = True
                    return
                os.utime(self.file)

    def check(self) -> None:
        """Raise `CheckpointError` if another process has taken the lock over."""
        if self.lost:
            raise CheckpointError(f"{self._held_by(_read(self.file))}. This run ends here")


def _read(file: Path) -> Owner | None:
    """The owner that a file names; None if there is no file, or one that cannot be read."""
    try:
        return Owner(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _create(source: Path, target: Path) -> None:
    """Copy a file to a path that does not exist yet, in one step; raises `FileExistsError` if it does."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # File systems over object stores have no links. Opening with "x" fails if the file exists.
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))


def _space() -> str:
    """The identity of the machine, its boot and its namespace of process numbers, as one text."""
    parts: list[Any] = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _status(pid: int) -> tuple[str, str] | None:
    """The state (one letter) and the start of a process; None if no process has this number.

    Both are unknown without `/proc` (macOS, say), and where it hides the processes of other users.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            # Signal 0 is not sent, but checks whether the process exists
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            # It exists, and belongs to another user
            pass
        return "", UNKNOWN
    # The second field, the name in parentheses, may hold spaces. After it, the first field is the state,
    # and the 20th the start.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
