"""Dimensions of a traced program: which of them are one axis, by unification.

Every dimension of every value is a node. Operations unify nodes (the summed dimensions of a matrix
product), factor them (a reshape of 12 into heads of 4) or cut them into blocks (the split of a fused
projection). The nodes without such parts are atoms: the axes that an annotation can name.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal


# A dimension that is cut into more blocks than this counts as one that a window slides over
MOST_BLOCKS = 32


class Node:
    """A dimension, or a part of one; nodes that are unified share a root.

    - `structure`: None for an atom; `"prod"` of factors, the slowest first; `"sum"` of blocks, in order.
    - `fixed`: the reasons why it cannot grow, as text; empty if it can.
    - `data`: whether it is a dimension of the inputs.
    """

    def __init__(self, size: int, *, data: bool = False, fixed: str = ""):
        self.size = size
        self.parent: Node | None = None
        self.structure: Literal["prod", "sum"] | None = None
        self.parts: list[Node] = []
        self.data = data
        self.fixed = [fixed] if fixed else []

    @property
    def root(self) -> "Node":
        """The node that stands for all that are unified with this one."""
        node = self
        while node.parent is not None:
            node = node.parent
        if node is not self:
            self.parent = node  # shortens the next search
        return node

    def freeze(self, reason: str) -> None:
        """Note why the dimension cannot grow."""
        if reason not in self.root.fixed:
            self.root.fixed.append(reason)

    @property
    def atoms(self) -> list[tuple[int, "Node"]]:
        """Every atom in it with the offset of its block (0 where it is not cut into blocks)."""
        node, pairs = self.root, []
        if node.structure is None:
            return [(0, node)]
        at = 0
        for part in node.parts:
            pairs += [(at + offset, atom) for offset, atom in part.atoms]
            at += part.root.size if node.structure == "sum" else 0
        return pairs

    def factors(self) -> list["Node"]:
        """The factors of a product, slowest first; itself for anything else."""
        node = self.root
        if node.structure != "prod":
            return [node]
        return [factor for part in node.parts for factor in part.factors()]

    def blocks(self) -> list["Node"]:
        """The blocks of a sum, in order; itself for anything else."""
        node = self.root
        if node.structure != "sum":
            return [node]
        return [block for part in node.parts for block in part.blocks()]


def product(parts: Sequence[Node]) -> Node:
    """One dimension of several, the first one slowest."""
    if len(parts) == 1:
        return parts[0]
    node = Node(math.prod(part.root.size for part in parts))
    node.structure, node.parts = "prod", list(parts)
    return node


def total(parts: Sequence[Node]) -> Node:
    """One dimension that holds several blocks one after the other; empty ones are no blocks of it."""
    parts = [part for part in parts if part.root.size] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    node = Node(sum(part.root.size for part in parts))
    node.structure, node.parts = "sum", list(parts)
    return node


def unify(a: Node, b: Node) -> None:
    """Make two dimensions of the same size one."""
    a, b = a.root, b.root
    if a is b:
        return
    if a.structure is None or (b.structure is not None and a.structure == "sum" != b.structure):
        a, b = b, a
    if b.structure is not None:
        if a.structure == b.structure == "prod":
            _align(a, a.factors(), b.factors(), "prod")
        elif a.structure == b.structure:
            _align(a, a.blocks(), b.blocks(), "sum")
        else:
            _repeat(a, b)
        a, b = a.root, b.root
        if a is b:
            return
    b.parent = a
    a.data = a.data or b.data
    a.fixed += [reason for reason in b.fixed if reason not in a.fixed]


def factored(node: Node, sizes: Sequence[int]) -> list[Node]:
    """Factor a dimension into these sizes, the first one slowest, and give the factors."""
    if len(sizes) == 1:
        return [node]
    parts = [Node(size) for size in sizes]
    unify(node, product(parts))
    return parts


def cut(node: Node, sizes: Sequence[int]) -> list[Node]:
    """Cut a dimension into blocks of these sizes, and give the blocks."""
    if len(sizes) == 1:
        return [node]
    if 0 in sizes and any(sizes):  # else the block that is all of it would be a part of itself
        blocks = iter(cut(node, [size for size in sizes if size]))
        return [next(blocks) if size else Node(0) for size in sizes]
    if node.root.data or len(node.blocks()) + len(sizes) > MOST_BLOCKS:
        return [other(node, size, "slides over it") for size in sizes]
    parts = [Node(size) for size in sizes]
    unify(node, total(parts))
    return parts


def other(node: Node, size: int, does: str) -> Node:
    """A dimension made of another by an operation after which neither can grow; `does` is its verb."""
    if node.root.data:
        return Node(size, data=True)
    node.freeze(f"the program {does}")
    return Node(size, fixed=f"the program {does}")


def _align(node: Node, ours: list[Node], theirs: list[Node], kind: Literal["prod", "sum"]) -> None:
    """Unify the parts of two products, or of two sums, splitting those that are longer."""
    ours, theirs = list(ours), list(theirs)
    while ours and theirs:
        a, b = ours.pop(0), theirs.pop(0)
        if a.root.size == b.root.size:
            unify(a, b)
            continue
        large, small = (a, b) if a.root.size > b.root.size else (b, a)
        rest = large.root.size - small.root.size
        if kind == "prod":
            rest, odd = divmod(large.root.size, small.root.size)
            if odd:
                for part in (a, b, *ours, *theirs):
                    part.freeze("the program factors it in two ways")
                return
        split = factored if kind == "prod" else cut
        first, last = split(large, [small.root.size, rest])
        unify(first, small)
        (ours if large is a else theirs).insert(0, last)


def _repeat(whole: Node, sum_: Node) -> None:
    """Unify a product with a sum: equal blocks are one axis, as often as the first factor says."""
    blocks, factors = sum_.blocks(), whole.factors()
    unit = math.gcd(*(block.root.size for block in blocks))
    count = sum_.size // unit
    if count > MOST_BLOCKS or unit == 1:
        for node in (*blocks, *factors):
            node.freeze("the program both cuts and factors it")
        return
    number, rest = factored(product(factors), [count, unit])
    number.freeze("it counts blocks")
    for block in blocks:
        n = block.root.size // unit
        if n == 1:
            unify(block, rest)
        else:
            inner = Node(n, fixed="it counts blocks")
            unify(block, product([inner, rest]))


def frozen(nodes: Iterator[Node]) -> None:
    """Pass the reasons that fix a dimension, and its `data` flag, down to its atoms."""
    for node in nodes:
        root = node.root
        for _, atom in root.atoms:
            if atom is not root:
                atom.data = atom.data or root.data
                for reason in root.fixed:
                    atom.freeze(reason)
