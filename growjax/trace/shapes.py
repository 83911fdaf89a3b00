"""Operations that move entries without computing with them: how dimensions split, merge and stay."""

import math
from collections.abc import Callable

from growjax.trace.dims import Node, cut, factored, other, product, total, unify
from growjax.trace.values import Op, Value


def moved(walk, ins, out: Value, groups, name, filling=()) -> list[Value]:
    """Write an operation that moves the entries of `ins` to `out` by `groups`; its results.

    Where no entry of `ins` comes to stand, those of `filling` do.
    """
    out.zero = all(v.zero for v in (*ins, *filling))
    return walk.write(Op("shape", ins, [out], groups, name=name, beside=filling))


def _broadcast_in_dim(walk, params, ins, shapes):
    x, where = ins[0], params["broadcast_dimensions"]
    nodes, groups = [Node(n) for n in shapes[0]], []
    for d, i in enumerate(where):
        if x.nodes[d].root.size == shapes[0][i]:
            nodes[i] = x.nodes[d]
            groups.append((0, [d], [i], 0))
    return moved(walk, ins[:1], Value(nodes), groups, "broadcast")


def _transpose(walk, params, ins, shapes):
    order = params["permutation"]
    groups = [(0, [d], [i], 0) for i, d in enumerate(order)]
    return moved(walk, ins, Value([ins[0].nodes[d] for d in order]), groups, "transpose")


def _squeeze(walk, params, ins, shapes):
    left = [d for d in range(len(ins[0].nodes)) if d not in params["dimensions"]]
    groups = [(0, [d], [i], 0) for i, d in enumerate(left)]
    return moved(walk, ins, Value([ins[0].nodes[d] for d in left]), groups, "squeeze")


def _reshape(walk, params, ins, shapes):
    x, shape = ins[0], shapes[0]
    out: list[Node] = [Node(n) for n in shape]
    groups = []
    mine = [d for d, n in enumerate(x.shape) if n != 1]
    theirs = [i for i, n in enumerate(shape) if n != 1]
    while mine and theirs:
        a, b = [mine.pop(0)], [theirs.pop(0)]
        while (m := math.prod(x.shape[d] for d in a)) != (n := math.prod(shape[i] for i in b)):
            if m < n:
                a.append(mine.pop(0))
            else:
                b.append(theirs.pop(0))
        parts = factored(product([x.nodes[d] for d in a]), [shape[i] for i in b])
        for i, part in zip(b, parts, strict=True):
            out[i] = part
        groups.append((0, a, b, 0))
    # Dimensions of size 1 stay one and the same where they stand at the same place
    ones = [d for d, n in enumerate(x.shape) if n == 1]
    for d, i in zip(ones, [i for i, n in enumerate(shape) if n == 1], strict=False):
        out[i] = x.nodes[d]
        groups.append((0, [d], [i], 0))
    return moved(walk, ins, Value(out), groups, "reshape")


def _slice(walk, params, ins, shapes):
    x, steps = ins[0], params["strides"] or [1] * len(shapes[0])
    out, groups = [], []
    limits = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    for d, (start, stop, step) in enumerate(limits):
        n = x.nodes[d].root.size
        if (start, stop, step) == (0, n, 1):
            out.append(x.nodes[d])
            groups.append((0, [d], [d], 0))
        elif start == stop:
            out.append(Node(0))
            groups.append((0, [d], [d], -start))
        elif step == 1:
            sizes = [size for size in (start, stop - start, n - stop) if size]
            out.append(cut(x.nodes[d], sizes)[1 if start else 0])
            groups.append((0, [d], [d], -start))
        else:
            out.append(other(x.nodes[d], len(range(start, stop, step)), "takes it with a stride"))
    return moved(walk, ins, Value(out), groups, "slice")


def _split(walk, params, ins, shapes):
    x, dim, outs = ins[0], params["axis"], []
    parts = cut(x.nodes[dim], params["sizes"])
    at = 0
    for part, size in zip(parts, params["sizes"], strict=True):
        nodes = [part if d == dim else node for d, node in enumerate(x.nodes)]
        groups = [(0, [d], [d], -at if d == dim else 0) for d in range(len(nodes))]
        outs += moved(walk, [x], Value(nodes), groups, "split")
        at += size
    return outs


def _concatenate(walk, params, ins, shapes):
    dim, at, groups = params["dimension"], 0, []
    parts = []
    for k, value in enumerate(ins):
        for d in range(len(value.nodes)):
            groups.append((k, [d], [d], at if d == dim else 0))
            if d != dim:
                unify(value.nodes[d], ins[0].nodes[d])
        parts.append(value.nodes[dim])
        at += value.nodes[dim].root.size
    node = total(parts)
    if any(part.root.data for part in parts):
        node.data = True
    nodes = [node if d == dim else n for d, n in enumerate(ins[0].nodes)]
    return moved(walk, ins, Value(nodes), groups, "concatenate")


def _stack(walk, params, ins, shapes):
    dim, groups = params["axis"], []
    for value in ins[1:]:
        for a, b in zip(ins[0].nodes, value.nodes, strict=True):
            unify(a, b)
    for k, value in enumerate(ins):
        groups += [(k, [d], [d + (d >= dim)], 0) for d in range(len(value.nodes))]
    nodes = list(ins[0].nodes)
    nodes.insert(dim, Node(len(ins), fixed="it counts stacked arrays"))
    return moved(walk, ins, Value(nodes), groups, "stack")


def _pad(walk, params, ins, shapes):
    x, out, groups = ins[0], [], []
    for d, (low, high, inner) in enumerate(params["padding_config"]):
        node = x.nodes[d]
        if (low, high, inner) == (0, 0, 0):
            out.append(node)
            groups.append((0, [d], [d], 0))
        elif inner == 0 and min(low, high) >= 0 and not node.root.data:
            ends = [Node(n, fixed="the program pads it") for n in (low, high)]
            parts = [part for part in (ends[0], node, ends[1]) if part.size]
            out.append(total(parts))
            groups.append((0, [d], [d], low))
        else:
            out.append(other(node, shapes[0][d], "pads or crops it"))
    return moved(walk, ins[:1], Value(out), groups, "pad", ins[1:])


def _gather(walk, params, ins, shapes):
    x, ids = ins[0], ins[1]
    how, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*how.collapsed_slice_dims, *how.operand_batching_dims}
    offset = [d for d in range(len(x.nodes)) if d not in gone]
    out: list[Node] = [Node(n) for n in shapes[0]]
    groups = []
    looked_up = list(how.collapsed_slice_dims)
    for i, d in zip(how.offset_dims, offset, strict=True):
        if sizes[d] == x.nodes[d].root.size:
            out[i] = x.nodes[d]
            groups.append((0, [d], [i], 0))
        elif sizes[d] == 1 and ids.known is None:
            looked_up.append(d)
        else:
            out[i] = other(x.nodes[d], sizes[d], "takes a window of it")
    batch = [i for i in range(len(out)) if i not in how.offset_dims]
    for i, d in zip(batch, range(len(ids.nodes) - 1), strict=True):
        out[i] = ids.nodes[d]
        groups.append((1, [d], [i], 0))
    for d, e in zip(how.operand_batching_dims, how.start_indices_batching_dims, strict=True):
        unify(x.nodes[d], ids.nodes[e])
    op = Op("shape", [x, ids], [Value(out)], groups, name="gather")
    op.pairs = [(d, "lookup") for d in looked_up]
    return walk.write(op)


def _dynamic_slice(walk, params, ins, shapes):
    x, out, groups, looked_up = ins[0], [], [], []
    for d, size in enumerate(params["slice_sizes"]):
        if size == x.nodes[d].root.size:
            out.append(x.nodes[d])
            groups.append((0, [d], [d], 0))
        elif size == 1 and ins[1 + d].number is None:
            out.append(Node(1))
            looked_up.append((d, "lookup"))
        else:
            out.append(other(x.nodes[d], size, "takes a window of it"))
    outs = moved(walk, ins[:1], Value(out), groups, "dynamic_slice")
    walk.tape[-1].pairs = looked_up
    return outs


def _dynamic_update_slice(walk, params, ins, shapes):
    x, new = ins[:2]
    for a, b in zip(x.nodes, new.nodes, strict=True):
        if a.root.size == b.root.size:
            unify(a, b)
        else:
            other(a, 1, "writes a window of it")
    walk.write(Op("equal", [x, new], [], name="update"))
    return walk.write(Op("shape", [x], [Value(x.nodes)], _same(x), name="update", beside=ins[1:]))


def _scatter_add(walk, params, ins, shapes):
    x, ids, new = ins
    how = params["dimension_numbers"]
    gone = {*how.inserted_window_dims, *how.operand_batching_dims}
    window = [d for d in range(len(x.nodes)) if d not in gone]
    for i, d in zip(how.update_window_dims, window, strict=True):
        if x.nodes[d].root.size == new.nodes[i].root.size:
            unify(x.nodes[d], new.nodes[i])
        else:
            other(x.nodes[d], 1, "writes a window of it")
    for d in how.inserted_window_dims:
        other(x.nodes[d], 1, "writes single entries of it")
    outs = [Value(x.nodes)]
    return walk.write(Op("opaque", [x, new], outs, name="scatter", beside=[ids]))


def _same(value: Value) -> list[tuple[int, list[int], list[int], int]]:
    return [(0, [d], [d], 0) for d in range(len(value.nodes))]


RULES: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "scatter": _scatter_add,
    "scatter_add": _scatter_add,
    "scatter_max": _scatter_add,
    "scatter_min": _scatter_add,
    "scatter_mul": _scatter_add,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
