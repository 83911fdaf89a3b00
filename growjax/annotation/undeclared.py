"""Norms and tied heads that an annotation leaves out, as far as axes and layers of `eqx.nn` show.

Norms that a model writes out itself show in its program alone (`annotate(..., example=batch)`).
"""

import fnmatch
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax

from growjax.annotation.packing import has_shape, walk
from growjax.axes import Axes, Slot, get


def undeclared(
    tree: Any, table: Axes, statics: Mapping[str, Any], gates: Collection[str]
) -> Iterator[str]:
    """What is missing, a line each; `statics` are the declared static fields.

    An axis behind a gate may be read by a head that takes no share: `gj.msg` divides nothing.
    """
    for steps, path, node in walk(tree):
        if isinstance(node, eqx.nn.LayerNorm | eqx.nn.RMSNorm):
            yield from _norm(node, steps, path, table, statics)
        if isinstance(node, eqx.nn.Shared):
            yield from _tied(node, steps, path, table, gates)


def unread(table: Axes, gates: Collection[str]) -> Iterator[str]:
    """A residual stream that its blocks read and nothing after them: its head may be its own table.

    Blocks that do not add to the stream are after it, such as those of a decoder that read an encoder's.
    """
    for axis in table.sizes:
        if axis in gates or not table.is_stream(axis):
            continue
        readers = [s for s in table.having(axis, "param") if s.positions(axis, "consumed")]
        adding = [s for s in table.having(axis, "param") if s.positions(axis, "produced")]
        stacks = {d.axis for s in adding for d in s.dims if d.role == "stack"}
        inside = [s for s in readers if any(d.axis in stacks for d in s.dims)]
        if inside and len(inside) == len(readers):
            yield (
                f"{axis!r}: no array after the blocks consumes it. If the head is the table that "
                f"produces it, the gain of the norm before it takes the share: declare it '~{axis} ->'. "
                "If there is no head, give example=batch, which shows that"
            )


def _norm(node: Any, steps: tuple, path: str, table: Axes, statics) -> Iterator[str]:
    dims = [d for s in table.values() if s.steps[:-1] == ("tree", *steps) for d in s.dims]
    if any(dim.normalised for dim in dims):
        return
    names = [d.axis for d in dims if d.role != "stack" and not d.literal]
    if node.weight is None and node.bias is None:
        texts = [
            text for name, text in statics.items() if fnmatch.fnmatchcase(f"{path}.shape", name)
        ]
        names = re.findall(r"[A-Za-z_]\w*", str(texts[0]) if texts else "")
        if not (dims or texts):  # nothing shows its axis but its size
            same = [axis for axis, size in table.sizes.items() if node.shape == (size,)]
            if same:
                yield (
                    f"{path}: a {type(node).__name__} without a gain averages over {node.shape[0]} "
                    f"entries, as many as {', '.join(map(repr, same))}; declare it, '{path}': "
                    f"'~{same[0]}', or its size in statics, '{path}.shape': ('{node.shape[0]}',), if "
                    "its axis is none of these"
                )
            return
    for axis in dict.fromkeys(names):
        yield (
            f"{path}: a {type(node).__name__} averages over {axis!r}, which uneven copies change; "
            f"declare it where its gain is, or would be: '{path}.weight': '~{axis}'"
        )


def _tied(node: Any, steps: tuple, path: str, table: Axes, gates) -> Iterator[str]:
    """A Linear that reads an axis through a shared table that is declared to produce it."""
    places = {id(inner): (where, name) for where, name, inner in walk(node.pytree)}
    # `eqx.nn.Shared` removes the arrays at `where`, and puts those of `get` in their place at every call
    removed, shared = (jax.tree.leaves(f(node.pytree)) for f in (node.where, node.get))
    for placeholder, array in zip(removed, shared, strict=True):
        where, _ = places.get(id(placeholder), ((), ""))
        source = places.get(id(array), ((), ""))[0]
        reader = get(node.pytree, where[:-1]) if where else None
        slot = _slot(table, ("tree", *steps, "pytree", *source))
        if not isinstance(reader, eqx.nn.Linear) or where[-1] != "weight" or slot is None:
            continue
        if slot.dims[-1].literal or slot.dims[-1].role == "consumed":
            continue
        axis = slot.dims[-1].axis  # a Linear's weight is [out, in]
        vectors = [s for s in table.having(axis, "param") if len(s.dims) == 1]
        takes = any(s.dims[0].role == "consumed" for s in vectors)
        # Where nothing consumes the axis, operators refuse it themselves
        if "consumed" in table.roles(axis) and not (takes or axis in gates):
            yield (
                f"{path}: a Linear reads {axis!r} through {slot.path}, which "
                f"produces it, and no norm before it takes the share: declare the norm's gain '~{axis} "
                f"->', or write the size, {table.size(axis)}, in place of {axis!r}"
            )


def _slot(table: Axes, steps: tuple) -> Slot | None:
    slots = [s for s in table.values() if s.steps == steps and s.dims]
    return slots[0] if slots and has_shape(slots[0].value) else None
