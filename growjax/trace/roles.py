"""The role of every axis of every parameter: whether it takes the share, produces it or normalises.

The tape is read once. Each axis of a value has a degree (`growjax.trace.linear`), the power by which it
scales with the share: sums over the axis need degree 1, and operations that are not linear degree 0. The
equations of an axis have a solution exactly if its coordinates can be copied with shares. A sum of degree
0 is a mean, which only equal numbers of copies preserve.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from growjax.trace.dims import Node, frozen
from growjax.trace.linear import ZERO, Lin, System
from growjax.trace.values import Op, Value


Key = tuple[int, int, Node]  # dimension, offset of the block, atom


class Place(NamedTuple):
    """One axis of one parameter: the parameter's number, and where the axis stands in it."""

    leaf: int
    dim: int
    offset: int
    atom: Node


@dataclasses.dataclass(frozen=True)
class Entry:
    """The properties of a value along one axis.

    - `degree`: how it scales with the share.
    - `status`: `"spread"` (the same for every coordinate), `"leaf"` (a parameter itself), `"made"`, or
      `"scaled"` (multiplied by a parameter coordinate by coordinate).
    - `places`: the parameters that it is, if it is one.
    - `sums`: the sums over the axis that it was divided by or moved by.
    """

    degree: Lin = ZERO
    status: str = "spread"
    places: tuple[Place, ...] = ()
    sums: frozenset[int] = frozenset()


SPREAD = Entry()


class Sum(NamedTuple):
    """A sum over an axis: its degree, and the parameters next to it."""

    atom: Node
    degree: Lin
    near: tuple[int, ...]
    op: Op


class Roles:
    """The roles of a program's parameters, read off its tape.

    - `unknown`: place to the unknown that says whether it takes the share.
    - `elementwise`, `lookups`, `stacks`: places.
    - `normalised`: place to the sums that its norm takes.
    - `faults`: atom to why its coordinates cannot be copied.
    - `choices`: atom to the places of which any could take the share.
    - `contradicted`: places of `given` (whether each takes the share) that contradict the program.
    - `direct`: places that the program sums over as they are.
    """

    def __init__(
        self,
        tape: Sequence[Op],
        leaves: Sequence[Value],
        trained: Sequence[bool],
        tied: Sequence[Sequence[int]] = (),
        given: Mapping[Place, bool] | None = None,
    ):
        self.tape, self.leaves = tape, leaves
        self.entries: dict[int, dict[Key, Entry]] = {}
        self.sums_of: dict[int, dict[Node, frozenset[int]]] = {}
        self.near: dict[int, tuple[int, ...]] = {}
        self.systems: dict[Node, System] = {}
        self.places: dict[int, Place] = {}
        self.unknown: dict[Place, int] = {}
        self.count = 0
        self.sums: list[Sum] = []
        self.elementwise: set[Place] = set()
        self.lookups: set[Place] = set()
        self.stacks: set[Place] = set()
        self.normalised: dict[Place, set[int]] = {}
        self.faults: dict[Node, list[str]] = {}
        self.choices: dict[Node, list[Place]] = {}
        self.direct: set[Place] = set()
        frozen(node for value in self._values() for node in value.nodes)
        for number, (value, trains) in enumerate(zip(leaves, trained, strict=True)):
            self._leaf(number, value, trains)
        for first, *rest in tied:  # blocks of one stack have one role
            for other in rest:
                for a, b in zip(self._unknowns(first), self._unknowns(other), strict=True):
                    self._equate(a, b)
        for op in tape:
            self._read(op)
        self.contradicted = [p for p, takes in (given or {}).items() if not self._holds(p, takes)]
        self.means = self._decide()

    def _values(self):
        yield from self.leaves
        for op in self.tape:
            yield from (*op.ins, *op.outs)

    def keys(self, value: Value) -> list[Key]:
        """Every axis of a value, with where it stands."""
        return [
            (d, offset, atom)
            for d, node in enumerate(value.nodes)
            for offset, atom in node.atoms
            if atom.size != 1
        ]

    def takes(self, place: Place) -> bool:
        """Whether a parameter takes the share of an axis."""
        name = self.unknown.get(place)
        if name is None:
            return False
        system = self.systems[place.atom]
        return system.value(Lin(0, {name: Fraction(1)})).constant == 1

    def _unknowns(self, leaf: int) -> list[Place]:
        return [place for place in self.unknown if place.leaf == leaf]

    def _holds(self, place: Place, takes: bool) -> bool:
        """Require that a parameter takes the share or not; False if that contradicts the program."""
        name = self.unknown.get(place)
        if name is None:
            return not takes
        system = self.systems[place.atom].copy()
        if not system.zero(Lin(-int(takes), {name: Fraction(1)})):
            return False
        self.systems[place.atom] = system
        return True

    def _equate(self, a: Place, b: Place) -> None:
        gap = Lin(0, {self.unknown[a]: Fraction(1)}).plus(
            Lin(0, {self.unknown[b]: Fraction(1)}), -1
        )
        self._zero(gap, a.atom, "its blocks would differ in their share", (a.leaf, b.leaf))

    def _leaf(self, number: int, value: Value, trains: bool) -> None:
        entries = {}
        for d, offset, atom in self.keys(value):
            place, degree = Place(number, d, offset, atom), ZERO
            if trains:
                degree = self._fresh(atom)
                (name,) = degree.terms
                self.unknown[place], self.places[name] = name, place
            entries[d, offset, atom] = Entry(degree, "leaf", (place,))
        self.entries[id(value)] = entries
        self.near[id(value)] = (number,)

    def _fresh(self, atom: Node, free: bool = False) -> Lin:
        self.count += 1
        system = self.systems.setdefault(atom, System())
        if free:
            system.free.add(self.count)
        return Lin(0, {self.count: Fraction(1)})

    def _entry(self, value: Value, key: Key) -> Entry:
        d = key[0]
        if d >= len(value.nodes) or value.nodes[d].root.size == 1:
            return SPREAD
        entries = self.entries.get(id(value), {})
        return entries.get(key) or entries.get((d, 0, key[2])) or SPREAD

    def _zero(self, degree: Lin, atom: Node, why: str, near: tuple[int, ...] = ()) -> None:
        system = self.systems.setdefault(atom, System())
        before = system.copy()
        if not system.zero(degree):
            self.systems[atom] = before
            self._fault(atom, why, near)

    def _fault(self, atom: Node, why: str, near: tuple[int, ...]) -> None:
        faults = self.faults.setdefault(atom, [])
        names = ", ".join(f"{{{n}}}" for n in near)
        text = f"{why} ({names})" if names else why
        if text not in faults:
            faults.append(text)

    # One line of the tape --------------------------------------------------------------------

    def _read(self, op: Op) -> None:
        near = tuple(dict.fromkeys(n for v in op.ins for n in self.near.get(id(v), ())))[-3:]
        direct = [v for v in op.ins if any(e.places for e in self.entries.get(id(v), {}).values())]
        if op.kind == "dot" and direct:
            near = self.near[id(direct[-1])]
        for out in op.outs:
            self.near[id(out)] = near
        if op.kind == "shape":
            self._shape(op)
        elif op.kind in ("dot", "sum", "extreme"):
            self._contraction(op, near)
        elif op.kind == "equal":
            self._equal(op.ins[0], op.ins[1], near)
        elif op.kind == "carry":
            (start,), (out,) = op.ins, op.outs
            self.entries[id(out)] = {
                key: Entry(self._fresh(key[2], free=True), "made") for key in self.keys(out)
            }
            self._equal(start, out, near)
        elif op.kind == "opaque":
            for value in op.ins:
                self._flat(value, near, op.name)
            for out in op.outs:
                self.entries[id(out)] = {key: Entry(ZERO, "made") for key in self.keys(out)}
        else:
            self._elementwise(op, near)

    def _flat(self, value: Value, near, name: str) -> None:
        for key in self.keys(value):
            entry = self._entry(value, key)
            self._zero(entry.degree, key[2], f"its share would have to pass through {name}", near)

    def _equal(self, a: Value, b: Value, near) -> None:
        if a.zero or b.zero:
            return
        for key in self.keys(b):
            gap = self._entry(a, key).degree.plus(self._entry(b, key).degree, -1)
            self._zero(gap, key[2], "only one of two added numbers would have the share", near)

    def _shape(self, op: Op) -> None:
        (out,) = op.outs
        entries: dict[Key, Entry] = {}
        for k, dims, outs, shift in op.groups:
            value = op.ins[k]
            mine = self.entries.get(id(value), {})
            for i in outs:
                for offset, atom in out.nodes[i].atoms:
                    entry = None
                    for d in dims:
                        exact = mine.get((d, offset - shift, atom))
                        entry = entry or exact or mine.get((d, 0, atom))
                    if len(dims) != len(outs) and entry is None:
                        entry = next((e for (_, _, a), e in mine.items() if a is atom), None)
                    inside = shift <= offset < shift + sum(value.nodes[d].root.size for d in dims)
                    if len(op.ins) > 1 and op.name == "concatenate" and not inside:
                        continue  # a block of another operand
                    if entry is not None and atom.size != 1:
                        self._join(entries, (i, offset, atom), entry, value, op)
        for d, role in op.pairs:
            for key, entry in self.entries.get(id(op.ins[0]), {}).items():
                if key[0] == d:
                    (self.lookups if role == "lookup" else self.stacks).update(entry.places)
                    if role == "lookup":
                        self._zero(entry.degree, key[2], "it is indexed")
                        if not entry.places and not key[2].data:
                            key[2].freeze("the program indexes it")
        if op.name in ("gather", "dynamic_slice"):
            if any(role == "lookup" for _, role in op.pairs):
                # Rows of a table are numbers in the program like any others
                for key, entry in entries.items():
                    entries[key] = dataclasses.replace(entry, status="made", places=())
        self._put(op, out, entries)

    def _put(self, op: Op, out: Value, entries: dict[Key, Entry]) -> None:
        """The entries of a result, and the sums that its operands hold over axes that it lacks."""
        self.entries[id(out)] = entries
        present = {key[2] for key in entries}
        sums: dict[Node, frozenset[int]] = {}
        for value in op.ins:
            for atom, ids in self.sums_of.get(id(value), {}).items():
                if atom not in present:
                    sums[atom] = sums.get(atom, frozenset()) | ids
        self.sums_of[id(out)] = sums

    def _join(self, entries, key: Key, entry: Entry, value: Value, op: Op) -> None:
        """A block of a result; where two operands have it, both have the same share."""
        other = entries.get(key)
        if other is not None and not value.zero:
            gap = other.degree.plus(entry.degree, -1)
            self._zero(
                gap, key[2], f"blocks of one dimension would differ in their share ({op.name})"
            )
        entries[key] = entry if other is None else dataclasses.replace(other, places=())

    def _contraction(self, op: Op, near) -> None:
        (out,) = op.outs
        entries: dict[Key, list[Entry]] = {}
        for k, (d,), (i,), _ in op.groups:
            for offset, atom in out.nodes[i].atoms:
                if atom.size != 1:
                    entry = self._entry(op.ins[k], (d, offset, atom))
                    entries.setdefault((i, offset, atom), []).append(entry)
        made = {}
        for key, parts in entries.items():
            if len(parts) == 1 and op.kind == "sum":
                made[key] = parts[0]
            elif len(parts) == 1:
                made[key] = Entry(parts[0].degree, "made", (), parts[0].sums)
            else:
                made[key] = self._product(parts)
        self.entries[id(out)] = made
        sums: dict[Node, frozenset[int]] = {}
        for value in op.ins if op.kind == "sum" else ():
            sums |= self.sums_of.get(id(value), {})
        for a, b in op.pairs:
            for offset, atom in op.ins[0].nodes[a].atoms:
                if atom.size == 1:
                    continue
                summed = [self._entry(op.ins[0], (a, offset, atom))]
                if b is not None:
                    summed.append(self._entry(op.ins[1], (b, offset, atom)))
                degree = functools.reduce(Lin.plus, [entry.degree for entry in summed])
                for entry in summed:
                    self.direct.update(entry.places)
                if op.kind == "extreme":
                    self._zero(
                        degree, atom, f"its share would have to pass through {op.name}", near
                    )
                    continue
                if any(value.zero for value in op.ins):
                    continue
                sums[atom] = sums.get(atom, frozenset()) | {len(self.sums)}
                if not any(entry.places for entry in summed):  # the variance, after the mean
                    sums[atom] = sums[atom].union(*(entry.sums for entry in summed))
                self.sums.append(Sum(atom, degree, near, op))
        self.sums_of[id(out)] = sums

    def _product(self, parts: Sequence[Entry]) -> Entry:
        """Entries that are multiplied coordinate by coordinate."""
        degree = ZERO
        for part in parts:
            degree = degree.plus(part.degree)
        present = [part for part in parts if part.status != "spread"]
        sums = frozenset().union(*(part.sums for part in parts))
        if not present:
            return Entry(degree)
        if len(present) == 1:
            return dataclasses.replace(present[0], degree=degree, sums=sums)
        leaves = [part for part in present if part.status == "leaf"]
        if leaves and len(leaves) < len(present):
            for part in leaves:
                self._scales(part, sums)
            return Entry(degree, "scaled")
        return Entry(degree, "made", (), sums)

    def _scales(self, leaf: Entry, sums: frozenset[int]) -> None:
        for place in leaf.places:
            self.elementwise.add(place)
            if sums:
                self.normalised.setdefault(place, set()).update(sums)

    def _elementwise(self, op: Op, near) -> None:
        (out,) = op.outs
        entries: dict[Key, Entry] = {}
        for predicate, *_ in op.groups:
            self._flat(predicate, near, "a condition")
        for key in self.keys(out):
            parts = [self._moved(value, key) for value in op.ins]
            if op.kind == "same":
                entries[key] = parts[0]
            elif op.kind == "mul":
                entries[key] = self._product(parts)
            elif op.kind == "div":
                flipped = dataclasses.replace(parts[1], degree=parts[1].degree.times(-1))
                entries[key] = self._product([parts[0], flipped])
            elif op.kind == "add":
                entries[key] = self._added(op, key, parts, near)
            elif isinstance(op.kind, tuple):
                part = parts[0]
                entries[key] = Entry(part.degree.times(op.kind[1]), _bent([part]), (), part.sums)
            else:
                for part in parts:
                    why = f"its share would have to pass through {op.name}"
                    self._zero(part.degree, key[2], why, near)
                taken = frozenset[int]().union(*(part.sums for part in parts))
                entries[key] = Entry(ZERO, _bent(parts), (), taken)
        self._put(op, out, entries)

    def _moved(self, value: Value, key: Key) -> Entry:
        """An operand along an axis; one that is spread may hold a sum over it."""
        entry = self._entry(value, key)
        sums = self.sums_of.get(id(value), {}).get(key[2], frozenset())
        return dataclasses.replace(entry, sums=entry.sums | sums) if sums else entry

    def _added(self, op: Op, key: Key, parts: list[Entry], near) -> Entry:
        present = [
            (value, part) for value, part in zip(op.ins, parts, strict=True) if not value.zero
        ]
        for _, part in present[1:]:
            gap = part.degree.plus(present[0][1].degree, -1)
            why = "only one of two added numbers would have the share"
            self._zero(gap, key[2], why, near)
        degree = present[0][1].degree if present else ZERO
        sums = frozenset().union(*(part.sums for part in parts))
        carrying = [part for _, part in present if part.status != "spread"]
        if not carrying:
            return Entry(degree)
        if len(carrying) == 1:
            return dataclasses.replace(carrying[0], degree=degree, sums=sums)
        leaves = [part for part in carrying if part.status == "leaf"]
        others = [part for part in carrying if part.status != "leaf"]
        scaled = bool(others) and all(part.status == "scaled" for part in others)
        for part in leaves:
            if scaled or (sums and others):
                self._scales(part, sums)
        if leaves and scaled:
            return Entry(degree, "scaled")
        return Entry(degree, "made")

    # Decisions -------------------------------------------------------------------------------

    def _decide(self) -> dict[int, Sum]:
        """Decide of every sum whether a parameter's share preserves it (degree 1) or it is a mean."""
        means: dict[int, Sum] = {}
        for number, each in enumerate(self.sums):
            system = self.systems.setdefault(each.atom, System())
            degree = system.value(each.degree)
            open_places = [self.places[n] for n in degree.terms if n in self.places]
            trial = system.copy()
            if trial.zero(degree.plus(Lin(1), -1)):
                if len(open_places) > 1:
                    self.choices.setdefault(each.atom, []).extend(open_places)
                self.systems[each.atom] = trial
                continue
            trial = system.copy()
            if trial.zero(degree):
                self.systems[each.atom] = trial
                means[number] = each
            else:
                self._fault(
                    each.atom, "two parameters of one sum over it would take the share", each.near
                )
        return means

    def settle(self, prefer: Any) -> None:
        """Decide what the equations leave open: the share goes where `prefer(place)` is largest."""
        for atom, system in self.systems.items():
            wanted = sorted(set(self.choices.get(atom, ())), key=prefer, reverse=True)
            for place in wanted:
                name = self.unknown[place]
                if system.unknowns([name]):
                    trial = system.copy()
                    if trial.zero(Lin(-1, {name: Fraction(1)})):
                        system = self.systems[atom] = trial
            for name, place in self.places.items():
                if place.atom is atom and system.unknowns([name]):
                    trial = system.copy()
                    if trial.zero(Lin(0, {name: Fraction(1)})):
                        system = self.systems[atom] = trial


def _bent(parts: Sequence[Entry]) -> str:
    present = [part.status for part in parts if part.status != "spread"]
    return "made" if present else "spread"
