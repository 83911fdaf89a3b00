"""The bugs that `python -m tests.mutations` plants, one after the other."""

# @ name | file of growjax | file of tests | pytest -k
# - what stands there, in one or more lines (indentation of the first one left out)
# + what the bug makes of it
TABLE = """
@ share dropped | maps.py | maps | every_leaf or transpose_of
- scale = power.of(jnp.asarray(factor, x.dtype))
+ scale = jnp.ones_like(jnp.asarray(factor, x.dtype))
@ share on the other side | algebra.py | maps | every_leaf or transpose_of
- if own is None and role == self.side:
+ if own is None and role != self.side:
@ lookup axis takes a share | algebra.py | maps | every_leaf or moments_follow
- if role in ("lookup", "stack") or is_matrix(produced)
+ if is_matrix(produced)
@ a square matrix grows along one of its two dimensions | maps.py | maps | every_leaf
- for dim in where:
-             x = _gather(*_sources(move, slot, x, dim), dim, fresh)
+ for dim in where[:1]:
+             x = _gather(*_sources(move, slot, x, dim), dim, fresh)
@ biases of copies start at zero | maps.py | maps | every_leaf
- return jnp.take(x, source, axis=dim, mode="clip")
+ taken = jnp.take(x, source, axis=dim, mode="clip")
+     return taken if x.ndim > 1 else taken.at[x.shape[0] :].set(0)
@ epsilon not rescaled | maps.py | maps | norm_over_zeros
- values[slot.steps] = slot.value * mean_square(move)
+ values[slot.steps] = slot.value
@ gain scaled the wrong way | algebra.py | maps | norm_over_zeros
- scale = grown**0.5
+ scale = grown**-0.5
@ moments of a rescaled gain move as the gain | algebra.py | maps | norm_over_zeros
- yield None, "gradient", 1 / scale
+ yield None, "gradient", scale
@ first moments unscaled | algebra.py | maps | moments_follow
- FIRST = Law(gradient=Power(1, odd=True))
+ FIRST = Law()
@ second moments by the first power | algebra.py | maps | moments_follow
- sign * jnp.abs(x) ** whole
+ sign * jnp.abs(x)
@ what never had a gradient keeps a trace of signs | algebra.py | maps | power_keeps
- jnp.where(x == 0, 0, sign
+ jnp.where(x != x, 0, sign
@ no dual for elementwise leaves | algebra.py | maps | moments_follow
- if role in ("lookup", "stack") or is_matrix(produced)
+ if role in ("lookup", "stack", "elementwise") or is_matrix(produced)
@ moments of new coordinates are one | maps.py | maps | moments_follow
- fresh: Any = 0,
+ fresh: Any = 1,
@ a share of layers on what reads the stream | algebra.py | maps | on_a_stack_axis
- d.axis == move.via and d.role == "produced"
+ d.axis == move.via and d.role == "consumed"
@ draws without the leaf's path | maps.py | maps | draws_differ
- f"{self.slot.path}:{self.move.axis}"
+ f"{self.move.axis}"
@ draws without the axis | maps.py | maps | draws_differ
- f"{self.slot.path}:{self.move.axis}"
+ f"{self.slot.path}"
@ draws without the index | maps.py | maps | draws_differ
- key = jax.random.fold_in(key, i)
+ key = jax.random.fold_in(key, 0)
@ draws by position among the new | maps.py | maps | draw_depends
- draws = self._each(self._draw(x, [dim]), jnp.asarray(ids))
+ draws = self._each(self._draw(x, [dim]), jnp.arange(len(ids)))
@ RoPE frequencies drawn | maps.py | growth | rotary_pairs and msg
- if self.slot.kind == "buffer":
+ if self.slot.kind == "gate":
@ gates left open | maps.py | gates | every_hidden_state
- return Gate((~new).astype(float), new, pace)
+ return Gate((new | ~new).astype(float), new, pace)
@ copies are not new | algebra.py | maps | first_home
- return ~first | (self.source < 0)
+ return self.source < 0
@ integers that repeat a size stay | maps.py | axes | rewrites_the_integers
- replaced(model, DeclaredOutside, lambda module: module.resized(sizes))
+ replaced(model, DeclaredOutside, lambda module: module.resized(table.sizes))
@ buffers are trained | axes.py | axes | floating_params
- True for s in table.of_kind("param") if _floating
+ True for s in table.values() if _floating
@ gates leave a trace in what is trained | axes.py | optim | ramping_and_settling
- return put(trained, empty), rest
+ return trained, rest
@ the ramp moves old coordinates | gates.py | gates | gradients_of_new
- jnp.where(self.new, level, one)
+ jnp.where(self.new, one, level)
@ settle does not look | gates.py | gates | settle_refuses
- if not bool(jnp.all(slot.value.value == 1))
+ if slot.value is None
@ gate after the activation | nn/mlp.py | gates | hidden_units
- gated(self.up, self.gate), bias)
-         h = act(h) if
+ self.up, self.up_bias)
+         h = gated(act(h), self.gate) if
@ gate on one factor of a GLU | nn/mlp.py | gates | hidden_units
- gated(self.up, self.gate), bias)
-         h = act(h) if self.glu is None else act(affine("te,em->tm", x, self.glu)) * h
+ gated(self.up, None if self.glu is not None else self.gate), bias)
+         glu = self.glu if self.glu is None else gated(self.glu, self.gate)
+         h = act(h) if glu is None else act(affine("te,em->tm", x, glu)) * h
@ the bias of hidden units without their gate | nn/mlp.py | gates | hidden_units
- gated(self.up_bias, self.gate)
+ self.up_bias
@ gate before the bias of a norm | nn/norm.py | gates | weights_its_statistics
- if self.bias is not None:
-             h = h + self.bias.astype(h.dtype)
-         return gated(h, self.gate).astype(x.dtype)
+ h = gated(h, self.gate)
+         if self.bias is not None:
+             h = h + self.bias.astype(h.dtype)
+         return h.astype(x.dtype)
@ statistics of a norm unweighted | nn/norm.py | gates | weights_its_statistics
- jnp.sum(weights * v, -1, keepdims=True)
+ jnp.mean(v, -1, keepdims=True)
@ count of a norm unweighted | nn/norm.py | gates | weights_its_statistics
- weights = c * (1 / jnp.sum(c))
+ weights = c / c.shape[0]
@ the norm before a tied head is elementwise | models/gpt.py | axes | tied_head
- side = "consumed" if c.tied and self.lm else "elementwise"
+ side = "elementwise"
@ keys take no share | nn/attention.py | growth | rotary_pairs and copy
- return "<-" if self.k_norm is None else ""
+ return ""
@ keys take a share under QK-norm | nn/attention.py | growth | norm_of_queries and copy
- return "<-" if self.k_norm is None else ""
+ return "<-"
@ values without the gate of the group | nn/attention.py | gates | heads_mask and group
- affine("tkgd,kgde->te", gated(mixed, self.gate_group, -2), self.o, self.o_bias)
+ affine("tkgd,kgde->te", found, self.o, self.o_bias)
@ keys without the gate of heads | nn/attention.py | gates | heads_mask and kv_heads
- k, v = (gated(gated(h, self.gate_kv_heads, -2), self.gate_head_dim) for h in (k, v))
+ v = gated(v, self.gate_kv_heads, -2)
+         k, v = (gated(h, self.gate_head_dim) for h in (k, v))
@ logits scaled by the new head_dim | nn/attention.py | growth | rotary_pairs and zeros
- queries * self.scale, 0, 2)
+ queries * queries.shape[-1] ** -0.5, 0, 2)
@ bias of keys dropped | nn/attention.py | models | test_llama
- affine("se,ekd->skd", source, self.k, self.k_bias)
+ affine("se,ekd->skd", source, self.k)
@ rotary halves instead of pairs | nn/rotary.py | models | test_llama
- pairs = x.reshape(*x.shape[:-1], -1, 2)
-     quarter = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
+ left, right = jnp.split(x, 2, -1)
+     quarter = jnp.concatenate([-right, left], -1)
@ the causal mask upside down | nn/mask.py | models | test_gpt
- behind = key <= query
+ behind = key >= query
@ the padding mask inverted | nn/mask.py | models | padding_is_not_seen and gpt
- conditions.append(at(self.keys, key))
+ conditions.append(~at(self.keys, key))
@ tiles that are seen are left out | nn/mask.py | attend | reach
- low = jnp.maximum(first - self.window + 1, 0)
+ low = jnp.maximum(first - self.window + 2, 0)
@ a tile adds to sums of another maximum | nn/bodies.py | attend | all_scores_give
- fade = jnp.exp(top - highest)
+ fade = jnp.ones_like(top)
@ the bias of tiles has no gradient | nn/bodies.py | attend | all_scores_give
- db = jax.tree.map(jnp.add, db, pull(d_scores)[0])
+ db = db
@ sums over tiles in the activations' dtype | nn/bodies.py | attend | add_up_in_float32
- length, total = queries.shape[2], keys.shape[1]
-     q, k, v = _padded(queries, 2, tile), _padded(keys, 1, tile), _padded(values, 1, tile)
-     wide = _wide(queries)
+ length, total = queries.shape[2], keys.shape[1]
+     q, k, v = _padded(queries, 2, tile), _padded(keys, 1, tile), _padded(values, 1, tile)
+     wide = queries.dtype
@ attention over tiles runs twice | nn/bodies.py | attend | runs_once
- return checkpoint_name(out, SAVED), checkpoint_name(logs, SAVED)
+ return out, logs
@ masks of other lengths are clipped | nn/mask.py | attend | other_lengths
- if value is not None and value.shape not in shapes:
+ if value is not None and value.shape == ():
@ documents of one sequence for two | nn/mask.py | attend | other_lengths
- if self.documents is not None and queries != keys:
+ if self.documents is None and queries != keys:
@ places that fill the last tile are seen | nn/bodies.py | attend | all_scores_give
- real = (columns < total)[None, :]
+ real = (columns <= total)[None, :]
@ branch multiplier ignored | nn/block.py | subnet | runs_its_blocks
- y = y if branch is None else y * jnp.asarray(branch, y.dtype)
+ y = y * 1.0
@ branches join the stream without its gate | nn/block.py | gates | stream_is_masked
- x + gated(y, self.gate)
+ x + y
@ a new layer and the identity mixed up | nn/stacked.py | gates | mixed_with_its_own
- return m * y + (1 - m) * x
+ return (1 - m) * y + m * x
@ skipped layers run and are masked | nn/stacked.py | subnet | is_not_run
- jax.lax.cond(on, mixed, skipped, x)
+ jax.tree.map(lambda a, b: jnp.where(on, a, b), mixed(x), skipped(x))
@ the active flag inverted | nn/stacked.py | subnet | is_not_run
- jax.lax.cond(on, mixed, skipped, x)
+ jax.lax.cond(on, skipped, mixed, x)
@ nothing is computed again | nn/stacked.py | models | remat_keeps and gpt
- return _POLICIES.get(remat)
+ return None
@ products are computed again too | nn/stacked.py | models | remat_keeps and gpt
- jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
+ jax.checkpoint_policies.nothing_saveable,
@ bias of the masked-language head lost | models/bert.py | models | test_bert
- return Readout(x, words.table, self.decoder_bias, tied=True, gate=words.gate)
+ return Readout(x, words.table, tied=True, gate=words.gate)
@ shared heads become heads of their own | growth/operator.py | growth | heads_are_query_heads
- shared = axes.size("group") > 1
+ shared = False
@ msg without gates | growth/masked.py | gates | every_hidden_state
- AxisMap(axis, source, gated=True, init=init)
+ AxisMap(axis, source, init=init)
@ random shares do not sum to one | growth/copying.py | optim | would_have and momentum
- weight / np.bincount(source, weight, minlength=old)[source]
+ weight / np.bincount(source, minlength=old)[source]
@ uneven copies under a norm | growth/copying.py | bad_input | uneven
- elif even and norms and len(set(counts)) > 1:
+ elif even and norms and len(set(counts)) > 2:
@ zeros of the stream on its readers | growth/zeroed.py | growth | epsilon_of_a_norm
- side="produced" if normalised else "consumed"
+ side="consumed"
@ interleave as repeat | growth/depth.py | orders | order_of_the_papers
- return np.arange(new) * old // new
+ return np.arange(new) % old
@ the bottom layers doubled | growth/depth.py | orders | order_of_the_papers
- copies = 1 + (layers >= old - extra)
+ copies = 1 + (layers < extra)
@ repeat continues from the bottom | growth/depth.py | orders | order_of_the_papers
- layers[old - new % old :]
+ layers[: new % old]
@ the middle block rounded down | growth/depth.py | orders | order_of_the_papers
- end = -(-blocks // 2) * extra if
+ end = max(blocks // 2, 1) * extra if
@ old layers closed instead of new ones | growth/depth.py | growth | block_expansion_does_not
- share = np.where(move.is_new(), 0.0, 1.0)
+ share = np.where(move.is_new(), 1.0, 0.0)
@ branches not split among copies | growth/depth.py | optim | split_branches
- share = 1 / np.bincount(source, minlength=axes.size(axis))[source]
+ share = np.ones(len(source))
@ zeroed branches under a closing norm | growth/depth.py | bad_input | post and LN
- _closing_norms(axes, axis, stream),
+ [],
@ growth on an axis that is still ramping | maps.py | bad_input | ramping
- [slot.path for slot in mine if slot.value is not None]
+ []
@ a path in the order of drawing | subnet/paths.py | subnet | path_ascends
- return jnp.sort(path)
+ return path
@ a path without its fixed layers | subnet/paths.py | subnet | path_ascends
- fixed = tuple(sorted({i % layers for i in self.keep})) if not bad else ()
+ fixed = ()
@ fixed layers count as drawn ones | subnet/paths.py | subnet | bernoulli_path
- (self.length - fixed) / (layers - fixed)
+ self.length / layers
@ gaps to the layer before | subnet/paths.py | subnet | those_of_the_table
- gaps = jnp.diff(path, append=layers)
+ gaps = jnp.diff(path, prepend=-1)
@ the root of the gap forgotten | subnet/paths.py | subnet | add_up_to_the_depth
- "sqrt_gap": lambda: jnp.sqrt(gaps)
+ "sqrt_gap": lambda: gaps
@ every step draws the same path | subnet/base.py | subnet | function_of_seed_and_step
- jax.random.fold_in(fold_in_name(jax.random.key(seed), "subnet"), step)
+ jax.random.fold_in(fold_in_name(jax.random.key(seed), "subnet"), 0)
@ the deepest layer is never dropped most | subnet/drops.py | subnet | follows_its_formulas
- return 1 - jnp.arange(1, layers + 1) / layers
+ return 1 - jnp.arange(layers) / layers
@ kept branches multiplied by p | subnet/drops.py | subnet | one_over_p
- return 1 / self.chances(on.shape[0], step) if self.inverse else None
+ return self.chances(on.shape[0], step) if self.inverse else None
@ warm-up on top of the steps | subnet/paths.py | subnet | shares_out_its_steps
- np.round((steps - warmup) * np.cumsum(weights) / weights.sum())
+ np.round(steps * np.cumsum(weights) / weights.sum())
@ the same units in every layer | subnet/parts.py | subnet | units_differ
- jax.vmap(draw)(jax.random.split(key, axes.size(stacks.pop())))
+ jnp.tile(draw(key), (axes.size(stacks.pop()), 1))
@ units scaled down | subnet/parts.py | subnet | part_of_a_path
- "linear": size / count
+ "linear": count / size
@ ages not reset | optim/age.py | optim | fresh_run
- return jnp.where(young, 0, age[np.maximum(move.source, 0)])
+ return age[np.maximum(move.source, 0)]
@ as old as the oldest | optim/age.py | optim | youngest
- jnp.minimum, jnp.asarray(top)
+ jnp.maximum, 0 * jnp.asarray(top)
@ as old as the last axis | growth/births.py | optim | youngest
- for i, dim in enumerate(part.dims):
+ for i, dim in list(enumerate(part.dims))[-1:]:
@ copies behind a gate keep moments | optim/carrying.py | optim | moments_of_new
- copies == "dual" and not move.gated
+ copies == "dual"
@ second moments carried as first ones | optim/probe.py | optim | would_have and rmsprop
- return Power(degree, odd)
+ return Power(min(degree, 1.0), odd)
@ accumulators of fresh coordinates start from zero | optim/carrying.py | optim | own_constant
- copies, fresh = hop.keep or average, traits.initial
+ copies, fresh = hop.keep or average, None if traits.initial is None else 0
@ an average of anything is carried | optim/carrying.py | optim | average_of_anything
- if probed.averages:
+ if probed is None:
@ norms count as their entries' own | optim/probe.py | carry | optax.lars
- if shaped and all(_same(
+ if shaped or all(_same(
@ what a shape decides is kept | optim/carrying.py | carry | orthogonal
- if touched and not traits.additive:
+ if touched and traits is None:
@ sums count from zero | optim/probe.py | carry | optax.adagrad
- dict.fromkeys((initial, 0.0))
+ dict.fromkeys((0.0,))
@ small gradients alone decide a power | optim/probe.py | optim | small_gradients_alone
- if agreed is None and "unknown" in powers:
+ if agreed is not None and powers is None:
@ weights added to gradients are not seen | optim/probe.py | optim | weights_added
- best = Law(*both) if best == _UNKNOWN else best
+ best = FIRST
@ gains and biases decay | optim/age.py | optim | decay_is_for_matrices
- s.init == "normal" for s in slots
+ True for s in slots
@ Sophia forgets how many labels were drawn | optim/sophia.py | rules | gauss_newton
- jnp.asarray(labels, g.dtype) * g * g
+ g * g
@ Sophia's curvature fades between looks | optim/sophia.py | rules | only_when_it_is_shown
- h = state.h
+ h = jax.tree.map(lambda h: b2 * h, state.h)
@ all layers are one tensor | optim/scale.py | rules | layer_by_layer
- range(len(slot.dims) - len(within), len(slot.spec.groups))
+ range(len(slot.spec.groups))
@ heads and embeddings are hidden matrices | optim/muon.py | rules | matrices_inside
- if not all({"consumed", "produced"} <= table.roles(dim.axis) for dim in named):
+ if not data:
@ a matrix is split where its role last changes | optim/muon.py | rules | orthogonal_layer_by_layer
- first = next((i for i, dim in enumerate(data) if dim.role != data[0].role), 0)
+ first = next((i for i in range(len(data) - 1, 0, -1) if data[i - 1].role != data[i].role), 0)
@ new coordinates share the old average | optim/rules.py | rules | fresh_run
- jnp.where(seen > 0, weight / jnp.where(seen > 0, seen, 1), 0)
+ jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)
@ averages weigh every step alike | optim/rules.py | rules | average_of_where
- weight = jnp.square(jnp.asarray(rate, float))
+ weight = jnp.asarray(rate, float)
@ the offset of an average is carried as a moment | optim/probe.py | rules | carried_with_them
- dataclasses.replace(t, law=WEIGHT) if i in inside else t
+ dataclasses.replace(t, law=FIRST) if i in inside else t
@ averages of copies behind gates are blank | optim/carrying.py | optim | average_of_the_parameters
- leaf, traits.law, fresh=fresh, copies=copies
+ leaf, traits.law, fresh=fresh, copies=hop.keep
@ a wrong gradient passes | certificate/record.py | certify | wrong_map
- gradient <= rounding(difference.dtype, 1e-10)
+ gradient <= rounding(difference.dtype, 1e10)
@ the second step of liveness repeats the first | certificate/measured.py | certify | half_dead
- (zero[0][axis], zero[1][axis])
+ (zero[0][axis], zero[0][axis])
@ layers that did not run grow older | optim/freezing.py | freeze | as_old
- {axis: _chosen(running, axis, age, old.of[axis]) for axis, age in new.of.items()}
+ {axis: age for axis, age in new.of.items()}
@ layers that did not run decay | optim/freezing.py | freeze | bitwise
- return _rows(running, updates, zeros), jax.tree_util.tree_unflatten(structure, restored)
+ return updates, jax.tree_util.tree_unflatten(structure, restored)
@ coins are all heads | subnet/base.py | freeze | with_a_gradient
- flags[move.axis] = chosen if move.active is None else move.active
+ flags[move.axis] = chosen
@ moments without a layer are left to chance | optim/freezing.py | freeze | refused
- if getattr(value, "shape", slot.value.shape) != slot.value.shape:
+ if not slot.arrays():
@ the command line loses the second model | cli/training.py | commands | rho_from
- second = None if reference is None else open_model(reference)[0]
+ second = None
@ norms on the embeddings are those of post-LN alone | models/bert.py | models | test_bert
- starts = c.post_norm or c.embedding_norm
+ starts = c.post_norm
@ the seed of random copies is ignored | growth/copying.py | survivors | random_copies or random_shares
- np.random.default_rng(self.seed)
+ np.random.default_rng(0)
@ random copies come in turn | growth/copying.py | survivors | random_copies
- source = np.concatenate([np.arange(old), rng.integers(0, old, size - old)])
+ source = np.arange(size) % old
@ copies of layers forget the name of the stream | growth/depth.py | survivors | knows_its_stream
- move = AxisMap(axis, source, via=self.stream, finish=finish)
+ move = AxisMap(axis, source, finish=finish)
@ shares of layers forget the name of the stream | growth/depth.py | survivors | stream
- return dataclasses.replace(move, share=share)
+ return dataclasses.replace(move, share=share, via="embed")
@ the second multiplier replaces the first | maps.py | survivors | two_multipliers
- return moved if given is None else moved * given
+ return moved if given is None else given
@ queries are gated before their norm | nn/attention.py | survivors | after_their_norm
- q = _normed(self.q_norm, q, gates)
-         q = gated(gated(q, self.gate_kv_heads, -3), self.gate_group, -2)
+ q = gated(gated(q, self.gate_kv_heads, -3), self.gate_group, -2)
+         q = _normed(self.q_norm, q, gates)
@ keys are gated before their norm | nn/attention.py | survivors | after_their_norm
- k = _normed(self.k_norm, k, (self.gate_kv_heads, self.gate_head_dim))
-         k, v = (gated(gated(h, self.gate_kv_heads, -2), self.gate_head_dim) for h in (k, v))
+ k, v = (gated(gated(h, self.gate_kv_heads, -2), self.gate_head_dim) for h in (k, v))
+         k = _normed(self.k_norm, k, (self.gate_kv_heads, self.gate_head_dim))
@ ages of axes in brackets stay apart | growth/births.py | survivors | two_axes_in_one
- if not slot.spec.parts and all(count == 1 for count in slot.spec.groups):
+ if not slot.spec.parts:
@ softmax in the activations' dtype | nn/bodies.py | survivors | weighs_in_float32
- jnp.einsum("kgtd,ksd->kgts", queries, keys).astype(_wide(queries))
+ jnp.einsum("kgtd,ksd->kgts", queries, keys)
@ a thousand floors pass | certificate/record.py | survivors | sixteen
- max(rounding(self.dtype, 1e-12), 16 * self.floor)
+ max(rounding(self.dtype, 1e-12), 1000 * self.floor)
@ liveness behind open gates | certificate/measured.py | survivors | where_the_gates_stand
- np.where(s.value.new, level, 1.0)
+ np.where(s.value.new, 1.0, 1.0)
@ an output that is not finite passes | certificate/measured.py | survivors | not_finite
- gap = gap if np.isfinite(gap) else np.inf
+ gap = gap if np.isfinite(gap) else 0.0
@ what earlier operators made is forgotten | certificate/coordinates.py | survivors | earlier_operators
- new[move.axis] = move.is_new() | inherited
+ new[move.axis] = move.is_new()
@ buffers that are added to a mean are not touched | maps.py | survivors | epsilon
- {slot.steps for slot in (*table.having(move.axis), *_mean_buffers(move, table))}
+ {slot.steps for slot in table.having(move.axis)}
@ updates go up the gradient | optim/rules.py | train | norms_are
- u * -jnp.asarray(rate, u.dtype)
+ u * jnp.asarray(rate, u.dtype)
@ lengths drawn by chance once and for all | subnet/paths.py | plan | do_alone
- return math.inf if certain else step + 1
+ return math.inf
@ paths past the end of their stage | subnet/paths.py | plan | do_alone
- return min(stage.path.steady(step), stage.stop)
+ return stage.path.steady(step)
@ classes go by their bare names | values/names.py | values | one_bare_name
- name = f"growjax:{thing.__name__}" if own else f"{thing.__module__}:{thing.__qualname__}"
+ name = f"growjax:{thing.__name__}"
@ a reversed input is taken for noise | certificate/measured.py | own_models | layers_by_number
- floor = before
+ floor = floor
@ a reversed input is noise in the model's dtype | certificate/measured.py | own_models | layers_by_number
- native = native and dataclasses.replace(native, floor=0.0)
+ native = native
@ dicts that cannot be rebuilt are annotated | annotation/packing.py | own_models | no_path
- if not has_shape(leaf) or id(leaf) in seen:
+ if leaf is not None:
@ a task that writes is scored without extend | evals/tasks.py | own_models | before_any_is_run
- if required == "extend" and not hasattr(inside, "extend"):
+ if required == "extend" and not hasattr(inside, "words"):
@ copies are as old as what they copy | growth/births.py | births | compose
- young = move.source < 0 if move.over is not None else move.is_new()
+ young = move.source < 0
@ every growth is the first | growth/births.py | births | compose
- number, of = self.growths + 1, dict(self.of)
+ number, of = self.growths * 0 + 1, dict(self.of)
@ an entry is as old as its oldest coordinate | growth/births.py | births | compose
- return over_entries(slot, births, sizes, xp.maximum, xp.int32(0))
+ return over_entries(slot, births, sizes, xp.minimum, xp.int32(99))
@ what is dealt out takes the oldest birth | growth/births.py | births | dealt_out
- return xp.where(same, births.max(dim), xp.asarray(MIXED, births.dtype))
+ return births.max(dim)
@ the average of a fresh coordinate is zero | state.py | births | own_weight
- fresh=get(after, slot.steps),
+ fresh=0 * get(after, slot.steps),
@ averages miss what a finish does to old weights | optim/carrying.py | births | finished_as
- return move.finish is not None or type(move)
+ return move is None or type(move)
@ an average keeps its own buffers | state.py | births | own_weight
- half if whole and _is_half(node) else eqx.combine(half, rest)
+ half if _is_half(node) else eqx.combine(half, jax.tree.map(lambda x: 2 * x, rest))
@ births of a state are forgotten | state.py | births | by_hand
- grown = State(model, opt_state, average, cursor=state.cursor, births=births)
+ grown = State(model, opt_state, average, cursor=state.cursor)
@ gradients of a frozen part are clipped with the rest | optim/partwise.py | parts | as_if_alone
- without(gradient), structure.unflatten(bare), without(params), **hidden
+ gradient, structure.unflatten(bare), without(params), **hidden
@ memories of a frozen part are clipped with the rest | optim/partwise.py | parts | as_if_alone
- without(gradient), structure.unflatten(bare), without(params), **hidden
+ without(gradient), state, without(params), **hidden
@ weights of a frozen part decay into a norm | optim/partwise.py | parts | as_if_alone
- without(gradient), structure.unflatten(bare), without(params), **hidden
+ without(gradient), structure.unflatten(bare), params, **hidden
@ minus zero becomes zero | optim/partwise.py | parts | as_if_alone
- return without(updates, -0.0), jax
+ return without(updates), jax
@ moments of a frozen part stand still | optim/partwise.py | parts | remembered or kicked
- other = old if traits.law == WEIGHT else other
+ other = old
@ what is judged of a frozen part moves | optim/partwise.py | parts | judged_stays
- other = old if traits.law == WEIGHT else other
+ other = other
@ curves count from the last growth alone | optim/partwise.py | parts | count_from
- if growth is None:
+ if growth != -1:
@ curves never start again | optim/carrying.py | parts | count_from
- after.append(jnp.zeros_like(leaf) if cell.counts == "last" else leaf)
+ after.append(leaf)
@ what an optimizer carries is born a growth early | optim/carrying.py | parts | count_from
- number = 0 if cell.counts == "since" else growths[cell.node] + 1
+ number = 0 if cell.counts == "since" else growths[cell.node]
@ every part decays alike | optim/divided.py | parts | decay_of_a_part
- steps: x * jnp.asarray(multiple, x.dtype)
+ steps: x * jnp.asarray(multiple, x.dtype) ** 0
@ all is new before the first growth | optim/divided.py | parts | before_the_first
- masks[slot.steps] = mask & self._grown
+ masks[slot.steps] = mask
@ rates hold before the first growth | optim/divided.py | parts | before_the_first
- multiples[slot.steps] = jnp.where(self._grown, multiple, 1)
+ multiples[slot.steps] = multiple
@ rules that take means of an array pass | optim/partwise.py | parts | that_mix
- if not _near(a[:2], np.stack([narrowed(x, slot, more) for x in b])):
+ if not _near(a[:2], a[:2]):
@ rules that take sums of an array pass | optim/partwise.py | parts | that_mix
- if slot.positions(axis) and not _near(a[1][first], a[lane][first]):
+ if slot.positions(axis) and not _near(a[1][first], a[1][first]):
"""
