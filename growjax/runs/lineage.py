"""What a run writes about itself into its checkpoints, and how it finds its way back."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.sharding import Mesh

from growjax import __version__, growth
from growjax.axes import partition
from growjax.errors import CheckpointError, raise_all
from growjax.gates import opened, ungated
from growjax.parallel import model_shardings, replicated, state_shardings
from growjax.plan.files import differences, from_dict, load_plan, save_plan, to_dict
from growjax.plan.plan import Plan, build
from growjax.plan.stages import Span
from growjax.programs.step import Programs, State, checksums
from growjax.runs.checkpoint import Checkpoints, load, numbered, read_lineage
from growjax.runs.records import Crossing


class Found(NamedTuple):
    """Where a run stands: what its last checkpoint holds and says."""

    path: str
    stage: int
    step: int
    flops: int
    seconds: float
    state: State


class Saves:
    """The checkpoints of one plan in the folder of its run, next to the plan itself.

    `reference` is the digest of the second model that a selector compares with. Raises `CheckpointError`
    if the folder is that of another plan; where it is spread over devices and where its data lie may
    differ.
    """

    def __init__(
        self,
        plan: Plan,
        run: Path,
        *,
        keep_last: int,
        keep_every: int | None,
        reference: str | None = None,
    ):
        self.plan, self.run, self.reference = plan, run, reference
        self.checkpoints = Checkpoints(
            run / "checkpoints", keep_last=keep_last, keep_every=keep_every
        )
        self.parent: str | None = None
        self.start: dict[str, Any] | None = None
        file = run / "plan.json"
        if file.exists():
            old = _movable(load_plan(file))
            faults = list(differences(to_dict(old), to_dict(_movable(plan))))
            hint = "choose another folder, or go on with that one"
            raise_all(CheckpointError, f"{run} holds the run of another plan; {hint}:", faults)

    def last(self) -> Path | None:
        """The last whole checkpoint."""
        self.checkpoints.wait()
        found = self.checkpoints.found()
        return found[-1] if found else None

    def wait(self) -> None:
        """Return once nothing is being written."""
        self.checkpoints.wait()

    def resume(self, programs: Programs, data: str) -> Found | None:
        """The state to go on from, on the mesh of the programs; None in a new run."""
        path = self.last()
        lineage = None if path is None else read_lineage(path)
        if lineage is not None:
            # Where the plan in the folder was lost, its checkpoints still say whose they are
            said = self._said(lineage["stage"])
            # Through the values, so that a field which did not exist then has its default
            was = {name: to_dict(from_dict(lineage.get(name))) for name in said}
            faults = list(differences(*json.loads(json.dumps([was, said]))))
            raise_all(CheckpointError, f"{path} is of the run of another plan:", faults)
        if not (self.run / "plan.json").exists() and jax.process_index() == 0:
            self.run.mkdir(parents=True, exist_ok=True)
            save_plan(self.plan, self.run / "plan.json")
        if path is None or lineage is None:
            return None
        if lineage["data"] != data:
            raise CheckpointError(
                f"{path}: it was trained on other data (digest {lineage['data']}, now {data}); a run "
                "goes on with what it began with"
            )
        if lineage.get("reference") != self.reference:
            raise CheckpointError(
                f"{path}: it chose by another second model (digest {lineage.get('reference')}, now "
                f"{self.reference}); a run goes on with what it began with"
            )
        span = self.plan.spans[lineage["stage"]]
        self.parent, self.start = path.name, lineage.get("start")
        state = load(path, programs.shapes(span.model))
        return Found(
            str(path),
            span.index,
            lineage["step"],
            lineage["flops"],
            lineage["seconds"],
            state,
        )

    def save(
        self,
        span: Span,
        step: int,
        state: State,
        seal: Callable[[State], list[Any]],
        *,
        level: float,
        flops: int,
        seconds: float,
        data: str,
        crossing: Crossing | None,
    ) -> Path | None:
        """Start to write the state before `step`, with everything that led to it; None if it is there.

        A resumed run comes past its checkpoints again, with the same numbers. `seal` is the compiled
        program of `checksums`.
        """
        if self.checkpoints.path(step, span.index).exists():
            return None
        lineage = {
            "growjax": __version__,
            **self._said(span.index),
            "gated": span.stage.grow is not None,
            "level": level,
            "sizes": span.sizes,
            "stage": span.index,
            "step": step,
            "tokens": span.tokens + (step - span.start) * span.step_tokens,
            "flops": flops,
            "seconds": seconds,
            "data": data,
            "reference": self.reference,
            "parent": self.parent,
            "start": self.start,
            "checksums": numbered(state, seal),
            "certificate": None if crossing is None else dataclasses.asdict(crossing),
        }
        path = self.checkpoints.save(step, span.index, state, lineage)
        self.parent = path.name
        return path

    def _said(self, stage: int) -> dict[str, Any]:
        """What a checkpoint of one stage says about the plan."""
        plan = self.plan
        grown = [s.grow for s in plan.stages[: stage + 1] if s.grow is not None]
        earlier = plan.start.operators if plan.start else ()
        return {
            "plan": plan.name,
            "model": to_dict(plan.model),
            "optimizer": to_dict(plan.optimizer),
            "operators": [to_dict(op) for op in (*earlier, *grown)],
            "seed": plan.seed,
            "tokenizer": plan.tokenizer,
        }


def digest_of(tree: Any) -> str:
    """A name for the numbers in a tree, the same on every mesh."""
    found = json.dumps(numbered(tree, jax.jit(checksums)), sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def model_of(lineage: Mapping[str, Any]) -> Any:
    """The shapes of the model that a checkpoint holds, rebuilt from its lineage alone."""
    config = from_dict(lineage["model"])
    key = jax.random.key(0)
    model = eqx.filter_eval_shape(lambda: build(config, key))
    for saved in lineage["operators"]:
        op = growth.from_dict(saved)
        model = eqx.filter_eval_shape(lambda m, op=op: op(m, key=key), ungated(model))
    return model if lineage["gated"] else ungated(model)


def load_model(path: str | Path, mesh: Mesh | None = None) -> tuple[Any, dict[str, Any]]:
    """The model in a checkpoint, its gates as far open as they were, and its lineage.

    It is the one to evaluate: the average, if the optimizer averages. On a `mesh` it is split as for
    training; without one it lies on the first device. Raises `CheckpointError` if the checkpoint is not
    whole.

    **Example**

        model, lineage = load_model("runs/first/checkpoints/00000400-01")
    """
    lineage = read_lineage(path)
    trained, rest = partition(model_of(lineage))
    optimizer = from_dict(lineage["optimizer"]).build()
    wanted = {"trained": trained, "rest": rest}
    if optimizer.judged is not None:
        wanted["optimizer"] = jax.eval_shape(optimizer.init, trained)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: here, wanted)
    else:
        where = {
            "trained": model_shardings(trained, mesh),
            "rest": jax.tree.map(lambda _: replicated(mesh), rest),
        }
        if "optimizer" in wanted:
            where["optimizer"] = state_shardings(wanted["optimizer"], trained, mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, where
    )
    found = load(path, shapes, only=tuple(wanted))
    trained = optimizer.evaluated(found["trained"], found.get("optimizer"))
    return opened(eqx.combine(trained, found["rest"]), lineage["level"]), lineage


def _movable(plan: Plan) -> Plan:
    """The plan without what may change when a run goes on."""
    start = plan.start and dataclasses.replace(plan.start, folder="it was read at the start")
    return dataclasses.replace(plan, layout=type(plan.layout)(), data=None, start=start)
