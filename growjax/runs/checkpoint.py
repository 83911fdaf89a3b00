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
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from growjax.errors import CheckpointError, raise_all
from growjax.programs.step import checksums


_NAME = re.compile(r"(\d{8})-(\d{2})")
_KEY = "growjax"


class Checkpoints:
    """The checkpoints of one run, `STEP-STAGE` each; saving returns while the writing goes on.

    **Arguments**

    - `folder`: where they are, and where nothing else should be.
    - `keep_last`: how many of the latest stay.
    - `keep_every`: those at multiples of so many steps stay as well; None keeps no more.

    The first checkpoint of every stage stays whatever is asked for: it is what the later ones grew from.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 2, keep_every: int | None = None):
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_every = keep_last, keep_every
        self._writing: tuple[Path, Any] | None = None

    def found(self) -> list[Path]:
        """The checkpoints that are whole, oldest first."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))
        return []

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
                shutil.rmtree(old)

    def _superseded(self) -> list[Path]:
        found = self.found()
        kept = set(found[-self.keep_last :]) if self.keep_last else set()
        stages: set[str] = set()
        for path in found:
            step, stage = path.name.split("-")
            if stage not in stages or (self.keep_every and int(step) % self.keep_every == 0):
                kept.add(path)
            stages.add(stage)
        return [path for path in found if path not in kept]


def write(path: Path, state: Any, lineage: Mapping[str, Any]) -> Any:
    """Start to write one checkpoint; `.result()` returns when it is whole."""
    metadata: Any = {_KEY: sealed(lineage)}
    return ocp.save_async(str(path.absolute()), named(state), custom_metadata=metadata)


def read_lineage(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says about itself; raises `CheckpointError` if it is not whole or was edited."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint, and there is no such folder")
    with _clear(f"{path} is not a whole checkpoint"), _quiet():
        found = _plain(ocp.metadata(str(path)).custom_metadata).get(_KEY)
    if not isinstance(found, dict) or "seal" not in found:
        raise CheckpointError(
            f"{path}: its lineage is missing, so nobody can say what it is; it was not written by "
            "growjax, or its metadata file was lost"
        )
    lineage = {name: value for name, value in found.items() if name != "seal"}
    if sealed(lineage)["seal"] != found["seal"]:
        raise CheckpointError(f"{path}: its lineage was changed after it was written")
    return lineage


def load(path: str | Path, shapes: Any, *, only: Sequence[str] = ()) -> Any:
    """The state in a checkpoint, each array born where its shape says.

    `shapes` is a tree of `jax.ShapeDtypeStruct`s with shardings, on this or another mesh than that
    which saved it; `only` reads the parts of the state with these names. Raises `CheckpointError` that
    lists every leaf that is missing, left over or of another shape or type, and for files that are
    truncated or altered.
    """
    path, wanted = Path(path).absolute(), named(shapes)
    with _clear(f"{path} is not a whole checkpoint"), _quiet():
        there: Any = ocp.metadata(str(path), "state").metadata
    faults = [f"{name}: not in the checkpoint" for name in wanted if name not in there]
    left = [name for name in there if not only or name.split(".")[0] in only]
    faults += [f"{name}: in the checkpoint only" for name in left if name not in wanted]
    for name in wanted.keys() & there.keys():
        have, want = there[name], wanted[name]
        if (tuple(have.shape), str(have.dtype)) != (tuple(want.shape), str(want.dtype)):
            faults.append(
                f"{name}: {have.dtype}{list(have.shape)} in the checkpoint, expected "
                f"{want.dtype}{list(want.shape)}"
            )
    hint = "A checkpoint of another size is loaded as what it is and then grown, by `growjax grow`."
    raise_all(CheckpointError, f"{path} does not hold this state. {hint}", sorted(faults))
    context = ocp.Context()
    context.pytree.loading.partial_load = bool(only)
    with _clear(f"{path} cannot be read"), _quiet(), context:
        arrays: Any = ocp.load(str(path), wanted, checkpointable_name="state")
    state = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in wanted])
    found = numbered(state, jax.jit(checksums))
    written = read_lineage(path)["checksums"]
    changed = [name for name in wanted if found[name] != written[name]]
    raise_all(CheckpointError, f"{path} cannot be read: these are not what was written:", changed)
    return state


def numbered(state: Any, checksums: Callable[[Any], list[Any]]) -> dict[str, int]:
    """The checksum of every leaf, by its name."""
    return dict(zip(named(state), map(int, jax.device_get(checksums(state))), strict=True))


def _plain(metadata: Any) -> dict[str, Any]:
    return metadata if isinstance(metadata, dict) else {}


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their readable names, in its order: `trained.blocks.block.mlp.up`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def sealed(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage with a checksum of its own text."""
    lineage = json.loads(json.dumps(lineage))
    text = json.dumps(lineage, sort_keys=True)
    return {**lineage, "seal": hashlib.sha256(text.encode()).hexdigest()}


@contextlib.contextmanager
def _clear(what: str) -> Iterator[None]:
    """One kind of error for all that can go wrong below, and the reason with it."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{what}: {reason[0][:300]}") from error


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
