"""Checkpoints and journals that were harmed: restored right, or one typed error that says what to do."""

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import growjax as gj
from growjax import train as trainer
from growjax.errors import CheckpointError, DamagedError, DataError, GrowjaxError, PlanError
from growjax.runs import hosts
from growjax.runs.checkpoint import lineage_faults, load, read_lineage, sealed
from growjax.runs.journal import Journal, lines_of
from growjax.runs.lineage import optimizer_of
from growjax.runs.run import Run, checkpoint_in
from growjax.train import Begin, Options, read_journal, watch
from growjax.train.commands import describe
from tests.conftest import DEEP
from tests.runs import feed, losses, plan, programs_of, same, steps


# What Orbax was about to read when it came upon a fault is never awaited, and says so when it is freed
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
train: Any = trainer.train  # tests know which record comes where; the checker does not
PLACES = 400 if DEEP else 24


@pytest.fixture(autouse=True)
def _freed_here(only_young_garbage):
    """And not in some later test, which would be blamed for it."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def short(programs, tmp_path_factory):
    """A run of four steps with a checkpoint after every second one, and its records."""
    of, folder = plan(steps(4)), tmp_path_factory.mktemp("short") / "run"
    options = Options(held_out=4, save_every=2, keep_last=9)
    running = train(of, feed(of), run=folder, options=options, cache=programs)
    return of, list(watch(running, of, run=folder)), folder


@pytest.fixture
def copied(short, tmp_path):
    """The same, to be harmed: the plan, the folder, and its last checkpoint."""
    shutil.copytree(short[2], tmp_path / "run")
    return short[0], tmp_path / "run", tmp_path / "run" / "checkpoints" / "00000004-00"


def rewritten(path: Path, change: Any) -> None:
    """The lineage of a checkpoint changed and sealed again, as an odd version of growjax might."""
    file = path / "_CHECKPOINT_METADATA"
    saved = json.loads(file.read_text())
    lineage = saved["custom_metadata"]["growjax"]
    del lineage["seal"]
    change(lineage)
    saved["custom_metadata"]["growjax"] = sealed(lineage)
    file.write_text(json.dumps(saved))


# A flipped bit anywhere -----------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_seen_or_harmless(short, tmp_path_factory):
    of, _, folder = short
    path = tmp_path_factory.mktemp("flipped") / "00000004-00"
    shutil.copytree(folder / "checkpoints" / path.name, path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    assert {"_sharding", "_METADATA", "_CHECKPOINT_METADATA"} <= {p.name for p in files}
    assert any(p.parent.name == "d" for p in files)
    shapes = programs_of(of).shapes(of.spans[0].model)
    whole = [np.asarray(x) for x in jax.tree.leaves(load(path, shapes))]
    seen = set()

    @settings(max_examples=PLACES)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def check(file: Path, place: float, bit: int) -> None:
        with flip(file, place, bit):
            try:
                read_lineage(path)
                leaves = [np.asarray(x) for x in jax.tree.leaves(load(path, shapes))]
            except CheckpointError as error:
                seen.add(file)
                assert str(path) in str(error)
            else:
                assert all(np.array_equal(a, b) for a, b in zip(leaves, whole, strict=True))

    check()
    assert len(seen) >= 3


@pytest.fixture(scope="module")
def stopped(programs, tmp_path_factory):
    """A run that grows, and its folder as a kill would have left it before its last checkpoint."""
    of = plan(steps(2), steps(4, grow=gj.msg(mlp=24, heads=4), ramp=2))
    folder = tmp_path_factory.mktemp("stopped") / "run"
    options = Options(held_out=4, save_every=1, keep_last=9, held_out_end=4)
    running = train(of, feed(of), run=folder, options=options, cache=programs)
    records = list(watch(running, of, run=folder))
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    (folder / "held_out.npz").unlink()
    return of, options, records, folder


def test_a_flipped_bit_in_any_file_of_a_run_is_seen_or_harmless(short, tmp_path_factory):
    """Of what stands beside the checkpoints: the plan, the journal and the held-out losses."""
    _, _, ended = short
    folder = tmp_path_factory.mktemp("flipped") / "run"
    shutil.copytree(ended, folder, ignore=shutil.ignore_patterns("checkpoints"))
    files = sorted(folder.iterdir())
    assert [p.name for p in files] == ["held_out.npz", "metrics.jsonl", "plan.json"]
    run, seen = Run(folder), set()

    def held_out() -> Any:
        saved = run.held_out()
        assert saved is not None
        return saved[0].sums.tolist(), saved[0].weights.tolist(), saved[1]

    rows = run.rows()

    def read_rows() -> Any:
        # A bit of the checksum's name makes it a field that nobody reads
        return [{k: row[k] for k in old} for row, old in zip(run.rows(), rows, strict=True)]

    readers = {run.plan: run.plan(), read_rows: rows, run.sessions: run.sessions()}
    readers[held_out] = held_out()

    @settings(max_examples=2 * PLACES)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def check(file: Path, place: float, bit: int) -> None:
        with flip(file, place, bit):
            for read, right in readers.items():
                try:
                    assert read() == right
                except GrowjaxError as error:
                    seen.add(file.name)
                    assert file.name in str(error)

    check()
    assert len(seen) == 3


@pytest.mark.slow
def test_a_run_with_a_flipped_bit_ends_the_same_or_is_refused(stopped, programs, tmp_path_factory):
    """In any file of the run, the last checkpoint's most of all."""
    of, options, records, folder = stopped
    last = max((folder / "checkpoints").iterdir())
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    files = [p.relative_to(folder) for p in files if p.parent == folder or last in p.parents]
    ends, refused = [], []

    @settings(max_examples=400)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def check(file: Path, place: float, bit: int) -> None:
        copy = tmp_path_factory.mktemp("flipped") / "run"
        shutil.copytree(folder, copy)
        with flip(copy / file, place, bit):
            try:
                running = train(of, feed(of), run=copy, options=options, cache=programs)
                rest: list[Any] = list(watch(running, of, run=copy))
            except GrowjaxError as error:
                refused.append(str(error))
            else:
                # Who ends the tests by SIGTERM ends this session alone, which then is no other run
                assert rest[-1].signal is None, "these tests were asked to stop"
                assert same(rest, records)
                ends.append(file)
        shutil.rmtree(copy)

    check()
    assert len(ends) > 20 and len(refused) > 20


@contextlib.contextmanager
def flip(file: Path, place: float, bit: int) -> Iterator[None]:
    """Change one bit of a file, and back."""
    original = file.read_bytes()
    data = bytearray(original)
    data[int(place * len(data))] ^= 1 << bit
    file.write_bytes(bytes(data))
    try:
        yield
    finally:
        file.write_bytes(original)


def flipped(path: Path) -> None:
    """A bit of the largest file of the arrays changes."""
    largest = max(path.glob("state/**/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))


def test_damage_says_what_to_remove_and_where_the_run_goes_on(short, copied, programs):
    of, folder, path = copied
    flipped(path)
    text = r"00000004-00 is not a whole .* Remove that folder, and the run goes on from step 2 \(00000002"
    with pytest.raises(DamagedError, match=text):
        list(train(of, feed(of), run=folder, cache=programs))
    shutil.rmtree(path.with_name("00000002-00"))
    with pytest.raises(DamagedError, match="Remove that folder, and the run begins anew"):
        list(train(of, feed(of), run=folder, cache=programs))
    # By hand, as it says
    shutil.rmtree(path)
    again = list(train(of, feed(of), run=folder, cache=programs))
    assert again[0].resumed is None and same(again, short[1])


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_damage_is_one_error_and_no_page_of_logs(short, copied, file, caplog):
    """Orbax logs the whole of a file that it cannot read, and then raises an error too."""
    path = copied[2]
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2 if "state" in file else 0] ^= 1
    (path / file).write_bytes(data)
    shapes = programs_of(short[0]).shapes(short[0].spans[0].model)
    with pytest.raises(DamagedError, match="its lineage is missing|list of its arrays cannot be"):
        load(path, shapes)
    assert not [record for record in caplog.records if record.name == "absl"]


def test_a_run_falls_back_if_asked_to_and_ends_the_same(short, copied, programs):
    of, folder, path = copied
    flipped(path)
    options = Options(held_out=4, save_every=2, fall_back=True)
    again = list(train(of, feed(of), run=folder, options=options, cache=programs))
    assert again[0].step == 2 and again[0].resumed == str(path.with_name("00000002-00"))
    (note,) = again[0].notes
    assert (
        "00000004-00 is not a whole checkpoint" in note
        and "set aside as 00000004-00.damaged" in note
    )
    assert path.with_name("00000004-00.damaged").is_dir()
    assert same(again, short[1]) and losses(again) == {
        n: x for n, x in losses(short[1]).items() if n >= 2
    }
    # What took its place is whole
    assert next(train(of, feed(of), run=folder, options=options, cache=programs)).step == 4


def test_what_was_half_written_or_half_removed_is_cleared_away(short, copied, programs):
    of, folder, path = copied
    half = [path.with_name(name) for name in ("x.orbax-checkpoint-tmp", "00000002-00.dropped")]
    for place in half:
        shutil.copytree(path, place)
    running = train(of, feed(of), run=folder, cache=programs)
    assert next(running) == Begin(0, 4, str(path), 1)
    assert not any(place.exists() for place in half)


def test_a_run_from_before_there_were_births_is_refused_in_a_sentence(short, copied, programs):
    of, folder, path = copied
    rewritten(path, lambda lineage: lineage.pop("births"))
    with pytest.raises(CheckpointError, match="before lineages recorded the births of coordinates"):
        list(train(of, feed(of), run=folder, cache=programs))


# Odd lineages ---------------------------------------------------------------------------------

FIELDS = sorted(lineage_faults.__globals__["_FIELDS"])
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["is", "x", "tokens", "layers"]), st.integers(0, 3)),
    st.just({"is": "Batches", "corpus": 1}),
    st.just([{"is": "Stack", "factor": 2}]),
    st.just([{"operator": "msg", "sizes": {"nothing": 3}}]),
)


def test_an_odd_lineage_is_a_typed_error_however_it_is_sealed(short, tmp_path_factory):
    of, _, folder = short
    path = tmp_path_factory.mktemp("odd") / "checkpoints" / "00000004-00"
    shutil.copytree(folder / "checkpoints" / path.name, path)
    file = path / "_CHECKPOINT_METADATA"
    original, refused = file.read_text(), []
    console = Console(file=(path.parent / "shown").open("w"))

    @settings(max_examples=2 * PLACES)
    @given(st.sampled_from(FIELDS), st.one_of(JUNK, st.just(...)))
    def check(field: str, junk: Any) -> None:
        def change(lineage: dict[str, Any]) -> None:
            lineage[field] = junk
            if junk is ...:
                del lineage[field]

        rewritten(path, change)
        try:
            describe(path, console)
            optimizer_of(read_lineage(path))
        except CheckpointError as error:
            refused.append(str(error))
        finally:
            file.write_text(original)

    check()
    assert len(refused) > PLACES // 2 and any("it is missing" in text for text in refused)


# The value of a field, the checkpoint's name with it, and what the run says
OTHER = {
    "stage": (7, "00000004-07", "it is of stage 7, and the plan has 1"),
    "step": (999, "00000999-00", "it is before step 999, and stage 0 has steps 0 to 4"),
    "seed": (5, "00000004-00", "seed: was 5, is 0"),
}


@pytest.mark.parametrize("field", OTHER)
def test_a_lineage_that_does_not_fit_the_plan_is_refused_by_the_run(copied, programs, field):
    of, folder, path = copied
    value, name, words = OTHER[field]
    rewritten(path, lambda lineage: lineage.update({field: value}))
    path.rename(path.with_name(name))
    with pytest.raises(CheckpointError, match=f"is of the run of another plan(.|\n)*{words}"):
        next(train(of, feed(of), run=folder, cache=programs))


def test_a_host_with_another_lineage_than_that_of_process_0_is_refused(
    copied, programs, monkeypatch
):
    """Under the same name: as if another run had written into the folder that this host sees."""
    of, folder, _ = copied
    real = hosts.from_first

    def other(make: Any) -> Any:
        value = real(make)
        return value | {"tokens": 1} if isinstance(value, dict) else value

    monkeypatch.setattr(hosts, "from_first", other)
    with pytest.raises(CheckpointError, match="is not the checkpoint that process 0 goes on from"):
        next(train(of, feed(of), run=folder, cache=programs))


# Journals ---------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.integers(1, 200))
def test_a_journal_that_was_cut_anywhere_is_mended_and_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    rows = [{"kind": "step", "step": n, "stage": 0, "loss": 1.5} for n in range(5)]
    with Journal(folder) as journal:
        for row in rows:
            journal.add(row)
    file = folder / "metrics.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[:-cut])
    left = file.read_bytes().count(b"\n")
    with Journal(folder) as journal:
        journal.add({"kind": "begin", "step": left, "stage": 0})
    lines = list(lines_of(file))
    assert lines == [*rows[:left], {"kind": "begin", "step": left, "stage": 0}]
    assert read_journal(folder) == lines


def test_digits_that_changed_in_a_plan_or_a_journal_are_seen(copied):
    """They are as good JSON as before."""
    _, folder, _ = copied
    run = Run(folder)

    def changed(file: Path, old: str, new: str) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    changed(run.plan_file, '"seed": 0', '"seed": 1')
    with pytest.raises(PlanError, match="plan.json: it was changed after .* remove 'sha-256' from"):
        run.plan()
    changed(run.journal_file, '"step": 1', '"step": 3')
    with pytest.raises(DataError, match="metrics.jsonl:3: this record was changed .* remove that"):
        run.rows()


def test_only_a_part_of_a_last_line_is_taken_for_cut_off(copied):
    _, folder, _ = copied
    file = folder / "metrics.jsonl"
    data = file.read_bytes()
    rows = read_journal(folder)
    last = data.splitlines()[-1]
    for end in (b"J", b" \x00"):
        file.write_bytes(data[:-1] + end)
        for read in (lambda: read_journal(folder), lambda: Journal(folder).__enter__()):
            with pytest.raises(
                DataError, match="expected a line break at the end, got .*; put one"
            ):
                read()
    file.write_bytes(data.replace(last, last.replace(b"end", b"eod")))
    with pytest.raises(DataError, match="this record was changed"):
        read_journal(folder)
    file.write_bytes(data[:-1])
    assert read_journal(folder) == rows[:-1]


def test_a_row_without_a_field_is_a_fault_with_its_line(tmp_path):
    """As a flipped bit in the name of the field makes it."""
    rows = [{"kind": "step", "step": n, "stage": 0, "crossing": {}} for n in range(2)]
    begin = {"kind": "begin", "step": 2, "stage": 0}
    file = tmp_path / "metrics.jsonl"

    def written(*lines: Any) -> None:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    for name in ("step", "stage"):
        odd = {key: value for key, value in rows[1].items() if key != name}
        written(rows[0], odd, begin)
        text = rf"metrics.jsonl:2: expected a record with '{name}'; remove that line"
        with pytest.raises(DataError, match=text):
            [(row["step"], row["stage"]) for row in read_journal(tmp_path)]
    written(*rows)
    with pytest.raises(DataError, match="metrics.jsonl:2: .* 'exactness'"):
        read_journal(tmp_path)[1]["crossing"]["exactness"]
    written(rows[0], {"kind": "stepp"}, begin)
    with pytest.raises(DataError, match="metrics.jsonl:2: expected a record in JSON"):
        read_journal(tmp_path)


def test_sessions_of_a_run_are_told_by_its_journal(short, copied, programs):
    of, folder, _ = copied
    run = Run(folder)
    assert [s.finished for s in run.sessions()] == [True] and run.finished
    running = train(of, feed(of), run=folder, cache=programs)
    list(watch(running, of, run=folder))
    first, second = run.sessions()
    assert (first.step, first.resumed) == (0, None) and second.step == 4
    assert second.resumed and second.resumed.endswith("00000004-00")
    with pytest.raises(DataError, match="no journal of a run"):
        Run(folder / "nowhere").sessions()


# Held-out losses in the folder ----------------------------------------------------------------------


def test_the_losses_of_the_end_are_kept_and_a_damaged_file_is_said(short, copied, programs):
    of, folder, _ = copied
    end: Any = short[1][-1]
    saved = Run(folder).held_out()
    assert saved is not None and saved[1]["step"] == 4
    assert np.array_equal(saved[0].sums, end.held_out.sums) and saved[0].loss == end.held_out.loss
    file = folder / "held_out.npz"
    again = list(train(of, feed(of), run=folder, cache=programs))[-1]
    assert again.held_out_seconds == 0 and np.array_equal(again.held_out.sums, end.held_out.sums)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="held_out.npz is damaged .* remove it"):
        list(train(of, feed(of), run=folder, cache=programs))
    file.unlink()
    again = list(train(of, feed(of), run=folder, cache=programs))[-1]
    assert np.array_equal(again.held_out.sums, end.held_out.sums) and file.exists()


# What a path means ------------------------------------------------------------------------------------


def test_a_path_means_a_checkpoint_or_the_last_one_of_a_run(short, tmp_path):
    last = short[2] / "checkpoints" / "00000004-00"
    assert checkpoint_in(short[2]) == last == checkpoint_in(last)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint_in(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="a run without a whole checkpoint"):
        checkpoint_in(tmp_path)


@pytest.mark.parametrize("inside", ["", "run", "state/d"])
def test_nothing_trains_inside_a_checkpoint(copied, programs, inside):
    of, _, path = copied
    before = sorted(path.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint, and nothing trains in it.*Start\("
    ):
        next(train(of, feed(of), run=path / inside, cache=programs))
    assert sorted(path.rglob("*")) == before
    with pytest.raises(CheckpointError, match="the run's folder is the one above"):
        next(train(of, feed(of), run=path.parent, cache=programs))
    aside = path.parent / "another" / "run"
    with pytest.raises(
        CheckpointError, match="has its checkpoints in .*, and nothing else belongs"
    ):
        next(train(of, feed(of), run=aside, cache=programs))
    assert not aside.exists()
