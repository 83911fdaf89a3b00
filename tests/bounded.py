"""Llamas of random bf16 numbers, of any size, and the memory that growing one takes.

    python -m tests.bounded FOLDER LAYERS EMBED MLP VOCAB      # write one, in shards of 1 GB
    python -m tests.bounded --measure FOLDER                   # the peak of growing a small one

`tests/test_bounded.py` measures a small one, and docs/pretrained.md says how to measure a large one.
"""

import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from growjax import draws, hf
from growjax.axes import axes_of, put
from growjax.deferred import Deferred
from growjax.growth import chain, copy, stack
from growjax.growth.leafwise import grow_deferred
from growjax.hf.convert import load_deferred, with_dtype
from growjax.hf.stock import buffers_of, shapes_of
from growjax.models import LlamaConfig


def write(folder: Path, layers: int, embed: int, mlp: int, vocab: int, shard: int = 10**9) -> None:
    """Write a Llama of random numbers in bf16, a layer at a time."""
    config = LlamaConfig(
        layers,
        embed,
        heads=embed // 64,
        kv_heads=max(embed // 256, 1),
        head_dim=64,
        mlp=mlp,
        vocab=vocab,
    )
    shapes = shapes_of(config)
    values: dict[tuple, Any] = {
        axes_of(shapes)[path].steps: x for path, x in buffers_of(config).items()
    }
    for slot in axes_of(shapes).of_kind("param"):
        if slot.value is not None:
            shape, name = slot.value.shape, zlib.crc32(slot.path.encode())
            values[slot.steps] = Deferred(
                shape, np.dtype(jnp.bfloat16), _normal(shape, name, slot.init)
            )
    hf.save(put(shapes, values), folder, shard=shard)


def _normal(shape: tuple[int, ...], name: int, init: str) -> Callable[[int, int], np.ndarray]:
    """A function that draws rows: gains around 1, weights of about the size that training leaves."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = []
        for i in range(start, stop):
            draw = np.random.default_rng([name, i]).standard_normal(shape[1:], np.float32)
            rows.append((0.03 * draw + (init == "ones")).astype(jnp.bfloat16))
        return np.stack(rows)

    return read


def peak() -> int:
    """The most memory that this process has had at once since `forget_peak`, in bytes."""
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


def forget_peak() -> int:
    """Let `peak` count from now on; returns what it is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def measure(folder: Path) -> dict[str, int]:
    """The peak of memory, over what there was before, and the size of a new model of some 80 MB."""
    before, key = 0, draws.key(0)
    # What the first one takes is that of compilers and libraries
    for name, layers, mlp, vocab in (("tiny", 2, 96, 300), ("small", 10, 512, 20_000)):
        op = chain(copy(mlp=mlp * 3 // 2), stack(layers=layers * 3 // 2, branch="zero"))
        write(folder / name, layers, 512, mlp, vocab)
        before = forget_peak()
        model = load_deferred(folder / name, dtype="float32")
        grown = grow_deferred(op, model, folder / "scratch", key=key, small=2**16)
        hf.save(with_dtype(grown, "bfloat16"), folder / f"{name}-grown", shard=30_000_000)
    new = sum(file.stat().st_size for file in (folder / "small-grown").glob("*.safetensors"))
    return {"peak": peak() - before, "new": new}


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
