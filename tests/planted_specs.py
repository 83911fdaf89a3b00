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
- named = [(f"{self.path}[{i}]", spec) for
+ named = [(self.path, spec) for
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
- if idle or is_matrix(factor) or takers:
+ if True:
@ shares that only producers could take are believed | maps.py | specs | nothing_consumes
- for d in p.dims if d.axis == axis and d.role == wanted]
+ for d in p.dims if d.axis == axis]
@ norms without a gain are left out | axes.py | specs | without_a_gain
- return _field("param", f"~{axis}", default=None)
+ return _field("param", axis, default=None)
@ empty fields are not annotated | annotation/annotated.py | specs | without_a_gain
- if not (has_shape(leaf) or leaf is None):
+ if not has_shape(leaf):
@ a gain that is not there is taken for mended | maps.py | specs | do_not_mend
- s.steps[:-1] not in mends or s.value is None
+ s.steps[:-1] not in mends
@ places that are not there are put in silence | trees.py | specs | not_put or named_at_once
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
@ fresh layers are drawn by 0.02 | maps.py | depth | drawn_as_a_model_is_born
- deviation = 0.02 if fan_in == 1 else fan_in**-0.5
+ deviation = 0.02
@ the fan-in is that before growth | maps.py | depth | fresh_rows
- sizes = [self.move.length if i in dims else n for i, n in enumerate(x.shape)]
+ sizes = list(x.shape)
@ keys count what they contract with queries as their fan-in | axes.py | depth | drawn_as_a_model_is_born
- d.role == "consumed" if own is None else d.axis in own for d
+ d.role == "consumed" for d
@ queries of T5 are drawn like others | nn/attention.py | depth | drawn_as_a_model_is_born
- return "embed head_dim" if self.scale == 1 else "embed"
+ return "embed"
@ an epsilon of nothing is one | maps.py | depth | epsilon_of_layers
- constant_values=self.slot.start
+ constant_values=1.0
@ a middle block begins at the bottom | growth/depth.py | depth | middle_block_need
- if blocks * extra == old else (old + extra) // 2
+ if blocks * extra == old else extra
@ a loop leaves its last round out | subnet/loops.py | depth | runs_its_layers
- *layers[first:end] * self.times
+ *layers[first:end] * (self.times - 1)
@ a loop ends a layer early | subnet/loops.py | depth | runs_its_layers
- self.first % depth, self.last % depth + 1
+ self.first % depth, max(self.last % depth, 1)
@ sequences longer than the positions are read | nn/assembly.py | depth | longer_than_the_positions
- if places is not None and start + shape[0] > places:
+ if places is not None and start + shape[0] > places + 1:
@ a cache is full without a word | nn/assembly.py | depth | cache_has_room
- if places is not None and start + shape[0] > places:
+ if places is not None and shape[0] > places:
@ ids beyond the table are read | nn/embedding.py | depth | beyond_the_table
- if low < 0 or high >= size:
+ if low < 0:
@ ids are looked at under a trace | nn/embedding.py | depth | cache_has_room
- numbers = np.asarray(ids)  # by NumPy, so that no trace is in the way
+ numbers = ids
@ a batch is one sequence | nn/assembly.py | depth | forgotten_vmap
- if len(shape) != 1:
+ if not shape:
@ a fill stands for an operator that does more | certificate/coordinates.py | certify | beside_its_maps
- type(atom).__call__ is Operator.__call__ and not any(map(finishes, atom.maps(table)))
+ True
@ a finish is no more than a fill | certificate/coordinates.py | certify | beside_its_maps
- type(atom).__call__ is Operator.__call__ and not any(map(finishes, atom.maps(table)))
+ type(atom).__call__ is Operator.__call__
@ settings of operations are not compared | trace/expressions.py | closing | number_of_blocks
- "options": op.options,
+ "options": None,
@ loops of any length are one | trace/expressions.py | closing | number_of_blocks
- number(("loop", inner, self.tape[first].options), (*start
+ number(("loop", inner), (*start
@ conditions of loops are not compared | trace/expressions.py | closing | number_of_blocks
- goes_on = [self.of(value) for value in self.tape[end].beside]
+ goes_on = []
@ a norm without a gain needs no axis | annotation/undeclared.py | inferred_sizes | not_declared
- same = [axis for axis, size in table.sizes.items() if node.shape == (size,)]
+ same = []
@ every fill is a program | certificate/measured.py | certify | few_programs
- _poisoned(op, model, np.float32(offset), np.float32(spread))
+ _poisoned(op, model, float(offset), float(spread))
@ papers of every value are cited | cards.py | cards | exactly or choose
- papers += cases.get(field, ())
+ papers += [paper for some in cases.values() for paper in some]
@ what is inside an operator is not cited | cards.py | cards | exactly
- for part in _inside(value) or ():
+ for part in ():
@ a folder is cited by an empty text | cards.py | cards | only_values
- if _inside(value) is None:
+ if value == ():
@ a card takes one paper for a tuple of papers | cards.py | cards | are_a_tuple
- if not isinstance(papers, tuple) or not all(isinstance(p, Paper) for p in papers):
+ if isinstance(papers, str):
@ two papers share a key | cards.py | cards | told_apart or a_card
- return f"{name}{self.year}{word}"
+ return f"{name}{self.year}a"
@ tokens in the middle are out of order | nn/stacked.py | nested | in_the_middle
- return jnp.sort(drawn)
+ return drawn
@ positions stay behind their tokens | nn/block.py | nested | llamas
- turn = jnp.take(turn[0], tokens, axis=-2), jnp.take(turn[1], tokens, axis=-2)
+ turn = turn[0][..., : len(tokens), :], turn[1][..., : len(tokens), :]
@ documents stay behind their tokens | nn/mask.py | nested | in_the_middle
- documents=at(self.documents, 0),
+ documents=None if self.documents is None else self.documents[: len(places)],
@ every layer draws the same tokens | nn/stacked.py | nested | in_the_middle or another_way
- block if whole else _Thinned(block, _drawn(key, self.token_count, x.shape[0]))
+ block if whole else _Thinned(block, _drawn(0 * key, self.token_count, x.shape[0]))
@ layers run after the exit | subnet/exits.py | nested | coins_fall
- return runs & (jnp.arange(layers) < drawn)
+ return runs & (jnp.arange(layers) != drawn)
@ exits weigh alike | nn/head.py | exits | weighted_sum
- weights = jnp.asarray(readout.weights, x.dtype).reshape(count, *[1] * x.ndim)
+ weights = jnp.full((count, *[1] * x.ndim), 1 / count, x.dtype)
@ exits read what comes before their layer | nn/stacked.py | exits | weighted_sum
- return x, (auxiliary, x)
+ return x, (auxiliary, 0 * x)
@ exits share no norm | models/causal.py | exits | weighted_sum
- exits=jax.vmap(self.norm)(exits)
+ exits=exits
@ exits do not rotate | subnet/exits.py | exits | rotate_the_exits
- (depths - 1 + phase) % self.every
+ (depths - 1) % self.every
@ exits come all at once | subnet/exits.py | exits | rotate_the_exits
- depths = depths[depths >= layers - phase]
+ depths = depths[depths >= 0]
@ logits of exits are free | plan/steps.py | exits | is_charged
- if part.besides is not None:
+ if part is None:
@ exits are forgotten by a loss of its own | nn/head.py | exits | chunks
- if self.exits is not None:
+ if self.exits is None and self.weights:
@ the last exit has no weight of its own | subnet/exits.py | nested | by_their_weights
- weights[-1] = layers - 1 + self.exits
+ weights[-1] = self.exits
@ one size in all steps | subnet/matformer.py | nested | each_as_often
- default_rng([seed, step, 0x3E5])
+ default_rng([seed, 0x3E5])
@ steps between two numbers of tokens are skipped | subnet/thinned.py | nested | rises_in_steps
- now - (now - self.count) % self.by + self.by
+ now - (now - self.count) % self.by + 2 * self.by
@ an epsilon is trained | annotation/declared.py | annotation | follows_its_axis
- return Declaration("buffer" if epsilon else "param", given)
+ return Declaration("param" if epsilon else "param", given)
@ an average loses its gates | state.py | annotation | gets_its_gates
- half if whole and _is_half(node) else eqx.combine(half, rest)
+ half if _is_half(node) else eqx.combine(half, rest)
@ averages of a state are not ramped | state.py | births | whole_averages
- lambda node: put(node, values) if _is_whole(node, model.model) else node,
+ lambda node: node,
@ a trained half gets gates | state.py | births | whole_averages
- return alike(node, model) and not _is_half(node)
+ return alike(node, model)
@ an epsilon that multiplies is one | inference/epsilons.py | epsilons | printed_as_one
- if not (use.kind == "mul" if op.kind[1] < 0 else use.kind == "div" and i == 1):
+ if use.kind not in ("mul", "div"):
@ an epsilon that is used elsewhere is one | inference/epsilons.py | epsilons | printed_as_one
- if self._uses(number) == len(norms) and self._alone
+ if self._alone
@ a variance is a mean square | inference/epsilons.py | epsilons | printed_as_one
- return Epsilon(atom, True, numbers | centred)
+ return Epsilon(atom, False, numbers | centred)
@ what is not centred is a LayerNorm | inference/epsilons.py | epsilons | printed_as_one
- if norm.centred and not all(self._centre(x, norm.atom) for x in divided):
+ if norm.centred and not divided:
@ one reason is two notes | inference/inferred.py | inferred_sizes | one_note
- if alike and re.sub(
+ if not alike and re.sub(
@ a buffer's field declares nothing | annotation/declared.py | annotation | declared_by_its_field
- given if isinstance(given, Declaration) else declaration_of(given)
+ given if isinstance(given, Declaration) else None
@ errors name the packed tree | axes.py | annotation | as_the_user_does
- path = ".".join(map(str, steps)) if path is None else path
+ path = ".".join(map(str, steps))
@ one of two arrays of a path is lost | axes.py | annotation | two_arrays
- lost = {slot.path for slot in slots if self._slots[slot.path] is not slot}
+ lost = set()
@ loops of any length are the same | trace/program.py | inferred_sizes | as_often_as
- if a.kind == "carry" and lengths[0] != lengths[1]:
+ if a.kind == "carry" and not a.options:
@ other draws are the same constant | trace/program.py | inferred_sizes | as_often_as
- if a.name == "random" and grows and not any(
+ if a.name == "random" and grows and any(
@ keys that are inputs are constants | trace/program.py | inferred_sizes | as_often_as or an_input
- ids = {id(value) for value in (*program.inputs, *program.rows)}
+ ids = {id(value) for value in program.inputs}
@ all random numbers are one expression | trace/expressions.py | closing | random_numbers
- if op.name == "random" and any(id(key) in self.live for key in op.beside):
+ if op.name == "random":
@ settings of operations may follow a size | trace/program.py | inferred_sizes | as_often_as
- (a.kind, a.options) != (b.kind, b.options)
+ a.kind != a.kind
@ conditions may follow a size | trace/walk.py | inferred_sizes | as_often_as
- self.tape[-1].groups = [(ins[0], None, None, 0)]  # as of `select_n`
+ self.tape[-1].groups = []
@ blocks of a decoder are no readers | annotation/undeclared.py | inferred_sizes | another_stack
- inside = [s for s in readers if any(d.axis in stacks for d in s.dims)]
+ inside = [s for s in readers if any(d.role == "stack" for d in s.dims)]
@ what is pasted without a head is refused | annotation/annotated.py | inferred_sizes | no_surprise
- lines.append("    example=batch,")  # without it this annotation is refused
+ pass
"""
