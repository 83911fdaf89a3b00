"""Checkpoints that say what they are: arrays under readable names, and the lineage that led to them.

Orbax writes the arrays, in the background and from every host, into a folder that gets its name only
when it is whole. The lineage travels inside: the plan and the stage, what the model grew from and by
which operators, what was spent, and the certificate of the last growth. It is all that is needed to
rebuild the model; nothing is ever unpickled.

Loading is strict. A checkpoint of other shapes is refused with a list of every leaf that differs: a
small model becomes a large one through a growth operator and in no other way.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from growjax.errors import CheckpointError, DamagedError, raise_all
from growjax.programs.step import checksums
from growjax.runs.run import checkpoints_in, refuse_pattern, step_of


# What Orbax has not finished, and what was not removed to its end, have these in their names
_PARTIAL, _DROPPED, _DAMAGED = "orbax-checkpoint-tmp", ".dropped", ".damaged"
_KEY = "growjax"


class Checkpoints:
    """The checkpoints of one run, `STEP-STAGE` each; saving returns while the writing goes on.

    **Arguments**

    - `folder`: where they are, and where nothing else should be.
    - `keep_last`: how many of the latest stay.
    - `keep_every`: those at multiples of so many steps stay as well; None keeps no more.
    - `keep`: and those before these steps.

    The first checkpoint of every stage stays whatever is asked for: it is what the later ones grew from.
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
        self._writing: tuple[Path, Any] | None = None

    def clean(self) -> None:
        """Remove what killed sessions left half written or half removed; for the owner of the run."""
        with contextlib.suppress(FileNotFoundError), _clear(f"{self.folder} cannot be cleaned"):
            for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
                if _PARTIAL in path.name or path.name.endswith(_DROPPED):
                    shutil.rmtree(path)

    def path(self, step: int, stage: int) -> Path:
        """Where the checkpoint before `step`, in `stage`, is or would be."""
        return self.folder / f"{step:08d}-{stage:02d}"

    def save(self, step: int, stage: int, state: Any, lineage: Mapping[str, Any]) -> Path:
        """Start to write a state; its arrays may be donated as soon as this returns.

        Waits for the one before. Raises `CheckpointError` if either cannot be written, or is there.
        """
        self.wait()
        path = self.path(step, stage)
        with _clear(f"{path} could not be written"), _quiet():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writing = path, write(path, state, lineage)
        return path

    def wait(self) -> None:
        """Return once nothing is being written, and drop what need not be kept."""
        if self._writing is None:
            return
        (path, writing), self._writing = self._writing, None
        with _clear(f"{path} could not be written"), _quiet():
            writing.result()
        if jax.process_index() == 0:
            for old in self._superseded():
                # One that is half removed must not look whole
                dropped = old.with_name(old.name + _DROPPED)
                with _clear(f"{old} could not be removed"):
                    old.rename(dropped)
                    shutil.rmtree(dropped)

    def _superseded(self) -> list[Path]:
        whole = checkpoints_in(self.folder)
        kept = set(whole[-self.keep_last :]) if self.keep_last else set()
        stages: set[int] = set()
        for path in whole:
            step, stage = step_of(path)
            wanted = step in self.keep or (self.keep_every and step % self.keep_every == 0)
            if wanted or stage not in stages:
                kept.add(path)
            stages.add(stage)
        return [path for path in whole if path not in kept]


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint another name, so that nothing goes on from it, and return that."""
    for n in range(1, 1000):
        target = path.with_name(f"{path.name}{_DAMAGED}{n if n > 1 else ''}")
        if not target.exists():
            with _clear(f"{path} could not be renamed"):
                path.rename(target)
            return target
    raise CheckpointError(f"{path}: too many damaged checkpoints of this name; remove some")


def damaged(path: Path, reason: str, faults: Sequence[str] = ()) -> DamagedError:
    """The error for a checkpoint that cannot be read: what to remove, and where its run goes on then."""
    listed = "".join(f"\n  - {fault}" for fault in faults)
    earlier = [p for p in checkpoints_in(path.parent) if p.name < path.name]
    if not checkpoints_in(path.parent):
        return DamagedError(f"{path} is not a whole checkpoint: {reason}{listed}")
    then = "the run begins anew"
    if earlier:
        then = f"the run goes on from step {step_of(earlier[-1])[0]} ({earlier[-1].name})"
    return DamagedError(
        f"{path} is not a whole checkpoint: {reason}. Remove that folder, and {then}; "
        f"`growjax train --fall-back`, or Options(fall_back=True), sets it aside and does so{listed}"
    )


def write(path: Path, state: Any, lineage: Mapping[str, Any]) -> Any:
    """Start to write one checkpoint; `.result()` returns when it is whole."""
    refuse_pattern(path)
    metadata: Any = {_KEY: sealed(lineage)}
    return ocp.save_async(str(path.absolute()), named(state), custom_metadata=metadata)


def read_lineage(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises `CheckpointError` if there is none, and `DamagedError` if it is not whole or was edited.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint, and there is no such folder")
    with _damage(path), _quiet():
        metadata = ocp.metadata(str(path)).custom_metadata
    sealed_lineage = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(sealed_lineage, dict) or "seal" not in sealed_lineage:
        raise damaged(
            path,
            "its lineage is missing, so nobody can say what it is; it was not written by growjax, or "
            "its metadata file was lost",
        )
    lineage = {name: value for name, value in sealed_lineage.items() if name != "seal"}
    if sealed(lineage)["seal"] != sealed_lineage["seal"]:
        raise damaged(path, "its lineage was changed after it was written")
    if "births" not in lineage:
        raise CheckpointError(
            f"{path}: it was written before checkpoints said which growth added what, by growjax "
            f"{lineage.get('growjax')}; this version does not read it"
        )
    faults = list(lineage_faults(lineage))
    if faults:
        raise damaged(path, "its lineage makes no sense", faults)
    return lineage


def _alone(do: Callable[[], Any]) -> Any:
    return do()


def load(
    path: str | Path,
    shapes: Any,
    *,
    only: Sequence[str] = (),
    together: Callable[[Callable[[], Any]], Any] = _alone,
) -> Any:
    """The state in a checkpoint, each array born where its shape says.

    `shapes` is a tree of `jax.ShapeDtypeStruct`s with shardings, on this or another mesh than that
    which saved it; `only` reads the parts of the state with these names. `together` runs the reading, and
    makes an error of one host one of all (`hosts.together`): what follows needs all of them.

    Raises `CheckpointError` that lists every leaf that is missing, left over or of another shape or
    type, and `DamagedError` for files that are truncated or altered.
    """
    path, wanted = Path(path).absolute(), named(shapes)
    lineage = read_lineage(path)
    with _damage(path), _quiet():
        stored: Any = ocp.metadata(str(path), "state").metadata
        have = {name: (tuple(x.shape), str(x.dtype)) for name, x in stored.items()}
    if have.keys() != lineage["checksums"].keys():
        raise damaged(path, "its arrays are not those that its lineage lists")
    faults = [f"{name}: not in the checkpoint" for name in wanted if name not in have]
    left = [name for name in have if not only or name.split(".")[0] in only]
    faults += [f"{name}: in the checkpoint only" for name in left if name not in wanted]
    for name in wanted.keys() & have.keys():
        (shape, dtype), want = have[name], wanted[name]
        if (shape, dtype) != (tuple(want.shape), str(want.dtype)):
            faults.append(
                f"{name}: {dtype}{list(shape)} in the checkpoint, expected "
                f"{want.dtype}{list(want.shape)}"
            )
    hint = "A checkpoint of another size is loaded as what it is and then grown, by `growjax grow`."
    raise_all(CheckpointError, f"{path} does not hold this state. {hint}", sorted(faults))
    context = ocp.Context()
    context.pytree.loading.partial_load = bool(only)

    def read() -> list[Any]:
        with _damage(path), _quiet(), context:
            arrays: Any = ocp.load(str(path), wanted, checkpointable_name="state")
            return [arrays[name] for name in wanted]

    leaves = together(read)
    state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    found, written = numbered(state, jax.jit(checksums)), lineage["checksums"]
    changed = [name for name in wanted if found[name] != written[name]]
    if changed:
        raise damaged(path, "some arrays are not what was written", changed)
    return state


def numbered(state: Any, checksums: Callable[[Any], list[Any]]) -> dict[str, int]:
    """The checksum of every leaf, by its name."""
    return dict(zip(named(state), map(int, jax.device_get(checksums(state))), strict=True))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their readable names, in its order: `trained.blocks.block.mlp.up`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def sealed(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage with a checksum of its own text."""
    lineage = json.loads(json.dumps(lineage))
    text = json.dumps(lineage, sort_keys=True)
    return {**lineage, "seal": hashlib.sha256(text.encode()).hexdigest()}


# The fields of a lineage, and what each may be; "start" and "certificate" have fields of their own
_Check = Callable[[Any], bool]


def _is(*types: type) -> _Check:
    # A bool counts as an int in Python
    return lambda x: isinstance(x, types) and (bool in types or not isinstance(x, bool))


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _counts(x: Any) -> bool:
    return isinstance(x, dict) and all(_count(n) for n in x.values())


def _births(x: Any) -> bool:
    """Whether it is `{axis: [[birth, how many in a row], ...]}`."""
    if not isinstance(x, dict) or not all(isinstance(runs, list) for runs in x.values()):
        return False
    pairs = [pair for runs in x.values() for pair in runs]
    return all(isinstance(p, list) and len(p) == 2 and all(map(_count, p)) for p in pairs)


def _number(x: Any, most: float = math.inf) -> bool:
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and math.isfinite(x) and 0 <= x <= most


def _start(x: Any) -> bool:
    if x is None:
        return True
    words = isinstance(x, dict) and all(
        isinstance(x.get(k), str) for k in ("folder", "is", "digest")
    )
    return words and all(x.get(k, 0) is None or _count(x.get(k)) for k in ("tokens", "flops"))


def _fork(x: Any) -> bool:
    if x is None:
        return True
    counts = isinstance(x, dict) and _count(x.get("step")) and _count(x.get("stage"))
    return (
        counts
        and isinstance(x.get("run"), str)
        and isinstance(x.get("changes"), list)
        and all(isinstance(change, str) for change in x["changes"])
    )


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
    "start": ("what it started from, or nothing", _start),
    "fork": ("what it was forked from, or nothing", _fork),
    "checksums": ("whole numbers by leaf", _counts),
    "certificate": ("a saved certificate or nothing", _is(dict, type(None))),
}


def lineage_faults(lineage: Mapping[str, Any]) -> Iterator[str]:
    """Every field of a lineage that is missing or not what it should be; others may stand beside them."""
    for name, (expected, check) in _FIELDS.items():
        if name not in lineage:
            yield f"{name}: expected {expected}, and it is missing"
        elif not check(lineage[name]):
            yield f"{name}: expected {expected}, got {repr(lineage[name])[:80]}"


@contextlib.contextmanager
def _clear(what: str) -> Iterator[None]:
    """One kind of error for all that can go wrong below, and the reason with it."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what}: {_reason(error)}") from error


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading is damage: Orbax and TensorStore raise errors of any kind."""
    try:
        yield
    except Exception as error:
        raise damaged(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax tells its whole story at the warning level; errors are raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
