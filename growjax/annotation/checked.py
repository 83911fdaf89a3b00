"""Check an annotation against the traced program of its model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from growjax.annotation.closing import Closings, closings, grown_shapes, slots_of, stack_steps
from growjax.annotation.packing import unpack
from growjax.annotation.traced import Traced, call
from growjax.axes import axes_of, get
from growjax.maps import AxisMap
from growjax.specs import Dim
from growjax.trace import Differs, Node, Place, factored, powers, unbalanced, unify
from growjax.trace.dims import cut


class Checked:
    """The errors in an annotation, from one trace of the model and one more for every axis."""

    def __init__(self, annotated: Any, batch: Any, forward: Callable | None):
        self.annotated, self.forward = annotated, forward or call
        self.table = axes_of(annotated)
        places = list(stack_steps(annotated.tree))
        self.nodes: dict[str, Node] = {}
        self.where: dict[tuple[str, Node], str] = {}
        self.traced = Traced(unpack(annotated.tree), batch, forward, places, read=False)
        # The slot of every declared array, and how many of its axes are those of packed lists
        self.slots = {n: (slot, packed) for n, slot, packed in slots_of(annotated, self.traced)}
        # Once: dimensions that are cut or factored again are other nodes than those that were read
        self.parts = list(self._parts())
        self.complaints: list[str] = []
        self.closings: Closings = {}

    def faults(self) -> list[str]:
        """Every error, a line each."""
        self._name()
        given = {place: takes for place, takes, _ in self._declared()}
        self.traced.read(given)
        self._wrong_roles()
        self._unclaimed()
        for axis in self.table.sizes:
            self._at_another_size(axis)
        self.closings = closings(self.annotated, self.traced)
        for axis in dict.fromkeys((*self.annotated.gates, *self.annotated.residual)):
            if "stack" in self.table.roles(axis):
                self._open_stack(axis)
        return list(dict.fromkeys(self.complaints))

    def _parts(self) -> Iterator[tuple[int, int, int, Dim, Node]]:
        """Every axis of every array: its number, dimension, offset, declaration and node."""
        for leaf, (slot, packed) in self.slots.items():
            value = self.traced.program.inputs[leaf]
            for d, (terms, node) in enumerate(
                zip(slot.spec.terms[packed:], value.nodes, strict=True)
            ):
                sizes = [
                    int(np.prod([dim.size(self.table.sizes) for dim in term])) for term in terms
                ]
                at = 0
                for term, size, block in zip(terms, sizes, cut(node, sizes), strict=True):
                    factors = factored(block, [dim.size(self.table.sizes) for dim in term])
                    for dim, factor in zip(term, factors, strict=True):
                        if factor.root.size > 1:
                            yield leaf, d, at, dim, factor
                    at += size

    def _name(self) -> None:
        """Unify all dimensions of one name, and report those that have two names."""
        names: dict[Node, tuple[str, str]] = {}
        parts = [part for part in self.parts if not part[3].literal]
        for leaf, _, _, dim, node in parts:
            path = self.traced.paths[leaf]
            for _, atom in node.atoms:
                other, first_path = names.setdefault(atom, (dim.axis, path))
                if other != dim.axis:
                    self.complaints.append(
                        f"{path}: {dim.axis!r} is the same dimension of the program as {other!r} "
                        f"of {first_path}"
                    )
        for *_, dim, node in parts:
            unify(self.nodes.setdefault(dim.axis, node), node)

    def _declared(self) -> Iterator[tuple[Place, bool, Dim]]:
        """Every axis of every trained array, with whether it is declared to take the share."""
        for leaf, d, at, dim, node in self.parts:
            if (
                not dim.literal
                and dim.role not in ("stack", "lookup")
                and self.traced.trained[leaf]
            ):
                for _, atom in node.atoms:
                    yield Place(leaf, d, at, atom), dim.role == "consumed", dim

    def _wrong_roles(self) -> None:
        wrong = set(self.traced.roles.contradicted)
        for place, takes, dim in self._declared():
            if place in wrong and not place.atom.data:
                now, want = ("consumed", "produced") if takes else (dim.role, "consumed")
                self.complaints.append(
                    f"{self.traced.paths[place.leaf]}: {dim.axis!r} is declared {now}, and the program "
                    f"needs it {want}"
                )

    def _unclaimed(self) -> None:
        """Report the sums over an axis that no array consumes and no declared norm takes."""
        roles = self.traced.roles
        bare = {s.dims[-1].axis for s in self.table.of_kind("param") if s.value is None and s.dims}
        same = {n: group for group in self.traced.groups for n in group}
        declared: set[int] = set()
        named: dict[Node, str] = {}
        for place, _, dim in self._declared():
            named[place.atom] = dim.axis
            if dim.normalised:
                for leaf in same.get(place.leaf, [place.leaf]):
                    declared |= roles.normalised.get(place._replace(leaf=leaf), set())
        seen = set()
        for number, mean in roles.means.items():
            axis = named.get(mean.atom)
            near = ", ".join(self.traced.paths[n] for n in mean.near)
            if axis is None or axis in bare or number in declared or mean.atom.data:
                continue
            text = (
                f"axis {axis!r}: the program sums over it ({mean.op.name} near {near}), but it is "
                "neither consumed by an array of that sum nor averaged by a declared norm ('~')"
            )
            if (axis, near) not in seen:
                self.complaints.append(text)
            seen.add((axis, near))

    def _at_another_size(self, axis: str) -> None:
        """Trace the model with the axis twice as long, and report why it is not the same program."""
        node = self.nodes.get(axis)
        roles = self.table.roles(axis)
        if node is None or node.root.data or roles & {"stack", "lookup"} or "consumed" not in roles:
            return  # nothing reads an axis of outputs, which may well follow its size
        if any(f"axis {axis!r}" in c or f"{axis!r} is" in c for c in self.complaints):
            return
        if fixed := [reason for _, atom in node.atoms for reason in atom.fixed]:
            self._wrong_size(axis, fixed[0])
            return
        size = self.table.size(axis)
        try:
            grown = grown_shapes(self.annotated, AxisMap(axis, np.arange(2 * size) % size))
            arrays = [get(grown, steps) for steps in self.traced.steps]
            large = self.traced.traced(grown, arrays)
            constants = powers(self.traced.program, large, node.root, 2)
        except Differs as error:
            self._wrong_size(axis, str(error))
        except Exception as error:  # whatever the user's model raises at a size that it cannot take
            self._wrong_size(
                axis, f"the model does not run with more of it: {str(error).strip()[:200]}"
            )
        else:
            faults = unbalanced(self.traced.program, self.traced.roles, node.root, constants)
            for why, near in faults:
                names = ", ".join(self.traced.paths[n] for n in near)
                self._wrong_size(axis, f"{why} (near {names})" if names else why)

    def _open_stack(self, axis: str) -> None:
        """Report blocks that should be the identity without their branches, and are not."""
        if why := self.closings.get((axis, self.annotated.stream)):
            name = "gates" if axis in self.annotated.gates else "residual"
            self.complaints.append(
                f"{name}: a block of {axis!r} is not the identity where the arrays that produce "
                f"{self.annotated.stream!r} are zero: {why}"
            )

    def _wrong_size(self, axis: str, why: str) -> None:
        size = self.table.size(axis)
        self.complaints.append(
            f"axis {axis!r} cannot grow: {why}. Name the static fields that follow it in `statics`, or "
            f"write its size, {size}, in place of its name"
        )
