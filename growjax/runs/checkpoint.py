"""Checkpoints that describe themselves: arrays under readable names, with the lineage of the model.

Orbax writes the arrays, in the background and from every host, into a folder that gets its name only
when it is whole. The lineage is part of the checkpoint: the plan and the stage, the operators that the
model grew by, the tokens and FLOPs spent, and the certificate of the last growth. It suffices to rebuild
the model; nothing is ever unpickled.

Loading is strict. A checkpoint of other shapes is refused with a list of every leaf that differs: only
an operator makes a small model larger.
"""

import contextlib
import json
import logging
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from growjax.errors import CheckpointError, DamagedError, raise_all
from growjax.programs.step import checksums
from growjax.runs.run import Run, checkpoints_in, refuse_pattern, step_of
from growjax.values.codec import seal_of


# Parts of folder names: of a checkpoint that Orbax has not finished, of one that is being removed, and
# of one that is set aside
_PARTIAL, _DROPPED, _DAMAGED = "orbax-checkpoint-tmp", ".dropped", ".damaged"
_KEY = "growjax"  # the key of the lineage in Orbax's metadata


class Checkpoints:
    """The checkpoints of one run, folders named `STEP-STAGE`; `save` returns while Orbax still writes.

    **Arguments**

    - `folder`: the folder of the checkpoints, with nothing else in it.
    - `keep_last`: the number of latest checkpoints that stay, 1 or more.
    - `keep_every`: checkpoints at multiples of this many steps stay as well; None for no others.
    - `keep`: checkpoints before these steps stay as well.

    The first checkpoint of every stage always stays: the later stages grew from it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep: Sequence[int] = (),
    ):
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_every, self.keep = keep_last, keep_every, keep
        self._writing: tuple[Path, Any] | None = None  # the path, and Orbax's future

    def clean(self) -> None:
        """Remove checkpoints that killed sessions left half written or half removed.

        Only the owner of the run's lock may call it.
        """
        with contextlib.suppress(FileNotFoundError), _clear(f"{self.folder} cannot be cleaned"):
            for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
                if _PARTIAL in path.name or path.name.endswith(_DROPPED):
                    shutil.rmtree(path)

    def path(self, step: int, stage: int) -> Path:
        """The path of the checkpoint in `stage` before `step`, whether it exists or not."""
        return self.folder / f"{step:08d}-{stage:02d}"

    def save(self, step: int, stage: int, state: Any, lineage: Mapping[str, Any]) -> Path:
        """Start to write a state; its arrays may be donated as soon as this returns.

        Waits for the previous checkpoint first. Raises `CheckpointError` if either cannot be written, or
        exists already.
        """
        self.wait()
        path = self.path(step, stage)
        with _in_orbax():
            self._writing = path, write(path, state, lineage)
        return path

    def wait(self) -> None:
        """Wait until the last checkpoint is written, then remove the superseded ones."""
        if self._writing is None:
            return
        (path, writing), self._writing = self._writing, None
        with _clear(f"{path} could not be written"), _in_orbax():
            writing.result()
        if jax.process_index() == 0:
            for old in self._superseded():
                # Renamed first, so that a kill while it is removed leaves no checkpoint that looks whole
                dropped = old.with_name(old.name + _DROPPED)
                with _clear(f"{old} could not be removed"):
                    old.rename(dropped)
                    shutil.rmtree(dropped)

    def _superseded(self) -> list[Path]:
        """The checkpoints that no rule keeps."""
        whole = checkpoints_in(self.folder)
        remaining = set(whole[-self.keep_last :])
        stages: set[int] = set()  # stages with a checkpoint so far; the first of each remains
        for path in whole:
            step, stage = step_of(path)
            requested = step in self.keep or (self.keep_every and step % self.keep_every == 0)
            if requested or stage not in stages:
                remaining.add(path)
            stages.add(stage)
        return [path for path in whole if path not in remaining]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that no run goes on from it; returns the new path."""
    for n in range(1, 1000):
        target = path.with_name(f"{path.name}{_DAMAGED}{n if n > 1 else ''}")
        if not target.exists():
            with _clear(f"{path} could not be renamed"):
                path.rename(target)
            return target
    raise CheckpointError(f"{path}: too many damaged checkpoints of this name; remove some")


def damaged(path: Path, reason: str, faults: Sequence[str] = ()) -> DamagedError:
    """The error for a checkpoint that cannot be read, with the remedy and the step that is left then."""
    listed = "".join(f"\n  - {fault}" for fault in faults)
    siblings = checkpoints_in(path.parent)
    if not siblings:
        # Not in the folder of a run
        return DamagedError(f"{path} is not a whole checkpoint: {reason}{listed}")
    earlier = [p for p in siblings if step_of(p) < step_of(path)]
    consequence = "the run begins anew"
    if earlier:
        consequence = f"the run goes on from step {step_of(earlier[-1])[0]} ({earlier[-1].name})"
    return DamagedError(
        f"{path} is not a whole checkpoint: {reason}. Remove that folder, and {consequence}; "
        f"`growjax train --fall-back`, or Options(fall_back=True), sets it aside and does so{listed}"
    )


def write(path: Path, state: Any, lineage: Mapping[str, Any]) -> Any:
    """Start to write one checkpoint; `.result()` of the returned future waits until it is whole.

    Raises `CheckpointError` if it cannot be written.
    """
    refuse_pattern(path)
    metadata: Any = {_KEY: sealed(lineage)}
    # Orbax refuses arrays without entries, which stacks of no layers have
    arrays = {name: leaf for name, leaf in named(state).items() if leaf.size}
    with _clear(f"{path} could not be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return ocp.save_async(str(path.absolute()), arrays, custom_metadata=metadata)


def write_whole(path: Path, state: Any, lineage: Mapping[str, Any]) -> None:
    """Write one checkpoint that is of no run, and wait for it; nothing of it stays if that fails."""
    try:
        with _in_orbax():
            writing = write(path, state, lineage)
            with _clear(f"{path} could not be written"):
                writing.result()
    except CheckpointError:
        for partial in path.parent.glob(f"{path.name}.{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def read_lineage(path: str | Path) -> dict[str, Any]:
    """The lineage of a checkpoint.

    Raises `CheckpointError` if the folder is missing, or has the name of another checkpoint of its run;
    `DamagedError` if the checkpoint is not whole or its lineage was edited.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint, and there is no such folder")
    with _damage(path), _in_orbax():
        metadata = ocp.metadata(str(path)).custom_metadata
    sealed_lineage = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(sealed_lineage, dict) or "seal" not in sealed_lineage:
        raise damaged(
            path,
            "its lineage is missing, so its model cannot be rebuilt; it was not written by growjax, or "
            "its metadata file was lost",
        )
    lineage = {name: value for name, value in sealed_lineage.items() if name != "seal"}
    if sealed(lineage)["seal"] != sealed_lineage["seal"]:
        raise damaged(path, "its lineage was changed after it was written")
    if "births" not in lineage:
        raise CheckpointError(
            f"{path}: it was written by growjax {lineage.get('growjax')}, before lineages recorded the "
            "births of coordinates; this version does not read it"
        )
    faults = list(lineage_faults(lineage))
    if faults:
        raise damaged(path, "its lineage is not valid", faults)
    if path in Run(path.parent.parent).checkpoints():
        step, stage = lineage["step"], lineage["stage"]
        if step_of(path) != (step, stage):
            raise CheckpointError(
                f"{path} was renamed: it is of stage {stage} before step {step}, and would be taken for "
                f"another; call it {step:08d}-{stage:02d} again"
            )
    return lineage


def _alone(do: Callable[[], Any]) -> Any:
    """`hosts.together` for one process."""
    return do()


def load(
    path: str | Path,
    shapes: Any,
    *,
    only: Sequence[str] = (),
    together: Callable[[Callable[[], Any]], Any] = _alone,
) -> Any:
    """Read the state of a checkpoint, each array directly into its sharding.

    - `shapes`: a tree of `jax.ShapeDtypeStruct`s with shardings; the mesh need not be the one that the
      state was saved from.
    - `only`: the names of the parts of the state to read, such as "trained"; by default all.
    - `together`: runs the reading, and turns an error on one host into an error on all
      (`hosts.together`), since the checksums that follow need all hosts.

    Raises `CheckpointError` that lists every leaf that is missing, left over or of another shape or
    type, and `DamagedError` for files that are truncated or altered.
    """
    path, leaves = Path(path).absolute(), named(shapes)
    expected = {name: leaf for name, leaf in leaves.items() if leaf.size}
    lineage = read_lineage(path)
    with _damage(path), _in_orbax():
        metadata: Any = ocp.metadata(str(path), "state").metadata
        if metadata is None:
            raise ValueError("the list of its arrays cannot be read")
        stored = {name: (tuple(x.shape), str(x.dtype)) for name, x in metadata.items()}
    if stored.keys() != lineage["checksums"].keys():
        raise damaged(path, "its arrays are not those that its lineage lists")
    faults = [f"{name}: not in the checkpoint" for name in expected if name not in stored]
    for name, (shape, dtype) in stored.items():
        leaf = expected.get(name)
        if leaf is None:
            if not only or name.split(".")[0] in only:
                faults.append(f"{name}: in the checkpoint only")
        elif (shape, dtype) != (tuple(leaf.shape), str(leaf.dtype)):
            faults.append(
                f"{name}: {dtype}{list(shape)} in the checkpoint, expected "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
    hint = (
        "A checkpoint of another size is loaded at its own size and then grown, by `growjax grow`."
    )
    raise_all(CheckpointError, f"{path} does not hold this state. {hint}", sorted(faults))
    context = ocp.Context()
    context.pytree.loading.partial_load = bool(only)

    def read() -> dict[str, Any]:
        with _damage(path), _in_orbax(), context:
            arrays: Any = ocp.load(str(path), expected, checkpointable_name="state")
            return {name: arrays[name] for name in expected}

    read_arrays = together(read)
    filled = [read_arrays[name] if leaf.size else _empty(leaf) for name, leaf in leaves.items()]
    state = jax.tree.unflatten(jax.tree.structure(shapes), filled)
    read_sums, written_sums = numbered(state, jax.jit(checksums)), lineage["checksums"]
    changed = [name for name in expected if read_sums[name] != written_sums[name]]
    if changed:
        raise damaged(path, "some arrays are not as they were written", changed)
    return state


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The array of a shape without entries, in its sharding."""
    if leaf.sharding is None:
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )


def numbered(state: Any, checksums: Callable[[Any], list[Any]]) -> dict[str, int]:
    """The checksum of every leaf with entries, by its name.

    `checksums` is a compiled `programs.step.checksums`.
    """
    sums = zip(named(state).items(), map(int, jax.device_get(checksums(state))), strict=True)
    return {name: number for (name, leaf), number in sums if leaf.size}


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by readable names such as `trained.blocks.block.mlp.up`, in their order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def sealed(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage with its seal, a checksum of its text."""
    # Through JSON, so that the text is the same before writing and after reading (tuples become lists)
    lineage = json.loads(json.dumps(lineage))
    return {**lineage, "seal": seal_of(lineage)}


# The fields of a lineage -------------------------------------------------------------------------

_Check = Callable[[Any], bool]


def _is(*types: type) -> _Check:
    """A check that a value is an instance of one of these types."""
    # In Python a bool is an int, which is not meant
    return lambda x: isinstance(x, types) and (bool in types or not isinstance(x, bool))


def _count(x: Any) -> bool:
    """Whether this is a whole number of 0 or more."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _counts(x: Any) -> bool:
    """Whether this is a dict of whole numbers."""
    return isinstance(x, dict) and all(_count(n) for n in x.values())


def _births(x: Any) -> bool:
    """Whether this is `{axis: [[birth, number of neighbours with it], ...]}`."""
    if not isinstance(x, dict) or not all(isinstance(runs, list) for runs in x.values()):
        return False
    pairs = [pair for runs in x.values() for pair in runs]
    return all(isinstance(p, list) and len(p) == 2 and all(map(_count, p)) for p in pairs)


def _number(x: Any, most: float = math.inf) -> bool:
    """Whether this is a finite number from 0 to `most`."""
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and math.isfinite(x) and 0 <= x <= most


def _start(x: Any) -> bool:
    """Whether this describes the model that the run started from, or None."""
    if x is None:
        return True
    if not isinstance(x, dict):
        return False
    if not all(isinstance(x.get(k), str) for k in ("folder", "is", "digest")):
        return False
    if not isinstance(x.get("pretrained"), str | None):
        return False
    # Tokens and FLOPs of a model from elsewhere are unknown, and None
    return all(x.get(k, 0) is None or _count(x.get(k)) for k in ("tokens", "flops"))


def _fork(x: Any) -> bool:
    """Whether this describes the run, and its step, that the run was forked from, or None."""
    if x is None:
        return True
    if not isinstance(x, dict) or not (_count(x.get("step")) and _count(x.get("stage"))):
        return False
    changes = x.get("changes")
    if not isinstance(x.get("run"), str) or not isinstance(changes, list):
        return False
    return all(isinstance(change, str) for change in changes)


# Each field with its value in words, for messages, and its check
_FIELDS: dict[str, tuple[str, _Check]] = {
    "growjax": ("the version that wrote it", _is(str)),
    "plan": ("a name", _is(str)),
    "model": ("a saved configuration", _is(dict)),
    "optimizer": ("a saved optimizer", _is(dict)),
    "operators": ("saved operators", lambda x: isinstance(x, list) and all(map(_is(dict), x))),
    "seed": ("a whole number", _count),
    "tokenizer": ("a name", _is(str)),
    "gated": ("true or false", _is(bool)),
    "level": ("a number from 0 to 1", lambda x: _number(x, 1.0)),
    "sizes": ("whole numbers by axis", _counts),
    "births": ("the births of coordinates by axis", _births),
    "stage": ("a whole number", _count),
    "step": ("a whole number", _count),
    "tokens": ("a whole number", _count),
    "flops": ("a whole number", _count),
    "seconds": ("a number of 0 or more", _number),
    "data": ("a digest", _is(str)),
    "reference": ("a digest or nothing", _is(str, type(None))),
    "parent": ("a checkpoint's name or nothing", _is(str, type(None))),
    "start": ("the model that it started from, or nothing", _start),
    "fork": ("the run that it was forked from, or nothing", _fork),
    "checksums": ("whole numbers by leaf", _counts),
    "certificate": ("a saved certificate or nothing", _is(dict, type(None))),
}
# Fields that lineages have had only lately, or of some stages only
_LATER: dict[str, tuple[str, _Check]] = {
    "loss": ("the name of a loss or nothing", _is(str, type(None))),
    "losses": ("the latest losses", lambda x: isinstance(x, list) and all(map(_is(float), x))),
    "fixed": ("a digest", _is(str)),
    "ended": (
        "pairs of a stage and its steps",
        lambda x: isinstance(x, list) and all(map(_pair, x)),
    ),
}


def _pair(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(_count, x))


def lineage_faults(lineage: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a lineage that are missing or not valid, one line each; other fields are ignored."""
    for name, (expected, check) in _FIELDS.items():
        if name not in lineage:
            yield f"{name}: expected {expected}, and it is missing"
        elif not check(lineage[name]):
            yield f"{name}: expected {expected}, got {repr(lineage[name])[:80]}"
    for name, (expected, check) in _LATER.items():
        if name in lineage and not check(lineage[name]):
            yield f"{name}: expected {expected}, got {repr(lineage[name])[:80]}"


@contextlib.contextmanager
def _clear(headline: str) -> Iterator[None]:
    """Turn any error inside into a `CheckpointError` with a headline and the reason."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{headline}: {_reason(error)}") from error


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn any error inside into a `DamagedError`: Orbax and TensorStore raise many kinds of errors."""
    try:
        yield
    except Exception as error:
        raise damaged(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextlib.contextmanager
def _in_orbax() -> Iterator[None]:
    """Silence Orbax, and keep Ctrl-C out of it.

    Orbax logs its ordinary work as warnings, and as errors what it raises as well.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _uninterrupted():
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Raise the `KeyboardInterrupt` of Ctrl-C at the end of the `with`; a second one ends the process.

    Python raises it wherever it is. In a callback of Orbax's event loop it is printed and lost, with the
    callback, and the program goes on or waits for ever.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # Nothing is raised: signals are handled otherwise, as by `growjax.train`
        yield
        return
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt
