"""Bugs in attention by kernels, in the forecast of speed and in what is kept, for `tests.mutations`."""

# @ name | file of growjax | file of tests | pytest -k
# - what stands there, in one or more lines (indentation of the first one left out)
# + what the bug makes of it
TABLE = """
@ padded keys are seen by the kernel | nn/splash.py | kernels | another_sequence
- return jnp.pad(numbers.astype(jnp.int32), (0, extra), constant_values=_NOWHERE)
+ return jnp.pad(numbers.astype(jnp.int32), (0, extra))
@ padding is dropped for the kernel | nn/splash.py | kernels | all_scores_give and padding
- of_keys = hidden(of_keys, mask.keys)
+ of_keys = hidden(of_keys, None)
@ the kernel forgets documents | nn/splash.py | kernels | all_scores_give and documents
- of_keys = jnp.zeros(keys, jnp.int32) if mask.documents is None else mask.documents
+ of_keys = jnp.zeros(keys, jnp.int32)
@ a kernel's window is one too wide | nn/splash.py | kernels | all_scores_give and documents
- pattern = masks.LocalMask(shape, (window - 1, 0 if mask.causal else window - 1), 0)
+ pattern = masks.LocalMask(shape, (window, 0 if mask.causal else window - 1), 0)
@ keys of the prefix count twice | nn/splash.py | kernels | all_scores_give and prefix
- seen = np.where(columns[None, :] < keys, key <= query, key > query)
+ seen = np.where(columns[None, :] < keys, key <= query, key >= query)
@ everything behind a query is its prefix | nn/splash.py | kernels | all_scores_give and prefix
- of_keys = jnp.concatenate([of_keys, jnp.where(prefix, of_keys, _NOWHERE)])
+ of_keys = jnp.concatenate([of_keys, of_keys])
@ every device computes all heads | nn/split.py | kernels | split_over_devices
- return ("tensor", None) if i == 0 else (None, "tensor")
+ return None, None
@ queries of another device count from 0 | nn/split.py | context | attention_of
- body(part, k, v, dataclasses.replace(mask, first=first), bias)
+ body(part, k, v, dataclasses.replace(mask, first=firsts[0]), bias)
@ biases of the first heads on every device | nn/split.py | context | attention_of
- first = jax.lax.axis_index(axis) * count
+ first = 0 * jax.lax.axis_index(axis)
@ outputs stay where halves were dealt | nn/split.py | context | attention_of
- return _returned(kernel(_dealt(q, ways), k, v, rest), ways)
+ return kernel(_dealt(q, ways), k, v, rest)
@ the kernel counts dealt queries in order | nn/splash.py | context | attention_of
- pattern.q_sequence = places
+ pattern.q_sequence = np.sort(places)
@ halves are dealt in order | nn/split.py | context | equally_many
- homes = [min(half, last - half) for half in range(2 * devices)]
+ homes = [half // 2 for half in range(2 * devices)]
@ every device reads the losses of all | nn/head.py | context | whole_sequence
- return jax.lax.with_sharding_constraint(parts, own)
+ return jax.lax.with_sharding_constraint(parts, NamedSharding(own.mesh, PartitionSpec()))
@ drawn tokens that devices cannot share | plan/worked.py | context | before_the_first_step
- if uneven := sorted(n for n in counts if n < longest and n % ways):
+ if uneven := sorted(n for n in counts if n < 0):
@ lengths that devices cannot share | plan/worked.py | context | before_the_first_step
- if any(length % ways for length in lengths.values()):
+ if any(length % ways for length in ()):
@ the machine decides and not the target | nn/place.py | kernels | platform_that_is_compiled_for
- if _PLACE.value is not None:
+ if _PLACE.value is None:
@ the kernel drops the bias | nn/kernels.py | kernels | cannot_do
- if bias is not None:
+ if bias is None and queries is None:
@ float64 in the kernel | nn/kernels.py | kernels | cannot_do
- if queries.dtype not in types:
+ if queries.dtype == "float16":
@ a loop counts once | forecast/cycles.py | speed | each_of_its_iterations
- own, kernels = own + times * inner[0], kernels + times * inner[1]
+ own, kernels = own + inner[0], kernels + inner[1]
@ tiles above the diagonal count | forecast/cycles.py | speed | tiles_that_it_computes
- return sum(1 for _ in _below(rows, columns))
+ return rows * columns
@ the share of the peak of one device | forecast/speed.py | speed | pace_of_a_stage
- mfu=sum(span.flops) / (total * devices * device.peak),
+ mfu=sum(span.flops) / (total * device.peak),
@ the strongest change is advised | forecast/memory.py | speed | cheapest_change
- low, high = (low, middle) if fits(middle) else (middle + 1, high)
+ low = high
@ what shares a replica goes over slices first | parallel.py | dryrun | over_slices_first
- across = math.gcd(data, slices), slices // math.gcd(data, slices)
+ across = slices // math.gcd(fsdp, slices), math.gcd(fsdp, slices)
@ freed memory goes back to the system | programs/cache.py | programs_kept | used_again
- threshold and mallopt(-8, 1) and mallopt(-1, -1)
+ mallopt(-3, 1 << 20) and mallopt(-8, 1) and mallopt(-1, 0)
@ half of the allocator's settings are made | programs/cache.py | programs_kept | half_of_the_settings
- threshold and mallopt(-8, 1) and mallopt(-1, -1)
+ mallopt(-8, 1) and mallopt(-1, -1) and threshold
@ the user's allocator is set up again | programs/cache.py | programs_kept | set_up_stays
- if any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
+ if "GLIBC_TUNABLES" in os.environ:
@ an estimate denies what was compiled | forecast/pod.py | dryrun | denied_by_an_estimate
- if proven and not estimated.startswith("any of these"):
+ if proven and not estimated:
@ every length has the tiles of a batch | nn/bodies.py | attend | grow_with_the_length
- side = TILE // 2 if length <= 4 * TILE else TILE if length <= 8 * TILE else 2 * TILE
+ side = TILE // 2
@ commands that train give memory back | cli/allowed.py | programs_kept | trains_keeps_memory
- keep_memory()
+ pass
@ several slices are one | forecast/pod.py | dryrun | slices_have_names
- return shape.slices * shape.chips
+ return shape.chips
@ the layout's choice of what is kept is dropped | parallel.py | speed | layout_says
- return stacked.remembering(model, remat, layout.unroll, layout.offload)
+ return stacked.remembering(model, None, layout.unroll, layout.offload)
@ a field without a value left ends the search | forecast/memory.py | host_memory | advice
- if not allowed:
+ if False:
@ tensors for the host stay on the device | parallel.py | host_memory | sends_its_tensors
- return stacked.remembering(model, remat, layout.unroll, layout.offload)
+ return stacked.remembering(model, remat, layout.unroll, ())
@ hours of some stages stand for all | forecast/speed.py | speed | hours_of_some
- if unknown:
+ if False:
@ the roofline forgets that experts share rows | forecast/speed.py | speed | of_its_own_rows
- ways = row_parts(mesh)
+ ways = mesh.shape["data"] * mesh.shape["fsdp"]
@ each sequence keeps a dimension of its own | nn/linear.py | products | rows_of_one_matrix
- y = _bind(*_matrices(x, weight, count), 1, dtype)
+ y = _plain(x, weight, dimension_numbers=(((x.ndim - count,), (0,)), ((), ())), dtype=dtype)
@ the gradient of a wide weight is turned | nn/linear.py | products | gradients_are_those
- total = apart(apart(gradient.T) @ rows).T
+ total = apart(apart(gradient.T) @ rows)
@ every platform has the products of CPUs | nn/linear.py | products | for_a_tpu
- if place is None or place.platform != "cpu" or place.mesh is not None or not on_one:
+ if place is None or place.mesh is not None or not on_one:
@ the host's part is counted on the device | forecast/residuals.py | host_memory | host_keeps
- device = nbytes(stored) - host - nbytes(
+ device = nbytes(stored) - nbytes(
@ the host keeps what one sequence needs | forecast/residuals.py | host_memory | host_keeps
- Residuals(*(rows * n // plan.layout.context for n in one))
+ Residuals(rows * one.device // plan.layout.context, one.host)
"""
