"""What a run is busy with between two records, for whoever shows it."""

import contextlib
from collections.abc import Callable, Iterator


class Doing:
    """What is being done right now, in a few words; empty while steps are trained.

    `listeners` are called with the words whenever they change, in the thread that trains.

    **Example**

        doing = Doing()
        doing.listeners.append(print)
        with doing("compiling"):
            ...
    """

    def __init__(self):
        self.listeners: list[Callable[[str], None]] = []
        self._words: list[str] = []

    @property
    def now(self) -> str:
        """The innermost of what is being done."""
        return self._words[-1] if self._words else ""

    @contextlib.contextmanager
    def __call__(self, words: str) -> Iterator[None]:
        """Say what is done within."""
        self._words.append(words)
        self._tell()
        try:
            yield
        finally:
            self._words.pop()
            self._tell()

    def _tell(self) -> None:
        for listener in self.listeners:
            listener(self.now)
