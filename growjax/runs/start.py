"""A trained model that a plan starts from: found, held against the plan's own shapes, and read.

Loading is strict, as for any checkpoint: what differs is named leaf by leaf before anything is computed,
and a model of another size is loaded as what it is. It becomes a larger one by a growth operator only.
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
from growjax.runs.lineage import digest_of, load_model, model_of, operators_of
from growjax.runs.run import checkpoint_in


# How a model computes and not what: these are the plan's, whatever the model was trained with
_OF_THE_RUN = ("dtype", "remat")
_SHOWN = 30


class Source(NamedTuple):
    """What is in the folder: the shapes of its model and, unless it is of Hugging Face, its lineage."""

    path: Path
    shapes: Any
    lineage: Mapping[str, Any] | None


def start_faults(plan: Plan) -> list[str]:
    """Everything that forbids a plan to start from the model it names, from shapes alone."""
    assert plan.start is not None
    try:
        source = _find(plan.start.folder)
    except GrowjaxError as error:
        return [f"start: {error}"]
    return [f"start: {fault}" for fault in _faults(plan, source)]


def read_start(plan: Plan, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """The model that a plan starts from, split over the mesh, and what lineages say about it.

    Raises `CheckpointError` that lists every difference from the plan's own shapes, and
    `HuggingFaceError` for a broken folder.
    """
    assert plan.start is not None
    source = _find(plan.start.folder)
    headline = f"plan {plan.name!r} cannot start from {source.path}:"
    raise_all(CheckpointError, headline, _faults(plan, source))
    before: Mapping[str, Any] = {}
    if source.lineage is None:
        dtype = str(jax.tree.leaves(partition(plan.origin)[0])[0].dtype)
        model, name = load_folder(source.path, dtype=dtype), "Hugging Face"
    else:
        model, name = ungated(load_model(source.path, mesh)[0]), source.path.name
        before = source.lineage.get("start") or {"tokens": 0, "flops": 0}
    # How it computes is the plan's, and all of its numbers are the folder's
    model = jax.tree.unflatten(jax.tree.structure(plan.origin), jax.tree.leaves(model))
    origin: dict[str, Any] = {
        "folder": plan.start.folder,
        "is": name,
        "digest": digest_of(partition(model)),
    }
    for what in ("tokens", "flops"):
        # Of a run that itself started from another one, both count; of a stranger nobody knows
        mine, earlier = (source.lineage or {}).get(what), before.get(what)
        origin[what] = None if mine is None or earlier is None else mine + earlier
    return model, origin


def _find(folder: str) -> Source:
    path = Path(folder)
    if (path / "config.json").is_file():
        config, key = read_config(path), jax.random.key(0)
        return Source(path, eqx.filter_eval_shape(lambda: config.build(key)), None)
    path = checkpoint_in(path)
    lineage = read_lineage(path)
    return Source(path, model_of(lineage), lineage)


def _faults(plan: Plan, source: Source) -> Iterator[str]:
    assert plan.start is not None
    lineage = source.lineage
    if lineage is not None:
        if is_gated(source.shapes) and lineage["level"] != 1:
            yield (
                f"its gates are at {lineage['level']:.2f}; start from a checkpoint from after its ramp"
            )
        words = lineage["tokenizer"], plan.tokenizer
        if words[0] != words[1] and "bytes" in words:
            yield f"tokenizer: it was trained on {words[0]!r}, and the plan says {words[1]!r}"
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


def _unlike(here: Any, plan: Any, where: str = "") -> Iterator[str]:
    """Where two models differ in shapes, types or settings, one line each."""
    if isinstance(here, eqx.Module) and type(here) is type(plan):
        for field in dataclasses.fields(here):
            if field.name not in _OF_THE_RUN:
                name = f"{where}.{field.name}" if where else field.name
                yield from _unlike(getattr(here, field.name), getattr(plan, field.name), name)
    elif (
        isinstance(here, list | tuple) and isinstance(plan, list | tuple) and len(here) == len(plan)
    ):
        for i, pair in enumerate(zip(here, plan, strict=True)):
            yield from _unlike(*pair, f"{where}[{i}]")
    elif _said(here) != _said(plan):
        yield f"{where}: {_said(here)} in the folder, {_said(plan)} in the plan"


def _said(x: Any) -> str:
    if hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__ if isinstance(x, eqx.Module) else repr(x)


def _born(config: Mapping[str, Any]) -> str:
    name = config["is"].partition(":")[2]
    return f"{name}({', '.join(f'{k}={v}' for k, v in config.items() if k != 'is')})"
