"""The bugs that `python -m tests.mutations` plants in specs, and in what growth and models refuse."""

# As in tests/planted.py
TABLE = """
@ sizes are solved in one pass | specs.py | specs | order_of_the_leaves
- while solvable := [length for length in pending if len(length.unknown(sizes)) == 1]:
+ for solvable in [[length for length in pending if len(length.unknown(sizes)) == 1]]:
@ numbers are sizes of one | specs.py | specs | shapes_were_made_of or interleaved
- return int(self.axis) if self.literal else sizes[self.axis]
+ return 1 if self.literal else sizes[self.axis]
@ a size that no whole number makes is rounded | specs.py | specs | do_not_fit
- return {axis: n} if self.total({**sizes, axis: n}) == self.length else {}
+ return {axis: n}
@ a dimension that does not add up is believed | specs.py | specs | do_not_fit
- return not self.unknown(sizes) and self.total(sizes) == self.length
+ return not self.unknown(sizes)
@ every block has the arrows of the first | specs.py | specs | sum_is_the_specs
- parts = tuple(Spec.parse(f"{before}({term}){after}") for term in sums[0][1].split("+"))
+ parts = tuple(Spec.parse(f"{before}({sums[0][1]})".split("+")[0] + f"){after}") for _ in "ab")
@ fused leaves are cut from the end | axes.py | specs | leaves_of_their_own
- slice(end - n, end))] for end, n in ends]
+ slice(end - n, end))] for end, n in reversed(list(ends))]
@ blocks of a fused leaf draw alike | axes.py | specs | not_those_of_another
- path=f"{self.path}[{i}]", spec=spec
+ path=self.path, spec=spec
@ the bias of two axes on one dimension is drawn | axes.py | specs | interleaved
- return "zeros" if len(spec.groups) - stacks < 2 else "normal"
+ return "zeros" if len(spec.dims) - stacks < 2 else "normal"
@ state starts in the wrong block | maps.py | specs | starts_in_the_block
- next(starts or iter([fresh]))
+ slot.cut(fresh, sizes)[0] if starts else fresh
@ numbers do not count as coordinates of entries | growth/births.py | specs | moments_of_fused and ages
- if not dim.literal:
+ if dim.axis not in ("state", "rank"):
@ shares that nobody takes are believed | maps.py | specs | nothing_consumes or an_output
- if idle or is_matrix(factor) or any(d.axis == axis and d.role == wanted for d in dims):
+ if True:
@ shares that only producers could take are believed | maps.py | specs | nothing_consumes
- if idle or is_matrix(factor) or any(d.axis == axis and d.role == wanted for d in dims):
+ if idle or is_matrix(factor) or any(d.axis == axis for d in dims):
@ norms without a gain are left out | axes.py | specs | without_a_gain
- return _field("param", f"~{axis}", default=None)
+ return _field("param", axis, default=None)
@ empty fields are not annotated | annotation/annotated.py | specs | without_a_gain
- if not (has_shape(leaf) or leaf is None):
+ if not has_shape(leaf):
@ a gain that is not there is taken for mended | maps.py | specs | do_not_mend
- s.steps[:-1] not in mends or s.value is None
+ s.steps[:-1] not in mends
@ places that are not there are put in silence | axes.py | specs | not_put or named_at_once
- [".".join(map(str, (*path, name))) for name in below],
+ [],
@ growth under jit looks at values | growth/operator.py | grow | every_transformation
- abstract = Tracer | jax.ShapeDtypeStruct
+ abstract = jax.ShapeDtypeStruct
@ shapes do not grow | growth/operator.py | grow | every_transformation
- if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
+ if False:
@ values are looked at nowhere | growth/operator.py | grow | looked_at
- [slot.path for slot, ok in zip(floating, finite, strict=True) if not ok],
+ [],
@ ramp knows heads by half | axes.py | gates | limited_to_some_axes
- factored = {"heads": ("kv_heads", "group")}.get(name, ())
+ factored = {"heads": ("group",)}.get(name, ())
@ an axis without gates is ramped in silence | gates.py | gates | limited_to_some_axes
- if ungated or not held:
+ if len(ungated) == len(names) and names or not held:
"""
