"""The trained model that a plan starts from: compared with the plan's own shapes, and read.

Loading is strict, as for any checkpoint: differences are listed leaf by leaf before anything is computed.
Only a growth operator makes the model larger.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.sharding import Mesh

from growjax.axes import partition
from growjax.errors import CheckpointError, GrowjaxError, raise_all
from growjax.gates import is_gated, ungated
from growjax.hf.convert import config as read_config
from growjax.hf.convert import load as load_folder
from growjax.plan.plan import Plan
from growjax.runs.checkpoint import read_lineage
from growjax.runs.lineage import digest_of, load_model, model_of, operators_of, pretrained_folder
from growjax.runs.run import checkpoint_in


# Settings of a model that do not change its function; the plan's are used
_OF_THE_RUN = ("dtype", "remat")
_SHOWN = 30  # the most differences that a message lists


class Source(NamedTuple):
    """A folder with a trained model: its shapes and, unless it is of Hugging Face, its lineage."""

    path: Path
    shapes: Any
    lineage: Mapping[str, Any] | None


def start_faults(plan: Plan) -> list[str]:
    """The reasons why a plan cannot start from the model that it names, from shapes alone."""
    assert plan.start is not None
    try:
        source = _source(plan.start.folder)
    except GrowjaxError as error:
        return [f"start: {error}"]
    return [f"start: {fault}" for fault in _faults(plan, source)]


def read_start(plan: Plan, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """Read the model that a plan starts from onto the mesh, and describe its origin for lineages.

    The origin has the folder, the name of the checkpoint, a digest of the parameters, the tokens and
    FLOPs of the model's training, which are None if they are unknown, and the Hugging Face folder that it
    all began with, or None. Raises `CheckpointError` that lists
    every difference from the plan's own shapes, and `HuggingFaceError` for a broken folder.
    """
    assert plan.start is not None
    source = _source(plan.start.folder)
    headline = f"plan {plan.name!r} cannot start from {source.path}:"
    raise_all(CheckpointError, headline, _faults(plan, source))
    tokens = flops = None
    if source.lineage is None:
        dtype = str(jax.tree.leaves(partition(plan.origin)[0])[0].dtype)
        model, name = load_folder(source.path, dtype=dtype), "Hugging Face"
        pretrained = str(source.path.absolute())
    else:
        model, name = ungated(load_model(source.path, mesh)[0]), source.path.name
        pretrained = pretrained_folder(source.lineage)
        # The training of that run and, if it started from a trained model too, of that one
        earlier = source.lineage.get("start") or {"tokens": 0, "flops": 0}
        tokens = _total(source.lineage.get("tokens"), earlier.get("tokens"))
        flops = _total(source.lineage.get("flops"), earlier.get("flops"))
    # The structure holds settings such as `dtype`, which are the plan's; the leaves are the folder's
    model = jax.tree.unflatten(jax.tree.structure(plan.origin), jax.tree.leaves(model))
    origin: dict[str, Any] = {
        "folder": plan.start.folder,
        "is": name,
        "digest": digest_of(partition(model)),
        "tokens": tokens,
        "flops": flops,
        "pretrained": pretrained,
    }
    return model, origin


def _total(a: int | None, b: int | None) -> int | None:
    """The sum of two numbers; None if one of them is unknown."""
    return None if a is None or b is None else a + b


def _source(folder: str) -> Source:
    """The model in a folder: of Hugging Face, of a checkpoint, or of a run."""
    path = Path(folder)
    if (path / "config.json").is_file():
        config, key = read_config(path), jax.random.key(0)
        return Source(path, eqx.filter_eval_shape(lambda: config.build(key)), None)
    path = checkpoint_in(path)
    lineage = read_lineage(path)
    return Source(path, model_of(lineage), lineage)


def _faults(plan: Plan, source: Source) -> Iterator[str]:
    """The differences between the model in a folder and the plan's own, one line each."""
    assert plan.start is not None
    lineage = source.lineage
    if lineage is not None:
        if is_gated(source.shapes) and lineage["level"] != 1:
            yield (
                f"its gates are at {lineage['level']:.2f}; start from a checkpoint from after its ramp"
            )
        trained, planned = lineage["tokenizer"], plan.tokenizer
        # Two different paths may be copies of one file
        if trained != planned and "bytes" in (trained, planned):
            yield f"tokenizer: it was trained on {trained!r}, and the plan says {planned!r}"
    unlike = list(_unlike(ungated(source.shapes), plan.origin))
    yield from unlike[:_SHOWN]
    if len(unlike) > _SHOWN:
        yield f"and {len(unlike) - _SHOWN} more"
    if unlike and lineage is not None:
        grew = ", ".join(map(str, operators_of(lineage))) or "nothing"
        yield (
            f"it was born as {_born(lineage['model'])} and grew by {grew}; the plan's `model` and "
            "`start.operators` must say the same, or describe an equal model. A smaller model becomes a "
            "larger one by the first stage's `grow`"
        )


def _unlike(ours: Any, planned: Any, where: str = "") -> Iterator[str]:
    """The differences of two models in shapes, dtypes or settings, one line each.

    `ours` is the model in the folder, `planned` that of the plan, or the same part of both; `where` is
    the path of the part.
    """
    if isinstance(ours, eqx.Module) and type(ours) is type(planned):
        for field in dataclasses.fields(ours):
            if field.name not in _OF_THE_RUN:
                name = f"{where}.{field.name}" if where else field.name
                yield from _unlike(getattr(ours, field.name), getattr(planned, field.name), name)
        return
    if isinstance(ours, list | tuple) and isinstance(planned, list | tuple):
        if len(ours) == len(planned):
            for i, (x, y) in enumerate(zip(ours, planned, strict=True)):
                yield from _unlike(x, y, f"{where}[{i}]")
            return
    if _text(ours) != _text(planned):
        yield f"{where}: {_text(ours)} in the folder, {_text(planned)} in the plan"


def _text(x: Any) -> str:
    """An array (or shape), module or setting in a message: `float32[4, 16]`."""
    if hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__ if isinstance(x, eqx.Module) else repr(x)


def _born(config: Mapping[str, Any]) -> str:
    """A saved configuration as the call that makes it: `GPTConfig(layers=2, ...)`."""
    name = config["is"].partition(":")[2]
    return f"{name}({', '.join(f'{k}={v}' for k, v in config.items() if k != 'is')})"
