"""Bugs in what a map along an axis is (see `tests.planted`)."""

TABLE = """
@ a dual that is the matrix itself | algebra.py | algebra | matrix_multiplies
- return np.linalg.pinv(matrix).T
+ return matrix
@ any matrix passes for a dual | algebra.py | algebra | without_a_dual
- if off.max() > _TOLERANCE:
+ if off.max() > 9:
@ a matrix of low rank is grown by | algebra.py | algebra | without_a_dual
- if dual is None and (rank := int(np.linalg.matrix_rank(p))) < old:
+ if dual is None and (rank := int(np.linalg.matrix_rank(p))) < 0:
@ gradients of producers take the matrix | algebra.py | algebra | matrix_multiplies
- if role == "produced":
-             return consumed
-         if role == "consumed":
-             return produced
+ if role == "produced":
+             return produced
+         if role == "consumed":
+             return consumed
@ elementwise gradients take one side alone | algebra.py | algebra | both_sides
- produced * consumed if factors else None
+ produced if factors else None
@ consumers take the mean too | algebra.py | algebra | mean_rows
- slot.dims[dim].role in ("produced", "lookup", "stack")
+ slot.dims[dim].role in ("produced", "lookup", "stack", "consumed")
@ moments of means are means | maps.py | algebra | mean_rows
- done = copies and not move.has_means and starts is None
+ done = copies and starts is None
@ copies do not count in a mean square | algebra.py | algebra | lemon_rows
- return float(np.sum(weights**2) / move.length)
+ return float(len(np.unique(move.source[weights != 0])) / move.length)
@ means under a norm that keeps them | maps.py | algebra | norm_would_see
- if (move.axis in slot.spec.means and not means)
+ if (move.axis in slot.spec.means)
@ zeros under a norm that subtracts the mean | maps.py | algebra | norm_would_see
- (move.axis in slot.spec.variances and (means or not pads))
+ (move.axis in slot.spec.variances)
@ uneven shares under a norm | maps.py | algebra | norm_would_see
- if norms and np.ptp(counts) > 1e-9 * counts.max():
+ if norms and not counts.max():
@ moments of unequal copies under norms are guessed | algebra.py | linear_growth | do_not_follow
- return bool(alive.any() and np.ptp(ratio) > 1e-9 * np.abs(ratio).max())
+ return bool(not alive.any())
@ new rows from their own layer | maps.py | algebra | next_layer
- above = jnp.take(x, np.minimum(np.arange(layers) + 1, layers - 1), axis=stacks[-1])
+ above = x
@ what reads new rows comes from the next layer too | maps.py | algebra | next_layer
- if not (move.above and stacks and slot.dims[dim].role == "produced"):
+ if not (move.above and stacks):
@ regrouped queries are copied | algebra.py | linear_growth | queries_dealt_out
- return move.over is not None and bool(slot.positions(move.over))
+ return move.over is not None and not slot.path
@ keys and queries are regrouped in another order | maps.py | linear_growth | queries_dealt_out
- x = xp.moveaxis(x, pair, (0, 1))
+ x = xp.moveaxis(x, pair[::-1], (0, 1))
@ squares are summed by a dense map | optim/carrying.py | linear_growth | do_not_follow
- if by == "mixed" and power is not None and traits.law.linear_in is None:
+ if by == "mixed" and power is not None and traits is None:
@ squares of weights follow means | algebra.py | linear_growth | do_not_follow
- sides["weight"] = "mixed"  # gradients along these rows start anew
+ pass
@ arrays of gradients are refused sums of weights | optim/carrying.py | linear_growth | means_start_anew
- if by == "mixed" and power is not None and traits.law.linear_in is None:
+ if by == "mixed" and traits.law.linear_in is None:
@ a toy cannot widen a scalar | optim/toy.py | linear_growth | state_of_a_scalar
- if not by:
+ if False:
@ averages take their own weight where old ones are summed | algebra.py | linear_growth | summed_as
- return np.zeros(move.length, bool) if summed else move.rows(slot, dim) == NONE
+ return move.rows(slot, dim) == NONE
@ keys repeated for old queries are new | growth/births.py | linear_growth | growth_they_were_born_in
- young = move.source < 0 if move.over is not None else move.is_new()
+ young = move.is_new()
@ queries of several growths are trained as one part | growth/births.py | linear_growth | dealt_out
- if not isinstance(births, Tracer) and np.any(np.asarray(births) == MIXED):
+ if births is None:
@ means of new words count padding | growth/finishes.py | lookups | padding_is_taken
- rows = jax.lax.slice_in_dim(old, 0, self.used, axis=dim)
+ rows = old
@ nobody reads the gate of the words | nn/head.py | lookups | behind_a_gate
- if self.gate is None:
+ if self.gate is None or self.gate is not None:
@ noise that does not cancel | growth/finishes.py | width | noise_cancels
- return jnp.moveaxis((moved - mean) * unit, 0, dim)
+ return jnp.moveaxis(moved * unit, 0, dim)
@ state is carried through noise | growth/finishes.py | width | not_carried
- if role in ("produced", "elementwise"):
+ if role == "nothing":
@ copies are locked unless one asks | growth/copying.py | width | told_apart
- shares: Literal["equal", "random", "diagonal"] = "random",
+ shares: Literal["equal", "random", "diagonal"] = "equal",
@ old weights are shrunk for every axis | growth/finishes.py | width | shrunk_once
- if move.axis != [axis for axis in self.order if slot.positions(axis)][-1]:
+ if not self.order:
@ a rest of zeros under LayerNorm | growth/lossless.py | width | lemon_keeps
- MEAN if centred else NONE
+ NONE
@ outputs are multiplied by YaRN as well as keys | growth/rotary.py | lookups | frequencies_are_lowered
- roles[move.axis] == "consumed" and roles.get(self.stream) != "produced"
+ roles[move.axis] == "consumed"
@ layers that should open in turn open together | growth/masked.py | depth | open_in_turn
- pace = np.where(new, new.sum() / np.maximum(np.cumsum(new), 1), 1.0)
+ pace = np.where(new, 1.0, 1.0)
@ LIDAS a layer too high | growth/depth.py | orders | order_of_the_papers
- end = -(-old // 2) + extra // 2
+ end = -(-old // 2) - (-extra // 2)
@ sources are scaled with their copies | growth/finishes.py | depth | sources_are_not
- np.where(move.is_new(), scale, 1.0)
+ np.full(move.length, scale)
@ a pooled head keeps one of the keys | growth/regrouping.py | heads | become_means
- mean = (run == np.arange(size)[:, None]) * (size / old)
+ mean = (np.arange(old) == np.arange(size)[:, None] * (old // size)) * 1.0
@ aligned units shrink to an n-th | growth/neighbours.py | between | aligned_before
- return jnp.exp(jax.lax.fori_loop(0, _ROUNDS, rounds, scores))
+ return jnp.exp(jax.lax.fori_loop(0, _ROUNDS, rounds, scores)) / len(lower)
@ units are aligned the other way round | growth/neighbours.py | between | aligned_before
- jnp.einsum("gij,gi...->gj...", self.plans[dim.axis], moved)
+ jnp.einsum("gji,gi...->gj...", self.plans[dim.axis], moved)
@ fills open closed branches | growth/neighbours.py | between | branch_is_closed
- if slot.path in self.closed:
+ if not slot.path:
@ layers go into the lowest gaps | growth/neighbours.py | between | highest_gaps
- first = old - 1 - extra
+ first = 0
@ blocks off the diagonal stay | growth/copying.py | width | on_the_diagonal
- copies = move.length // grown[move.axis]
+ return new
@ directions of the input in place of the output | growth/entries.py | gradmax | fastest
- directions = jnp.linalg.svd(numbers["products"][reader.path])[2][..., :new, :]
+ products = numbers["products"][reader.path]
+             directions = jnp.swapaxes(jnp.linalg.svd(products)[0], -1, -2)[..., :new, :]
@ the last directions in place of the first | growth/entries.py | gradmax | fastest
- numbers["products"][reader.path])[2][..., :new, :]
+ numbers["products"][reader.path])[2][..., -new:, :]
@ the last batch of GradMax counts alone | growth/entries.py | gradmax | several_batches
- path: total + gradient[path][..., old:, :].astype(total.dtype)
+ path: gradient[path][..., old:, :].astype(total.dtype)
@ units that never learn grow | growth/entries.py | gradmax | never_learn
- if not learns:
+ if learns is None:
@ an operator grows before it is fitted | growth/operator.py | fitting | says_why
- if not op.fitted:
+ if op is None:
@ padding counts as a piece | growth/transplants.py | transplants | pieces
- weights = np.asarray([[*w, *[0.0] * (longest - len(w))] for w in self.weights])
+ weights = np.asarray([[*w, *[w[0]] * (longest - len(w))] for w in self.weights])
@ a multiplier is forgotten in a file | hf/stock.py | multipliers | multipliers
- values[("block", part, name)] = array * weight.astype(array.dtype)
+ values[("block", part, name)] = array
@ closed layers keep their multiplier | nn/block.py | multipliers | multipliers
- closes: bool = eqx.field(static=True, default=True)
+ closes: bool = eqx.field(static=True, default=False)
@ a fit starts from undivided copies | growth/mixtures.py | fitting | starts_near
- np.eye(old)[source] / counts[source][:, None]
+ np.eye(old)[source] / 1
@ only the last step of a fit is charged | fitting.py | fitting | every_step
- cost += fit_flops(op, model, batch, loss)
+ cost = fit_flops(op, model, batch, loss)
@ means of what a norm puts out are means of its gain | maps.py | width | puts_out
- mends -= {place for place in mends if "produced" in roles.get(place, ())}
+ mends -= {place for place in mends if "none" in roles.get(place, ())}
@ a certificate of fewer words compares none | certificate/measured.py | transplants | smaller_vocabulary
- b, a = b[tuple(map(slice, a.shape))], a[tuple(map(slice, b.shape))]
+ b = b[tuple(map(slice, a.shape))]
@ closed copies may come in any order | growth/depth.py | depth | lose_or_swap
- if order != list(range(old)):
+ if len(order) > old:
@ YaRN cools what is not turned | growth/rotary.py | decoder | what_is_turned
- larger = jnp.where(self.turned, (0.1 * math.log(self.factor) + 1) ** 2, 1)
+ larger = jnp.full(self.turned.shape, (0.1 * math.log(self.factor) + 1) ** 2)
@ layers that do not grow have copies too | maps.py | within | other_layers
- return slot.join(move.limited(slot, before, x, law.origin))
+ return slot.join(x)
@ noise reaches layers that do not grow | growth/limited.py | within | other_layers
- return move.limited(slot, old, self.rule.applied(move, slot, old, new, key=key), 0.0)
+ return self.rule.applied(move, slot, old, new, key=key)
@ limited layers are the others | growth/limited.py | within | other_layers
- chosen = np.isin(np.arange(after.shape[dim]), self.layers)
+ chosen = ~np.isin(np.arange(after.shape[dim]), self.layers)
@ lists become tuples whatever they are | values/checks.py | bad_input | of_any_type or taken_apart
- return tuple(map(tuples, value)) if isinstance(value, list | tuple | range) else value
+ return tuple(value) if isinstance(value, list | tuple | range | str) else value
@ factors multiply a weight to which one is added | growth/finishes.py | decoder | one_more_than
- return slot.origin + factor * (x - slot.origin) if slot.origin else factor * x
+ return factor * x
@ sums of layers add ones up again | growth/mixtures.py | decoder | one_more_than
- rows = old - slot.origin
+ rows = old
@ a cap does not loosen the bound | growth/lookups.py | lookups | under_a_cap
- return math.log(1 + self.size - old) if capped else math.log(self.size / old)
+ return math.log(self.size / old)
@ layers are dealt out as keys are | growth/regrouping.py | heads | pooled_or_regrouped
- if role in ("stack", "lookup"):
+ if role == "lookup":
@ some layers grow new layers | growth/limited.py | within | does_not_fit
- if move.axis == self.axis:
+ if move.axis is None:
@ padding is a position | growth/finishes.py | lookups | before_the_first
- rows = jnp.take(old, self.first + place % count, axis=dim)
+ rows = jnp.take(old, place % count, axis=dim)
@ a drop without a step never drops | subnet/base.py | bad_input | SubnetError
- if step is None and self.scheduled:
+ if False:
@ stacks of no layers are not saved | runs/checkpoint.py | depth | loops_and_fresh
- arrays = {name: leaf for name, leaf in named(state).items() if leaf.size}
+ arrays = named(state)
@ weights of a fit are widened | growth/fits.py | between | network_predicts
- return (w - rate * (m / (jnp.sqrt(v) + 1e-8) + decay * w)).astype(w.dtype)
+ return w - rate * (m / (jnp.sqrt(v) + 1e-8) + decay * w)
@ norms average over zeros of layers that rest | growth/limited.py | within | whose_norm
- for slot in axes.normalised(move.axis)
+ for slot in axes.normalised(move.axis)[:0]
@ blocks of an array have no matrix | growth/mixtures.py | fitting | mixed_whole
- return Mixed({part.path: given[slot.path] for slot in slots for part in slot.parts})
+ return Mixed({slot.path: given[slot.path] for slot in slots})
@ a leaf without axes has no bias correction | optim/age.py | carry_others | as_old_as_the_model
- by_youngest(moments, weights, oldest(weights))
+ by_youngest(moments, weights, 1.0)
@ flags are multiplied | maps.py | algebra | are_not_rounded
- slot.require_fractions(x, "multiplied")
+ slot.require_fractions(x * 1.0, "multiplied")
@ whole numbers are averaged | maps.py | algebra | are_not_rounded
- slot.require_fractions(x, "averaged")
+ slot.require_fractions(x * 1.0, "averaged")
@ NaN is lost among the arrays of a gradient | certificate/measured.py | certify | never_lost
- float(np.max([np.abs(g).max(initial=0) for g in jax.tree.leaves(tree)], initial=0))
+ float(max([np.abs(g).max(initial=0) for g in jax.tree.leaves(tree)], default=0))
@ outputs are held to their own dtype | certificate/measured.py | certify | coarsest
- for x in (*jaxpr.invars, *jaxpr.constvars, *(x for eqn in jaxpr.eqns for x in eqn.outvars)):
+ for x in jaxpr.outvars:
@ gradients of a model that casts are held to float64 | certificate/record.py | certify | coarsest
- rounding(difference.dtype, 1e-10)
+ 1e-10
@ coordinates of the first model count as new | optim/scale.py | losses | rate_of_its_own
- added & (age < steps)
+ age < steps
@ copies are as old as their sources to a rate of its own | optim/carrying.py | losses | rate_of_its_own
- number = 0 if cell.counts == "since" else growths[cell.node] + 1
+ number = growths[cell.node] + 1 if cell.counts == "birth" else leaf.max()
@ masked logits are the scale of outputs | certificate/measured.py | certify | never_lost
- size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
+ size = float(np.abs(a).max(initial=0))
@ gradients of new entries may be anything | certificate/measured.py | certify | not_finite_at_new
- if np.isfinite(largest(before.gradient)) and not np.isfinite(largest(after.gradient)):
+ if not np.isfinite(largest(before.gradient)):
@ what a call of one's own changes is undone | growth/operator.py | grow | not_undone
- if find(model, steps) is find(small, steps)
+ if find(small, steps) is find(small, steps)
@ annotated modules inside others keep old sizes | trees.py | grow | up_to_date
- return jax.tree.map(lambda x: function(x) if is_one(x) else x, model, is_leaf=is_one)
+ return function(model) if is_one(model) else model
@ an ordered dict becomes another | trees.py | grow | class_and_order
- new: Any = copy.copy(node)
+ new: Any = dict(node)
@ heads that merge are as old as the first | optim/carrying.py | heads | keep_their_births
- return merged_births(rows, 1) if cell.counts == "birth" else rows.min(1)
+ return rows[:, 0] if cell.counts == "birth" else rows.min(1)
@ drawn numbers have the slope of what they follow | maps.py | maps | matched_draws
- x = jax.lax.stop_gradient(x)
+ pass
@ the deviation of a constant array has a gradient | growth/upcycling.py | upcycling | constant_arrays
- jnp.std(jax.lax.stop_gradient(array), *args, **options)
+ jnp.std(array, *args, **options)
@ statistics of no dropped unit | growth/upcycling.py | upcycling | constant_arrays
- if not count:
+ if count is None:
@ an array at two places is freed | growth/operator.py | growth | two_places
- id(leaf) not in held
+ leaf is not None
@ what is traced is freed | growth/operator.py | births | by_hand
- if any(isinstance(leaf, Tracer) for leaf in leaves):
+ if not leaves:
@ averages have whole numbers | state.py | births | whole_numbers
- axes_of(partition(model)[0]).params()
+ axes_of(model).params()
@ triggers make an arm of every run | report/compared.py | compared | one_window
- saved = to_dict(plan.unended)
+ saved = to_dict(plan)
@ triggers give every run a budget of its own | report/runs.py | compared | one_window
- plan, curve = self.plan.unended, self.points(charge, "held_out")
+ plan, curve = self.plan, self.points(charge, "held_out")
@ one window is taken for several | report/runs.py | compared | one_window
- len(held_out[0].sums) > 1
+ len(held_out[0].sums)
@ an empty stack has the age of the model, a full one has none | optim/age.py | carry_others | was_empty
- if not any(size for axis, size in sizes.items() if "stack" not in table.roles(axis)):
+ if not any(sizes.values()):
@ two layers are looked for in one | plan/steps.py | plan | single_layer
- if self.stacks[a] == 1}
+ if self.stacks[a] == 0}
@ a loss that is not a number is the lowest | train/choosing.py | probe | finite_loss
- losses.append(loss if math.isfinite(loss) else None)
+ losses.append(loss)
@ any step will do | subnet/base.py | bad_input | SubnetError
- raise_all(SubnetError, "a sub-network cannot be taken at this step:", wrong)
+ del wrong
@ a state is a model without axes | axes.py | bad_input | state
- (of a gj.State, give state.model)
+ (of a model)
@ shares beyond numbers are shares | plan/timing.py | probe | proportional_shares
- if not np.all(shares > 0):
+ if np.any(shares < 0):
@ draws of all slices at once | maps.py | draws | slice_at_a_time
- return jax.vmap(draw)(ids) if self._is_constant else jax.lax.map(draw, ids)
+ return jax.vmap(draw)(ids)
@ constants are drawn in a loop | maps.py | draws | slice_at_a_time
- return jax.vmap(draw)(ids) if self._is_constant else jax.lax.map(draw, ids)
+ return jax.lax.map(draw, ids)
"""
