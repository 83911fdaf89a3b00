"""The bugs that `python -m tests.mutations` plants in costs, comparisons, forecasts and reports."""

# As in tests/planted.py
TABLE = """
@ Holm forgets the ranks before | budget/statistics.py | comparison | holm or more_arms
- highest = max(highest, min((len(p) - rank) * p[i], 1.0))
+ highest = min((len(p) - rank) * p[i], 1.0)
@ no adjustment for many arms | budget/comparison.py | comparison | more_arms
- verdict, reason = _verdict(pair, (flips, p[1], p[2]), margin, alpha, len(family))
+ verdict, reason = _verdict(pair, (flips, p[0], p[2]), margin, alpha, len(family))
@ five seeds decide | budget/envelope.py | comparison | verdicts
- SEEDS = 6
+ SEEDS = 5
@ signs are not looked at | budget/comparison.py | comparison | agree or verdict or flip
- if flips <= alpha and p_holm <= alpha and apart:
+ if p_holm <= alpha and apart:
@ an undecayed run is compared | budget/comparison.py | comparison | may_not
- if undecayed and not allow_undecayed:
+ if undecayed and allow_undecayed:
@ the first crossing counts | budget/comparison.py | comparison | last_crossing
- elif y1 > goal:
-             cost = None
+ elif y1 > goal:
+             pass
@ the frontier is read without the logarithm | budget/envelope.py | frontier | logarithm
- parts.append(_crossing(ends, losses, log=True))
+ parts.append(_crossing(ends, losses))
@ nobody waits for a block of steps | forecast/calibration.py | calibration | waited_for
- jax.block_until_ready(done)
-     return time.perf_counter_ns() - start
+ return time.perf_counter_ns() - start
@ a second gradient is charged with its step | forecast/calibration.py | calibration | second_gradient
- name: getattr(timing, name) - step.mean
+ name: getattr(timing, name)
@ uneven steps are not told | budget/clock.py | calibration | uneven
- uneven, at_most = timing.mean / timing.median,
+ uneven, at_most = timing.median / timing.mean,
@ the label of a figure is one line | report/figures.py | demo | width_of_a_phone
- axes.set_xlabel(textwrap.fill(label, 50, break_on_hyphens=False))
+ axes.set_xlabel(label)
@ figures are too wide for a phone | report/figures.py | demo | width_of_a_phone
- width = 8.0 if kwargs.get("ncols", 1) > 2 else 6.0
+ width = 8.0
@ figures scroll sideways on a phone | report/page.py | demo | width_of_a_phone
- "@media(max-width:50rem){"
+ "@media(max-width:50rem){svg{min-width:38rem}"
@ every unit but FLOPs is called seconds | report/figures.py | compared | own_unit
- return 1.0, "reference seconds" if unit == "seconds" else plain(unit)
+ return 1.0, "reference seconds"
@ a clock charges fractions | budget/clock.py | plan | cannot_charge
- if isinstance(cost, bool) or not isinstance(cost, int | np.integer) or cost < 0:
+ if cost < 0:
@ a proposed command forgets what was allowed | report/compared.py | compared | is_named
- f"{path}{allowed}` goes on with it"
+ f"{path}` goes on with it"
@ a clock is calibrated on one batch of the data | forecast/calibration.py | calibration | in_turns
- step.batch = from_host(rows, mesh)
+ from_host(rows, mesh)
@ stages that choose are timed on what they are offered | forecast/calibration.py | calibration | as_well
- if feed is not None and op.kind == "train" and span.stage.select is None:
+ if feed is not None and op.kind == "train":
@ nobody says that steps wait for data | budget/clock.py | calibration | uneven_steps
- if timing.fed is not None and timing.fed > _EVEN:
+ if timing.fed is not None and timing.fed > 2 * _EVEN:
@ windows are not in the error of a difference | budget/statistics.py | comparison | over_both
- variance = of_seeds + of_windows
+ variance = of_seeds
@ a bootstrap over seeds as narrow as it comes | budget/statistics.py | comparison | over_both
- return float((seeds / (seeds - 1)) ** 0.5 * t.ppf(tail, seeds - 1) / norm.ppf(tail))
+ return 1.0
@ windows are drawn for each seed anew | budget/statistics.py | comparison | over_both or windows
- by_seed = window_draws(sums, weights, rng, draws)
+ by_seed = np.hstack([window_draws(row[None], weights, rng, draws) for row in sums])
@ a difference within the margin is called equivalent | budget/comparison.py | comparison | equivalence
- if small and p_same <= alpha:
+ if small:
@ a run of a step more is dearer | budget/envelope.py | frontier | step_more
- if spent <= cost * (1 + slack) and
+ if spent <= cost and
@ the frontier forgets the ways of longer runs | budget/envelope.py | frontier | every_cost
- if use == "ends":
+ if use != "none":
@ what was never reached is taken to be reached at the last end | budget/pace.py | frontier | bound
- if never.any():
+ if never.all() and at_once.any():
@ a speed-up may be below 0 | budget/pace.py | frontier | decides_nothing
- return max(t_interval(values.tolist())[side], 0.0)
+ return t_interval(values.tolist())[side]
@ a bound that leaves 1 in is called no difference | budget/pace.py | frontier | bound
- return "no difference found" if bound == "=" else "open"
+ return "no difference found"
@ plans of other rates share their steps | plan/prefix.py | forks | warm_up_of_steps
- parted = next((n for n, old, new in rates if old != new), None)
+ parted = None if rates else None
@ a fork may have longer stages before it | plan/prefix.py | forks | other_things
- if a.index < stage and a.steps != b.steps:
+ if a.index < stage - 9 and a.steps != b.steps:
@ other rates before a fork are not on record | plan/prefix.py | forks | extended
- if old != new:
+ if old > 9 * new:
@ the name of a plan leads out of its tree | plan/prefix.py | forks | folder_of_a_plan
- if name in ("", ".", "..") or "/" in name or "\\\\" in name
+ if name in ("", ".")
@ an optimum at the edge of a sweep goes unsaid | report/sweep.py | sweep | where_the_best_is
- if name != "seed" and len(numbers) > 1 and value in (numbers[0], numbers[-1]):
+ if name != "seed" and len(numbers) > 1 and value == numbers[0]:
@ each seed of a sweep is an arm | report/sweep.py | sweep | where_the_best_is
- for name, x in values.items() if name != "seed"]
+ for name, x in values.items() if name]
@ runs of a tree are named by their plans | plan/prefix.py | sweep | where_the_best_is
- names = [plan.name for plan in plans] if names is None else names
+ names = [f"{n} {plan.name}" for n, plan in enumerate(plans)]
@ seeds are paired by the order of their lines | report/arms.py | experiments_summary | paired_by_seed
- order = sorted(range(len(self.outcomes)), key=lambda i: self.outcomes[i].seed)
+ order = range(len(self.outcomes))
@ sizes run for less count | report/comparisons.py | experiments_summary | best_fixed_size
- if (fixed.name, fixed.outcomes[0].budget) in used
+ if used is not None
@ free variants have rows | report/comparisons.py | experiments_summary | best_fixed_size
- grown = [arm for arm in arms if not (arm.fixed or arm.free)]
+ grown = [arm for arm in arms if not arm.fixed]
@ a bound reads as a number | report/words.py | experiments_page | tables_of_a_page
- return f"{bound} {value:.2f}"
+ return f"{value:.2f}"
@ an ignored sign turns a task around | report/comparisons.py | experiments_summary | every_measure
- "estimate": sign * c.mean,
+ "estimate": c.mean,
@ what a run costs in FLOPs is charged by its clock | report/runs.py | demo | end_to_end
- spent=float(curve[-1][0]),
+ spent=float(plan.flops + 1),
@ advice grows where it is not sure | advise.py | advise | kept_tokens_alone
- return len(self.legs) > 1 and self.sure >= _SURE
+ return len(self.legs) > 1
@ advice grows at any time | advise.py | advise | no_later
- some = np.arange(_SHORTEST, int(latest * _PARTS) + 1, _SHORTEST)
+ some = np.arange(_SHORTEST, _PARTS + 1, _SHORTEST)
@ retention is not counted from what a fresh model needs | advise.py | advise | retention_says
- fresh + retention * (tokens - fresh)
+ fresh + retention * tokens
@ sizes that do not grow into each other are stages | advise.py | advise | no_stages
- if growable is not None and not growable(order[i], size):
+ if growable is None and not growable(order[i], size):
@ the retention of a pilot counts its own tokens | advise.py | advise | predicts_its_end
- return (end - large.tokens - fresh) / (small.tokens - fresh)
+ return (end - fresh) / (small.tokens - fresh)
@ a plan that grows is that of its first size | advise.py | advise | as_two_plans
- last = fixed[legs[-1].size.name]
+ last = fixed[legs[0].size.name]
@ steps that pilots share are charged twice | report/pilots.py | pilots | trained_and_answer
- return run.last["spent"] - (shared[-1] if shared else 0.0)
+ return run.last["spent"]
@ retention beyond all tokens is believed | report/pilots.py | pilots | ends_do
- return tuple(min(max(rho, 0.0), 1.0) for rho in known)
+ return tuple(min(max(rho, 0.0), 9.0) for rho in known)
@ pilots grow into any larger size | report/pilots.py | pilots | into_what
- nearest.setdefault(small, (small, large))
+ nearest[small] = (small, large)
@ trials of other candidates are free | plan/probe.py | probe | every_outcome or a_charge
- charge=stage.charge + (total - cost) / unit
+ charge=stage.charge
@ a decision is for the worst | plan/probe.py | probe | keeps_the_best
- losses.index(min(finite))
+ losses.index(max(finite))
@ the loss before the end of a trial decides | train/choosing.py | probe | keeps_the_best
- evaluate_at=(*options.evaluate_at, end),
+ evaluate_at=(*options.evaluate_at, end - 1),
@ plans of other windows share their steps | plan/prefix.py | forks | read_other_text
- or first.block != second.block
+ or first.block > second.block
@ plans of other held-out texts share their steps | plan/prefix.py | forks | read_other_text
- "accumulate", "data", "validation")
+ "accumulate", "data")
@ a fork may read other windows | plan/prefix.py | forks | other_things
- if trunk.block != plan.block:
+ if trunk.block > plan.block:
@ a trigger may end the stage of a trial | plan/probe.py | triggers | is_refused
- if any(stage.until is not None and stage.ended is None for stage in stages):
+ if not stages:
@ fits of candidates are free | plan/probe.py | fits | candidate_is_part
- span.fit_cost + sum(span.costs[: self.steps])
+ sum(span.costs[: self.steps])
@ a growth that lost everything is advised | report/pilots.py | pilots | more_than_all
- growths.keys() - left_out
+ growths.keys()
@ its pilots count for other growths | report/pilots.py | pilots | more_than_all
- if mean < LOST}
+ if mean < 100 * LOST}
"""
