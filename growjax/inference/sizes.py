"""Which static fields follow the size of an axis, from traces of the model at another size."""

import itertools
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import equinox as eqx
import jax

from growjax.annotation.layers import stale
from growjax.annotation.packing import walk
from growjax.annotation.traced import Traced
from growjax.axes import get, put
from growjax.trace import Differs, Node, grown_shape, powers, unbalanced


# Fields of layers of `eqx.nn` that no array shows; all others follow from the arrays
_OPEN = {"num_heads", "groups"}
# How many sets of fields are tried for one axis before it counts as one that cannot grow
_TRIES = 40


class Field(NamedTuple):
    """A static field, or those of the same name in all blocks of a list."""

    pattern: str
    value: Any
    places: tuple[tuple, ...]

    @property
    def number(self) -> int:
        """Its size, that of the only entry of a shape."""
        return self.value[0] if isinstance(self.value, tuple) else self.value

    def times(self, factor: int) -> Any:
        """The field once the axis is so many times as long."""
        return (self.number * factor,) if isinstance(self.value, tuple) else self.number * factor


class Statics:
    """The static fields that have to follow an axis; `needs` has the axes of each."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.fields = _fields(traced.model)
        self.needs: dict[Field, list[Node]] = {}

    def probe(self, atom: Node) -> str:
        """Trace the model with twice as many coordinates; why its program would differ, or ""."""
        constants, why = self._try(atom, ())
        chosen: Sequence[Field] = ()
        if constants is None:
            for fields in self._sets(atom):
                constants, _ = self._try(atom, fields)
                if constants is not None:
                    chosen = self._needed(atom, fields)
                    constants, _ = self._try(atom, chosen)
                    break
        if constants is None:
            return why
        for field in chosen:
            self.needs.setdefault(field, []).append(atom)
        program, roles = self.traced.program, self.traced.roles
        faults = unbalanced(program, roles, atom, constants)
        names = [", ".join(self.traced.paths[n] for n in near) for _, near in faults]
        return "; ".join(
            f"{text} (near {near})" if near else text
            for (text, _), near in zip(faults, names, strict=True)
        )

    def _sets(self, atom: Node) -> Iterable[Sequence[Field]]:
        """Fields that could repeat the size, all of them first, then a few at a time."""
        equal = [field for field in self.fields if field.number == atom.size]
        whole = [field for field in self.fields if field.number % atom.size == 0]
        few = (set_ for n in (1, 2, 3) for set_ in itertools.combinations(whole, n))
        sets = itertools.chain([equal] if equal else [], [whole] if whole else [], few)
        return itertools.islice(sets, _TRIES)

    def _needed(self, atom: Node, fields: Sequence[Field]) -> Sequence[Field]:
        """The fields without those that the program does not read."""
        chosen = list(fields)
        for field in fields:
            rest = [each for each in chosen if each is not field]
            if self._try(atom, rest)[0] is not None:
                chosen = rest
        return chosen

    def _try(self, atom: Node, fields: Iterable[Field]) -> tuple[dict[int, Fraction] | None, str]:
        """The constants that follow the size if these fields do, or None and the reason."""
        traced, factors = self.traced, {atom: 2}
        values = traced.program.inputs[: len(traced.paths)]
        arrays = [
            jax.ShapeDtypeStruct(grown_shape(value, factors), x.dtype)
            for value, x in zip(values, traced.arrays, strict=True)
        ]
        changes = {steps: field.times(2) for field in fields for steps in field.places}
        model = put(traced.model, changes | dict(zip(traced.steps, arrays, strict=True)))
        model = put(model, stale(model, changes))
        try:
            large = traced.traced(model, arrays)
            return powers(traced.program, large, atom, 2), ""
        except Differs as error:
            return None, str(error)
        except Exception as error:  # whatever the user's model raises at a size that it cannot take
            text = str(error).strip().splitlines()
            return None, f"the model does not run with more of it: {text[0] if text else error!r}"


def _fields(model: Any) -> list[Field]:
    """Every whole number, or shape of one dimension, that a module keeps in a field."""
    fields: dict[str, Field] = {}
    for steps, path, node in walk(model):
        value = node[0] if isinstance(node, tuple) and len(node) == 1 else node
        if not steps or type(value) is not int or value < 2 or not isinstance(steps[-1], str):
            continue
        owner = get(model, steps[:-1])
        if type(owner).__module__.startswith("equinox.") and not _is_open(owner, steps[-1]):
            continue
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        known = fields.get(pattern)
        if known is not None and known.value == node:
            fields[pattern] = known._replace(places=(*known.places, steps))
        else:
            name = pattern if known is None else path
            fields[name] = Field(name, node, (steps,))
    return list(fields.values())


def _is_open(owner: Any, name: str) -> bool:
    if isinstance(owner, eqx.nn.LayerNorm | eqx.nn.RMSNorm):
        return name == "shape" and owner.weight is None and owner.bias is None
    return name in _OPEN and not isinstance(owner, eqx.nn.Conv)
