"""Degrees: by which power of an axis's share each number scales, as linear equations.

Where coordinates of an axis are copied, some parameters take a share. An intermediate value then scales
by a power of it, its degree, which is a sum of unknowns (1 for a parameter that takes the share, else 0).
"""

from collections.abc import Iterable
from fractions import Fraction


class Lin:
    """A constant and a sum of unknowns, each with a coefficient."""

    def __init__(self, constant: Fraction | int = 0, terms: dict[int, Fraction] | None = None):
        self.constant = Fraction(constant)
        self.terms = terms or {}

    def plus(self, other: "Lin", times: Fraction | int | float = 1) -> "Lin":
        """This and a multiple of another."""
        times = Fraction(times)
        terms = dict(self.terms)
        for name, c in other.terms.items():
            terms[name] = terms.get(name, Fraction(0)) + c * times
        nonzero = {name: c for name, c in terms.items() if c}
        return Lin(self.constant + other.constant * times, nonzero)

    def times(self, factor: Fraction | int | float) -> "Lin":
        """A multiple of this."""
        return Lin().plus(self, factor)


ZERO = Lin()


class System:
    """Linear equations over unknowns that are 0 or 1 (or any number, for those in `free`)."""

    def __init__(self):
        self.solved: dict[int, Lin] = {}
        self.free: set[int] = set()

    def copy(self) -> "System":
        """A copy, to try an equation on."""
        other = System()
        other.solved, other.free = dict(self.solved), self.free
        return other

    def value(self, x: Lin) -> Lin:
        """An expression with all that is solved put in."""
        while any(name in self.solved for name in x.terms):
            result = Lin(x.constant)
            for name, c in x.terms.items():
                term = self.solved.get(name)
                result = result.plus(Lin(0, {name: Fraction(1)}) if term is None else term, c)
            x = result
        return x

    def zero(self, x: Lin) -> bool:
        """Add the equation `x = 0`; False, and nothing is added, if it contradicts the others."""
        x = self.value(x)
        if not x.terms:
            return x.constant == 0
        # A number that may be anything is the first to be expressed by the others
        name = max(x.terms, key=lambda n: (n in self.free, n))
        rest = Lin(x.constant, {n: c for n, c in x.terms.items() if n != name})
        solution = rest.times(-1 / x.terms[name])
        if not solution.terms and name not in self.free and solution.constant not in (0, 1):
            return False
        self.solved[name] = solution
        return all(self._possible(n) for n in self.solved)

    def _possible(self, name: int) -> bool:
        solution = self.value(self.solved[name])
        return name in self.free or bool(solution.terms) or solution.constant in (0, 1)

    def unknowns(self, names: Iterable[int]) -> list[int]:
        """Those that are not decided yet."""
        return [n for n in names if self.value(Lin(0, {n: Fraction(1)})).terms]
