"""The walk over a program: every operation unifies dimensions and leaves a line on a tape."""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from growjax.trace import shapes
from growjax.trace.dims import Node, factored, other, unify
from growjax.trace.loops import scanned
from growjax.trace.values import Op, Value


_LINEAR = set(
    "neg convert_element_type copy copy_p real imag reduce_precision optimization_barrier stop_gradient "
    "sharding_constraint layout_constraint pvary device_put copy_to_memory_space name".split()
)
_ADD = set("add sub add_any select_n".split())
_ORDERED = set("cumsum cumprod cummax cummin cumlogsumexp rev".split())
_REDUCE = {"reduce_sum": "sum"} | dict.fromkeys(
    "reduce_max reduce_min reduce_and reduce_or reduce_prod reduce_xor".split(), "extreme"
)
_CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "jaxpr",
}
# Elementwise operations that are not linear: their operands need degree 0, and their results have it
_BENT = set(
    "exp exp2 log log1p expm1 tanh sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc "
    "erf_inv logistic abs sign floor ceil round is_finite not and or xor eq ne lt le gt ge max min rem "
    "pow nextafter clamp digamma lgamma square cbrt shift_left shift_right_logical "
    "shift_right_arithmetic population_count clz eq_to lt_to le_to bitcast_convert_type".split()
)


# Operations on literal scalars of the program are computed while it is walked: `n - 1`, `1 / n`
_NUMBERS: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp,
    "log": np.log,
    "square": np.square,
    "integer_pow": lambda x, y: float(x) ** y,
    "pow": np.power,
    "convert_element_type": lambda x: x,
    "stop_gradient": lambda x: x,
    "select_n": lambda which, *cases: cases[int(which)],
}


def _options(params: Mapping[str, Any]) -> tuple:
    """The parameters of an equation that are plain data, by name; others are programs or places."""
    return tuple((name, repr(value)) for name, value in sorted(params.items()) if _plain(value))


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | enum.Enum | np.number)


class Walk:
    """A tape of everything that a program computes; `run` walks it."""

    def __init__(self):
        self.tape: list[Op] = []

    def run(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        """Walk a closed jaxpr with these values as its inputs, and give its outputs."""
        constants = [self.constant(array) for array in closed.consts]
        return self._jaxpr(closed.jaxpr, constants, inputs)

    def constant(self, array: Any) -> Value:
        """The value of an array that the program holds."""
        shape = np.shape(array)
        known = None
        if isinstance(array, np.ndarray | jax.Array) and not isinstance(array, Tracer):
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                known = np.asarray(jax.random.key_data(array))
            elif not jnp.issubdtype(array.dtype, jax.dtypes.extended):
                known = np.asarray(array)
        drawn = known is not None and known.shape != shape  # a key, no number of the program
        zero = known is not None and not drawn and known.dtype.kind in "fiu" and not known.any()
        number = known.item() if known is not None and known.ndim == 0 else None
        return Value([Node(n) for n in shape], number=number, zero=bool(zero), known=known)

    def _jaxpr(self, jaxpr, constants: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom) -> Value:
            if isinstance(atom, core.Literal):
                return self.constant(np.asarray(atom.val))
            return values[atom]

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    # One equation ----------------------------------------------------------------------------

    def _equation(self, eqn, ins: list[Value]) -> list[Value]:
        first = len(self.tape)
        outs = self._results(eqn, ins)
        for op in self.tape[first:]:
            if op.options is None:  # those of an inner program have their own
                op.options = _options(eqn.params)
        return outs

    def _results(self, eqn, ins: list[Value]) -> list[Value]:
        name, sizes = eqn.primitive.name, [v.aval.shape for v in eqn.outvars]
        if name in _NUMBERS and ins and all(value.number is not None for value in ins):
            exponent = {"y": eqn.params["y"]} if name == "integer_pow" else {}
            with np.errstate(all="ignore"):
                number = _NUMBERS[name](*(value.number for value in ins), **exponent)
            return [self.constant(np.asarray(number, eqn.outvars[0].aval.dtype))]
        if name in _CALLS and _CALLS[name] in eqn.params:
            inner = eqn.params[_CALLS[name]]
            if isinstance(inner, core.ClosedJaxpr):
                return self.run(inner, ins)
            return self._jaxpr(inner, [], ins)
        if name in shapes.RULES:
            return shapes.RULES[name](self, eqn.params, ins, sizes)
        rule: Callable | None = getattr(self, f"_{name}", None)
        if rule is not None:
            return rule(eqn.params, ins, sizes)
        if name in ("reduce_prod", "reduce_xor"):
            for dim in eqn.params["axes"]:
                ins[0].nodes[dim].freeze(
                    f"the program takes a {name.removeprefix('reduce_')} over it"
                )
        if name in _REDUCE:
            return self._reduced(_REDUCE[name], eqn.params["axes"], ins, name)
        if name in _ORDERED:
            dims = eqn.params.get("dimensions", [eqn.params.get("axis")])
            for dim in dims:
                ins[0].nodes[dim].freeze(f"the program takes its order into account ({name})")
            return self._elementwise("same" if name in ("rev", "cumsum") else "bent", ins, name)
        if name in ("stop_gradient", "optimization_barrier") and len(ins) > 1:
            return [self._elementwise("same", [x], name)[0] for x in ins]
        if name in _LINEAR:
            return self._elementwise("same", ins, name)
        if name in _ADD:
            return self._elementwise("add", ins[1:] if name == "select_n" else ins, name, ins)
        if name in ("mul", "div"):
            return self._elementwise(name, ins, name)
        if name in ("sqrt", "rsqrt", "integer_pow", "square"):
            powers = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2}
            power = powers[name] if name in powers else eqn.params["y"]
            return self._elementwise(("power", power), ins, name)
        if name in _BENT:
            return self._elementwise("bent", ins, name)
        return self._opaque(name, ins, sizes)

    def write(self, op: Op) -> list[Value]:
        """Put a line on the tape; its results."""
        self.tape.append(op)
        return op.outs

    def _opaque(self, name: str, ins: list[Value], sizes) -> list[Value]:
        for value in ins:
            for node in value.nodes:
                node.freeze(f"the program does {name} with it, which is not understood")
        outs = [
            Value([Node(n, fixed=f"it is made by {name}, which is not understood") for n in shape])
            for shape in sizes
        ]
        return self.write(Op("opaque", ins, outs, name=name))

    def _elementwise(self, kind, ins, name, every=None) -> list[Value]:
        """All operands have the shape of the result, with 1 where they are spread, or are scalars."""
        every = every or ins
        nodes = list(max(every, key=lambda v: len(v.nodes)).nodes)
        for value in every:
            for d, node in enumerate(value.nodes):
                if nodes[d].root.size == 1:
                    nodes[d] = node
                elif node.root.size != 1:
                    unify(nodes[d], node)
        zero = kind in ("add", "same") and all(v.zero for v in ins)
        zero = zero or (kind == "mul" and any(v.zero for v in ins))
        op = Op(kind, ins, [Value(nodes, zero=zero)], name=name)
        if every is not ins:
            op.groups = [(every[0], None, None, 0)]  # a predicate, which has to be the same
        return self.write(op)

    def _reduced(self, kind: str, axes, ins: list[Value], name: str) -> list[Value]:
        x = ins[0]
        if kind == "extreme":  # copies do not change it, but fresh coordinates could be it
            for d in axes:
                x.nodes[d].freeze(
                    f"the program takes {name} over it, where fresh coordinates count"
                )
        left = [d for d in range(len(x.nodes)) if d not in axes]
        groups = [(0, [d], [i], 0) for i, d in enumerate(left)]
        pairs = [(d, None) for d in axes]
        out = Value([x.nodes[d] for d in left], zero=x.zero)
        return self.write(Op(kind, [x], [out], groups, pairs, name))

    def _psum(self, params, ins, sizes):
        """A sum over mapped axes, of which `vmap` has made dimensions."""
        return self._over_mapped("sum", "psum", params, ins)

    def _pmax(self, params, ins, sizes):
        return self._over_mapped("extreme", "pmax", params, ins)

    _pmin = _pmax

    def _over_mapped(self, kind: str, name: str, params, ins) -> list[Value]:
        axes = [axis for axis in params["axes"] if isinstance(axis, int | np.integer)]
        return [out for x in ins for out in self._reduced(kind, axes, [x], name)]

    def _argmax(self, params, ins, sizes):
        for dim in params["axes"]:
            ins[0].nodes[dim].freeze("the program takes the index of its largest entry")
        return self._reduced("extreme", params["axes"], ins, "argmax")

    _argmin = _argmax

    def _sort(self, params, ins, sizes):
        for value in ins:
            value.nodes[params["dimension"]].freeze("the program sorts it")
        outs = [Value(value.nodes) for value in ins]
        return self.write(Op("opaque", ins, outs, name="sort"))

    def _top_k(self, params, ins, sizes):
        ins[0].nodes[-1].freeze("the program takes its largest entries")
        outs = [Value([*ins[0].nodes[:-1], Node(shape[-1], data=True)]) for shape in sizes]
        return self.write(Op("opaque", ins, outs, name="top_k"))

    def _iota(self, params, ins, sizes):
        nodes = [Node(n) for n in sizes[0]]
        nodes[params["dimension"]].freeze("the program counts along it")
        return self.write(Op("opaque", [], [Value(nodes)], name="iota"))

    def _noise(self, params, ins, sizes):
        """Keys and the numbers that are drawn with them, which follow no axis."""
        outs = [Value([Node(n) for n in shape]) for shape in sizes]
        return self.write(Op("opaque", [], outs, name="random", beside=ins))

    _random_bits = _random_wrap = _random_unwrap = _random_split = _random_fold_in = (
        _random_seed
    ) = _noise
    _threefry2x32 = _noise

    # Sums of products ------------------------------------------------------------------------

    def _dot_general(self, params, ins, sizes):
        x, y = ins
        (cx, cy), (bx, by) = params["dimension_numbers"]
        for a, b in [*zip(cx, cy, strict=True), *zip(bx, by, strict=True)]:
            unify(x.nodes[a], y.nodes[b])
        fx = [d for d in range(len(x.nodes)) if d not in (*cx, *bx)]
        fy = [d for d in range(len(y.nodes)) if d not in (*cy, *by)]
        nodes, groups = [], []
        for a, b in zip(bx, by, strict=True):
            groups += [(0, [a], [len(nodes)], 0), (1, [b], [len(nodes)], 0)]
            nodes.append(x.nodes[a])
        for k, value, free in ((0, x, fx), (1, y, fy)):
            for d in free:
                groups.append((k, [d], [len(nodes)], 0))
                nodes.append(value.nodes[d])
        out = Value(nodes, zero=x.zero or y.zero)
        pairs = list(zip(cx, cy, strict=True))
        return self.write(Op("dot", ins, [out], groups, pairs, "dot_general"))

    def _conv_general_dilated(self, params, ins, sizes):
        x, w = ins
        how, many = params["dimension_numbers"], params["feature_group_count"]
        if params["batch_group_count"] != 1:
            return self._opaque("conv_general_dilated", ins, sizes)
        (xb, xf, *xs), (wo, wi, *ws) = how.lhs_spec, how.rhs_spec
        ob, of, *os = how.out_spec
        out: list[Any] = [None] * len(sizes[0])
        out[ob], out[of] = x.nodes[xb], w.nodes[wo]
        groups = [(0, [xb], [ob], 0), (1, [wo], [of], 0)]
        pairs = []
        if many == 1:
            unify(x.nodes[xf], w.nodes[wi])
            pairs.append((xf, wi))
        elif x.nodes[xf].root.size == w.nodes[wo].root.size == many:
            unify(x.nodes[xf], w.nodes[wo])  # depthwise: nothing is summed
            groups.append((0, [xf], [of], 0))
        else:
            each = w.nodes[wi].root.size
            mine = factored(x.nodes[xf], [many, each]) if each > 1 else [x.nodes[xf]]
            theirs = factored(w.nodes[wo], [many, w.nodes[wo].root.size // many])
            for node in (*mine, *theirs, w.nodes[wi]):
                node.freeze("a convolution takes it in groups")
        for d in ws:
            w.nodes[d].freeze("it is the extent of a kernel")
        for a, b in zip(xs, os, strict=True):
            node = x.nodes[a]
            out[b] = (
                node
                if node.root.size == sizes[0][b]
                else other(node, sizes[0][b], "slides over it")
            )
            if not node.root.data:
                node.freeze("a convolution slides over it")
        return self.write(Op("dot", ins, [Value(out)], groups, pairs, "conv"))

    def _reduce_window(self, params, ins, sizes):
        x, out, groups = ins[0], [], []
        for d, size in enumerate(params["window_dimensions"]):
            whole = size == 1 and sizes[0][d] == x.nodes[d].root.size
            out.append(x.nodes[d] if whole else other(x.nodes[d], sizes[0][d], "slides over it"))
            groups += [(0, [d], [d], 0)] if whole else []
        return shapes.moved(self, ins[:1], Value(out), groups, "reduce_window")

    _reduce_window_sum = _reduce_window_max = _reduce_window_min = _reduce_window

    # Loops and branches ----------------------------------------------------------------------

    def _carried(self, starts: Sequence[Value]) -> list[Value]:
        """The carry of a loop as its body finds it: of any share, since it is settled at the end."""
        inner = []
        for start in starts:
            carry = Value(start.nodes)
            self.write(Op("carry", [start], [carry], name="carry"))
            inner.append(carry)
        return inner

    def _closed_loop(
        self, inner: Sequence[Value], after: Sequence[Value], condition: Sequence[Value] = ()
    ) -> None:
        for a, b in zip(inner, after, strict=True):
            for m, n in zip(a.nodes, b.nodes, strict=True):
                unify(m, n)
            self.write(Op("equal", [a, b], [], name="carry", beside=condition))

    def _scan(self, params, ins, sizes):
        fixed, starts, rows = scanned(params, ins)
        carries = len(starts)
        inner = self._carried(starts)
        lengths = [value.nodes[0] for value in rows]
        for node in lengths[1:]:
            unify(node, lengths[0])
        length = lengths[0] if lengths else Node(params["length"], data=True)
        row = []
        for value in rows:
            groups = [(0, [d], [d - 1], 0) for d in range(1, len(value.nodes))]
            row += shapes.moved(self, [value], Value(value.nodes[1:]), groups, "scan")
            self.tape[-1].pairs = [(0, "stack")]
            # Its length is the carry's, so that a turn of a longer loop is the same expression
            self.tape[-1].options = (("reverse", repr(params["reverse"])),)
        outs = self.run(params["jaxpr"], [*fixed, *inner, *row])
        self._closed_loop(inner, outs[:carries])
        made = []
        for value in outs[carries:]:
            groups = [(0, [d], [d + 1], 0) for d in range(len(value.nodes))]
            made += shapes.moved(self, [value], Value([length, *value.nodes]), groups, "scan")
        return [*inner, *made]

    def _while(self, params, ins, sizes):
        a, b = params["cond_nconsts"], params["body_nconsts"]
        inner = self._carried(ins[a + b :])
        condition = self.run(params["cond_jaxpr"], [*ins[:a], *inner])
        after = self.run(params["body_jaxpr"], [*ins[a : a + b], *inner])
        self._closed_loop(inner, after, condition)
        return inner

    def _cond(self, params, ins, sizes):
        branches = [self.run(branch, ins[1:]) for branch in params["branches"]]
        chosen = []
        for cases in zip(*branches, strict=True):
            chosen += self._elementwise("add", cases, "cond")
            self.tape[-1].groups = [(ins[0], None, None, 0)]  # as of `select_n`
        return chosen
