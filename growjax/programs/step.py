"""The programs of a run: birth, training step, growth and evaluation, as pure functions under jit.

Each is written for one global batch and one whole model.

- Under `Layout(step="auto")` the compiler places the collectives, from the shardings of inputs and
  outputs. Parameters are gathered layer by layer, and gradients constrained to the parameters' shardings
  (`parallel.gathered`); otherwise the compiler splits and sends activations.
- Under "shard_map" each replica computes the gradient of its own rows (with `own_paths`, through its own
  path of layers), and the only collective, a sum, is written out.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from growjax.axes import Slot, partition
from growjax.gates import opened, ungated
from growjax.growth import Births, Chain, Fit, Operator
from growjax.maps import fold_in_name
from growjax.nn.bodies import KERNELS
from growjax.nn.place import CONTEXT, Place, place_of, running_on
from growjax.optim import Parts, carry, freeze
from growjax.optim.divided import Division
from growjax.optim.partwise import divided
from growjax.optim.transfer import Transfer
from growjax.parallel import (
    BATCH,
    Layout,
    gathered,
    model_shardings,
    remembering,
    replicated,
    row_axes,
    split_rows,
    state_shardings,
)
from growjax.plan.losses import Loss, drawn_loss, objective
from growjax.plan.optimizer import Rule
from growjax.plan.plan import Plan
from growjax.plan.stages import Carry, Work
from growjax.plan.worked import purpose_key
from growjax.select import Selector
from growjax.subnet import step_key


SEED = jax.ShapeDtypeStruct((), jnp.int32)  # the shape of a seed, to trace a program with


class State(NamedTuple):
    """The state that a run carries from step to step.

    `trained` and `rest` are the two halves of the model by `growjax.axes.partition`: the trained
    parameters, and buffers, gates and static fields. `optimizer` is the optimizer's state.
    """

    trained: Any
    rest: Any
    optimizer: Any

    @property
    def model(self) -> Any:
        """The whole model, its gates closed."""
        return eqx.combine(self.trained, self.rest)


class Controls(NamedTuple):
    """The scalar arguments of one step: the level of the gates, the learning rate, the step and the seed.

    NumPy scalars, tracers, or their shapes. The seed is an argument and not a constant of the program,
    so that runs that differ in the seed alone share their compiled programs.
    """

    level: Any
    rate: Any
    step: Any
    seed: Any


class Report(NamedTuple):
    """The numbers of one step: its loss, the norm of its gradient and of the parameters before it."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    parameter_norm: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Makes the jitted programs of a run; nothing is compiled before it is lowered or called.

    **Fields**

    - `optimizer`: the rule of one update, such as `Optimizer().build()`.
    - `loss`: (model, example) to losses and weights, such as `growjax.train.cross_entropy`.
    - `accumulate`: the number of parts in which a batch is computed, one after the other.
    - `transfer`: the base of the learning rate, if it transfers over width and depth.
    """

    optimizer: Rule
    loss: Loss
    mesh: Mesh
    layout: Layout
    accumulate: int = 1
    transfer: Transfer | None = None

    @classmethod
    def of(cls, plan: Plan, mesh: Mesh, loss: Loss | None = None) -> "Programs":
        """The programs of a plan on a mesh of its layout; `loss` replaces the plan's."""
        rule, loss = plan.optimizer.build(), loss or plan.loss
        return cls(rule, loss, mesh, plan.layout, plan.accumulate, plan.transfer)

    def state_of(self, model: Any) -> State:
        """The state that starts from a model: its two halves and a fresh optimizer."""
        trained, rest = partition(model)
        return State(trained, rest, self.optimizer.init(trained))

    def judged(self, state: State) -> Any:
        """The model to evaluate: the average, if the optimizer averages, or else the trained one."""
        trained = self.optimizer.evaluated(state.trained, state.optimizer)
        return eqx.combine(trained, state.rest)

    def shardings(self, state: State) -> State:
        """The sharding of each array of a state, which may hold arrays or shapes."""
        everywhere = replicated(self.mesh)
        return State(
            model_shardings(state.trained, self.mesh),
            jax.tree.map(lambda _: everywhere, state.rest),
            state_shardings(state.optimizer, state.trained, self.mesh),
        )

    def placed(self, state: State) -> State:
        """The shapes of a state, each with its sharding, to lower a program for."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.shardings(state),
        )

    def shapes(self, model: Any) -> State:
        """The shapes and shardings of the state that starts from a model, which may hold shapes only."""
        return self.placed(jax.eval_shape(self.state_of, model))

    def birth(self, make: Callable[[Any], Any]) -> Any:
        """The program (seed) -> State: every array is made on the devices that hold it.

        `make` is (seed) -> model.
        """

        def create(seed: Any) -> State:
            return self.state_of(make(seed))

        return jax.jit(
            create,
            in_shardings=replicated(self.mesh),
            out_shardings=self.shardings(jax.eval_shape(create, SEED)),
        )

    def start(self, model: Any) -> State:
        """Put a model on the mesh, each array by its sharding, with a fresh optimizer state."""
        shapes = jax.eval_shape(self.state_of, model)
        where = self.shardings(shapes)
        trained, rest = jax.device_put(partition(model), (where.trained, where.rest))
        fresh = jax.jit(self.optimizer.init, out_shardings=where.optimizer)
        return State(trained, rest, fresh(trained))

    def step(
        self,
        shapes: State,
        work: Work,
        select: Selector | None = None,
        births: Births | None = None,
        grown_at: tuple[int, ...] = (),
    ) -> Any:
        """The program (State, batch, Controls, reference) -> (State, Report).

        The old state is donated: its memory is reused. With a selector the batch holds all rows on offer,
        and `reference` is the second model that it compares with, if it does; otherwise it is None.
        `births` and `grown_at` are those of the span, which work that trains parts needs.
        """
        where, everywhere = self.shardings(shapes), replicated(self.mesh)
        return jax.jit(
            functools.partial(_step, self, work, select, (births, grown_at)),
            donate_argnums=0,
            in_shardings=(where, split_rows(self.mesh), everywhere, everywhere),
            out_shardings=(where, everywhere),
        )

    def growth(
        self, shapes: State, op: Operator | Chain, carried: Carry = "dual", numbers: Any = None
    ) -> Any:
        """The program (State, seed) -> the grown State, in its own shardings.

        Of an operator that is fitted, it takes the numbers as well, whose shapes are `numbers`.

        Gates of an earlier growth are dropped first; they must be at 1, where that changes nothing. The
        old state is not donated: both states are in memory until the caller drops the old one.
        """
        grow = functools.partial(_grow, self, op, carried)
        more = () if numbers is None else (numbers,)
        return jax.jit(
            grow,
            in_shardings=(self.shardings(shapes), *[replicated(self.mesh)] * (1 + len(more))),
            out_shardings=self.shardings(jax.eval_shape(grow, shapes, SEED, *more)),
        )

    def seal(self, shapes: State) -> Any:
        """The program (State) -> the checksum of every leaf."""
        where = (self.shardings(shapes),)
        return jax.jit(checksums, in_shardings=where, out_shardings=replicated(self.mesh))

    def evaluate(self, shapes: State) -> Any:
        """The program (State, batch, level) -> losses and weights of the whole model, [B, T] both."""
        where = self.shardings(shapes)
        everywhere = replicated(self.mesh)
        return jax.jit(
            functools.partial(_evaluate, self),
            in_shardings=(where, split_rows(self.mesh), everywhere),
            out_shardings=everywhere,
        )


# The programs ------------------------------------------------------------------------------------


def _has_kernels(programs: Programs) -> bool:
    """Whether the platform of the programs computes attention by a kernel."""
    place = place_of(programs.mesh)
    return place is not None and place.platform in KERNELS


def each_row(
    programs: Programs, loss: Callable[[Any], Any], rows: Any, *, replica: bool = False
) -> Any:
    """The losses and weights of each row, [rows, T] each, traced for the platform that will run them.

    A kernel must know that rows are split over devices, since the compiler splits everything but kernels.
    Every body of attention must know it where sequences are split too. `replica` says that the rows are
    one replica's own, under `shard_map`.
    """
    place = place_of(programs.mesh)
    if replica and place is not None:
        place = Place(place.platform)
    split = None
    if place and place.mesh and (_has_kernels(programs) or place.context > 1):
        split, rows = row_axes(programs.mesh), _split_sequences(rows, programs.mesh)
    with running_on(place):
        return jax.vmap(loss, spmd_axis_name=split)(rows)


def _split_sequences(rows: Any, mesh: Mesh) -> Any:
    """The rows of a batch, each split over `context` along its first own axis where that divides it."""
    ways = mesh.shape.get(CONTEXT, 1)
    if ways == 1:
        return rows  # the mesh may lack the axis
    where = NamedSharding(mesh, PartitionSpec(row_axes(mesh), CONTEXT))

    def split(x: Any) -> Any:
        if x.ndim < 2 or x.shape[1] % ways:
            return x
        return jax.lax.with_sharding_constraint(x, where)

    return jax.tree.map(split, rows)


def checksums(tree: Any) -> list[Array]:
    """A 32-bit checksum of every leaf, which changes with any one bit of the leaf.

    It is a sum of integers modulo 2**32, the same in any order, so that it does not depend on the mesh
    or the number of hosts.
    """

    def of(x):
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        # An eight-byte number becomes two of four, in a dimension of its own
        size = min(x.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
        # The row-major index of each entry, so that swapped entries change the sum. It is made from
        # iotas of the array's shape, which each device computes for the entries that it holds.
        place = jnp.zeros(bits.shape, jnp.uint32)
        for d, n in enumerate(bits.shape):
            place = place * np.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d)
        # An even constant times the place, plus 1, is odd: multiplying by it loses no bit modulo 2**32
        factor = place * np.uint32(0x9E3779B2) + np.uint32(1)
        return jnp.sum(bits * factor, dtype=jnp.uint32)

    return [of(x) for x in jax.tree.leaves(tree)]


def _step(
    programs: Programs,
    work: Work,
    select: Selector | None,
    growths: tuple[Births | None, tuple[int, ...]],
    state: State,
    batch: Any,
    controls: Controls,
    reference: Any,
) -> tuple[State, Report]:
    """One update: the state after it, and the numbers of the step, such as the loss before the update."""
    if select is not None:
        batch = _chosen(programs, select, state, batch, controls, reference)
    where = model_shardings(state.trained, programs.mesh)
    loss, gradient = _loss_and_gradient(programs, programs.loss, work.part, state, batch, controls)
    gradient = jax.lax.with_sharding_constraint(gradient, where)
    curvature = None
    if work.curvature:
        # A key for each row of the global batch, so that the labels do not depend on the layout
        key = fold_in_name(step_key(controls.seed, controls.step), "labels")
        keys = jax.random.split(key, batch["weights"].shape[0])
        rows = {**batch, "key": jax.random.key_data(keys)}
        _, curvature = _loss_and_gradient(programs, drawn_loss, work.part, state, rows, controls)
        curvature = jax.lax.with_sharding_constraint(curvature, where)
    # The number of labels that `drawn_loss` draws: one at each position of weight 1
    labels = jnp.sum(batch["weights"])
    rule = (
        programs.optimizer
        if programs.transfer is None
        else programs.transfer.rule(programs.optimizer)
    )
    update = rule.update
    if work.parts is not None:
        update = _parts_update(programs, rule, work.parts, *growths, controls)
    updates, optimizer = update(
        gradient,
        state.optimizer,
        state.trained,
        rate=controls.rate,
        curvature=curvature,
        labels=labels,
    )
    if work.freeze and work.part is not None:
        # Undo the update of the layers that did not run: their parameters and their optimizer state
        key = step_key(controls.seed, controls.step)
        running = work.part.running(state.model, key=key, step=controls.step)
        updates, optimizer = freeze(running, updates, optimizer, state.optimizer)
    report = Report(loss, optax.tree.norm(gradient), optax.tree.norm(state.trained))
    return State(optax.apply_updates(state.trained, updates), state.rest, optimizer), report


def _parts_update(
    programs: Programs,
    rule: Rule,
    parts: Parts,
    births: Births | None,
    grown_at: tuple[int, ...],
    controls: Controls,
) -> Callable[..., tuple[Any, Any]]:
    """The optimizer's update, part by part; curves count the steps of the run since a growth."""
    assert births is not None

    def time(slot: Slot, growth: int | None) -> Array:
        return controls.step - grown_at[-1 if growth is None else growth]

    # The plan's optimizer beside the transferred rule: `growjax.optim.probe` caches its result by object
    return functools.partial(divided, programs.optimizer, rule, Division(parts, births, time))


def _chosen(
    programs: Programs,
    select: Selector,
    state: State,
    batch: Any,
    controls: Controls,
    reference: Any,
) -> Any:
    """The rows that a step trains on, chosen by their losses under the whole model (no gradient)."""

    def mean_losses(model):
        """The mean loss of each row of the batch, [rows]."""
        model = gathered(model, programs.mesh)
        losses, weights, *_ = each_row(programs, lambda row: programs.loss(model, row), batch)
        # A row without targets has no weight; its mean is 0 and not NaN
        return jnp.sum(losses * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1e-9)

    losses = mean_losses(opened(state.model, controls.level))
    reference_losses = mean_losses(reference) if select.compares else None
    count = losses.shape[0] // select.offers
    key = step_key(controls.seed, controls.step)
    index = select.choose(losses, reference_losses, count, key=key)
    chosen = jax.tree.map(lambda x: x[index], batch)
    return jax.lax.with_sharding_constraint(chosen, split_rows(programs.mesh))


def _loss_and_gradient(
    programs: Programs, loss: Loss, part, state: State, batch: Any, controls: Controls
):
    """The mean loss over the global batch, and its gradient: all at once, or replica by replica."""
    # Each part and each replica divides by the weight of the global batch, so that their losses and
    # gradients add up to those of the mean over all positions
    total_weight = jnp.sum(batch["weights"])

    def of_rows(trained, rest, rows, controls, total_weight, replica=None):
        """The contribution of some rows; with the number of a replica, through a path of its own."""
        key = step_key(controls.seed, controls.step)
        key = key if replica is None else jax.random.fold_in(key, replica)

        def loss_of(trained, rows):
            model = opened(eqx.combine(trained, rest), controls.level)
            model = model if part is None else part(model, key=key, step=controls.step)
            model = gathered(remembering(model, programs.layout), programs.mesh)
            alone = programs.layout.step == "shard_map"
            losses = each_row(programs, lambda row: loss(model, row), rows, replica=alone)
            return objective(losses, total_weight)

        return accumulated(jax.value_and_grad(loss_of), programs.accumulate, trained, rows)

    if programs.layout.step == "auto":
        return of_rows(state.trained, state.rest, batch, controls, total_weight)

    def of_replica(trained, rest, rows, controls, total_weight):
        # Marked as varying over replicas: otherwise JAX would sum the gradient of the replicated
        # parameters over devices in each part, and not once at the end
        trained, rest, controls, total_weight = jax.lax.pcast(
            (trained, rest, controls, total_weight), BATCH[0], to="varying"
        )
        rank = jax.lax.axis_index("data") if programs.layout.own_paths else None
        contribution = of_rows(trained, rest, rows, controls, total_weight, rank)
        return jax.lax.psum(contribution, BATCH[0])

    everywhere = PartitionSpec()
    return jax.shard_map(
        of_replica,
        mesh=programs.mesh,
        in_specs=(everywhere, everywhere, BATCH, everywhere, everywhere),
        out_specs=everywhere,
        # The outputs of kernels do not say over which axes they vary
        check_vma=not _has_kernels(programs),
    )(state.trained, state.rest, batch, controls, total_weight)


def accumulated(loss_and_gradient: Callable, parts: int, trained: Any, rows: Any):
    """The sums of a loss and its gradient over the parts of a batch, computed one after the other."""
    if parts == 1:
        return loss_and_gradient(trained, rows)

    def split(x):
        # [B, ...] to [parts, B / parts, ...]. Part p takes the rows p, p + parts, ...: every device
        # then splits the rows that it holds, and none are sent.
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, loss_and_gradient(trained, rows)), None

    # Made from the parameters, the zeros have the sharding (under shard_map, the type) of gradients
    zeros = jax.tree.map(lambda x: 0 * x, trained)
    start = 0 * jnp.sum(jax.tree.leaves(zeros)[0].astype(jnp.float32)), zeros
    return jax.lax.scan(add, start, jax.tree.map(split, rows))[0]


def _grow(
    programs: Programs,
    op: Operator | Chain,
    carried: Carry,
    state: State,
    seed: Any,
    numbers: Any = None,
) -> State:
    """The grown model, and the optimizer state carried through the same operator with the same key."""
    key = purpose_key(seed, "grow")
    model = ungated(state.model)
    if isinstance(op, Fit):
        op = op.filled(numbers)
    grown = op(model, key=key)
    if carried == "reset":
        return programs.state_of(grown)
    optimizer = carry(
        op, state.optimizer, model, optimizer=programs.optimizer, key=key, copies=carried
    )
    trained, rest = partition(grown)
    return State(trained, rest, optimizer)


def _evaluate(programs: Programs, state: State, batch: Mapping[str, Array], level: Array):
    """The losses and weights of each position, [B, T] both."""
    model = gathered(opened(programs.judged(state), level), programs.mesh)
    losses, weights, *_ = each_row(programs, lambda row: programs.loss(model, row), batch)
    return losses, weights
