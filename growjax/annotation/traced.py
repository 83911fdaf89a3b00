"""A user's model as a traced program: its arrays with their paths, and which of them are stacked."""

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import StateIndex

from growjax.annotation.packing import has_shape, walk
from growjax.axes import put
from growjax.errors import AxisError
from growjax.trace import Place, Program, Roles, tie, trace


def call(model: Any, batch: Any) -> Any:
    """The model under `vmap` on a batch, a tuple for several inputs; with its state, if it has one."""
    inputs = batch if isinstance(batch, tuple) else (batch,)
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or () in lengths:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(inputs)]
        raise AxisError(
            "the batch: expected arrays with one leading batch dimension (a tuple for several inputs), "
            f"or forward=(model, batch) -> outputs, got the shapes {shapes}"
        )
    nodes = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, eqx.nn.BatchNorm | StateIndex))
    if not any(isinstance(node, StateIndex | eqx.nn.BatchNorm) for node in nodes):
        return jax.vmap(model)(*inputs)
    named = [node.axis_name for node in nodes if isinstance(node, eqx.nn.BatchNorm)]
    name = named[0] if named else "batch"
    state = eqx.nn.State(model)
    model = eqx.nn.delete_init_state(model)
    run = jax.vmap(model, axis_name=name, in_axes=(*[0] * len(inputs), None), out_axes=(0, None))
    return run(*inputs, state)


class Traced:
    """A model's arrays, in the order of their paths, and the program that it computes of them.

    - `arrays`: path to the steps and the array; `paths` are the keys, in order.
    - `groups`: the numbers of arrays that are one array of packed blocks.
    """

    roles: Roles

    def __init__(
        self,
        model: Any,
        batch: Any,
        forward: Callable | None,
        stacks: Sequence[tuple],
        *,
        read: bool = True,
    ):
        self.model, self.batch, self.forward = model, batch, forward or call
        places = [(steps, path, leaf) for steps, path, leaf in walk(model) if _is_numeric(leaf)]
        self.steps = [steps for steps, _, _ in places]
        self.paths = [path for _, path, _ in places]
        self.arrays = [leaf for _, _, leaf in places]
        self.groups = _stacked(self.steps, stacks)
        states = [steps for steps, _, node in walk(model) if isinstance(node, StateIndex)]
        self.trained = [
            jnp.issubdtype(x.dtype, jnp.floating) and not any(where[: len(s)] == s for s in states)
            for where, x in zip(self.steps, self.arrays, strict=True)
        ]
        self.program = self.traced(model, self.arrays)
        for number in self._stopped():
            self.trained[number] = False
        tie(self.program, self.groups)
        if read:
            self.read()

    def read(self, given: Mapping[Place, bool] | None = None) -> None:
        """Solve for the role of every axis; `given` fixes for some places whether they take the share."""
        values = self.program.inputs[: len(self.arrays)]
        self.roles = Roles(self.program.tape, values, self.trained, self.groups, given)
        self.roles.settle(self._suits)

    def _stopped(self) -> list[int]:
        """The arrays of which the program takes no gradient (`jax.lax.stop_gradient`)."""
        uses: dict[int, set[str]] = {}
        for op in self.program.tape:
            for value in op.ins:
                uses.setdefault(id(value), set()).add(op.name)
        values = self.program.inputs[: len(self.arrays)]
        return [n for n, value in enumerate(values) if uses.get(id(value)) == {"stop_gradient"}]

    def traced(self, model: Any, arrays: Sequence[Any]) -> Program:
        """The program of a model of the same fields with other arrays, or shapes."""

        def run(arrays, batch):
            return self.forward(put(model, dict(zip(self.steps, arrays, strict=True))), batch)

        return trace(run, arrays, self.batch)

    def _suits(self, place: Place) -> tuple[bool, bool, int, int, int]:
        """The rank of a place among those that could take the share: summed over first, then keys."""
        path = self.paths[place.leaf].lower()
        key = any(
            fnmatch.fnmatchcase(part, "*key*") or part in ("k", "wk") for part in path.split(".")
        )
        key |= ".k_" in f".{path}"
        return place in self.roles.direct, key, place.leaf, place.dim, place.offset

    def named(self, text: str) -> str:
        """A message with the paths of the arrays that it names by number."""
        for number, path in enumerate(self.paths):
            text = text.replace(f"{{{number}}}", path)
        return text


def _is_numeric(leaf: Any) -> bool:
    return has_shape(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _stacked(steps: Sequence[tuple], stacks: Sequence[tuple]) -> list[list[int]]:
    """Arrays that differ only in the index of a block of a stacked list."""
    groups: dict[tuple, list[int]] = {}
    for number, where in enumerate(steps):
        groups.setdefault(_general(where, stacks), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _general(steps: tuple, stacks: Collection[tuple]) -> tuple:
    """Steps with `"*"` for the index in every stacked list that they lead through."""
    lists = [any(leads_to(steps[:n], stack) for stack in stacks) for n in range(len(steps))]
    return tuple("*" if inside else step for step, inside in zip(steps, lists, strict=True))


def leads_to(steps: tuple, stack: tuple) -> bool:
    """Whether steps lead to a stacked list, whatever the index of the lists that it is in."""
    return len(steps) == len(stack) and all(
        a == b or b == "*" for a, b in zip(steps, stack, strict=True)
    )


def stack_places(model: Any, patterns: Mapping[str, str]) -> dict[tuple, str]:
    """The steps of the lists that match a pattern, with `"*"` for the index of a list around them."""
    places: dict[tuple, str] = {}
    for steps, path, node in walk(model):
        if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
            for pattern, axis in patterns.items():
                if fnmatch.fnmatchcase(path, pattern):
                    places.setdefault(_general(steps, places), axis)
    return places
