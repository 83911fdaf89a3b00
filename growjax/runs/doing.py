"""The activity of a run between two records, such as compiling, for a display."""

import contextlib
from collections.abc import Callable, Iterator


class Doing:
    """The current activity of a run in a few words; empty while it trains steps.

    `listeners` are called with the new words whenever they change, in the thread that trains.

    **Example**

        doing = Doing()
        doing.listeners.append(print)
        with doing("compiling"):
            ...
    """

    def __init__(self):
        self.listeners: list[Callable[[str], None]] = []
        self.detail = ""  # how far the innermost activity is; read by displays when they draw
        self._words: list[str] = []  # the activities in progress, the innermost last

    @property
    def now(self) -> str:
        """The innermost activity in progress."""
        return self._words[-1] if self._words else ""

    @contextlib.contextmanager
    def __call__(self, words: str) -> Iterator[None]:
        """Announce an activity for as long as the `with` block lasts."""
        self._words.append(words)
        self._tell()
        try:
            yield
        finally:
            self._words.pop()
            self._tell()

    def _tell(self) -> None:
        self.detail = ""
        for listener in self.listeners:
            listener(self.now)
