"""The arrays of an optimizer's state: the parameter that each belongs to, or its count."""

import re
from typing import Any, Literal, NamedTuple

import jax

from growjax.axes import Slot, axes_of
from growjax.growth import Births
from growjax.optim.age import Ages, Since


class Cell(NamedTuple):
    """One array of an optimizer's state.

    - `name`: its path.
    - `kind`: its path without the numbers of layers, and the spec of its parameter; the same for the
      arrays of layers that are alike.
    - `steps`: the path of its parameter in the model; None if it belongs to none.
    - `alone`: whether it is the only array at the parameter's path (factored moments come in pairs).
    - `axis`: the axis whose coordinates' ages or births it holds, or None.
    - `counts`: the quantity that it counts, if it is part of an `Ages`, `Births` or `Since`.
    - `node`: the path of that `Ages`, `Births` or `Since`.
    """

    name: str
    kind: str
    steps: tuple[str | int, ...] | None = None
    alone: bool = False
    axis: str | None = None
    counts: Literal["age", "birth", "since", "growths", "last"] | None = None
    node: str = ""


def cells(state: Any, params: Any) -> list[Cell]:
    """The arrays of an optimizer's state, in the order of its leaves."""
    slots = {slot.steps: slot for slot in axes_of(params).params()}
    arrays = []
    whole = lambda node: alike(node, params) or isinstance(node, Ages | Births | Since)  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=whole):
        like = alike(node, params)
        for inner, _ in jax.tree_util.tree_leaves_with_path(node):
            name = jax.tree_util.keystr((*path, *inner))
            steps = tuple(
                getattr(k, "name", getattr(k, "idx", getattr(k, "key", k))) for k in inner
            )
            if isinstance(node, Ages | Births | Since):
                arrays.append(_counting(name, node, steps, jax.tree_util.keystr(path)))
                continue
            places = [steps[:n] for n in range(len(steps) + 1)] if like else []
            own = [place for place in places if place in slots]
            if own:
                kind = jax.tree_util.keystr(path) + numberless(
                    jax.tree_util.keystr(inner), slots[own[0]]
                )
                # As the parameter is called: in an annotated model by its path in the user's own
                rest = jax.tree_util.keystr(inner[len(own[0]) :])
                name = f"{jax.tree_util.keystr(path)}.{slots[own[0]].path}{rest}"
                arrays.append(Cell(name, kind, own[0], steps == own[0]))
            else:
                arrays.append(Cell(name, name))
    return arrays


def _counting(name: str, node: Ages | Births | Since, steps: tuple, path: str) -> Cell:
    """The cell of an array that counts updates or growths."""
    if steps[0] in ("growths", "last"):
        return Cell(name, name, counts=steps[0], node=path)
    counts = {Ages: "age", Births: "birth", Since: "since"}[type(node)]
    return Cell(name, name, axis=steps[-1], counts=counts, node=path)  # type: ignore[arg-type]


def numberless(path: str, slot: Slot) -> str:
    """A parameter's path with `*` for every number (of a layer), and its spec."""
    return f"{re.sub(r'[0-9]+', '*', path)} {slot.spec}"


def alike(node: Any, params: Any) -> bool:
    """Whether a node of a state is a tree like the parameters (which may be a list or a dict)."""
    if type(node) is not type(params):
        return False
    if isinstance(node, dict):
        return node.keys() == params.keys()
    return not isinstance(node, list | tuple) or len(node) == len(params)
