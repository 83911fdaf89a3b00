"""The model of a checkpoint, its operators and its optimizer, rebuilt from the lineage alone."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh

from growjax.axes import partition, sizes
from growjax.errors import CheckpointError
from growjax.gates import opened, ungated
from growjax.growth import Births, Operator
from growjax.growth.births import grown_shapes
from growjax.parallel import model_shardings, replicated, state_shardings
from growjax.plan.optimizer import Optimizer
from growjax.programs.step import checksums
from growjax.runs.checkpoint import load, numbered, read_lineage
from growjax.runs.run import checkpoint_in
from growjax.values import from_dict, short


def digest_of(tree: Any) -> str:
    """A digest of the arrays in a tree, the same on every mesh: 16 hexadecimal digits."""
    sums = json.dumps(numbered(tree, jax.jit(checksums)), sort_keys=True)
    return hashlib.sha256(sums.encode()).hexdigest()[:16]


def operators_of(lineage: Mapping[str, Any]) -> list[Operator]:
    """The operators that a model grew by, in order; raises `CheckpointError` for one that is invalid."""
    operators = []
    for n, saved in enumerate(lineage["operators"]):
        op = _decoded(f"operators[{n}]", saved)
        if not isinstance(op, Operator):
            raise CheckpointError(f"lineage: operators[{n}]: expected an operator, got {op!r}")
        operators.append(op)
    return operators


def optimizer_of(lineage: Mapping[str, Any]) -> Optimizer:
    """The optimizer that a model was trained by; raises `CheckpointError` if it is invalid."""
    optimizer = _decoded("optimizer", lineage["optimizer"])
    if not isinstance(optimizer, Optimizer):
        raise CheckpointError(f"lineage: optimizer: expected an optimizer, got {optimizer!r}")
    return optimizer


def model_of(lineage: Mapping[str, Any]) -> Any:
    """The shapes of a checkpoint's model: that of the configuration, grown by the operators.

    Raises `CheckpointError` if no model can be built from them, or not one of the sizes and births in
    the lineage.
    """
    return _rebuilt(lineage)[0]


def births_of(lineage: Mapping[str, Any]) -> Births:
    """The growth that each coordinate of the model in a checkpoint was born in.

    Growth n is the n-th of the lineage's operators. Raises `CheckpointError` as `model_of`.
    """
    return _rebuilt(lineage)[1]


def pretrained_folder(lineage: Mapping[str, Any]) -> str | None:
    """The Hugging Face folder that a model was trained on from, itself or by a run before; or None.

    Lineages hold it. Those of earlier versions hold the run before alone, which is then read; warns if it
    is not where it was.
    """
    start = lineage["start"]
    while start is not None:
        if "pretrained" in start:
            return start["pretrained"]
        if start["is"] == "Hugging Face":
            return start["folder"]
        try:
            start = read_lineage(checkpoint_in(start["folder"]))["start"]
        except CheckpointError as error:
            warnings.warn(
                f"the run that this model started from cannot be read ({error}), so it is taken for one "
                "from scratch; if it began with a Hugging Face folder, put that run back, or work in the "
                "folder that its path counts from",
                stacklevel=3,
            )
            return None
    return None


def _rebuilt(lineage: Mapping[str, Any]) -> tuple[Any, Births]:
    """The shapes of the model, and the births of its coordinates, compared with those in the lineage."""
    config, operators = _decoded("model", lineage["model"]), operators_of(lineage)
    key = jax.random.key(0)
    try:
        model = eqx.filter_eval_shape(lambda: config.build(key))
        births = Births.original(model)
        for op in operators:
            births, model = births.grown(op, ungated(model)), grown_shapes(op, ungated(model))
    except Exception as error:
        # Building a model of strange sizes may raise anything
        raise CheckpointError(f"lineage: it describes no model: {error}") from error
    # The stage after the last growth has dropped its gates
    model = model if lineage["gated"] else ungated(model)
    if sizes(model) != lineage["sizes"]:
        raise CheckpointError(
            f"lineage: it describes a model of sizes {sizes(model)} and says {lineage['sizes']}"
        )
    if births.runs() != lineage["births"]:
        raise CheckpointError(
            f"lineage: its operators add {births.ranges()} to the model, and its births are others: "
            f"{short(lineage['births'])}"
        )
    return model, births


def _decoded(field: str, saved: Any) -> Any:
    """A value in the lineage; raises `CheckpointError` that names its field."""
    try:
        return from_dict(saved)
    except Exception as error:
        raise CheckpointError(f"lineage: {field}: {error}") from error


def load_model(
    path: str | os.PathLike[str], mesh: Mesh | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load the model of a checkpoint (of a run, its last one), and its lineage.

    The model is the one to evaluate: the average, if the optimizer averages. Its gates are at the level
    of the checkpoint. On a `mesh` it is split as for training; without one it is put on the first
    device. Raises `CheckpointError` if the checkpoint is not whole.

    **Example**

        model, lineage = load_model("runs/first")
        model, lineage = load_model("runs/first/checkpoints/00000400-01")
    """
    path = checkpoint_in(path)
    lineage = read_lineage(path)
    trained, rest = partition(model_of(lineage))
    optimizer = optimizer_of(lineage).build()
    parts = {"trained": trained, "rest": rest}
    if optimizer.judged is not None:
        # The average is part of the optimizer state
        parts["optimizer"] = jax.eval_shape(optimizer.init, trained)
    if mesh is None:
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first_device, parts)
    else:
        shardings = {
            "trained": model_shardings(trained, mesh),
            "rest": jax.tree.map(lambda _: replicated(mesh), rest),
        }
        if "optimizer" in parts:
            shardings["optimizer"] = state_shardings(parts["optimizer"], trained, mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), parts, shardings
    )
    loaded = load(path, shapes, only=tuple(parts))
    trained = optimizer.evaluated(loaded["trained"], loaded.get("optimizer"))
    return opened(eqx.combine(trained, loaded["rest"]), lineage["level"]), lineage
