"""`infer`: the annotation of a model from one trace of its program."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx

from growjax.annotation import Annotated
from growjax.annotation.annotated import annotate, annotated_by, with_state
from growjax.annotation.closing import Closings, closings
from growjax.annotation.packing import unlike, unpack, walk
from growjax.annotation.traced import Traced, call, stack_places
from growjax.axes import Declaration, axes_of, get
from growjax.certificate import certify
from growjax.growth.copying import Copy
from growjax.inference.epsilons import Epsilons
from growjax.inference.naming import STREAMS, Names, name_axes
from growjax.inference.sizes import Statics
from growjax.inference.spelling import Token, spell, terms_of
from growjax.trace import Node, Place


def infer(
    model: Any,
    batch: Any,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    state: eqx.nn.State | None = None,
    certified: bool = False,
    gates: Sequence[str] = (),
) -> Annotated:
    """Annotate a model by tracing it; `print` shows the call of `gj.annotate` to paste.

    The model is traced with shapes and never run. The trace shows which dimensions of its arrays are one
    axis, which arrays produce it, which sum over it and which norms average over it. An axis gets a name
    only if copies with shares keep the function; all others are written as numbers, which never grow, and
    `.notes` says why. Names are guesses, to be changed at will.

    **Arguments**

    - `batch`: an input of the model with a leading batch dimension (a tuple for several inputs). Arrays
      or `jax.ShapeDtypeStruct`s.
    - `forward`: `(model, batch) -> outputs`; by default the model under `vmap`, with its state.
    - `state`: the `eqx.nn.State` of the model.
    - `certified`: also grow every axis by copies and compare the outputs with the model's in float64
      (`gj.certify`), which compiles; an axis that fails becomes a number.
    - `gates`: axes that `gj.msg` may grow, by the names that are inferred; see `gj.annotate`.

    Exceptions that the model raises on `batch` pass through. Raises `AxisError` for gates that the model
    cannot have.

    **Example**

        small = gj.infer(model, tokens)
        print(small)
        big = gj.grow(gj.copy(mlp=2048), small)
    """
    inference = _Inference(model, batch, forward, state)
    annotated = inference.annotated()
    while certified:
        broken = _broken(annotated, batch, forward)
        if not broken:
            break
        for axis, why in broken.items():
            inference.refuse(axis, why)
        annotated = inference.annotated()
    if not gates:
        return annotated
    gated = annotate(
        model,
        dict(annotated.specs),
        ignore=annotated.ignore,
        statics=dict(annotated.statics),
        stacks=dict(annotated.stacks),
        state=state,
        gates=gates,
        residual=annotated.residual,
        stream=annotated.stream,
        example=batch,
        forward=forward,
    )
    return dataclasses.replace(gated, notes=annotated.notes)


def _broken(annotated: Annotated, batch: Any, forward: Callable | None) -> dict[str, str]:
    """The axes whose copies change the function, each with a message that says by how much."""
    run = forward or call

    def whole(model, batch):
        return run(unpack(model.tree), batch)

    def passes(*axes: str):
        op = Copy(tuple((axis, 2 * sizes[axis]) for axis in axes))
        return certify(op, annotated, batch, forward=whole)

    sizes = axes_of(annotated).sizes
    axes = [a for a in sizes if axes_of(annotated).roles(a) >= {"consumed"}]
    axes = [a for a in axes if not axes_of(annotated).roles(a) & {"stack", "lookup"}]
    if not axes or passes(*axes).passed:
        return {}
    records = {axis: passes(axis) for axis in axes}
    return {
        axis: f"copies change the outputs by {record.forward[-1].relative:.0e} in float64 (certified)"
        for axis, record in records.items()
        if not record.passed
    }


class _Inference:
    """One trace of a model: its axes with their roles and names, and the annotation made of them."""

    def __init__(self, model: Any, batch: Any, forward: Callable | None, state: Any):
        self.bare, self.state = model, state
        self.model = model if state is None else with_state(model, state)
        self.stacks = _stacks(self.model)
        places = stack_places(self.model, self.stacks)
        self.traced = Traced(self.model, batch, forward, list(places))
        self.roles, self.paths = self.traced.roles, self.traced.paths
        self.values = self.traced.program.inputs[: len(self.paths)]
        self.representative = {n: group[0] for group in self.traced.groups for n in group}
        used = {id(value) for op in self.traced.program.tape for value in op.ins}
        self.unused = {n for n, value in enumerate(self.values) if id(value) not in used}
        outs = [value for op in self.traced.program.tape for value in op.outs]
        self.computed = {atom for value in outs for _, _, atom in self.roles.keys(value)}
        self.places: dict[Node, list[Place]] = {}
        for leaf, value in enumerate(self.values):
            if leaf not in self.unused and self.representative.get(leaf, leaf) == leaf:
                for d, offset, atom in self.roles.keys(value):
                    self.places.setdefault(atom, []).append(Place(leaf, d, offset, atom))
        self.role = {p: self._role(p) for at in self.places.values() for p in at}
        self.refused = self._inexpressible()
        self.statics = Statics(self.traced)
        for atom in self.places:
            why = self.refused.get(atom) or self._why_not(atom)
            if not why and not self._is_indexed(atom):
                why = self._unclaimed(atom, self.statics.probe(atom))
            if why:
                self.refused[atom] = why
        self.norms = self._bare_norms()
        self.epsilons = Epsilons(self.traced.program, self.roles, self.paths).of
        self.names = Names(self.paths, self.stacks.values())
        open_places = {atom: at for atom, at in self.places.items() if atom not in self.refused}
        name_axes(
            self.names,
            open_places,
            self.role,
            [factors for value in self.values for factors in _products(value)],
            {atom: "layers" for atom in open_places if self._is_stack(atom)},
            self._convolved(),
            self._fields(),
            self.places,
            {atom for out in self.traced.program.outputs for _, _, atom in self.roles.keys(out)},
        )

    def _fields(self) -> dict[Node, str]:
        """Axes that one static field is the size of, with its name."""
        return {
            atoms[0]: field.pattern.rpartition(".")[2]
            for field, atoms in self.statics.needs.items()
            if len(atoms) == 1 and field.number == atoms[0].size
        }

    def _convolved(self) -> set[int]:
        """The arrays that are kernels of convolutions."""
        kernels = {id(op.ins[1]) for op in self.traced.program.tape if op.name == "conv"}
        return {n for n, value in enumerate(self.values) if id(value) in kernels}

    def _role(self, place: Place) -> str:
        if place in self.roles.stacks:
            return "stack"
        if place in self.roles.lookups:
            return "lookup"
        if self.roles.takes(place):
            return "consumed"
        return "elementwise" if place in self.roles.elementwise else "produced"

    def _is_stack(self, atom: Node) -> bool:
        return all(self.role[place] == "stack" for place in self.places[atom])

    def _is_indexed(self, atom: Node) -> bool:
        """Whether its coordinates are rows or layers, which no copies share."""
        return self._is_stack(atom) or any(self.role[p] == "lookup" for p in self.places[atom])

    # Axes that cannot grow -------------------------------------------------------------------

    def _inexpressible(self) -> dict[Node, str]:
        """Axes in dimensions that no spec can write: sums in products, two sums in one array."""
        refused: dict[Node, str] = {}
        for value in self.values:
            sums = [node for node in value.nodes if len(node.blocks()) > 1]
            hidden = [atom for node in sums[1:] for _, atom in node.atoms]
            for node in value.nodes:
                for factor in (f.root for block in node.blocks() for f in block.factors()):
                    hidden += [atom for _, atom in factor.atoms] if factor.structure else []
            refused |= {atom: "no spec can write how it is laid out" for atom in hidden}
        for place, role in self.role.items():
            if role == "stack" and place.dim > 0:
                refused[place.atom] = "it is scanned over, and not the first dimension"
        return refused

    def _why_not(self, atom: Node) -> str:
        if atom.data:
            return "it is a dimension of the inputs"
        faults = [] if self._is_stack(atom) else self.roles.faults.get(atom, [])
        seen = atom in self.computed or self._is_indexed(atom)
        unread = [] if seen else ["nothing that the program computes has it"]
        return self.traced.named("; ".join([*atom.fixed[:1], *faults[:1]] or unread))

    def _unclaimed(self, atom: Node, why: str) -> str:
        """The reason why an axis cannot grow: a sum in which no array takes the share, else `why`."""
        declared = {n for sums in self.roles.normalised.values() for n in sums}
        loose = [m for n, m in self.roles.means.items() if m.atom is atom and n not in declared]
        if not why or not loose or "follow" not in why:
            return why
        near = ", ".join(self.paths[n] for n in loose[-1].near)
        return f"the program sums over it ({loose[-1].op.name} near {near}), and no array takes the share"

    def refuse(self, axis: str, why: str) -> None:
        """Write an axis as a number after all."""
        atom = next(atom for atom, name in self.names.given.items() if name == axis)
        self.refused[atom] = why
        del self.names.given[atom]

    def _bare_norms(self) -> dict[str, Node]:
        """Norms without parameters, by the path of the gain that they lack, with their axis.

        An axis with a norm that nothing can declare is refused.
        """
        declared = {n for sums in self.roles.normalised.values() for n in sums}
        bare = {
            path: node
            for _, path, node in walk(self.model)
            if isinstance(node, eqx.nn.LayerNorm | eqx.nn.RMSNorm)
            and node.weight is None
            and node.bias is None
        }
        norms: dict[str, Node] = {}
        for number, mean in self.roles.means.items():
            atom = mean.atom
            if number in declared or atom not in self.places or atom in self.refused:
                continue
            mine = {path: atom for path, node in bare.items() if node.shape == (atom.size,)}
            if mine:
                norms |= {f"{path}.weight": atom for path in mine}
            else:
                near = ", ".join(self.paths[n] for n in mean.near)
                self.refused[atom] = f"a norm that has no parameters averages over it (near {near})"
        return norms

    # The annotation --------------------------------------------------------------------------

    def annotated(self) -> Annotated:
        """The model, annotated with the axes that have names."""
        specs: dict[str, str | Declaration] = {}
        ignore: list[str] = []
        for leaf, path in enumerate(self.paths):
            pattern = self._pattern(path)
            if self.representative.get(leaf, leaf) != leaf:
                continue
            text, names = self._spec(leaf)
            if leaf in self.unused or not (names or self.traced.trained[leaf]):
                ignore.append(pattern)
            else:
                trains = self.traced.trained[leaf] and not self._is_epsilon(leaf)
                specs[pattern] = text if trains else Declaration("buffer", text)
        for path, atom in self.norms.items():
            if atom in self.names.given:
                specs[self._pattern(path)] = f"~{self.names.given[atom]}"
        # What only a program shows has been read from it
        made = annotated_by(self.bare, specs, ignore, self._statics(), self.stacks, self.state)
        traced = closings(made, self.traced)
        streams = [name for name in STREAMS if name in self.names.given.values()]
        residual = [axis for (axis, name), why in traced.items() if name in streams[:1] and not why]
        return dataclasses.replace(
            made,
            notes=(*self._notes(), *_open_stacks(traced)),
            residual=tuple(residual),
            stream=streams[0] if residual else made.stream,
            traced=tuple(traced.items()),
        )

    def _pattern(self, path: str) -> str:
        """A path with `*` for the index in a stacked list."""
        parts = path.split(".")
        for n in range(len(parts)):
            above = ".".join(parts[:n])
            if above in self.stacks and parts[n].isdigit():
                parts[n] = "*"
        return ".".join(parts)

    def _spec(self, leaf: int) -> tuple[str, set[str]]:
        """The spec of an array, and the axes in it."""
        names: set[str] = set()

        def token(dim: int, offset: int, atom: Node) -> Token:
            name = self.names.given.get(atom)
            if name is None:
                return Token(str(atom.size))
            names.add(name)
            place = Place(leaf, dim, offset, atom)
            role = self.role[place]
            if role == "lookup":
                return Token(f"[{name}]", "consumed")
            normalised = any(n in self.roles.means for n in self.roles.normalised.get(place, ()))
            return Token(f"~{name}" if normalised else name, role)

        dims = []
        stacks: list[str] = []
        for d, node in enumerate(self.values[leaf].nodes):
            terms = terms_of(node, lambda offset, atom, d=d: token(d, offset, atom))
            if len(terms) == 1 and terms[0][0].role == "stack":
                stacks.append(terms[0][0].text)
            else:
                dims.append(terms)
        text = spell(dims)
        if self._is_epsilon(leaf):
            atom, centred, _ = self.epsilons[leaf]
            if name := self.names.given.get(atom):
                names.add(name)
                text = f"{text} <{'~' * centred}{name}>".strip()
        return (f"{' '.join(stacks)}: {text}" if stacks else text), names

    def _is_epsilon(self, leaf: int) -> bool:
        """Whether an array is the epsilon of a norm, the same in all blocks of its list."""
        same = next((group for group in self.traced.groups if leaf in group), [leaf])
        norms = {self.epsilons[n][:2] if n in self.epsilons else None for n in same}
        return None not in norms and len(norms) == 1

    def _statics(self) -> dict[str, Any]:
        """Every static field that follows axes, as their product."""
        statics: dict[str, Any] = {}
        for field, atoms in self.statics.needs.items():
            grown = [atom for atom in atoms if atom in self.names.given]
            rest, odd = divmod(field.number, math.prod(atom.size for atom in grown))
            if grown and not odd:
                names = [self.names.given[atom] for atom in grown]
                text = " ".join([*([str(rest)] if rest > 1 else []), *names])
                statics[field.pattern] = (text,) if isinstance(field.value, tuple) else text
        return statics

    def _notes(self) -> Iterator[str]:
        yield from self._refusals()
        for atom, name in self.names.given.items():
            free = [p for p in self.roles.choices.get(atom, ()) if p not in self.roles.direct]
            takers = self._where(p for p in free if self.roles.takes(p))
            others = self._where(p for p in free if not self.roles.takes(p))
            direct = any(p in self.roles.direct for p in self.places[atom])
            if takers and others and takers != others and not direct:
                yield f"{name}: {takers} takes the share of copies; {others} could as well"
        for path, atom in self.norms.items():
            if atom in self.names.given:
                name = self.names.given[atom]
                yield f"{name}: {self._pattern(path)} is taken to be a norm over it, by its size alone"

    def _refusals(self) -> Iterator[str]:
        """Notes on axes that do not grow; those of the same arrays and for the same reason are one.

        So are axes of one size in more and fewer arrays, the parts of a fused projection.
        """
        notes: list[tuple[list[int], list[str], str]] = []
        for atom, why in self.refused.items():
            arrays = self._arrays(self.places.get(atom, ()))
            if not arrays or atom.data or "kernel" in why:
                continue
            for sizes, others, reason in notes:
                nested = set(arrays) <= set(others) or set(others) <= set(arrays)
                alike = set(arrays) == set(others) or (nested and sizes == [atom.size])
                # The numbers in a message of JAX are those of one dimension
                if alike and re.sub(r"\d+", "", why) == re.sub(r"\d+", "", reason):
                    sizes += [atom.size] if atom.size not in sizes else []
                    others += [array for array in arrays if array not in others]
                    break
            else:
                notes.append(([atom.size], arrays, why))
        for sizes, arrays, why in notes:
            verb = "do" if len(sizes) > 1 else "does"
            yield f"{' and '.join(map(str, sizes))} in {', '.join(arrays)} {verb} not grow: {why}"

    def _arrays(self, places: Iterable[Place]) -> list[str]:
        return list(dict.fromkeys(self._pattern(self.paths[place.leaf]) for place in places))

    def _where(self, places: Iterable[Place]) -> str:
        return ", ".join(self._arrays(places))


def _open_stacks(traced: Closings) -> Iterator[str]:
    """Notes on stacks whose blocks are not the identity when all that produces the stream is zero."""
    for (axis, stream), why in traced.items():
        if why and stream in STREAMS:
            yield (
                f"{axis}: gj.stack(..., branch='zero') and gates on it change the function, since {why}"
            )


def _stacks(model: Any) -> dict[str, str]:
    """Lists of equal modules of the user's own, with a name for the axis of each."""
    stacks: dict[str, str] = {}
    for steps, path, node in walk(model):
        above = [get(model, steps[:n]) for n in range(len(steps))]
        inside = any(type(m).__module__.startswith("equinox.nn") for m in above)
        if not isinstance(node, list | tuple) or len(node) < 2 or inside:
            continue
        own = all(isinstance(m, eqx.Module | tuple | list | dict) for m in node)
        if own and not any(type(m).__module__.startswith("equinox.nn") for m in node):
            general = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
            if not unlike(node):
                stacks[general] = ""
    single = len(stacks) == 1
    for path in stacks:
        words = [part for part in path.split(".") if part != "*"]
        last = words[-1] if words else "layers"
        plain = single and last in ("layers", "blocks", "h", "block", "transformer", "stack")
        stacks[path] = "layers" if plain else "_".join(re.sub(r"\W", "_", w) for w in words)
    return stacks


def _products(value: Any) -> list[list[Node]]:
    """The groups of axes that share a dimension of an array, or a block of one."""
    return [
        [f.root for f in block.factors() if f.root.size > 1 and not _counts(f.root)]
        for node in value.nodes
        for block in node.blocks()
        if len(block.factors()) > 1
    ]


def _counts(node: Node) -> bool:
    return any(reason.startswith("it counts") for reason in node.fixed)
