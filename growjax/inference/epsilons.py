"""Epsilons that are arrays: numbers that a norm adds to its mean square before it takes the root."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from growjax.trace import Node, Place, Program, Roles, live
from growjax.trace.values import Op, Value


class Epsilon(NamedTuple):
    """The axis that a norm averages over, whether it subtracts the mean, and the numbers of its sums."""

    atom: Node
    centred: bool
    sums: frozenset[int]


class Epsilons:
    """The epsilons among a program's arrays, in `of`: the number of an array to its norm.

    Only norms of the form `x * rsqrt(mean(x**2) + epsilon)` are read, since a growth by zeros corrects
    these alone: the epsilon moves as the mean square does, and the gain by its root.
    """

    def __init__(self, program: Program, roles: Roles, paths: Sequence[str]):
        self.roles, self.leaves = roles, program.inputs[: len(paths)]
        tape = program.tape
        self.numbers = {id(value): n for n, value in enumerate(self.leaves)}
        self.maker = {id(out): op for op in tape for out in op.outs}
        self.users: dict[int, list[tuple[Op, int]]] = {}
        self.live = live(program)
        for op in tape:
            for i, value in enumerate(op.ins):
                self.users.setdefault(id(value), []).append((op, i))
        readings: dict[int, list[Epsilon | None]] = {}
        for op in tape:
            for number, norm in self._readings(op):
                readings.setdefault(number, []).append(norm)
        self.of: dict[int, Epsilon] = {}
        for number, norms in readings.items():
            if epsilon := _merged(norms):
                if self._uses(number) == len(norms) and self._alone(number, epsilon, paths):
                    self.of[number] = epsilon

    def _readings(self, op: Op) -> Iterator[tuple[int, Epsilon | None]]:
        """Every single number that a line adds to something, with the norm if it is one."""
        if op.name not in ("add", "add_any"):
            return
        for value, other in (op.ins, op.ins[::-1]):
            number = self.numbers.get(id(self._source(value)))
            if number is not None and self._is_number(number):
                yield number, self._divisor(op.outs[0], other)

    def _divisor(self, total: Value, square: Value) -> Epsilon | None:
        """The norm that divides by the root of `total`, the sum of an epsilon and a mean square."""
        divided = self._divided(total)
        norm = None if divided is None else self._norm(square)
        if divided is None or norm is None:
            return None
        # What is divided by the deviation has to be centred, too: else it is no LayerNorm
        if norm.centred and not all(self._centre(x, norm.atom) for x in divided):
            return None
        return norm

    def _is_number(self, leaf: int) -> bool:
        """Whether an array has one number, or one for every layer of a stack."""
        keys = self.roles.keys(self.leaves[leaf])
        return all(Place(leaf, *key) in self.roles.stacks for key in keys)

    def _norm(self, value: Value) -> Epsilon | None:
        """The norm whose mean square or variance a value is."""
        op = self.maker.get(id(self._source(value)))
        if op is None or op.kind not in ("sum", "dot"):
            return None
        own = {n for n, each in enumerate(self.roles.sums) if each.op is op}
        atoms = {self.roles.sums[n].atom for n in own}
        if len(atoms) != 1 or not own <= set(self.roles.means):
            return None
        (atom,) = atoms
        numbers = self.roles.sums_of[id(op.outs[0])][atom]
        operands = op.ins
        if op.kind == "sum":
            square = self.maker.get(id(self._source(op.ins[0])))
            if square is None or square.kind not in ("mul", ("power", 2)):
                return None
            operands = square.ins
        bases = [self._source(operand) for operand in operands]
        if any(base is not bases[0] for base in bases):
            return None
        if centred := self._centre(bases[0], atom):
            return Epsilon(atom, True, numbers | centred)
        # Moved or divided by another mean on the way, it may be centred or not
        return Epsilon(atom, False, numbers) if numbers == own else None

    def _centre(self, value: Value, atom: Node) -> frozenset[int]:
        """The numbers of the means of `x` over an axis, if a value is `x - mean(x)`."""
        op = self.maker.get(id(self._source(value)))
        if op is None or op.name != "sub":
            return frozenset()
        x, mean = self._source(op.ins[0]), self.maker.get(id(self._source(op.ins[1])))
        means = {
            n
            for n, each in enumerate(self.roles.sums)
            if each.atom is atom and each.op.kind == "sum" and self._source(each.op.ins[0]) is x
        }
        taken = any(self.roles.sums[n].op is mean for n in means)
        return frozenset(means) if taken else frozenset()

    def _source(self, value: Value) -> Value:
        """The value that another is in another shape or type, or as a multiple by a constant."""
        while op := self.maker.get(id(value)):
            moving = [each for each in op.ins if id(each) in self.live]
            moved = op.kind in ("shape", "same", "mul", "div")
            if op.name == "select_n":  # of a constant, by a condition that is one too
                moved = not any(id(each) in self.live for each, *_ in op.groups)
            if not moved or len(moving) != 1 or (op.kind == "div" and moving[0] is not op.ins[0]):
                return value
            value = moving[0]
        return value

    def _divided(self, value: Value) -> list[Value] | None:
        """All that the program divides by the root of a value; None if it does anything else with it."""
        divided: list[Value] = []
        for op, _ in self._reads(value):
            if op.kind not in (("power", 0.5), ("power", -0.5)):
                return None
            for use, i in self._reads(op.outs[0]):
                if not (use.kind == "mul" if op.kind[1] < 0 else use.kind == "div" and i == 1):
                    return None
                divided.append(use.ins[1 - i])
        return divided

    def _reads(self, value: Value) -> Iterator[tuple[Op, int]]:
        """The lines that use a value, in any shape or type."""
        for op, i in self.users.get(id(value), ()):
            if op.kind in ("shape", "same"):
                yield from self._reads(op.outs[0])
            else:
                yield op, i

    def _uses(self, number: int) -> int:
        return sum(1 for _ in self._reads(self.leaves[number]))

    def _alone(self, number: int, epsilon: Epsilon, paths: Sequence[str]) -> bool:
        """Whether every gain of a norm over the axis in its module belongs to the epsilon's own norm."""
        owner = paths[number].rpartition(".")[0]
        return all(
            taken & set(self.roles.means) <= epsilon.sums
            for place, taken in self.roles.normalised.items()
            if place.atom is epsilon.atom and paths[place.leaf].rpartition(".")[0] == owner
        )


def _merged(norms: list[Epsilon | None]) -> Epsilon | None:
    """The norm of an epsilon that several lines add, if they agree on it."""
    (first, *_) = norms
    if first is None or any(n is None or n[:2] != first[:2] for n in norms):
        return None
    return first._replace(sums=frozenset().union(*(n.sums for n in norms if n)))
