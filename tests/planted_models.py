"""More of what `python -m tests.mutations` plants: models of others, annotated and inferred."""

TABLE = """
@ blocks of other shapes are packed | annotation/packing.py | annotation | blocks_that_differ
- if has_shape(a) != has_shape(b) or (has_shape(a) and a.shape != b.shape):
+ if has_shape(a) != has_shape(b):
@ blocks are unpacked in reverse | annotation/packing.py | annotation | copy_the_blocks
- blocks = [jax.tree.unflatten(tree, row) for row in rows]
+ blocks = [jax.tree.unflatten(tree, row) for row in rows][::-1]
@ grown blocks share their state | annotation/packing.py | annotation | running_statistics
- return tuple((marker, i) for marker in self.markers[0])
+ return self.markers[0]
@ what is ignored keeps its length | annotation/annotated.py | annotation | ignored_is_as_long
- if packed and leaf is not None:
+ if False:
@ layers keep their old sizes | annotation/annotated.py | annotation | one_that_was_made or up_to_date
- tree = put(tree, layers.stale(tree, values))
+ pass
@ static fields of other sizes are taken | annotation/annotated.py | annotation | another_size_are_named
- if held != expected:
+ if False:
@ keys of attention are consumed nowhere | annotation/layers.py | inference | a_person_would_annotate
- "key_proj.weight": f"({heads} <- {width}) {embed}",
+ "key_proj.weight": f"({heads} {width}) {embed} ->",
@ masked norms count closed coordinates | annotation/gating.py | annotation | behind_gates
- weights = c / jnp.sum(c)
+ weights = c / c.size
@ gates of inner axes stand nowhere | annotation/gating.py | annotation | behind_gates
- takes = role != "consumed" if normalised else role == "consumed"
+ takes = normalised and role != "consumed"
@ gates of a stack close nothing | annotation/gating.py | annotation | behind_gates
- takes = any(d.axis == stream and d.role == "produced" for d in piece.dims)
+ takes = False
@ outputs are gated all the same | annotation/gating.py | annotation | cannot_be_gated
- elif not any(d.role == "consumed" and d.axis == axis for slot in slots for d in slot.dims):
+ elif False:
@ sums that nobody claims pass for norms | inference/inferred.py | inference | nothing_can_declare
- self.refused[atom] = f"a norm that has no parameters averages over it (near {near})"
+ pass
@ fields that nobody reads follow | inference/sizes.py | inference | another_of_its_size
- if self._try(atom, rest)[0] is not None:
+ if False:
@ a constant may follow the size | inference/sizes.py | inference | follow_a_size_fix_it
- faults = unbalanced(program, roles, atom, constants)
+ faults = []
@ arrows stand outside of sums | inference/spelling.py | inference | read_again
- leaves_sum = i - 1 == where and not piece
+ leaves_sum = False
@ two consumers of one sum are taken | trace/roles.py | inference | says_wrongly
- if not system.zero(Lin(-int(takes), {name: Fraction(1)})):
+ if False:
@ a carry may change its share | trace/roles.py | inference | a_person_would_annotate
- self._equal(op.ins[0], op.ins[1], near)
+ pass
@ means are never balanced | trace/program.py | inference | a_person_would_annotate
- result += len(here)
+ result += 0
@ other operations at another size pass | trace/program.py | inference | a_person_would_annotate
- if y.shape != (expected := grown_shape(x, {atom: factor})):
+ if False:
@ mixing of tokens counts as closed | trace/program.py | inference | stay_open
- operands = frozenset[int]().union(*map(of, op.ins))
+ operands = frozenset[int]()
@ axes that break a certificate keep their name | inference/inferred.py | inference | certified
- if not record.passed
+ if record is None
"""
