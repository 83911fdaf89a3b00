"""Whatever happens to a run ends in a clear error or goes on: the faults, each one exercised."""

import contextlib
import dataclasses
import errno
import gc
import io
import json
import math
import os
import shutil
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import train as trainer
from growjax.data import Text, batches
from growjax.errors import CheckpointError, DataError, TrainingError
from growjax.runs import checkpoint
from growjax.train import (
    Begin,
    Fork,
    Options,
    Plan,
    Step,
    cross_entropy,
    read_journal,
    stopwatch,
    transition,
    watch,
)
from tests.runs import every_kind, feed, losses, plan, same, steps


ROOT = Path(gj.__file__).parents[1]
# What Orbax was about to read when it came upon a fault is never awaited, and says so when it is freed
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
train: Any = trainer.train  # tests know which record comes where; the checker does not


@pytest.fixture(autouse=True)
def _freed_here(only_young_garbage):
    """And not in some later test, which would be blamed for it."""
    yield
    gc.collect()


class Reading:
    """A feed that changes what another one gives, and records what was asked of it."""

    def __init__(self, inner: Any, change: Any = lambda n, batch: batch):
        self.inner, self.change, self.waited = inner, change, 0.0
        self.digest = inner.digest

    def held_out(self, *args: Any) -> Any:
        return self.inner.held_out(*args)

    @contextlib.contextmanager
    def stream(self, span: Any, first: int) -> Iterator[Any]:
        with self.inner.stream(span, first) as inner:
            self.waiting = inner
            yield _Changed(inner, self.change, span.start)


class _Changed:
    def __init__(self, inner: Any, change: Any, start: int):
        self.inner, self.change, self.start = inner, change, start

    @property
    def waited(self) -> float:
        return self.inner.waited

    def __next__(self) -> Any:
        i, batch = next(self.inner)
        return i, self.change(self.start + i, batch)


# Faults: each ends in a clear error, and nothing is lost --------------------------------------------


def damaged(run, tmp_path, name="00000018-02") -> tuple[Plan, Path, Path]:
    whole, _, folder = run
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name > name:
            shutil.rmtree(path)
    return whole, tmp_path / "run", tmp_path / "run" / "checkpoints" / name


def truncate(path: Path) -> None:
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip(path: Path) -> None:
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(bytes(data))


def edit(path: Path) -> None:
    file = path / "_CHECKPOINT_METADATA"
    saved = json.loads(file.read_text())
    text = json.dumps(saved).replace('"step": 18', '"step": 17')
    assert text != json.dumps(saved)
    file.write_text(text)


def lose_metadata(path: Path) -> None:
    (path / "_CHECKPOINT_METADATA").unlink()


def strip_lineage(path: Path) -> None:
    file = path / "_CHECKPOINT_METADATA"
    saved = json.loads(file.read_text())
    saved["custom_metadata"] = {}
    file.write_text(json.dumps(saved))


DAMAGE = {
    "truncated": (truncate, "cannot be read|not a whole checkpoint"),
    "a byte changed": (flip, "cannot be read|not a whole checkpoint"),
    "lineage edited": (edit, "its lineage was changed after it was written"),
    "lineage lost": (strip_lineage, "its lineage is missing"),
    "metadata lost": (lose_metadata, "its lineage is missing|not a whole checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_and_not_a_model(run, programs, damage, tmp_path):
    whole, folder, path = damaged(run, tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(path)
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=message) as error:
        list(train(whole, feed(whole), run=folder, cache=programs))
    assert str(path) in str(error.value)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before
    # The one before it is whole: without the damaged one the run goes on
    shutil.rmtree(path)
    records = train(whole, feed(whole), run=folder, cache=programs)
    assert next(records) == Begin(2, 16, str(path.with_name("00000016-02")), 1)
    records.close()


def test_half_a_checkpoint_does_not_look_whole(run, programs, tmp_path):
    """What a killed writer leaves behind has another name, and is passed over."""
    whole, folder, path = damaged(run, tmp_path)
    path.rename(path.with_name(path.name + ".orbax-checkpoint-tmp"))
    records = train(whole, feed(whole), run=folder, cache=programs)
    assert next(records).step == 16
    records.close()


def test_a_full_disk_is_an_error_that_loses_nothing(run, programs, monkeypatch, tmp_path):
    from growjax.runs import checkpoint

    whole = run[0]
    real = checkpoint.ocp.save_async

    def full(path, *args, **kwargs):
        if "00000006" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp, "save_async", full)
    options = Options(held_out=4, save_every=2)
    with pytest.raises(CheckpointError, match="00000006-01 could not be written: .*No space left"):
        list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    monkeypatch.undo()
    records = list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    assert records[0].step == 4 and same(records, run[1])


def test_a_full_disk_leaves_nothing_of_a_grown_checkpoint(monkeypatch, tmp_path):
    """As TensorStore says it, once the folder is there."""

    def full() -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    def save_async(path: str, *_: Any, **__: Any) -> Any:
        Path(f"{path}.orbax-checkpoint-tmp").mkdir()
        return types.SimpleNamespace(result=full)

    monkeypatch.setattr(checkpoint.ocp, "save_async", save_async)
    with pytest.raises(CheckpointError, match="grown could not be written: RESOURCE_EXHAUSTED"):
        checkpoint.write_whole(tmp_path / "grown", {}, {})
    assert not any(tmp_path.iterdir())


def test_another_plan_or_other_data_are_refused(run, programs, tmp_path):
    whole, folder, _ = damaged(run, tmp_path)
    other = every_kind(seed=7)
    with pytest.raises(CheckpointError, match=r"another plan(.|\n)*plan.seed: was 0, is 7"):
        list(train(other, feed(other), run=folder, cache=programs))
    strange = Reading(feed(whole))
    strange.digest = "another"
    with pytest.raises(CheckpointError, match="trained on other data"):
        list(train(whole, strange, run=folder, cache=programs))


def test_a_run_goes_on_with_the_loss_that_it_began_with(programs, tmp_path):
    """Passed to `train` and no part of its plan; a fork may change it, and puts that on record."""

    def halved(model, example):
        losses, weights = cross_entropy(model, example)
        return 0.5 * losses, weights

    short = plan(steps(2))

    def goes_on(of: Plan = short, folder: Path = tmp_path / "run", **given: Any) -> Any:
        options = Options(held_out=4, save_every=1, held_out_end=0)
        return list(train(of, feed(of), run=folder, options=options, cache=programs, **given))

    goes_on(loss=halved)
    assert goes_on(loss=halved)[0].step == 2
    for other in (None, cross_entropy):
        with pytest.raises(
            CheckpointError, match=r"another loss \(test.*halved, now .*loss=\.\.\."
        ):
            goes_on(loss=other)
    forked = dataclasses.replace(short, fork=Fork(str(tmp_path / "run"), 1))
    notes = goes_on(forked, tmp_path / "fork")[0].notes
    assert any("loss: it minimised" in note and "that of its plan" in note for note in notes)


def test_a_loss_that_is_not_finite_stops_with_its_step(run, programs, tmp_path):
    def poison(n, batch):
        factor = np.float32(np.nan if n == 5 else 1)
        return {**batch, "weights": batch["weights"] * factor}

    whole, seen = run[0], []
    options = Options(held_out=4, save_every=2)
    with pytest.raises(TrainingError, match=r"step 5 \(stage 1 'ramp', .* loss of nan") as error:
        for record in train(
            whole, Reading(feed(whole), poison), run=tmp_path, options=options, cache=programs
        ):
            seen.append(record)
    assert list(losses(seen)) == [0, 1, 2, 3, 4] and "00000004-01" in str(error.value)
    records = list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    assert records[0].step == 4 and same(records, run[1])


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


HARM = {
    "gone": (Path.unlink, "No such file or directory, while it was read"),
    "cut off": (
        lambda path: path.write_bytes(b"\0" * 10),
        "expected .* tokens, and the file now ends",
    ),
    "bad bytes": (
        overwrite,
        "expected ids below 384 .* got 65535: the file was changed",
    ),
}


@pytest.fixture(scope="module")
def undisturbed(programs, tmp_path_factory):
    """A plan that reads text, and the records of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text").mkdir()
    for n in range(20):
        (folder / "text" / f"{n}.txt").write_text(f"{n} times {n} is {n * n}. " * 9)
    p = plan(steps(16), data=Text(str(folder / "text")))
    options = Options(held_out=4, save_every=2)
    return p, options, list(train(p, run=folder / "run", options=options, cache=programs))


@pytest.mark.parametrize("harm", HARM)
def test_data_that_are_harmed_end_in_an_error_that_loses_nothing(
    programs, undisturbed, harm, tmp_path
):
    """While they are read, and until they are thrown away; then the run goes on as if nothing was."""
    p, options, whole = undisturbed

    def running(name: str) -> Any:
        return train(p, run=tmp_path / name / "run", options=options, cache=programs)

    spoil, message = HARM[harm]
    seen = []
    with pytest.raises(DataError, match=f"tokens.bin: {message}"):
        for record in running("harmed"):
            seen.append(record)
            if isinstance(record, Step) and record.step == 3:
                (tokens,) = (tmp_path / "harmed" / "cache").glob("*/train*/tokens.bin")
                spoil(tokens)
    assert 3 <= max(losses(seen)) < 15
    with pytest.raises(
        DataError, match="is damaged; delete it and it is made anew(.|\n)*tokens.bin"
    ):
        next(running("harmed"))
    shutil.rmtree(tmp_path / "harmed" / "cache")
    again = list(running("harmed"))
    assert again[0].step >= 4 and same(again, whole)
    assert losses(again) == {n: x for n, x in losses(whole).items() if n >= again[0].step}


def test_text_that_is_none_is_named_before_anything_is_trained(tmp_path):
    (tmp_path / "good.txt").write_text("words " * 200)
    (tmp_path / "bad.txt").write_bytes(b"some\n\xff\xfe words " * 50)
    p = plan(steps(2), data=Text(str(tmp_path), "*.txt"))
    with pytest.raises(DataError, match=r"bad.txt, line 2: byte 0xff is not UTF-8"):
        next(train(p, run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_for_the_journal_loses_nothing(run, programs, tmp_path):
    whole, options = run[0], Options(held_out=4, save_every=2)
    records = train(whole, feed(whole), run=tmp_path, options=options, cache=programs)
    seen = []
    with contextlib.closing(records), pytest.raises(TrainingError, match="No space left"):
        for record in watch(records, whole, run=tmp_path):
            seen.append(record)
            if isinstance(record, Step) and record.step == 4:
                break
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        for record in watch(records, whole, run=tmp_path):
            seen.append(record)
    assert list(losses(seen)) == [0, 1, 2, 3, 4]
    again = list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    assert again[0].step == 4 and same(again, run[1])


def test_a_run_whose_plan_was_lost_is_not_taken_for_another(run, programs, tmp_path):
    whole, folder, _ = damaged(run, tmp_path)
    (folder / "plan.json").unlink()
    other = every_kind(seed=7, optimizer=trainer.Optimizer(b2=0.9))
    with pytest.raises(CheckpointError, match=r"another plan(.|\n)*seed: was 0, is 7") as error:
        list(train(other, feed(other), run=folder, cache=programs))
    assert "plan.optimizer.b2: was" in str(error.value) and not (folder / "plan.json").exists()
    faster = every_kind(rate=trainer.Schedule(2e-2))
    with pytest.raises(
        CheckpointError, match="plan.json was lost, and this is not the plan that it"
    ):
        next(train(faster, feed(faster), run=folder, cache=programs))
    records = train(whole, feed(whole), run=folder, cache=programs)
    assert next(records).step == 18 and trainer.load_plan(folder / "plan.json") == whole
    records.close()


class Broken(gj.Operator):
    """Says that it changes nothing, and copies the last layer to the end."""

    exactness = "exact"

    def maps(self, axes):
        return [gj.AxisMap("layers", np.array([0, 1, 1]))]


def test_a_growth_that_breaks_its_promise_is_undone(programs, tmp_path):
    p = plan(steps(3), steps(3, grow=Broken()))
    with pytest.raises(
        TrainingError, match=r"broken\(\) promises to be exact, and changed the loss"
    ):
        list(train(p, feed(p), cache=programs))


def test_a_clock_that_jumps_is_not_looked_at(run, programs, monkeypatch, tmp_path):
    """Back and forth by years; what is computed is the same, and what is shown makes some sense."""
    whole, records, _ = run
    draw = np.random.default_rng(0)

    def jumping() -> float:
        return float(draw.uniform(-1e9, 1e9))

    monkeypatch.setattr(time, "time", jumping)
    for module in (stopwatch, batches, transition):
        counters = types.SimpleNamespace(perf_counter=jumping)
        monkeypatch.setattr(module, "time", counters)
    shown = io.StringIO()
    console = Console(file=shown, width=120, force_terminal=True, get_time=jumping)
    running = train(whole, feed(whole), options=Options(held_out=4), cache=programs)
    again = list(watch(running, whole, run=tmp_path, console=console))
    assert losses(again) == losses(records) and same(again, records)
    done = [r for r in again if isinstance(r, Step)]
    assert all(r.took >= 0 and r.waited >= 0 and math.isfinite(r.seconds) for r in done)
    assert all(a.seconds <= b.seconds for a, b in zip(done, done[1:], strict=False))
    rows = [row for row in read_journal(tmp_path) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(whole.steps))
    assert all(math.isfinite(row.get("tokens_per_second", 1.0)) for row in rows)
    assert "stack and" in shown.getvalue()


def test_seconds_of_training_never_go_back():
    """Not even where other activities are counted as more than all of the time, as by rounding."""
    watch = stopwatch.Stopwatch()
    before = watch.training()
    watch.lap()
    watch.spent["save"] += 5.0
    assert watch.training() >= before >= 0
    assert watch.lap() >= 0


def test_no_activity_takes_less_than_no_time(monkeypatch):
    """A counter that jumps back in the midst of it stands still."""
    times = iter([10.0, 20.0, 15.0])
    counter = types.SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(stopwatch, "time", counter)
    watch = stopwatch.Stopwatch()
    with watch.apart("save"):
        pass
    assert watch.spent["save"] == 0
