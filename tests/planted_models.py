"""More of what `python -m tests.mutations` plants: models of others, annotated and inferred."""

TABLE = """
@ norms in the activations' dtype | nn/norm.py | survivors | norm_is_computed
- h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
-         eps = jax.lax.stop_gradient(self.eps)
-         if
+ h = x
+         eps = jax.lax.stop_gradient(self.eps)
+         if
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
- takes = bool(piece.positions(stream, "produced"))
+ takes = False
@ outputs are gated all the same | annotation/gating.py | annotation | cannot_be_gated
- elif not any(slot.positions(axis, "consumed") for slot in slots):
+ elif False:
@ an inferred model gets no gates | inference/inferred.py | inference | gates_that_are_asked_for
- gates=gates,
+ gates=(),
@ sums that nobody claims pass for norms | inference/inferred.py | inference | nothing_can_declare
- self.refused[atom] = f"a norm that has no parameters averages over it (near {near})"
+ pass
@ fields that nobody reads follow | inference/sizes.py | inference | another_of_its_size
- if self._try(atom, rest)[0] is not None:
+ if False:
@ a constant may follow the size | inference/sizes.py | inference | follow_a_size_fix_it
- faults = unbalanced(program, roles, atom, constants)
+ faults = []
@ arrows stand outside of sums | inference/spelling.py | specs | read_again
- leaves_sum = i - 1 == where and not piece
+ leaves_sum = False
@ two consumers of one sum are taken | trace/roles.py | inference | says_wrongly
- if not system.zero(Lin(-int(takes), {name: Fraction(1)})):
+ if False:
@ a carry may change its share | trace/roles.py | inference | a_person_would_annotate
- self._equal(op.ins[0], op.ins[1], near)
+ pass
@ means are never balanced | trace/program.py | inference | a_person_would_annotate
- result += power
+ result += 0
@ a largest entry may be a new one | trace/walk.py | inferred_sizes | not_alone
- if kind == "extreme":  # copies do not change it, but fresh coordinates could be it
+ if False:
@ an order that is read is no fault of an annotation | annotation/checked.py | inferred_sizes | not_alone
- if fixed := [reason for _, atom in node.atoms for reason in atom.fixed]:
+ if fixed := []:
@ an empty slice is the whole | trace/shapes.py | inferred_sizes | size_0
- elif start == stop:
+ elif False:
@ a stream that nothing reads at the end | annotation/undeclared.py | inferred_sizes | no_surprise
- if inside and len(inside) == len(readers):
+ if not readers:
@ pieces with other constants share a program | certificate/pieces.py | pieces | whole_does
- return "literal", str(x.aval), getattr(x.val, "tobytes", lambda: x.val)()
+ return "literal", str(x.aval)
@ the end of a program does not know what layers made | certificate/pieces.py | pieces | whole_does
- needed = (needed - made.keys()) | used.keys()
+ needed = {*used}
@ every layer is a program | certificate/pieces.py | pieces | no_more_programs
- if _same(form, other):
+ if form is other:
@ a branch may follow its place in the list | annotation/closing.py | closing | follow_their_place
- for new in (size, 0):
+ for new in (size,):
@ a branch may follow the number of layers | annotation/closing.py | closing | number_of_layers
- return "" if turns[0] == turns[1] else "what a block does follows their number"
+ return ""
@ what stands before produced blocks is consumed | inference/spelling.py | specs | before_a_sum
- if last == "produced" and 0 < first == len(pieces) - 1:
+ if False:
@ entries beside those of an axis are overlooked | trace/program.py | inferred_sizes | dilute
- if len(known) < len(parts) or (node.structure == "sum" and len(set(known)) > 1):
+ if False:
@ other operations at another size pass | trace/program.py | inference | a_person_would_annotate
- if y.shape != (expected := grown_shape(x, {atom: factor})):
+ if False:
@ zeros in a factor close a block | trace/expressions.py | closing | would_change
- if op.kind in ("mul", "dot") and any(zeros):
+ if op.kind in ("mul", "dot", "add") and any(zeros):
@ every activation keeps zeros | trace/expressions.py | closing | would_change
- bent = op.kind == "bent" and op.name in _KEEP_ZERO
+ bent = op.kind == "bent"
@ a negated stream counts as the stream | trace/expressions.py | closing | would_change
- elif op.kind == "add" and op.name == "sub" and zeros[0]:
+ elif False:
@ a choice is its first case | trace/expressions.py | closing | would_change
- rest = list(dict.fromkeys(ins))  # a choice between equals
+ rest = rest[:1]
@ loops from one start are one | trace/expressions.py | closing | would_change
- (*start, *after, *goes_on))
+ (*start, *goes_on))
@ moved entries count as the stream | trace/expressions.py | closing | would_change
- return op.ins[0].shape == op.outs[0].shape and moved == left and op.name != "update"
+ return op.ins[0].shape == op.outs[0].shape and op.name != "update"
@ a row that is written over counts as the stream | trace/expressions.py | closing | are_read
- return op.ins[0].shape == op.outs[0].shape and moved == left and op.name != "update"
+ return op.ins[0].shape == op.outs[0].shape and moved == left
@ zeros stay zeros whatever is padded or written in | trace/expressions.py | closing | would_change
- filled = beside[:1] not in ([], [ZERO])
+ filled = False
@ indices are no zeros | trace/expressions.py | closing | are_read
- filled = beside[:1] not in ([], [ZERO])
+ filled = any(beside)
@ what is written in has no number | trace/expressions.py | closing | are_read
- self.expressions.number(key, (*ins, *beside)) if same is None else same
+ self.expressions.number(key, (*ins,)) if same is None else same
@ zeros of the program stay zeros when padded | trace/shapes.py | closing | would_change
- out.zero = all(v.zero for v in (*ins, *filling))
+ out.zero = all(v.zero for v in ins)
@ only the first case of a branch is read | trace/walk.py | closing | would_change
- chosen += self._elementwise("add", cases, "cond")
+ chosen += cases[:1]
@ all blocks are zero at once | annotation/closing.py | closing | would_change
- closed = {m for name in names for m in same.get(number[name], ())} & set(added)
+ closed = {m for name in names for m in same.get(number[name], ())}
@ a body may change its carry | annotation/closing.py | closing | would_change
- changed = [loop for loop in loops if loop.start != loop.end]
+ changed = []
@ blocks that stay open are stacked | growth/depth.py | closing | would_change
- if why:
+ if False:
@ blocks that nobody checked are stacked | growth/depth.py | closing | neither_declared
- if why is None and not multiplied and _makers(axes, axis, stream):
+ if False:
@ gates on stacks need no batch | annotation/annotated.py | closing | neither_declared
- if "stack" in table.roles(axis) and example is None and axis not in residual
+ if False
@ a stack that is declared residual is not checked | annotation/checked.py | closing | a_batch_checks_it
- for axis in dict.fromkeys((*self.annotated.gates, *self.annotated.residual)):
+ for axis in self.annotated.gates:
@ axes that break a certificate keep their name | inference/inferred.py | inference | certified
- if not record.passed
+ if record is None
@ keys of a certificate are one | draws.py | draws | told_apart
- a = _mixed(key[0] ^ jnp.asarray(data, jnp.uint32))
+ a = _mixed(key[0])
@ draws of a certificate count up | draws.py | draws | normal_and_independent
- bits = _mixed(counter * jnp.uint32(_GOLDEN) + key[0]) ^ key[1]
+ bits = (counter * jnp.uint32(_GOLDEN) + key[0]) ^ key[1]
@ weights of experts over all logits | nn/experts.py | experts | loop_over_tokens
- weights = jax.nn.softmax(top, axis=-1)
+ weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
@ the sorted choices are not put back | nn/experts.py | experts | loop_over_tokens
- return jnp.einsum("tke,tk->te", y[back]
+ return jnp.einsum("tke,tk->te", y
@ a router in the dtype of the activations | nn/experts.py | experts | float32_under
- wide = jnp.promote_types(x.dtype, jnp.float32)
+ wide = x.dtype
@ the balance loss counts closed experts | nn/experts.py | experts | closed_gate
- if self.expert_gate is not None:
-             count =
+ if self.expert_gate is None:
+             count =
@ auxiliary losses of layers that do not run | nn/stacked.py | experts | do_not_run
- auxiliary = auxiliary * jax.lax.stop_gradient(gate.value)
+ auxiliary = auxiliary * jnp.ones_like(gate.value)
@ auxiliary losses count every row alike | plan/losses.py | experts | evaluation_does_not
- total = total + jnp.sum(of_row * jnp.sum(weights, axis=-1))
+ total = total + jnp.sum(of_row * jnp.mean(weights))
@ FLOPs of all experts | cost.py | experts | flops_are
- return 2 * math.prod(chosen) *
+ return 2 * math.prod(chosen[:-1]) * rest[1][-3] *
@ shards of experts without their factor | nn/experts.py | upcycling | keep_the_function
- down=shards * mlp.down
+ down=mlp.down
@ copies of experts keep whole moments | growth/upcycling.py | upcycling | backward_pass
- return np.where(self.source < 0, 1.0, 1 / np.maximum(counts, 1)[self.source])
+ return None
@ dropped units differ by matrix | growth/upcycling.py | upcycling | drop_upcycling
- owner = path if self.per_matrix else path.rpartition(".")[0]
+ owner = path
@ experts take any stream for embed | growth/upcycling.py | upcycling | asked_of_the_model
- return next(streams, "embed")
+ return next(iter(()), "embed")
@ noise of copies does not cancel | growth/upcycling.py | upcycling | sums_to_zero
- draws = (draws - jnp.mean(draws, 0))
+ draws = draws
@ born experts are as old as the model | growth/births.py | upcycling | shards_of_units or trained_alone
- of[axis] = np.full(size, number, np.int32)
+ of[axis] = np.full(size, 0, np.int32)
@ norms of layers may be left out | annotation/undeclared.py | inferred_sizes | without_a_batch
- if any(dim.normalised for dim in dims):
+ if True:
@ tied heads may be left out | annotation/undeclared.py | inferred_sizes | tied_head
- takes = any(s.dims[0].role == "consumed" for s in vectors)
+ takes = bool(vectors)
@ annotated dimensions are read anew | annotation/checked.py | inferred_sizes | grows_exactly
- for leaf, d, at, dim, node in self.parts:
+ for leaf, d, at, dim, node in self._parts():
@ constants of a fill follow the model | certificate/measured.py | certify | double_precision
- normal = lambda: offset + spread * jax.random.normal(key, shape, jnp.float32)  # noqa: E731
+ normal = lambda: offset + spread * jax.random.normal(key, shape)  # noqa: E731
@ gains of 1 + w are scaled from zero | maps.py | decoder | gemma-copy
- origin = slot.origin if law == WEIGHT else law.origin
+ origin = law.origin
@ a closed layer ends in zeros before a norm | algebra.py | decoder | closed_layers
- takes = takes if slot.closes is None else slot.closes
+ pass
@ norms over the width count closed heads | nn/norm.py | decoder | mixed-msg
- count *= x.shape[dim] if gate is None else jnp.sum(jax.lax.stop_gradient(gate.value))
+ count *= x.shape[dim]
@ a cache sees beyond the window | nn/attention.py | decoder | cache_gives
- pairs = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
+ pairs = back >= 0
@ parallel branches follow each other | nn/block.py | decoder | norms_stand
- h = self._input(start if self.parallel else x, self.mlp_norm)
+ h = self._input(x, self.mlp_norm)
@ branches without the norm behind them | nn/block.py | decoder | norms_stand
- y = y if after is None else after(y)
+ pass
@ the gradient of a cap is one | nn/bodies.py | decoder | cap_bends
- scores, slope = cap * bent, 1 - bent * bent
+ scores, slope = cap * bent, 1 + 0 * bent
@ a factor of queries on what is not turned | nn/rotary.py | decoder | part_of_a_head
- return jnp.where(freqs == 0, cos, size * cos), size * sin
+ return size * cos, size * sin
@ short frequencies whatever the length | nn/rotary.py | decoder | long_sequences
- freqs = jnp.where(is_long, jax.lax.stop_gradient(self.far), freqs)
+ pass
@ an encoder's second norm is not read off it | hf/bert.py | hf | norms_is_read
- embedding_norm=not block.post_norm and model.embedding_norm is not None,
+ embedding_norm=False,
@ padding tokens of RoBERTa take a position of their own | models/bert.py | models | padding_tokens
- places = jnp.cumsum(real) * real + self.padding
+ places = jnp.cumsum(real) + self.padding
@ real tokens of RoBERTa begin at the position of padding | models/bert.py | models | padding_tokens
- places = jnp.cumsum(real) * real + self.padding
+ places = (jnp.cumsum(real) - 1) * real + self.padding
@ ignored heads are built all the same | hf/convert.py | hf | may_be_ignored
- file = ConfigFile(folder.config, shown)
+ file = ConfigFile(folder.config, names)
@ a classifier with other heads is written without them | hf/bert.py | hf_grown | cannot_be_said
- if config.labels and (config.mlm_head or config.nsp_head):
+ if False:
@ RoBERTa is written as BERT | hf/bert.py | hf | read_back_to_the_bit
- if (config.padding is None) == (heads.stem != "Bert"):
+ if False:
@ a T5 that lost its decoder is read as an encoder | hf/t5.py | hf_companions | says_so
- return alone and not any(
+ return not any(
@ the head of mT5 is scaled | hf/t5.py | hf_config | head_of_mt5
- scaled = file.flag("tie_word_embeddings", default=True) and flavour.scales
+ scaled = file.flag("tie_word_embeddings", default=True)
@ an activation is renamed in a file | hf/convert.py | hf_config | keeps_the_name
- with_spellings(family.write(config), source_keys)
+ family.write(config)
@ a key that other readers take may differ | hf/decoder.py | hf_hub | say_as_well
- if self.other_activation is None:
+ if self.other_activation != "":
@ rotary positions of images are read as those of words | hf/families.py | hf_hub | say_as_well
- fixed=_FIXED | {"use_mrope": False},
+ fixed=_FIXED | {"use_mrope": True},
@ gates are certified before they are refused | train/pretrained.py | hf_grown | stock_model_cannot_hold
- if is_gated(shapes(op, shapes_in(model))):
+ if not model:
@ a card forgets the licence | hf/companions.py | export | keeps_its_files
- {"base_model": base or f" {base_model(source)}"} | card_metadata(folder)
+ {"base_model": base or f" {base_model(source)}"}
@ the width of a module keeps its new name | hf/companions.py | hf_companions | modules_of_sentence
- widths = {"word_embedding_dimension", "embedding_dimension"} & config.keys()
+ widths = {"word_embedding_dimension"} & config.keys()
@ outputs that grow tell nothing of what is dead | certificate/measured.py | certify | words_and_outputs
- shown == every else (shown, every)
+ shown == every else (shown,)
@ a bias that never moves counts as dead | certificate/measured.py | certify | words_and_outputs
- if g is None or slot.path in still:
+ if g is None:
@ an exact GELU is written as Gemma's | hf/decoder.py | hf_config | gelu_of_gemma
- if self.tanh_gelu and c.activation == "gelu":
+ if False:
@ layers behind the first are counted from 0 in a file | hf/table.py | hf | read_back_to_the_bit
- numbers = (place[0] + self.start, *place[1:]) if place else ()
+ numbers = place
@ the first layer of ModernBERT has a norm | models/modernbert.py | modernbert | first_layer
- of_first: dict[tuple, Any] = {("attention_norm",): None}
+ of_first: dict[tuple, Any] = {}
@ a classifier takes the mean of padding too | models/modernbert.py | modernbert | first_layer
- pooled = jnp.mean(hidden, 0, where=real[:, None], keepdims=True)
+ pooled = jnp.mean(hidden, 0, keepdims=True)
@ windows of ModernBERT are one wider in a file | hf/modernbert.py | hf | read_back_to_the_bit
- keys["local_attention"] = 2 * (keys.pop("sliding_window") - 1)
+ keys["local_attention"] = 2 * keys.pop("sliding_window")
@ all experts of a layer are its last one | hf/convert.py | hf | read_back_to_the_bit
- array[(place[0] - start, *place[1:])] = row
+ array[place[0] - start] = row
@ a mixture takes keys of the dense model over | hf/convert.py | hf_grown | became_a_mixture
- k == _POSITIONS or is_tolerated(k)
+ k not in family.aliases
@ shared experts are left out of a file | hf/mixtures.py | hf_grown | cannot_be_said
- if self.shared is None:
+ if self.shared is None and not shared:
@ a shared expert's gate is left out | nn/experts.py | decoder | behind_a_gate
- if self.shared_gate is not None:
+ if False:
@ the first padding token is the last token of a sequence | models/causal.py | decoder | last_token
- real = real if self.padding is None else tokens != self.padding
+ real = real if self.padding is None else jnp.ones_like(real)
@ a decoder without a head is read as a tied one | hf/heads.py | hf_companions | tied_decoder
- if headless and file.architecture in named:
+ if False:
@ answers to questions are read as labels | hf/heads.py | hf_companions | scores_of_labels
- if file.architecture.endswith(("ForQuestionAnswering", "ForMultipleChoice")):
+ if False:
@ every label is that of a sequence | hf/heads.py | hf_companions | scores_of_labels
- of = labelled(file, "token" if biased else "sequence")
+ of = "sequence"
@ a key that says two fields says the last | hf/decoder.py | hf_published | needs_them_alike
- if len({*told.values()}) > 1:
+ if False:
@ keys of a file are written unread | hf/convert.py | hf_published | not_written or do_not_contradict
- check_keys(family, told, names, config, dtype)
+ pass
@ a default scale is no number | hf/stock.py | hf_published | is_the_default
- config, again = _with_scale(config), _with_scale(again)
+ pass
@ a scale is another one in float64 | hf/stock.py | hf_published | in_any_dtype
- rel_tol=max(float(jnp.finfo(dtype).eps), 1e-9)
+ rel_tol=float(jnp.finfo(dtype).eps)
@ labels have the names of another head's | hf/convert.py | hf_published | do_not_contradict
- told = {k: value for k, value in told.items() if k not in ("id2label", "label2id")}
+ pass
@ the default of padding is forgotten | hf/heads.py | hf_published | padding_of_a_classifier
- value = file.get("pad_token_id", default=default)
+ value = file.get("pad_token_id")
@ a padding that is null is the default | hf/heads.py | hf_published | padding_of_a_classifier
- default = None if "pad_token_id" in file.values else self.padding
+ default = self.padding
@ a second window is not compared | hf/sights.py | hf_published | published_checkpoints
- if file.get("sliding_window_size", default=given) != given:
+ if file.get("sliding_window_size") == "":
@ a card names the commit of a cached repository | hf/companions.py | hf_companions | no_commit
- name = repository if folder.parent.name == "snapshots" and repository else folder.name
+ name = folder.name
@ a card's odd name is no YAML | hf/companions.py | hf_companions | no_commit
- return name if re.fullmatch(r"[A-Za-z_][\\w./-]*", name) else json.dumps(name)
+ return name
@ a process that was killed stops another of its number | hf/files.py | hf | nothing_half_written
- f".{path.absolute().name}.{secrets.token_hex(4)}"
+ f".{path.absolute().name}.{os.getpid()}"
@ an adapter beside its base is left out | hf/files.py | hf_companions | another_kind
- if os.path.lexists(path / ADAPTER):
+ if False:
@ numbers beyond the range of their dtype are written | hf/files.py | hf_grown | dtype_that_files
- if not np.isfinite(array).all():
+ if False:
@ a head without words is trained | models/causal.py | decoder | last_token
- if not self.lm:
+ if False:
@ a subclass is read by its parent's head | models/protocol.py | head | subclass
- if "predict" in vars(each) or "__call__" in vars(each):
-             return False
+ if "predict" in vars(each) or "__call__" in vars(each):
+             continue
@ layers that grow from none see everything | models/decoder.py | decoder | window_of_the_pattern
- own[("block", "attention", "born_window")] = reach[0]
+ own[("block", "attention", "born_window")] = NO_WINDOW
"""
