"""Which stacks have blocks that do nothing once the arrays that produce the residual stream are zero.

Such a block is `x + f(x)`, where `f` ends in those arrays. Neither zeros nor gates in them close a block
that ends in a norm, multiplies the stream or has no residual branch.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx

from growjax import maps
from growjax.annotation.packing import Layers, unpack, walk
from growjax.annotation.traced import Traced, leads_to
from growjax.axes import Slot, axes_of, get
from growjax.maps import AxisMap
from growjax.trace import Expressions
from growjax.trees import abstract


# (axis of a stack, axis of the stream) -> why a block is not the identity once its producers of the
# stream are zero; "" if it is
Closings = dict[tuple[str, str], str]


def stack_steps(tree: Any) -> dict[tuple, str]:
    """The steps, in the user's own model, of the lists that are packed, each with its axis.

    They have `"*"` for the index in a list around them.
    """
    places = {}
    for steps, _, node in walk(tree):
        if isinstance(node, Layers):
            general = list(steps)
            for n in range(len(steps)):
                if isinstance(get(tree, steps[:n]), Layers):
                    general[n] = "*"
            places[tuple(general)] = node.axis
    return places


def slots_of(annotated: Any, traced: Traced) -> Iterator[tuple[int, Slot, int]]:
    """The slots of the traced arrays: the array's number, its slot, how many axes are packed lists.

    Of packed blocks the first one's arrays stand for all.
    """
    number = {path: n for n, path in enumerate(traced.paths)}
    paths: dict[tuple, str] = {("tree", *steps): path for steps, path, _ in walk(annotated.tree)}
    for slot in axes_of(annotated).values():
        path = paths.get(slot.steps)
        if path in number and slot.arrays():
            above: list[Any] = [get(annotated, slot.steps[:n]) for n in range(len(slot.steps))]
            yield number[path], slot, sum(isinstance(node, Layers) for node in above)


def closings(annotated: Any, traced: Traced) -> Closings:
    """What closes the blocks of every stack, by one more trace for each packed list."""
    results: Closings = {}
    slots = list(slots_of(annotated, traced))
    packed = set(stack_steps(annotated.tree).values())
    for axis in dict.fromkeys(d.axis for _, slot, _ in slots for d in slot.dims):
        inside = [(n, slot) for n, slot, _ in slots if slot.positions(axis, "stack")]
        streams = [d.axis for _, s in inside for d in s.dims if d.role == "produced"]
        for stream in dict.fromkeys(name for name in streams if not name.isdigit()):
            producers = {n for n, slot in inside if slot.positions(stream, "produced")}
            if axis in packed:
                results[axis, stream] = _packed(annotated, traced, axis, producers)
            else:
                stacked = {n for n, _ in inside}
                results[axis, stream] = _scanned(annotated, traced, axis, stacked, producers)
    return results


def _packed(annotated: Any, traced: Traced, axis: str, producers: set[int]) -> str:
    """Why one more block, whose producers of the stream are zero, changes the program; "" if it does not.

    It is tried as the last block and as the first one, since what a block does may depend on its index.
    """
    size = axes_of(annotated).size(axis)
    try:
        grown = _with_one_more(annotated, axis)
        places = list(stack_steps(annotated.tree))
        large = Traced(grown, traced.batch, traced.forward, places, read=False)
    except Exception as error:  # whatever the user's model raises with one more block
        return f"the model does not run with more of them: {str(error).strip()[:200]}"
    mine = [place for place, name in stack_steps(annotated.tree).items() if name == axis]
    names = {traced.paths[n] for n in producers}
    same = {n: group for group in large.groups for n in group}
    expressions = Expressions()
    before, _ = expressions.of(traced.program, traced.paths)
    for new in (size, 0):
        # The new block has the name of the last one, and the others have the names of those in `traced`
        paths = large.paths if new == size else _first_as_last(large, mine, size)
        added = {
            n: path for n, steps in enumerate(large.steps) if (path := _in_block(steps, mine, new))
        }
        number = {path: n for n, path in enumerate(paths)}
        closed = {m for name in names for m in same.get(number[name], ())} & set(added)
        after, _ = expressions.of(large.program, paths, {paths[n] for n in closed})
        # Not equal lists but a part: a block may have outputs (or state) of its own
        rest = iter(after)
        if all(number in rest for number in before):
            continue
        if new != size:
            return "what a block does follows its place in the list"
        stays = expressions.parameters(after)
        return _why([general for n, general in added.items() if paths[n] in stays])
    return ""


def _first_as_last(large: Traced, places: Sequence[tuple], size: int) -> list[str]:
    """The arrays' paths, with the first block of a list named as its last, and all others one earlier."""
    path = dict(zip(large.steps, large.paths, strict=True))
    named = []
    for steps in large.steps:
        for place in places:
            if _inside(steps, place):
                index = (steps[len(place)] - 1) % (size + 1)
                steps = (*steps[: len(place)], index, *steps[len(place) + 1 :])
                break
        named.append(path[steps])
    return named


def _in_block(steps: tuple, places: Sequence[tuple], index: int) -> str:
    """The path of an array in the block of this index of a list, with `*` in its place; "" elsewhere."""
    for place in places:
        if _inside(steps, place) and steps[len(place)] == index:
            return ".".join(map(str, (*steps[: len(place)], "*", *steps[len(place) + 1 :])))
    return ""


def _inside(steps: tuple, place: tuple) -> bool:
    """Whether an array is in a list; `"*"` in the list's own steps is any index."""
    return len(steps) > len(place) and leads_to(steps[: len(place)], place)


def _scanned(
    annotated: Any, traced: Traced, axis: str, inside: set[int], producers: set[int]
) -> str:
    """Why the body of a scan over a stack is not the identity where producers are zero; "" if it is.

    It has to be the same with one more layer, too: a block may divide its branch by their number.
    """
    expressions = Expressions()
    zeroed = {traced.paths[n] for n in producers}
    _, loops = expressions.of(traced.program, traced.paths, zeroed)
    rows = {traced.paths[n] for n in inside} - zeroed
    loops = [loop for loop in loops if loop.scanned & rows]
    if not loops:
        return "the program does not scan over it, so what a block does cannot be seen"
    changed = [loop for loop in loops if loop.start != loop.end]
    if changed:
        stays = {name for loop in changed for name in expressions.parameters(loop.end)} & rows
        return _why([path for path in traced.paths if path in stays])
    try:
        large = _with_one_more(annotated, axis)
        program = traced.traced(large, [get(large, steps) for steps in traced.steps])
    except Exception as error:  # whatever the user's model raises with one more block
        return f"the model does not run with more of them: {str(error).strip()[:200]}"
    mine = {traced.paths[n] for n in inside}  # loops inside scan over the stream, too
    turns = [
        [
            loop.end
            for loop in expressions.of(each, traced.paths)[1]
            if loop.scanned and loop.scanned <= mine
        ]
        for each in (traced.program, program)
    ]
    return "" if turns[0] == turns[1] else "what a block does follows their number"


def _with_one_more(annotated: Any, axis: str) -> Any:
    """The shapes of the user's model with one more block at the end."""
    size = axes_of(annotated).size(axis)
    return grown_shapes(annotated, AxisMap(axis, [*range(size), size - 1]))


def grown_shapes(annotated: Any, move: AxisMap) -> Any:
    """The shapes of the user's model after a map."""
    grow = functools.partial(maps.apply, move, key=None)
    return unpack(eqx.filter_eval_shape(grow, abstract(annotated)).tree)


def _why(stays: Iterable[str]) -> str:
    names = ", ".join(stays)
    if names:
        return f"{names} does not act through arrays that produce the stream"
    return (
        "a block changes its input even then: it ends in a norm, or has no residual branch, or numbers "
        "in it follow how many there are"
    )
