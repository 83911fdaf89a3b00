"""The bugs that `python -m tests.mutations` plants in plans, programs and runs."""

# As in tests/planted.py
TABLE = """
@ tiles are charged half | cost.py | attend | charged_the_same
- return 4 * math.prod(queries) * keys[-2]
+ return 2 * math.prod(queries) * keys[-2]
@ a scanned layer is counted once | cost.py | subnet | costs_k_of_l
- return params["length"] * sum(costs)
+ return sum(costs)
@ each part of a batch has a mean of its own | programs/step.py | train | add_up
- return objective(losses, total_weight)
+ return objective(losses, jnp.sum(losses[1]))
@ the optimizer starts again at a growth | programs/step.py | train | carried_through
- trained, rest = partition(grown)
+ optimizer = jax.tree.map(jnp.zeros_like, optimizer)
+     trained, rest = partition(grown)
@ a checksum does not see places | programs/step.py | train | every_place
- factor = place * np.uint32(0x9E3779B2) + np.uint32(1)
+ factor = place * np.uint32(0) + np.uint32(1)
@ checksums are not compared | runs/checkpoint.py | faults | damaged_checkpoint
- changed = [name for name in expected if read_sums[name] != written_sums[name]]
+ changed = []
@ a certificate is not looked at | train/transition.py | faults | breaks_its_promise
- if limit is not None and not change <= limit:
+ if limit is not None and not change <= limit + 1e9:
@ a run begins though its state cannot follow | train/session.py | dryrun | cannot_follow
- headline, list(carry_faults(self.plan))
+ headline, []
@ checking the optimizer is training | train/session.py | hooks | before_the_first_step
- with self.doing("checking the optimizer"), self.stopwatch.apart("birth"):
+ with self.doing("checking the optimizer"):
@ a tracker that starts is training | train/loop.py | hooks | before_the_first_step
- with session.stopwatch.apart("birth"):
+ with contextlib.nullcontext():
@ a run trains among the checkpoints of another | runs/run.py | damage | inside_a_checkpoint
- if place == run.checkpoints_folder and run.plan_file.exists():
+ if place == run.checkpoints_folder and not run.plan_file.exists():
@ the next command cannot read the plan | values/names.py | progress | packages_of_the_plan
- packages = sorted({*_allowed, *_packages(data)})
+ packages = sorted(_allowed)
@ warnings are printed with lines of code | cli/__init__.py | commands | warning_is_a_message
- warnings.showwarning = _warn
+ pass
@ a plan is written without its changes | cli/training.py | commands | shown_before_it_runs
- save_plan(read, out)
+ save_plan(read_plan(plan, ()), out)
@ a resumed run forgets what was spent | train/session.py | train | bitwise_the_same
- self.spent = self.span.spent + sum(self.span.costs[:done])
+ self.spent = self.span.spent
@ every stage reads from the beginning | runs/feed.py | train | left_off
- start = latest.used(s.steps)
+ start = 0
@ a stage's own objective judges | train/judge.py | train | neither_batch_nor_stage
- self._windows[windows] = self.feed.held_out(self.plan.objective, windows)
+ self._windows[windows] = self.feed.held_out(self.plan.spans[0].objective, windows)
@ the last batch of windows is left out | train/judge.py | train | neither_batch_nor_stage
- for start in range(0, count, batch):
+ for start in range(0, count - count % batch, batch):
@ a growth leaves the old certificate out | train/session.py | train | lineage_says
- saved = list(self.save(crossing))
+ saved = list(self.save())
@ the lineage is not sealed | runs/checkpoint.py | faults | damaged_checkpoint
- if sealed(lineage)["seal"] != sealed_lineage["seal"]:
+ if not sealed(lineage)["seal"]:
@ checkpoints of another run are taken | runs/saves.py | faults | another_plan
- if lineage["data"] != data:
+ if not lineage["data"]:
@ gates stand one step too far open | plan/stages.py | train | ramps_open
- return min((i + 1) / self.ramp, 1.0) if self.ramp else 1.0
+ return min((i + 2) / self.ramp, 1.0) if self.ramp else 1.0
@ a schedule of the steps, not of the cost | plan/plan.py | plan | follows_cost
- return climb * (rate.rising(spent / warm) if spent < warm else rate.at(done))
+ return climb * rate.at(min(done, 1.0) ** 0.5)
@ plans start from the middle of a ramp | runs/start.py | start | is_refused
- if is_gated(source.shapes) and lineage["level"] != 1:
+ if is_gated(source.shapes) and lineage["level"] > 1:
@ a start of other settings is taken | runs/start.py | start | is_refused
- if _text(ours) != _text(planned):
+ if hasattr(ours, "shape") and _text(ours) != _text(planned):
@ a resumed run forgets what it started from | runs/saves.py | start | bitwise
- self.parent, self.start, self.fork = path.name, lineage["start"], lineage.get("fork")
+ self.parent, self.fork = path.name, lineage.get("fork")
@ seconds go back with the counter | train/stopwatch.py | faults | less_than_no_time
- self.latest = max(self.latest, time.perf_counter())
+ self.latest = time.perf_counter()
@ checkpoints without their plan are anybody's | runs/saves.py | faults | plan_was_lost
- raise_all(CheckpointError, f"{path} is of the run of another plan:", faults)
+ raise_all(CheckpointError, f"{path} is of the run of another plan:", faults[:0])
@ hooks see gates that are open | train/session.py | hooks | judged
- scores = self.judge.scores(self._judged(level), step)
+ scores = self.judge.scores(self._judged(1.0), step)
@ hooks see what trains, not what is judged | train/session.py | hooks | average_is_judged
- return opened(self.programs.judged(self.state), level)
+ return opened(self.state.model, level)
@ hooks are charged in seconds | train/session.py | hooks | time_of_hooks
- with self.stopwatch.apart("hooks", self.state), self.doing("running the hooks"):
+ with self.doing("running the hooks"):
@ a checkpoint that is being written is written twice | runs/saves.py | killed | killed_everywhere
- self.checkpoints.wait()
-         if self.checkpoints.path(step, span.index).exists():
+ if self.checkpoints.path(step, span.index).exists():
@ a dead process lives | runs/lock.py | lock | dead
- return state not in ("Z", "X") and started in (self.started, UNKNOWN)
+ return started in (self.started, UNKNOWN)
@ a process that is hidden is dead | runs/lock.py | lock | cannot_be_seen
- return state not in ("Z", "X") and started in (self.started, UNKNOWN)
+ return state not in ("Z", "X") and started == self.started
@ two processes take over one lock | runs/lock.py | lock | of_two_processes
- elif (owner := _read(self.file)) != before:
-                 raise CheckpointError(self._held_by(owner))
-             else:
+ else:
@ a lock that was released is replaced | runs/lock.py | lock | released_meanwhile
- # Its owner has released it meanwhile, and another process may take it now
-                 _create(mine, self.file)
+ os.replace(mine, self.file)
@ a fork does not say that its loss is another | runs/fork.py | faults | loss_that_it_began
- if lineage.get("loss") != loss:
+ if False:
@ a fork follows its trunk | runs/fork.py | forks | trunk_trains_on
- return None if saved is None else saved.step
+ return find_trunk(plan).lineage["step"]
@ any loss goes on with a run | runs/saves.py | faults | loss_that_it_began
- if "loss" in lineage and lineage["loss"] != self.loss:
+ if "loss" in lineage and False:
@ a stop loses an evaluation | train/session.py | stop | asked_to_stop
- program = self._compiled(need, "the evaluation", stops=False)
+ program = self._compiled(need, "the evaluation")
@ programs of another device are taken | programs/ahead.py | hosts | same_devices
- text = f"{devices} {lowered.in_tree}
+ text = f"{lowered.in_tree}
@ a lock is nobody's | runs/lock.py | lock | two_runs
- raise CheckpointError(self._held_by(owner))
-             return
+ return
@ process numbers are never used again | runs/lock.py | lock | another_process_has
- return state not in ("Z", "X") and started in (self.started, UNKNOWN)
+ return state not in ("Z", "X")
@ a torn journal is written on | runs/journal.py | damage | cut_anywhere
- if end < size:
+ if end > size:
@ damage is passed over without being asked | runs/saves.py | damage | says_what_to_remove
- if not self.fall_back:
+ if self.fall_back is None:
@ what was set aside is found again | runs/run.py | damage | falls_back
- if _NAME.fullmatch(p.name))
+ if _NAME.match(p.name))
@ hosts go on from what each sees | runs/saves.py | damage | other_lineage
- hosts.together(compare)
+ hosts.together(lambda: None)
@ a lap is the speed | runs/journal.py | progress | some_seconds
- while len(self._laps) > 1 and self._seconds - self._laps[0][0] >= self.window:
+ while len(self._laps) > 1:
@ a run by time saves nothing | train/session.py | train | by_time
- return self.timer.due(self.step) or due
+ return due
@ runs begin in checkpoints | runs/run.py | damage | inside_a_checkpoint
- if (place / METADATA).exists():
+ if (place / METADATA).is_symlink():
@ names of stages are markup | runs/progress.py | progress | as_they_are
- Text(name[:14]),
+ name[:14],
@ a table is short by one word | runs/feed.py | own_models | fewer_rows
- return reads_beyond(plan.loss, span.model, example(vocabulary.size - 1), example(0))
+ return reads_beyond(plan.loss, span.model, example(vocabulary.size - 2), example(0))
@ a loop reads its smallest row | trace/indices.py | reads | largest_index
- return rows[np.argmax(rows.reshape(len(rows), -1).max(1))] if rows.size else None
+ return rows[np.argmin(rows.reshape(len(rows), -1).max(1))] if rows.size else None
@ an evaluation reads words that the model lacks | evals/language.py | own_models | fewer_rows
- for read in reads_beyond(predictions, self.model, last, first):
+ for read in reads_beyond(predictions, self.model, first, first):
@ a clock is free | plan/plan.py | plan | cannot_charge
- if not faults and plan.cost == 0:
+ if not faults and plan.cost < 0:
@ curvature of the first step for all | plan/steps.py | plan | do_alone
- changes = self.curvature_every is not None or self._drawn(work.part, i) is not None
+ changes = self._drawn(work.part, i) is not None
@ coins of the first step for all | plan/steps.py | plan | do_alone
- changes = self.curvature_every is not None or self._drawn(work.part, i) is not None
+ changes = self.curvature_every is not None
@ layers that are left out move on | programs/step.py | freeze | trainer
- updates, optimizer = freeze(running, updates, optimizer, state.optimizer)
+ freeze(running, updates, optimizer, state.optimizer)
@ the paths of another step stay | programs/step.py | freeze | trainer
- running = work.part.running(state.model, key=key, step=controls.step)
+ running = work.part.running(state.model, key=key)
@ second models of other words are taken | plan/plan.py | methods | cannot_read
- if mine != theirs:
+ if mine < theirs:
@ what growth draws depends on the mesh | programs/step.py | hosts | grown_alike
- key = purpose_key(seed, "grow")
+ key = jax.random.fold_in(purpose_key(seed, "grow"), programs.mesh.size)
@ a warm-up of steps moves with the budget | plan/plan.py | forks | warm_up_of_steps
- return climb * (rate.rising(spent / warm) if spent < warm else rate.at(done))
+ return climb * rate.at(done)
@ a fork takes the oldest checkpoint | runs/fork.py | forks | growth_may_grow
- for path in reversed(paths):
+ for path in paths:
@ a fork's journal begins at the fork | runs/journal.py | forks | extended
- if self.begin is not None and self.begin.forked and not self.path.exists():
+ if self.begin is None and not self.path.exists():
@ a fork still needs its trunk | train/loop.py | forks | needs_no_trunk
- if session.forked:
+ if session.forked and session.step < 0:
@ what others fork from is dropped | runs/checkpoint.py | forks | of_nothing
- requested = step in self.keep or (self.keep_every and step % self.keep_every == 0)
+ requested = self.keep_every and step % self.keep_every == 0
@ an import path evades a format number | values/names.py | wrong_files | model.is-growjax.models
- if own is not None:
+ if own is not None and tag == own:
@ integers of a float's field stay beyond 32 bits | values/checks.py | values | in_range
- return float(value) if float in choices
+ return value if float in choices
@ integers of an operator's float stay beyond 32 bits | values/checks.py | values | in_range
- if not module or isinstance(stated, numbers.Integral):
+ if not module:
@ a carry takes any key | optim/carrying.py | births | no_key
- check_key(key, StateError)
+ check_key(None, StateError)
@ an unknown kind is refused after the table | train/commands.py | speed | roofline
- if kind is not None:
-         device_of(kind)
+ if kind in ():
+         device_of(kind)
@ a file holds any number of values | values/codec.py | wrong_files | too_many_values
- if self.values > _VALUES:
+ if self.values > 100 * _VALUES:
@ gates of shapes are folded as arrays | annotation/annotated.py | annotation | shapes_is_read
- if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self)):
+ if not jax.tree.leaves(self):
@ a fork that fails leaves its plan | runs/saves.py | forks | fails_leaves
- find_trunk(self.plan)
+ print(find_trunk)
@ a checkpoint that was removed is called damaged | runs/fork.py | forks | run_removes
- if trunk.path.exists():
+ if trunk.path.name:
@ logits of few words are trained | runs/feed.py | own_models | fewer_words
- if outputs is not None and words > outputs:
+ if outputs is None:
@ all logits are read at once | nn/head.py | head | never_there_at_once
- if chunk >= tokens:
+ if chunk:
@ logits are kept for the gradient | nn/head.py | head | never_there_at_once
- in_loop = jax.checkpoint(of, prevent_cse=False, policy=policy)
+ in_loop = of
@ what is left over is read from the front | nn/head.py | head | chunks_give
- jax.tree.map(lambda x: x[whole:], arrays)
+ jax.tree.map(lambda x: x[: tokens - whole], arrays)
@ a padded chunk is charged | nn/head.py | head | charged_the_same
- rest = jax.checkpoint(of, policy=policy)(*jax.tree.map(lambda x: x[whole:], arrays))
+ rest = jax.checkpoint(of, policy=policy)(*jax.tree.map(lambda x: x[-chunk:], arrays))
+     rest = jax.tree.map(lambda x: x[whole - tokens :], rest)
@ the gradient of a loss forgets the target | nn/head.py | head | chunks_give
- slope = jnp.exp(logits - total[:, None]) - hit
+ slope = jnp.exp(logits - total[:, None]) - 0 * hit
@ a target counted from the end has no gradient | nn/head.py | head | chunks_give
- jnp.where(targets < 0, targets + vocab, targets)
+ targets
@ the labels of a chunk are drawn by one key | plan/losses.py | head | labels
- jax.vmap(jax.random.categorical)(keys, jax.lax.stop_gradient(logits))
+ jax.random.categorical(keys[0], jax.lax.stop_gradient(logits))
@ a stage trains all, whatever it says | programs/step.py | train_parts | stays_bitwise
- if work.parts is not None:
+ if work.parts is not None and growths is None:
@ curves of a run count from its birth | programs/step.py | train_parts | count_from
- return controls.step - grown_at[-1 if growth is None else growth]
+ return controls.step - grown_at[0]
@ growths before a start are forgotten | plan/worked.py | train_parts | before_a_start
- if plan.start is None or not plan.start.operators:
+ if plan.start is None or plan.start.operators:
@ births in a lineage are not compared | runs/lineage.py | wrong_files | births
- if births.runs() != lineage["births"]:
+ if not lineage["births"]:
@ a grown checkpoint has the births of the old one | train/commands.py | commands | computes_the_same
- "births": births_of(lineage).grown(op, ungated(model)).runs(),
+ "births": lineage["births"],
@ a checkpoint has the births of the first stage | runs/saves.py | train | lineage_says
- "births": span.births.runs(),
+ "births": self.plan.spans[0].births.runs(),
@ seconds of training go back | train/stopwatch.py | faults | never_go_back
- self.most = max(self.most, seconds)
+ self.most = seconds
@ a transfer's rate does not follow the depth | optim/transfer.py | transfer | multiples_of_a_decoder
- return Multiples(init / depth, 1 / (width * depth))
+ return Multiples(init / depth, 1 / width)
@ a transfer takes heads with a bias for the stream | optim/transfer.py | transfer | own_depth
- return table.is_stream(axis) and bool(table.normalised(axis))
+ return table.is_stream(axis)
@ a transfer leaves the decay at the rate of the base | optim/transfer.py | transfer | with_multipliers
- merged[steps] = merged.get(steps, 1.0) / rate
+ merged[steps] = merged.get(steps, 1.0)
@ a plan's transfer is not used by its steps | programs/step.py | transfer | changes_no_bit
- else programs.transfer.rule(programs.optimizer)
+ else programs.optimizer
@ a model is born without the multiples of its transfer | plan/worked.py | transfer | born_and_trained
- model = plan.transfer.born(model)
+ model = plan.transfer.born(model) if seed is None else model
@ charges are not spent | plan/worked.py | probe | a_charge
- spent += charged
+ spent += 0
@ a run forgets what it was charged for | train/session.py | probe | goes_on_exactly
- self.span, self.spent, self.moved = span, span.spent, True
+ self.span, self.moved = span, True
@ warm-ups are not charged | plan/plan.py | probe | a_charge
- cost, tokens = cost + span.charged, tokens + span.fit_tokens
+ tokens = tokens + span.fit_tokens
@ the law of another exponent | plan/timing.py | probe | papers_number
- 0.88 * math.log10(parameters)
+ 0.78 * math.log10(parameters)
@ a plateau is any rise | plan/timing.py | probe | a_plateau
- if after > before * (1 - self.least) else None
+ if after > before else None
@ a grown model is compared with the first losses of the other | plan/timing.py | triggers | same_steps
- self.whole[done - self.window : done]
+ self.whole[: self.window]
@ a trigger reads every loss that is known | train/session.py | triggers | one_step_after
- known = self.losses if self.late is not None else self.losses[:-1]
+ known = self.losses
@ a trigger does not wait for the ramp | train/session.py | triggers | waits_for
- max(stage.ramp, fitted_to, 2)
+ max(fitted_to, 2)
@ a trigger does not wait for a warm-up that is a share | plan/plan.py | triggers | warmup_of_the_plan
- spent < warm if warm else self._position(spent) < rate.warmup
+ spent < warm
@ checkpoints stand in the order of their names | runs/run.py | train | order_of_their_numbers
- key=step_of)
+ key=str)
@ stages of three digits have no checkpoints | runs/run.py | train | order_of_their_numbers
- r"\\d{8,}-\\d{2,}"
+ r"\\d{8}-\\d{2}"
@ a lineage forgets the folder that all began with | runs/start.py | start | hugging_face
- pretrained = str(source.path.absolute())
+ pretrained = None
@ a layout may change what is drawn | runs/saves.py | forks | draws_of_its_layout
- fields["layout"] = {"own_paths": plan.layout.own_paths}
+ del fields["layout"]
@ runs of one name are one run of a tracker | runs/watch.py | hooks | runs_of_one_name
- options["id"] = f"{_NOT_IN_IDS.sub('-', run.name)}-{place}"
+ options["id"] = f"{_NOT_IN_IDS.sub('-', run.name)}-{len(place)}"
@ a fork takes the end of a name for a step | train/commands.py | forks | may_end_as_a_step
- if not at or not step.isdigit() or Run(text).plan_file.exists():
+ if not at or not step.isdigit():
@ a trigger does not wait for the fit | train/session.py | triggers | waits_for
- max(stage.ramp, fitted_to, 2)
+ max(stage.ramp, 2)
@ a trigger does not wait for the rate | train/session.py | triggers | waits_for
- i < max(stage.ramp, fitted_to, 2) or self.plan.rises(self.spent, self.span.index)
+ i < max(stage.ramp, fitted_to, 2)
@ a stage that ends is saved before it is evaluated | train/session.py | triggers | however_often
- i + 1 < span.steps and not self.over(i + 1) and
+ i + 1 < span.steps and
@ losses of a trigger are not saved | train/session.py | triggers | within_a_stage
- losses=self.losses,
+ losses=(),
@ a run keeps the plan that its trigger changed | runs/saves.py | triggers | ordinary_plan
- hosts.from_first(self._write_plan)
+ return
@ a lost plan hides what a trigger ended | runs/saves.py | triggers | without_its_plan
- if lineage.get("ended", []) not in (before, [pair for pair in ended if pair[0] <= stage]):
+ if not isinstance(stage, int):
@ a later end hides that of the checkpoint's stage | runs/saves.py | triggers | second_trigger
- [pair for pair in ended if pair[0] <= stage]
+ ended
@ a schedule jumps where a trigger fires | plan/plan.py | triggers | goes_on_from
- return done + (1 - done) * (spent - self._fired) / (self.cost - self._fired)
+ return spent / self.cost
@ rates before a trigger are those after it | plan/plan.py | triggers | goes_on_from
- return self._before.learning_rate(spent)
+ return self.rate.peak * spent / self.cost
@ a fork takes ends that came later | plan/plan.py | triggers | that_came_before
- if step is None or other.spans[n].start + steps <= step:
+ if step is None or other.spans[n].start + steps > step:
@ fits are free | plan/worked.py | fits | charged_in
- charged = round(stage.charge * plan.clock.per_unit) + fit_cost
+ charged = round(stage.charge * plan.clock.per_unit)
@ tokens of a fit are not counted | plan/worked.py | fits | charged_in
- tokens += fit_tokens
+ tokens += 0
@ a run forgets the FLOPs of its fit | train/session.py | fits | charged_in
- self.flops, self.losses = self.flops + span.fit_flops, []
+ self.losses = []
@ a fit reads other batches than its stage | train/session.py | fits | by_hand
- self.feed.stream(span, 0) as stream:
+ self.feed.stream(span, 1) as stream:
@ a FLOP of a fit costs one everywhere | plan/steps.py | fits | clocks_of_seconds
- round(Fraction(flops * cost, per))
+ flops
@ the network of LESA is free | growth/neighbours.py | fits | lesa
- return self.fill == "lesa"
+ return False
@ what a fit refuses grows | train/transition.py | fits | went_wrong
- raise_all(TrainingError, f"{where} must not grow this model:", list(faults))
+ del faults
@ a stage is too short for its fit | plan/worked.py | fits | refused_before
- if isinstance(op, Fit) and op.batches > steps:
+ if isinstance(op, Fit) and op.batches > 10 * steps:
@ a command's error waits for the other hosts | cli/__init__.py | evals_tasks | lists_tasks
- if not _has_other_hosts():
+ if True:
@ devices of a CPU share a thread a core | cli/__init__.py | commands | thread_each
- if asked.isdecimal() and int(asked) > 1:
+ if False:
@ a growth says three times that it is compiled | runs/progress.py | progress | several_pieces
- self.announced.add(activity)
+ pass
@ many short pieces of a long activity are silent | runs/progress.py | progress | several_pieces
- began = self.since.setdefault(activity, now)
+ began = now
@ a kill loses the end of a stage | train/session.py | triggers | session_after
- self.recorded = set(resumed.ended)
+ self.recorded = {stage for stage, _ in self.plan.ends}
@ the end of a stage is in the journal twice | runs/journal.py | triggers | session_after
- if row["kind"] in ("ended", "growth"):
+ if row["kind"] == "growth":
@ a run that stops at its end forgets the end | train/session.py | triggers | stops_at_the_end
- if self.step == self.span.start + self.span.steps:
+ if False:
@ forks forget the ends of their trunk | runs/journal.py | triggers | ends_it_as_its_trunk
- ("begin", "step", "growth", "ended")
+ ("begin", "step", "growth")
@ a row without a field is a KeyError | runs/journal.py | damage | without_a_field
- def __missing__(self, name: str) -> Any:
+ def _missing(self, name: str) -> Any:
@ a damaged file of losses is any error | runs/run.py | damage | any_file_of_a_run
- except Exception as error:
+ except (OSError, ValueError, KeyError, EOFError) as error:
@ the checksum of a journal's line is not compared | runs/journal.py | damage | digits_that_changed
- if zlib.crc32(line.encode()) != int(checked[2], 16):
+ if not int(checked[2], 16) >= 0:
@ a last line that is damaged is taken for cut off | runs/journal.py | damage | only_a_part
- if _CHECKED.match(tail) and not _CHECKED.fullmatch(tail):
+ if _CHECKED.match(tail) and not tail:
@ the plan of a run has no seal | runs/saves.py | damage | digits_that_changed
- save_plan(self.plan, self.run.plan_file, sealed=True)
+ save_plan(self.plan, self.run.plan_file)
@ the seal of a value is not compared | values/codec.py | damage | digits_that_changed
- if seal != seal_of(saved):
+ if not seal:
@ an axis of one value has no extent | report/figures.py | demo | evaluated_once
- margin = max(late) - min(late) or 1.0
+ margin = max(late) - min(late)
@ signals are caught after the first record | train/loop.py | stop | at_the_first_record
- stop.catch()
+ yield begin
+     stop.catch()
@ signals are given back before a run is closed | train/loop.py | stop | stays_over
- end = session.end(finished=True)
+ end = session.end(finished=True)
+         stop.__exit__()
@ hosts that were asked to stop leave one by one | cli/__init__.py | commands | leave_together
- sys.modules["jax"].distributed.shutdown()
+ pass
@ what Orbax logs of a damaged file is shown | runs/checkpoint.py | damage | no_page_of_logs
- logger.setLevel(logging.CRITICAL)
+ logger.setLevel(logging.ERROR)
@ lines of a log are wrapped | runs/progress.py | progress | not_wrapped
- soft_wrap=not self.console.is_terminal
+ soft_wrap=False
@ a run ends with its display | runs/progress.py | progress | with_its_display
- except (OSError, SystemExit):
+ except ZeroDivisionError:
@ a closed terminal kills the run | train/stop.py | stop | terminal_that_is_closed
- *([_HANGUP] if _HANGUP else [])
+ *[]
@ a terminal that hangs up twice kills the run | train/stop.py | stop | terminal_that_is_closed
- signal.SIG_IGN if other == _HANGUP else second
+ second
@ an exit status depends on who reads | cli/__init__.py | output | who_reads
- except OSError:
+ except ZeroDivisionError:
@ Ctrl-C is lost in Orbax | runs/checkpoint.py | stop | ctrl_c_while
- signal.signal(signal.SIGINT, press)
+ pass
@ Ctrl-C in Orbax is forgotten | runs/checkpoint.py | stop | ctrl_c_while
- if pressed:
+ if not pressed:
@ a renamed checkpoint is taken for another | runs/checkpoint.py | forks | was_renamed
- if step_of(path) != (step, stage):
+ if not step_of(path):
@ a copied line of a journal is two steps | runs/journal.py | commands | was_copied
- or latest[row["step"]] is row
+ or latest
@ a run whose plan was lost takes another rate | runs/saves.py | faults | plan_was_lost
- if lineage.get("fixed", _digest(self.plan)) != _digest(self.plan):
+ if not lineage.get("fixed", _digest(self.plan)):
@ an iterator that is left keeps its run | train/loop.py | stop | loop_that_is_left
- self._records: Any = records(self.doing, stop)
+ self._records: Any = (record for record in records(self.doing, stop) if self)
"""
