"""A trained model as a program that no longer needs growjax: StableHLO, by `jax.export`."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
from jax.export import Exported
from jaxtyping import Array

from growjax.errors import GateError
from growjax.gates import is_gated
from growjax.models.protocol import predictions
from growjax.nn.place import Place, running_on


# Blocks lay out the residual stream of a TPU by this call, which is no kernel that could be missing
_LAYOUT = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
# Platforms of `jax.export` that have another name as the platform of a device
_DEVICES = {"cuda": "gpu", "rocm": "gpu"}


def exported(
    model: Any,
    example: Mapping[str, Any],
    *,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> tuple[Exported, list[Array]]:
    """The program `(weights, examples) -> logits [B, T, vocab]` of a settled model, and its weights.

    The weights are arguments of the program, as a list of arrays, so that it is small and needs no class
    of growjax. One platform gets attention's kernel where it has one, several the plain form.

    **Arguments**

    - `example`: the arrays of one example, or their shapes: `{"tokens": int32 [T]}` and whatever else the
      model reads.
    - `batch`: the number of examples; None leaves it open until the program is called.
    - `platforms`: "cpu", "cuda", "rocm" and "tpu".

    Raises `GateError` for a model behind gates (`gj.settle` drops them), and `PlanError` for an example
    that the model does not read. `Exported.serialize` needs the package `flatbuffers`.

    **Example**

        program, weights = exported(model, {"tokens": jax.ShapeDtypeStruct((128,), "int32")})
        jax.numpy.savez("weights.npz", *weights)
        open("model.bin", "wb").write(program.serialize())    # and jax.export.deserialize(...).call
    """
    if is_gated(model):
        raise GateError(
            "this model has gates, whose levels would be lost; open and settle it first"
        )
    arrays, static = eqx.partition(model, eqx.is_array)
    weights, tree = jax.tree.flatten(arrays)
    (size,) = (batch,) if batch is not None else jax.export.symbolic_shape("batch")
    examples = {
        name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for name, x in example.items()
    }

    def program(weights: list[Array], examples: Mapping[str, Array]) -> Array:
        whole = eqx.combine(jax.tree.unflatten(tree, weights), static)
        return jax.vmap(lambda row: predictions(whole, row))(examples)

    only = platforms[0] if len(platforms) == 1 else "cpu"
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in weights]
    export = jax.export.export(jax.jit(program), platforms=platforms, disabled_checks=[_LAYOUT])
    with running_on(Place(_DEVICES.get(only, only))):
        return export(shapes, examples), weights
