"""The expressions of a program's outputs, simplified where parameters are zero.

Equal expressions have the same number, in every program that shares an `Expressions`. So two programs
compute the same outputs for any values of their inputs if the numbers of their outputs agree, and the
body of a loop is the identity if its carry ends with the number that it began with. (The converse does
not hold: `relu(relu(x))` is another expression than `relu(x)`.)
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from growjax.trace.program import Program, live
from growjax.trace.values import Op, Value


# The number of whatever is zero in every entry
ZERO = 0
# Operations that keep the values of their operand (in another dtype, on another device)
_SAME_VALUES = set(
    "convert_element_type copy copy_p reduce_precision optimization_barrier stop_gradient "
    "sharding_constraint layout_constraint pvary device_put copy_to_memory_space name".split()
)
# Operations that are not linear, but 0 where all their operands are
_KEEP_ZERO = set(
    "abs sign sqrt cbrt square floor ceil round sin tan sinh tanh asin atan asinh atanh erf expm1 log1p "
    "max min erf_inv".split()
)


class Loop(NamedTuple):
    """A loop: the inputs that it scans over, its carry at the start and at the end of one turn."""

    scanned: frozenset[str]
    start: tuple[int, ...]
    end: tuple[int, ...]


class Expressions:
    """The numbers of expressions, shared by several programs."""

    def __init__(self):
        self._numbers: dict[Hashable, int] = {("zero",): ZERO}
        self._operands: dict[int, tuple[int, ...]] = {}
        self._names: dict[int, str] = {}

    def of(
        self, program: Program, names: Sequence[str], zeroed: Collection[str] = ()
    ) -> tuple[list[int], list[Loop]]:
        """The numbers of a program's outputs, and its loops, once the inputs in `zeroed` are zero.

        `names` are those of the program's parameters, in order.
        """
        reading = _Reading(self, program)
        for name, value in zip(names, program.inputs, strict=True):
            reading.numbers[id(value)] = ZERO if name in zeroed else self.named(name)
        for n, value in enumerate(program.rows):
            reading.numbers[id(value)] = self.number(("row", n))
        reading.run(0, len(program.tape))
        return [reading.of(value) for value in program.outputs], reading.loops

    def named(self, name: str) -> int:
        """The number of a parameter."""
        number = self.number(("parameter", name))
        self._names[number] = name
        return number

    def number(self, key: Hashable, operands: tuple[int, ...] = ()) -> int:
        """The number of the expression that `key` describes, of these operands."""
        number = self._numbers.setdefault((key, operands), len(self._numbers))
        self._operands[number] = operands
        return number

    def parameters(self, numbers: Iterable[int]) -> set[str]:
        """The names of the parameters in some expressions."""
        seen: set[int] = set()
        rest = list(numbers)
        while rest:
            number = rest.pop()
            if number not in seen:
                seen.add(number)
                rest += self._operands.get(number, ())
        return {self._names[number] for number in seen if number in self._names}


class _Reading:
    """The numbers of the values of one program, from a walk along its tape."""

    def __init__(self, expressions: Expressions, program: Program):
        self.expressions, self.tape, self.live = expressions, program.tape, live(program)
        self.numbers: dict[int, int] = {}
        self.loops: list[Loop] = []

    def of(self, value: Value) -> int:
        """The number of a value; constants of the program are found here for the first time."""
        if value.zero:
            return ZERO
        if id(value) not in self.numbers:
            known = value.known
            # Without its numbers (a random key) a constant is equal to no other
            content: Hashable = ("unknown", id(value))
            if known is not None:
                content = (str(known.dtype), known.shape, np.ascontiguousarray(known).tobytes())
            self.numbers[id(value)] = self.expressions.number(("constant", content))
        return self.numbers[id(value)]

    def run(self, first: int, last: int) -> None:
        """Number the results of `tape[first:last]`."""
        at = first
        while at < last:
            if self.tape[at].kind == "carry":
                at = self._loop(at)
            else:
                self._read(self.tape[at])
                at += 1

    def _loop(self, first: int) -> int:
        """Number the results of a loop whose carries begin at `first`; the place after it."""
        body = first
        while self.tape[body].kind == "carry":
            body += 1
        carries = [op.outs[0] for op in self.tape[first:body]]
        start = tuple(self.of(op.ins[0]) for op in self.tape[first:body])
        end = next(
            n
            for n in range(body, len(self.tape))
            if self.tape[n].kind == "equal" and self.tape[n].ins[0] is carries[0]
        )
        number = self.expressions.number
        for n, carry in enumerate(carries):
            self.numbers[id(carry)] = number(("carry", n), (start[n],))
        inner = tuple(self.numbers[id(carry)] for carry in carries)
        count = len(self.loops)
        self.run(body, end)
        after = tuple(self.of(op.ins[1]) for op in self.tape[end : end + len(carries)])
        del self.loops[count:]  # those inside are listed by the second run
        rows = [op.ins[0] for op in self.tape[body:end] if op.pairs and op.pairs[0] == (0, "stack")]
        scanned = frozenset(self.expressions.parameters(self.of(x) for x in rows))
        self.loops.append(Loop(scanned, inner, after))
        # Now that the whole body is known, a carry is named after it: two loops from one start differ
        goes_on = [self.of(value) for value in self.tape[end].beside]
        whole = number(("loop", inner, self.tape[first].options), (*start, *after, *goes_on))
        for n, carry in enumerate(carries):
            same = inner[n] == after[n]
            self.numbers[id(carry)] = start[n] if same else number(("carried", n), (whole,))
        self.run(body, end)
        return end + len(carries)

    def _read(self, op: Op) -> None:
        ins, beside = [[self.of(value) for value in values] for values in (op.ins, op.beside)]
        if op.name == "random" and any(id(key) in self.live for key in op.beside):
            beside = []  # by a key that is an input, of which any other is as good
        same = self._simplified(op, ins, beside)
        groups = tuple(
            (self.of(k) if isinstance(k, Value) else k, _tuple(dims), _tuple(outs), shift)
            for k, dims, outs, shift in op.groups
        )
        how: Mapping = {
            "kind": op.kind,
            "name": op.name,
            "groups": groups,
            "pairs": tuple(op.pairs),
            "options": op.options,
        }
        for n, out in enumerate(op.outs):
            key = ("operation", n, out.shape, *how.values())
            self.numbers[id(out)] = (
                self.expressions.number(key, (*ins, *beside)) if same is None else same
            )

    def _simplified(self, op: Op, ins: Sequence[int], beside: Sequence[int]) -> int | None:
        """The number of a result that is zero, or that is one of the operands; None for any other."""
        zeros = [number == ZERO for number in ins]
        # Zeros are none any more where others are padded or written in; behind those stand indices
        filled = beside[:1] not in ([], [ZERO])
        if op.kind in ("mul", "dot") and any(zeros):
            return ZERO
        if op.kind == "div" and zeros[:1] == [True]:
            return ZERO
        power = isinstance(op.kind, tuple) and op.kind[1] > 0
        bent = op.kind == "bent" and op.name in _KEEP_ZERO
        linear = op.kind in ("shape", "add", "same", "sum", "extreme")
        if ins and all(zeros) and not filled and (power or bent or linear):
            return ZERO
        if not op.outs:
            return None
        rest = [number for number in ins if number != ZERO]
        if op.kind == "add" and op.name in ("select_n", "cond"):
            rest = list(dict.fromkeys(ins))  # a choice between equals
        elif op.kind == "add" and op.name == "sub" and zeros[0]:
            return None
        elif op.kind in ("mul", "div"):
            ones = [value.number == 1 for value in op.ins]
            ones[0] &= op.kind == "mul"
            rest = [number for number, one in zip(ins, ones, strict=True) if not one]
        elif op.kind != "add" and op.name not in _SAME_VALUES and not _stays(op):
            return None
        (shape,) = {out.shape for out in op.outs}
        whole = len(rest) == 1 and op.ins[ins.index(rest[0])].shape == shape
        return rest[0] if whole else None


def _stays(op: Op) -> bool:
    """Whether an operation that moves entries leaves all of them where they are."""
    if op.kind != "shape" or len(op.ins) != 1 or len(op.outs) != 1:
        return False
    left = [(0, [d], [d], 0) for d, node in enumerate(op.ins[0].nodes) if node.root.size != 1]
    moved = [group for group in op.groups if op.ins[0].nodes[group[1][0]].root.size != 1]
    return op.ins[0].shape == op.outs[0].shape and moved == left and op.name != "update"


def _tuple(dims: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if dims is None else tuple(dims)
