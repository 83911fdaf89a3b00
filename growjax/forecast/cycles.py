"""The cycles of a compiled TPU program, from the estimates in its text.

The TPU compiler writes its estimate of the cycles of every instruction into the program's text; the total
counts the body of a loop once for each iteration. It has none for kernels. Those of splash attention are
estimated here, from the tiles that they compute and the length of the schedule that the compiler made of
one tile. Neither estimate has the time that kernels wait for memory, or chips for each other.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from growjax.errors import CostError, raise_all


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.<>-]+) \(.*\{$")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r"condition=%?([\w.<>-]+), body=%?([\w.<>-]+)")
_CALLED = re.compile(r"to_apply=%?([\w.<>-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=)([^}]*?)(?:\}|, metadata)")
_TRIPS = re.compile(r"constant\((\d+)\)")
_BOUND = re.compile(r"compare\(.*direction=LT")
_KERNEL = re.compile(r"%splash_mha_(fwd|dkv|dq)_[\w.]* = .* custom-call\(")
_SIDES = {
    "fwd": re.compile(r'\\"block_q\\": (\d+), \\"block_kv\\": (\d+)'),
    "dkv": re.compile(r'\\"block_q_dkv\\": (\d+), \\"block_kv_dkv\\": (\d+)'),
    "dq": re.compile(r'\\"block_q_dq\\": (\d+), \\"block_kv_dq\\": (\d+)'),
}
_TURNED = re.compile(r'\\"q_layout\\": 2')
_OPERANDS = re.compile(
    r"operand_layout_constraints=\{(.*?)\}, (?:frontend|custom|metadata|backend)"
)
_INTEGERS = ("s8", "s16", "s32")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Cycles(NamedTuple):
    """Cycles of a program on one chip: of the compiler's instructions, and of attention's kernels."""

    instructions: int
    kernels: int

    @property
    def total(self) -> int:
        return self.instructions + self.kernels


class Tile(NamedTuple):
    """Cycles of one tile in a kernel: some for each score, and some for the tile."""

    score: float
    tile: float


# From the number of bundles in the schedules that the compiler writes for v5p with
# --xla_jf_dump_llo_text, for tiles of 256, 512 and 1,024 squared: fwd 1280, 2288 and 6339, the fused
# backward pass 1559, 3219 and 10642; without fusion dkv 2905 and dq 2143 at 512. Scores are what costs:
# heads of 128 take as many bundles as heads of 64.
TILES = {
    "fwd": Tile(0.00515, 940),
    "fused": Tile(0.00945, 745),
    "dkv": Tile(0.00825, 745),
    "dq": Tile(0.0054, 740),
}


def cycles(text: str, cores: int) -> Cycles:
    """The cycles of a program, from its text; `cores` of a chip share the kernels' sequences and heads.

    Raises `CostError` for kernels that are not splash attention, and loops of unknown length.
    """
    computations, entry = _computations(text)
    complaints: list[str] = []

    def count(name: str) -> tuple[int, float]:
        own, kernels = 0, 0.0
        for line in computations[name]:
            times, called = 1, []
            if " while(" in line and (match := _BODY.search(line)):
                times, called = _trips(computations[match[1]], complaints), [match[2]]
            elif " conditional(" in line and (match := _BRANCHES.search(line)):
                branches = [count(name) for name in re.findall(r"%([\w.<>-]+)", match[1])]
                most = max(branches, key=sum)
                own, kernels = own + most[0], kernels + most[1]
            elif " call(" in line and (match := _CALLED.search(line)):
                called = [match[1]]
            elif match := _ESTIMATE.search(line):
                own += int(match[1])
            elif match := _KERNEL.search(line):
                kernels += _kernel(match[1], line) / cores
            elif 'custom_call_target="tpu_custom_call"' in line:
                complaints.append(
                    f"{line.split('=')[0].strip()}: no cycles are known for this kernel"
                )
            for inner in map(count, called):
                own, kernels = own + times * inner[0], kernels + times * inner[1]
        return own, kernels

    own, kernels = count(entry)
    raise_all(CostError, "the cycles of this program cannot be counted:", dict.fromkeys(complaints))
    return Cycles(own, round(kernels))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that is the program."""
    computations: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif line.startswith("  "):
            computations[name].append(line)
        elif name and computations[name]:
            computations[name][-1] += line  # the attributes of a kernel are lines of their own
    return computations, entry


def _trips(condition: list[str], complaints: list[str]) -> int:
    """The iterations of a loop that counts from 0 to a constant."""
    bounds = [int(n) for line in condition for n in _TRIPS.findall(line)]
    if len(bounds) != 1 or not any(map(_BOUND.search, condition)):
        complaints.append(f"a loop of unknown length: {' '.join(condition)[:200]}")
        return 1
    return bounds[0]


def _kernel(kind: str, line: str) -> float:
    """The cycles of one call of a kernel of splash attention on one core."""
    sides = _SIDES[kind].search(line)
    operands = _OPERANDS.search(line)
    assert sides is not None and operands is not None, line[:300]
    tile_q, tile_k = map(int, sides.groups())
    shapes = _shapes(operands[1])
    # Queries [..., heads, T, d] are the first array of numbers, and keys the second
    (_, queries), (_, keys), *_ = [s for s in shapes if s[0] in ("bf16", "f32") and len(s[1]) > 2]
    # Or [..., heads, d, T], where heads do not fill the lanes
    length = -1 if _TURNED.search(line) else -2
    rows, columns = queries[length] // tile_q, keys[length] // tile_k
    results = line.partition(" custom-call(")[0].partition(" = ")[2]
    if any(len(sizes) > len(queries) for _, sizes in _shapes(results)):
        kind = "fused"  # it returns a part of the queries' gradient for each tile of keys
    cost = TILES[kind]
    calls = math.prod(queries[:-2]) * _tiles(shapes, rows, columns)
    return calls * (cost.tile + cost.score * tile_q * tile_k)


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtypes and sizes of the arrays that a text names, such as "bf16[8,16]"."""
    arrays = _SHAPE.findall(text)
    return [(dtype, tuple(map(int, sizes.split(",")))) for dtype, sizes in arrays if sizes]


def _tiles(shapes: list[tuple[str, tuple[int, ...]]], rows: int, columns: int) -> float:
    """How many tiles of a head are computed, as far as the arguments of a kernel show it."""
    # The table of tiles is [1, rows, columns]; a window leaves fewer columns, or rows, in it
    tables = [sizes for dtype, sizes in shapes if dtype in _INTEGERS and len(sizes) == 3]
    if not tables:
        return rows * columns
    if math.prod(tables[0][1:]) < rows * columns:
        return math.prod(tables[0][1:])
    # A mask by position that leaves no column out is causal: those above the diagonal are skipped
    return sum(1 for _ in _below(rows, columns))


def _below(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The tiles that touch the lower triangle."""
    for i in range(rows):
        for j in range(columns):
            if j * rows < (i + 1) * columns:
                yield i, j
