"""What a step stores for the gradient, from shapes: on the device, and in the host's memory."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax

from growjax.axes import partition
from growjax.data.objectives import batch_shapes
from growjax.nn.place import SHAPES, running_on
from growjax.parallel import Layout, remembering, row_parts
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.subnet import Subnet


_PLAIN = Layout()


class Residuals(NamedTuple):
    """Bytes that the forward pass stores for the backward pass, by where they are."""

    device: int
    host: int

    @property
    def total(self) -> int:
        return self.device + self.host


def residuals(
    span: Span, part: Subnet | None, loss: Loss = cross_entropy, layout: Layout = _PLAIN
) -> Residuals:
    """Bytes that the forward pass of one sequence stores for the backward pass, without parameters.

    `part` is the sub-network that is trained.
    """
    trained, rest = partition(span.model)
    rows = batch_shapes(span.objective, 1)

    def pullback(trained, rest, rows):
        def loss_of(trained, rows):
            model = eqx.combine(trained, rest)
            model = model if part is None else part(model, key=jax.random.key(0), step=0)
            model = remembering(model, layout)
            losses, *_ = jax.vmap(lambda row: loss(model, row))(rows)
            return losses.sum()

        # The leaves of the pullback function are the residuals
        return jax.vjp(loss_of, trained, rows)[1]

    def nbytes(shapes):
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)

    with running_on(SHAPES):
        # The program and not its shapes alone, which do not say where an array is
        stored = jax.make_jaxpr(pullback)(trained, rest, rows).out_avals
    host = nbytes(x for x in stored if x.memory_space == jax.memory.Space.Host)
    # The parameters are among them, and part of the state
    device = nbytes(stored) - host - nbytes(jax.tree.leaves(trained))
    return Residuals(max(device, 0), host)


def residual_bytes(
    span: Span, part: Subnet | None, loss: Loss = cross_entropy, layout: Layout = _PLAIN
) -> int:
    """Those on the device and those in the host's memory together, of one sequence."""
    return residuals(span, part, loss, layout).total


def stored(plan: Plan, span: Span, part: Subnet | None, mesh: Any) -> Residuals:
    """Bytes that a step of a stage stores for one device of a mesh, there and in the host's memory."""
    rows = math.ceil(span.batch / plan.accumulate / row_parts(mesh))  # on one device, at a time
    one = residuals(span, part, plan.loss, plan.layout)
    return Residuals(*(rows * n // plan.layout.context for n in one))
