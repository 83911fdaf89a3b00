"""The programs of a fit: its first numbers, and those after one more batch, for the model of a state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from growjax.gates import ungated
from growjax.growth import Fit
from growjax.parallel import gathered, remembering, replicated, split_rows
from growjax.plan.losses import objective
from growjax.plan.worked import purpose_key
from growjax.programs.step import SEED, Programs, State, accumulated, each_row


def start(programs: Programs, op: Fit, shapes: State) -> Any:
    """The program (State, seed) -> the numbers of a fit before its first batch, on every device."""
    everywhere = replicated(programs.mesh)
    return jax.jit(
        functools.partial(_start, op),
        in_shardings=(programs.shardings(shapes), everywhere),
        out_shardings=everywhere,
    )


def numbers_of(programs: Programs, op: Fit, shapes: State) -> Any:
    """The shapes of a fit's numbers, on every device."""
    everywhere = replicated(programs.mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(functools.partial(_start, op), shapes, SEED),
    )


def improve(programs: Programs, op: Fit, shapes: State) -> Any:
    """The program (numbers, State, batch) -> the numbers after one more batch, and its loss."""
    everywhere = replicated(programs.mesh)
    return jax.jit(
        functools.partial(_improved, programs, op),
        donate_argnums=0,
        in_shardings=(everywhere, programs.shardings(shapes), split_rows(programs.mesh)),
        out_shardings=everywhere,
    )


def _start(op: Fit, state: State, seed: Any) -> Any:
    return op.start(ungated(state.model), key=purpose_key(seed, "grow"))


def _improved(programs: Programs, op: Fit, numbers: Any, state: State, batch: Any) -> Any:
    """One batch, in the parts and with the memory of a training step; the compiler splits it."""
    total_weight = jnp.sum(batch["weights"])

    def measure(make, x):
        def loss_of(x, rows):
            model = gathered(remembering(make(x), programs.layout), programs.mesh)
            losses = each_row(programs, lambda row: programs.loss(model, row), rows)
            return objective(losses, total_weight)

        return accumulated(jax.value_and_grad(loss_of), programs.accumulate, x, batch)

    return op.improved(numbers, ungated(state.model), measure)
