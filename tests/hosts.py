"""Programs that tests start in processes of their own: they need other devices than the tests have.

python -m tests.hosts layouts FOLDER              8 devices in one process
python -m tests.hosts own                         the same, with models that growjax did not write
python -m tests.hosts heads                       the same, with losses that read a few tokens at a time
python -m tests.hosts experts FOLDER              the same, with experts that are split over devices
python -m tests.hosts kernels                     splash attention, split over the devices
python -m tests.hosts parts FOLDER                two devices that split a model whose old layers rest
python -m tests.hosts rank FOLDER RANK PORT WHAT  one of two processes, one device each
python -m tests.hosts start FOLDER                one process that does what the two do at the end
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import growjax as gj
from growjax import parallel
from growjax.nn import Mask, attend, head
from growjax.nn.place import place_of, running_on
from growjax.parallel import BATCH, split_rows
from growjax.plan import Plateau
from growjax.programs.ahead import Ahead, lower
from growjax.programs.step import Programs, checksums
from growjax.runs.checkpoint import load, numbered, read_lineage
from growjax.train import (
    End,
    Ended,
    Fork,
    Layout,
    Options,
    Plan,
    Probe,
    Start,
    Step,
    choose,
    cross_entropy,
    train,
)
from tests import own
from tests.runs import SMALL, feed, plan, steps


def short(layout: Layout, **changes: Any) -> Plan:
    """Two steps, growth of width behind gates, then two steps on paths of length 1."""
    path = gj.random_path(1, keep=())
    return plan(
        steps(4, "small"),
        steps(4, "wide", grow=gj.msg(mlp=32, heads=4), ramp=2, subnet=path),
        layout=layout,
        batch=8,
        **changes,
    )


def losses(of: Plan, **kwargs: Any) -> list[float]:
    options = Options(held_out=8, evaluate_every=of.flops / 2, save_every=1, keep_last=9)
    records: list[Any] = list(train(of, feed(of), options=options, **kwargs))
    steps_done = [r for r in records if isinstance(r, Step)]
    return [r.loss for r in steps_done] + [r.held_out for r in steps_done if r.held_out is not None]


def layouts(folder: Path) -> None:
    """The losses of one plan under every layout, and of runs that went on under another one."""
    devices = jax.devices()
    ways = {
        "one": (Layout(), 1),
        "replicas": (Layout(step="shard_map"), 8),
        "context": (Layout(fsdp=4, context=2), 8),
        "both": (Layout(fsdp=2, tensor=2), 8),
    }
    losses_of = {
        name: losses(
            short(layout), devices=devices[:n], run=folder / name if name == "both" else None
        )
        for name, (layout, n) in ways.items()
    }
    halfway = sorted((folder / "both" / "checkpoints").iterdir())
    grown = regrown(halfway[0])
    forks = [forked(folder / "both", folder / f"fork {step}", step, devices) for step in (1, 2, 3)]
    for path in halfway:
        if path.name > "00000001-00":
            shutil.rmtree(path)
    split = short(Layout(context=2))
    losses_of["resumed"] = losses(split, devices=devices[:2], run=folder / "both")
    own = short(Layout(step="shard_map", own_paths=True))
    losses_of["own paths"] = losses(own, devices=devices)

    sharded = short(Layout(fsdp=8))
    mesh = sharded.layout.mesh(devices)
    born = parallel.model_shardings(sharded.build(), mesh)
    specs = {str(sharding.spec) for sharding in jax.tree.leaves(born)}
    report = {"losses": losses_of, "specs": sorted(specs), "grown": grown, "forks": forks}
    report["born on"] = [str(device) for device in born_on(devices[:2])]
    print(json.dumps(report | {"devices": parallel.self_test()}))


def born_on(devices: list[Any]) -> list[Any]:
    """Where a model is born on each device, by runs that share compiled programs."""
    of, cache, places = short(Layout()), {}, []
    for device in devices:
        ahead = Ahead(of, Programs.of(of, of.layout.mesh([device])), cache=cache)
        state = ahead.get(("birth", 0, None))(np.int32(of.seed))
        ahead.close()
        places += jax.tree.leaves(state.trained)[0].devices()
    return places


def parts(folder: Path) -> None:
    """A run whose old layers rest, split over two devices; one that went on, and one of one device."""
    of = plan(
        steps(4, "small"),
        steps(8, "new layers", grow=gj.stack(layers=4, order="insert"), train="new"),
        layout=Layout(fsdp=2),
        batch=8,
    )
    devices = jax.devices()
    options = Options(save_every=1, keep_last=9)

    def by_step(of: Plan, **kwargs: Any) -> dict[int, float]:
        records = train(of, feed(of), options=options, **kwargs)
        return {r.step: r.loss for r in records if isinstance(r, Step)}

    by_layout = {"whole": by_step(of, devices=devices, run=folder)}
    mesh = of.layout.mesh(devices)
    shapes = Programs(of.optimizer.build(), cross_entropy, mesh, of.layout).shapes(
        of.spans[1].model
    )
    first, last = (
        load(folder / "checkpoints" / f"{step:08}-01", shapes).trained for step in (2, 6)
    )
    same = jax.tree.map(lambda a, b: np.asarray(a) == np.asarray(b), first, last)
    old = of.spans[1].births.masks(of.spans[1].model, "old")
    pairs = list(zip(*map(jax.tree.leaves, (same, old)), strict=True))
    for path in sorted((folder / "checkpoints").iterdir())[-2:]:
        shutil.rmtree(path)
    by_layout["resumed"] = by_step(of, devices=devices, run=folder)
    by_layout["one"] = by_step(dataclasses.replace(of, layout=Layout()), devices=devices[:1])
    rests = all(bool(a[m].all()) for a, m in pairs)
    moves = all(not a[~m].any() for a, m in pairs if not m.all())
    print(json.dumps(by_layout | {"old rests": rests, "new moves": moves}))


def own_models() -> None:
    """The losses of models that growjax did not write: one under every layout, others under two or three.

    Where their axes come from is all that is different about the others.
    """
    devices = jax.devices()
    ways = {
        "one": (Layout(), 1),
        "replicas": (Layout(step="shard_map"), 8),
        "fsdp": (Layout(fsdp=8), 8),
        "both": (Layout(fsdp=2, tensor=2), 8),
    }
    others = {"annotated": ("one", "replicas", "both"), "a dict": ("one", "both")}
    plans = {"declared": own.mixed, "annotated": own.annotated, "a dict": own.mapping}
    results = {
        name: {
            way: losses(make(layout=layout, batch=8), devices=devices[:n])
            for way, (layout, n) in ways.items()
            if way in others.get(name, ways)
        }
        for name, make in plans.items()
    }
    print(json.dumps(results))


def heads() -> None:
    """The losses of heads that read three tokens at a time, under every layout: 8 are 3 + 3 + 2.

    "whole" reads them all at once, on one device.
    """
    devices = jax.devices()
    ways = {
        "whole": (Layout(), 1),
        "one": (Layout(), 1),
        "data": (Layout(), 8),
        "replicas": (Layout(step="shard_map"), 8),
        "fsdp": (Layout(fsdp=8), 8),
        "vocabulary": (Layout(tensor=2), 2),
        "both": (Layout(fsdp=2, tensor=2), 8),
    }
    # What is split of a head of its own is split of a tied one in the same way, but for the vocabulary
    untied = ("whole", "replicas", "vocabulary", "both")
    found: dict[str, dict[str, list[float]]] = {}
    for name, tied in (("tied", True), ("untied", False)):
        model = dataclasses.replace(SMALL, tied=tied)
        for way, (layout, n) in ways.items():
            if not tied and way not in untied:
                continue
            head.LARGE, head.CHUNK = (2**23, 256) if way == "whole" else (0, 3)
            of = plan(steps(3), model=model, layout=layout, batch=8)
            found.setdefault(name, {})[way] = losses(of, devices=devices[:n])
    print(json.dumps(found))


def mixtures(folder: Path) -> None:
    """A dense model that becomes a mixture and gets more experts, and a mixture of the "ragged" body."""
    devices, options = jax.devices(), Options(save_every=1, keep_last=9)

    def grown(layout: Layout) -> Plan:
        return plan(
            steps(2, "dense"),
            steps(4, "mixture", grow=gj.upcycle(experts=4, aux_loss_coef=0.1)),
            steps(4, "more", grow=gj.experts(8), ramp=2),
            layout=layout,
            batch=8,
        )

    def by_step(of: Plan, **kwargs: Any) -> dict[int, float]:
        records = train(of, feed(of), options=options, **kwargs)
        return {r.step: r.loss for r in records if isinstance(r, Step)}

    split, run = grown(Layout(fsdp=2, experts=2)), folder / "run"
    by_layout = {"one": by_step(grown(Layout()), devices=devices[:1])}
    by_layout["split"] = by_step(split, devices=devices, run=run)
    checkpoints = sorted((run / "checkpoints").iterdir())
    ends = [read_lineage(checkpoints[-1])["checksums"]]
    for path in checkpoints[-4:]:  # back before the experts became more
        shutil.rmtree(path)
    by_layout["resumed"] = by_step(split, devices=devices, run=run)
    ends.append(read_lineage(sorted((run / "checkpoints").iterdir())[-1])["checksums"])

    mixture = dataclasses.replace(SMALL, experts=4, shared_experts=1, bias=True, aux_loss_coef=0.1)
    for body, layout, n in (("dense", Layout(), 1), ("ragged", Layout(tensor=2, experts=2), 8)):
        model = dataclasses.replace(mixture, expert_body=body)
        by_layout[body] = by_step(
            plan(steps(4), model=model, layout=layout, batch=8), devices=devices[:n]
        )
    shardings = parallel.model_shardings(split.spans[-1].model, split.layout.mesh(devices))
    specs = {
        slot.path: str(gj.axes.get(shardings, slot.steps).spec)
        for slot in gj.axes_of(split.spans[-1].model).of_kind("param")
        if slot.positions("experts") and slot.arrays()
    }
    print(json.dumps({"losses": by_layout, "same end": ends[0] == ends[1], "specs": specs}))


def kernels() -> None:
    """Splash attention split over eight devices: its relative error, and how many arrays are gathered."""
    draw = np.random.default_rng(0)
    q, k = (draw.normal(size=s).astype("float32") for s in [(8, 2, 2, 128, 8), (8, 2, 128, 8)])
    documents = np.arange(128)[None] // np.arange(20, 28)[:, None]  # of another length in each row

    def run(body, split, q, k, documents):
        def one(q, k, documents):
            return attend(q, k, k, Mask(causal=True, documents=documents), body=body)

        def total(q, k):
            out = jax.vmap(one, spmd_axis_name=split)(q, k, documents)
            return jnp.sum(out**2), out

        return jax.grad(total, (0, 1), has_aux=True)(q, k)

    right = jax.jit(functools.partial(run, "einsum", None))(q, k, documents)
    results = {}
    for layout in (Layout(fsdp=2, tensor=2), Layout(data=1, tensor=8)):
        mesh = layout.mesh()
        heads = "tensor" if 2 % layout.tensor == 0 else None
        wide = NamedSharding(mesh, PartitionSpec(BATCH[0], heads))
        rows = jax.device_put((q, k, documents), (wide, wide, split_rows(mesh)))
        with running_on(place_of(mesh)):
            program = jax.jit(functools.partial(run, "splash", BATCH[0])).lower(*rows).compile()
        errors = jax.tree.map(
            lambda a, b: float(abs(a - b).max() / abs(b).max()), program(*rows), right
        )
        gathers = str(program.as_text()).count(" all-gather(")
        results[str(layout)] = max(jax.tree.leaves(errors)), gathers
    print(json.dumps(results))


def regrown(checkpoint: Path) -> dict[str, dict[str, int]]:
    """The checksums of what a checkpoint of eight devices grows into, read and grown on fewer."""
    ways = {8: Layout(fsdp=2, tensor=2), 4: Layout(fsdp=4), 2: Layout(tensor=2), 1: Layout()}
    results = {}
    for n, layout in ways.items():
        of, mesh = short(layout), layout.mesh(jax.devices()[:n])
        programs = Programs(of.optimizer.build(), cross_entropy, mesh, layout)
        state = load(checkpoint, programs.shapes(of.spans[0].model))
        grown = lower(of, programs, ("grow", 1, None)).compile()(state, np.int32(of.seed))
        results[f"{n} devices"] = numbered(grown, jax.jit(checksums))
    return results


def forked(trunk: Path, run: Path, step: int, devices: list[Any]) -> bool:
    """Whether a fork of a run, on eight devices, ends with its bits, whatever is grown in between."""
    of = short(Layout(fsdp=2, tensor=2), fork=Fork(str(trunk), step))
    losses(of, run=run, devices=devices)
    ends = [max((at / "checkpoints").iterdir()) for at in (trunk, run)]
    return read_lineage(ends[0])["checksums"] == read_lineage(ends[1])["checksums"]


def started(folder: Path, layout: Layout) -> dict[str, list[float]]:
    """Two steps from the model that `short` made, with a hook that reads all of it."""
    start = Start(str(folder), (gj.msg(mlp=32, heads=4),))
    of = plan(steps(4, "on"), start=start, layout=layout, batch=8)

    def size(model: Any, step: Step) -> dict[str, float]:
        return {"size": float(jax.jit(optax.tree.norm)(eqx.filter(model, eqx.is_array)))}

    options = Options(held_out=8, evaluate_every=of.flops / 2, hooks=(size,))
    steps_done = [r for r in train(of, feed(of), options=options) if isinstance(r, Step)]
    return {
        "losses": [r.loss for r in steps_done],
        "sizes": [r.scores["size"] for r in steps_done if r.scores],
    }


def chosen(folder: Path, layout: Layout) -> dict[str, Any]:
    """A choice between a growth that is fitted and none, and the rest, which ends by itself."""
    stages = steps(2), steps(3), steps(8, until=Plateau(1, 0.5))
    candidates = steps(3, grow=gj.growth.gradmax(mlp=24)), steps(3)
    probe = Probe(plan(*stages, layout=layout, batch=8), 1, candidates, steps=2)
    options, programs = Options(held_out=8, held_out_end=0), {}
    decision = choose(probe, folder, feed, options=options, cache=programs)
    of = decision.plan
    rest = list(train(of, feed(of), run=decision.run, options=options, cache=programs))
    return {
        "losses": decision.losses,
        "chosen": decision.chosen,
        "ended": [record.steps for record in rest if isinstance(record, Ended)],
        "rest": {record.step: record.loss for record in rest if isinstance(record, Step)},
    }


def rank(folder: Path, index: int, port: str, what: str) -> None:
    """One of two hosts.

    It may "start" (train, then start from that), find a folder of its own ("apart"), be asked to "stop",
    "go on" after that, or "die" two steps later.
    """
    parallel.connect(
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=index,
        # A machine that is loaded may hold up a process for some seconds, which then is not dead
        heartbeat=10 if what in ("go on", "die") else 100,
    )
    if what in ("stop", "go on", "die"):
        stopped(folder, what, index == 1)
        return
    if what == "apart":
        folder = folder / str(index)
    of = short(Layout(fsdp=2))
    reading = feed(of)
    options = Options(held_out=8, evaluate_every=of.flops / 2, save_every=1, keep_last=9)
    for record in train(of, reading, run=folder, options=options):
        if isinstance(record, Step):
            print(json.dumps([record.step, record.loss]), flush=True)
    batch = reading.batches(of.spans[0]).batch_at(0)
    assert len(batch["tokens"]) == 4 and np.all(batch["weights"] == 1)
    if what == "start":
        print(json.dumps(chosen(folder.parent / "probe", of.layout)))
        print(json.dumps(started(folder, of.layout)))


def stopped(folder: Path, what: str, second: bool) -> None:
    """Twelve steps at once, and again until one host is told to "stop".

    Or what is left after that, to the end ("go on") or until this host may "die" in its second step.
    """
    of = plan(steps(24), layout=Layout(fsdp=2), batch=8)

    def session(name: str, options: Options, asked: bool = False) -> dict[str, Any]:
        losses = {}
        for record in train(of, feed(of), run=folder / name, options=options):
            if isinstance(record, Step):
                losses[record.step] = record.loss
                print(json.dumps([record.step, record.loss]), flush=True)
                if asked:
                    time.sleep(0.4)  # JAX's service looks for a signal once a second
                    if second and record.step == 0:
                        os.kill(os.getpid(), signal.SIGTERM)
                if what == "die" and len(losses) == 2:
                    raise SystemError("this host dies")
            if isinstance(record, End):
                return {"losses": losses, "finished": record.finished, "signal": record.signal}
        raise AssertionError("no end")

    if what == "stop":
        options = Options(held_out=8)
        ends = [session("whole", options), session("stopped", options, asked=True)]
    else:
        ends = [session("stopped", Options(held_out=8, save_every=1))]
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    command, where, *rest = [*sys.argv[1:], "."]
    if command == "own":
        own_models()
    elif command == "heads":
        heads()
    elif command == "experts":
        mixtures(Path(where))
    elif command == "kernels":
        kernels()
    elif command == "layouts":
        layouts(Path(where))
    elif command == "parts":
        parts(Path(where))
    elif command == "start":
        print(json.dumps(chosen(Path(where).parent / "alone", Layout())))
        print(json.dumps(started(Path(where), Layout())))
    else:
        rank(Path(where), int(rest[0]), *rest[1:-1])
