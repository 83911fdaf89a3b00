"""The programs of a run: birth, training step, growth and evaluation, as pure functions under jit.

Each is written for one global batch and one whole model. Under `Layout(step="auto")` the shardings of
its inputs and outputs say where everything lives and the compiler places the collectives; parameters are
gathered layer by layer, and gradients pinned to the parameters' shardings (`parallel.gathered`), or it
would rather send activations around. Under "shard_map" the gradient is computed replica by replica, each
on its own rows (and, if asked, its own path through the layers), and the one collective is written out.
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
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from growjax.axes import partition
from growjax.gates import opened, ungated
from growjax.growth import Chain, Operator
from growjax.maps import fold_in_name
from growjax.optim import carry, freeze
from growjax.parallel import (
    BATCH,
    Layout,
    gathered,
    model_shardings,
    replicated,
    split_rows,
    state_shardings,
)
from growjax.plan.losses import Loss, drawn_loss
from growjax.plan.optimizer import Rule
from growjax.plan.plan import purpose_key
from growjax.plan.stages import Carry, Work
from growjax.select import Selector
from growjax.subnet import step_key


SEED = jax.ShapeDtypeStruct((), jnp.int32)


class State(NamedTuple):
    """What a run carries from step to step: both halves of the model, and the optimizer's state."""

    trained: Any
    rest: Any
    optimizer: Any

    @property
    def model(self) -> Any:
        """The whole model, its gates closed."""
        return eqx.combine(self.trained, self.rest)


class Controls(NamedTuple):
    """The numbers of one step: how far gates are open, the learning rate, the step and the run's seed.

    Scalars of NumPy or of a trace, or their shapes. No program holds a seed, so that runs which differ
    by it alone share what they compiled.
    """

    level: Any
    rate: Any
    step: Any
    seed: Any


class Report(NamedTuple):
    """What one step reports: its loss, the norm of its gradient and of the parameters before it."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    parameter_norm: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Makes the jitted programs of a run; nothing is compiled before it is lowered or called.

    **Fields**

    - `optimizer`: the rule of one update, such as `Optimizer().build()`.
    - `loss`: one example to its losses and weights, such as `growjax.train.cross_entropy`.
    - `accumulate`: how many parts a batch is computed in, one after the other.
    """

    optimizer: Rule
    loss: Loss
    mesh: Mesh
    layout: Layout
    accumulate: int = 1

    def state_of(self, model: Any) -> State:
        """The state that starts from a model: its two halves and a fresh optimizer."""
        trained, rest = partition(model)
        return State(trained, rest, self.optimizer.init(trained))

    def judged(self, state: State) -> Any:
        """The model to evaluate, which is not the one that trains if the optimizer averages."""
        trained = self.optimizer.evaluated(state.trained, state.optimizer)
        return eqx.combine(trained, state.rest)

    def shardings(self, state: State) -> State:
        """Where each array of a state (or of its shapes) lives."""
        everywhere = replicated(self.mesh)
        return State(
            model_shardings(state.trained, self.mesh),
            jax.tree.map(lambda _: everywhere, state.rest),
            state_shardings(state.optimizer, state.trained, self.mesh),
        )

    def placed(self, state: State) -> State:
        """The shapes of a state, each with its sharding: what a program is lowered for."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.shardings(state),
        )

    def shapes(self, model: Any) -> State:
        """The placed shapes of the state of a model, of which only shapes need be given."""
        return self.placed(jax.eval_shape(self.state_of, model))

    def birth(self, make: Callable[[Any], Any]) -> Any:
        """seed -> State: every array is born on the device that keeps it."""
        create = functools.partial(_birth, self, make)
        return jax.jit(
            create,
            in_shardings=replicated(self.mesh),
            out_shardings=self.shardings(jax.eval_shape(create, SEED)),
        )

    def start(self, model: Any) -> State:
        """The state of a model that is there, each array where it belongs: a fresh optimizer."""
        shapes = jax.eval_shape(self.state_of, model)
        where = self.shardings(shapes)
        trained, rest = jax.device_put(partition(model), (where.trained, where.rest))
        fresh = jax.jit(self.optimizer.init, out_shardings=where.optimizer)
        return State(trained, rest, fresh(trained))

    def step(self, shapes: State, work: Work, select: Selector | None = None) -> Any:
        """(State, batch, Controls, reference) -> (State, Report); the old state's memory is reused.

        With a selector the batch is what is offered, and `reference` the second model that it compares
        with, if it does; None otherwise.
        """
        where, everywhere = self.shardings(shapes), replicated(self.mesh)
        return jax.jit(
            functools.partial(_step, self, work, select),
            donate_argnums=0,
            in_shardings=(where, split_rows(self.mesh), everywhere, everywhere),
            out_shardings=(where, everywhere),
        )

    def growth(self, shapes: State, op: Operator | Chain, carried: Carry = "dual") -> Any:
        """(State, seed) -> the grown State, born in its own shardings.

        Gates that are still there are dropped first: they must be at 1, where dropping them changes
        nothing. The old state stays alive until its owner lets it go.
        """
        grow = functools.partial(_grow, self, op, carried)
        return jax.jit(
            grow,
            in_shardings=(self.shardings(shapes), replicated(self.mesh)),
            out_shardings=self.shardings(jax.eval_shape(grow, shapes, SEED)),
        )

    def seal(self, shapes: State) -> Any:
        """State -> the checksum of every leaf."""
        where = (self.shardings(shapes),)
        return jax.jit(checksums, in_shardings=where, out_shardings=replicated(self.mesh))

    def evaluate(self, shapes: State) -> Any:
        """(State, batch, level) -> the losses [B, T] of the whole model, and their weights."""
        where = self.shardings(shapes)
        everywhere = replicated(self.mesh)
        return jax.jit(
            functools.partial(_evaluate, self),
            in_shardings=(where, split_rows(self.mesh), everywhere),
            out_shardings=everywhere,
        )


# The programs ------------------------------------------------------------------------------------


def checksums(tree: Any) -> list[Array]:
    """A number for every leaf that changes with any bit of it, and with nothing else.

    Sums of whole numbers are the same in any order, so neither the mesh nor the host matters.
    """

    def of(x):
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        # An eight-byte number becomes two of four, in a dimension of its own
        size = min(x.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for d, n in enumerate(bits.shape):
            place = place * np.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d)
        # Odd factors: no bit of any entry is multiplied away
        factor = place * np.uint32(0x9E3779B2) + np.uint32(1)
        return jnp.sum(bits * factor, dtype=jnp.uint32)

    return [of(x) for x in jax.tree.leaves(tree)]


def _birth(programs: Programs, make: Callable[[Any], Any], seed: Any) -> State:
    return programs.state_of(make(seed))


def _step(
    programs: Programs,
    work: Work,
    select: Selector | None,
    state: State,
    batch: Any,
    controls: Controls,
    reference: Any,
) -> tuple[State, Report]:
    """One update: the state after it, and the loss before it."""
    if select is not None:
        batch = _chosen(programs, select, state, batch, controls, reference)
    where = model_shardings(state.trained, programs.mesh)
    loss, gradient = _loss_and_gradient(programs, programs.loss, work.part, state, batch, controls)
    gradient = jax.lax.with_sharding_constraint(gradient, where)
    curvature = None
    if work.curvature:
        # A key for each row of the whole batch, so that no layout changes what is drawn
        key = fold_in_name(step_key(controls.seed, controls.step), "labels")
        keys = jax.random.split(key, batch["weights"].shape[0])
        rows = {**batch, "key": jax.random.key_data(keys)}
        _, curvature = _loss_and_gradient(programs, drawn_loss, work.part, state, rows, controls)
        curvature = jax.lax.with_sharding_constraint(curvature, where)
    # Labels were drawn at the places that count
    labels = jnp.sum(batch["weights"])
    updates, optimizer = programs.optimizer.update(
        gradient,
        state.optimizer,
        state.trained,
        rate=controls.rate,
        curvature=curvature,
        labels=labels,
    )
    if work.freeze and work.part is not None:
        key = step_key(controls.seed, controls.step)
        running = work.part.running(state.model, key=key, step=controls.step)
        updates, optimizer = freeze(running, updates, optimizer, state.optimizer)
    report = Report(loss, optax.tree.norm(gradient), optax.tree.norm(state.trained))
    return State(optax.apply_updates(state.trained, updates), state.rest, optimizer), report


def _chosen(
    programs: Programs,
    select: Selector,
    state: State,
    batch: Any,
    controls: Controls,
    reference: Any,
) -> Any:
    """The rows of a batch that a step trains on: looked at by the whole model, without a gradient."""

    def mean_losses(model):
        model = gathered(model, programs.mesh)
        losses, weights = jax.vmap(lambda row: programs.loss(model, row))(batch)
        return jnp.sum(losses * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1e-9)

    losses = mean_losses(opened(state.model, controls.level))
    others = mean_losses(reference) if select.compares else None
    keep = losses.shape[0] // select.offers
    key = step_key(controls.seed, controls.step)
    index = select.choose(losses, others, keep, key=key)
    chosen = jax.tree.map(lambda x: x[index], batch)
    return jax.lax.with_sharding_constraint(chosen, split_rows(programs.mesh))


def _loss_and_gradient(
    programs: Programs, loss: Loss, part, state: State, batch: Any, controls: Controls
):
    """The mean loss over the global batch and its gradient, by replica or all at once."""
    # The mean is over all weights of all parts, so that neither parts nor replicas change it.
    weights = jnp.sum(batch["weights"])

    def parts(trained, rest, rows, controls, weights, replica=None):
        key = step_key(controls.seed, controls.step)
        key = key if replica is None else jax.random.fold_in(key, replica)

        def loss_of(trained, rows):
            model = opened(eqx.combine(trained, rest), controls.level)
            model = model if part is None else part(model, key=key, step=controls.step)
            model = gathered(model, programs.mesh)
            losses, counts = jax.vmap(lambda row: loss(model, row))(rows)
            return jnp.sum(losses * counts) / weights

        return _accumulated(jax.value_and_grad(loss_of), programs.accumulate, trained, rows)

    if programs.layout.step == "auto":
        return parts(state.trained, state.rest, batch, controls, weights)

    def replica(trained, rest, rows, controls, weights):
        # Varying from here on: gradients stay local until the one sum at the end.
        trained, rest, controls, weights = jax.lax.pcast(
            (trained, rest, controls, weights), BATCH[0], to="varying"
        )
        rank = jax.lax.axis_index("data") if programs.layout.own_paths else None
        return jax.lax.psum(parts(trained, rest, rows, controls, weights, rank), BATCH[0])

    everywhere = PartitionSpec()
    return jax.shard_map(
        replica,
        mesh=programs.mesh,
        in_specs=(everywhere, everywhere, BATCH, everywhere, everywhere),
        out_specs=everywhere,
    )(state.trained, state.rest, batch, controls, weights)


def _accumulated(loss_and_gradient: Callable, parts: int, trained: Any, rows: Any):
    """Sums of a loss and its gradient over the parts of a batch, computed one after the other."""
    if parts == 1:
        return loss_and_gradient(trained, rows)

    def split(x):
        # Every part takes every so-many-th row: each device then splits the rows that it has.
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, loss_and_gradient(trained, rows)), None

    # Zeros made from the parameters vary over the mesh, and are split over it, as gradients do.
    zeros = jax.tree.map(lambda x: 0 * x, trained)
    start = 0 * jnp.sum(jax.tree.leaves(zeros)[0].astype(jnp.float32)), zeros
    return jax.lax.scan(add, start, jax.tree.map(split, rows))[0]


def _grow(
    programs: Programs, op: Operator | Chain, carried: Carry, state: State, seed: Any
) -> State:
    key = purpose_key(seed, "grow")
    model = ungated(state.model)
    grown = op(model, key=key)
    if carried == "reset":
        return programs.state_of(grown)
    optimizer = carry(
        op, state.optimizer, model, optimizer=programs.optimizer, key=key, copies=carried
    )
    trained, rest = partition(grown)
    return State(trained, rest, optimizer)


def _evaluate(programs: Programs, state: State, batch: Mapping[str, Array], level: Array):
    model = gathered(opened(programs.judged(state), level), programs.mesh)
    return jax.vmap(lambda row: programs.loss(model, row))(batch)
