"""Values of a program, and the lines of the tape that say how each is made of others."""

from collections.abc import Sequence

from growjax.trace.dims import Node


class Value:
    """An array in the program: its dimensions, each a `Node` (of size 1 as well).

    - `number`: the value of a scalar that is written in the program.
    - `zero`: whether it is all zeros, which any share leaves as it is.
    - `known`: the array that a constant of the program holds.
    """

    def __init__(self, nodes: Sequence[Node], *, number=None, zero: bool = False, known=None):
        self.nodes, self.number, self.zero, self.known = list(nodes), number, zero, known

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every dimension."""
        return tuple(node.root.size for node in self.nodes)


class Op:
    """One line of the tape: an operation with its operands and results, in the terms that `Roles` reads.

    `kind` is one of

    - `"shape"`: moves entries; `groups` lists `(operand, its dimensions, dimensions of the result,
      offset)`, and entries keep their values;
    - `"mul"`, `"div"`, `"add"`, `"same"` (linear), `"bent"` (not linear), `("power", p)`: elementwise;
    - `"dot"`: `groups` as for shape, and `pairs` of summed dimensions of the two operands;
    - `"sum"`, `"extreme"`: reductions; `groups` as for shape, `pairs` of `(dimension, None)`;
    - `"equal"`: both values are one (a loop's carry);
    - `"opaque"`: nothing is known of the result but its dimensions.

    `beside` are operands that decide on entries of the result and give it no dimensions: first the
    entries that are padded or written in, then indices. At the end of a loop it is the condition.
    `options` are the settings of its equation in the program (a direction, the length of a loop).
    """

    options: tuple | None = None

    def __init__(self, kind, ins, outs, groups=(), pairs=(), name="", beside=()):
        self.kind, self.ins, self.outs = kind, list(ins), list(outs)
        self.groups, self.pairs, self.name = list(groups), list(pairs), name
        self.beside = list(beside)
