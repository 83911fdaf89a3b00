"""Growing about 100M parameters, in bytes read and written a second, over a plain copy of memory.

The process keeps its memory (`_race.keep_memory`): else the kernel clears every page of the grown model,
which takes longer than writing it, and the copy, which writes to the same place each time, does not pay
for that.
"""

import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from experiments.bench._race import keep_memory
from growjax.models import GPT, GPTConfig


def run() -> dict:
    """Race growth by width and by depth against `numpy.copyto` on warm memory."""
    keep_memory()
    config = GPTConfig(
        layers=12, embed=768, heads=12, head_dim=64, mlp=3072, vocab=32768, positions=1024
    )
    shapes = jax.eval_shape(lambda: GPT(config, key=jax.random.key(0)))
    small = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    size = sum(x.nbytes for x in jax.tree.leaves(small))
    source = np.ones(size // 4, np.float32)
    target = np.empty_like(source)

    def copy() -> int:
        np.copyto(target, source)
        return 2 * size

    def growth(op: Any) -> Any:
        def go() -> int:
            big = jax.block_until_ready(gj.grow(op, small, key=jax.random.key(0)))
            return size + sum(x.nbytes for x in jax.tree.leaves(big))

        return go

    runners = {
        "copy": copy,
        "mlp x 1.5": growth(gj.copy(mlp=4608)),
        "layers x 2": growth(gj.stack(layers=24)),
    }
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(12):
        for name, go in runners.items():
            start = time.perf_counter()
            moved = go()
            if turn >= 2:
                rates[name].append(moved / (time.perf_counter() - start) / 1e9)
    middle = {name: float(np.median(r)) for name, r in rates.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"GB/s: { {n: round(r, 1) for n, r in middle.items()} }; {size / 4e6:.0f}M parameters")
    worst = min(r for n, r in middle.items() if n != "copy")
    return {
        "ratio": round(worst / middle["copy"], 3),
        "goal": 0.6,
        "gigabytes_per_second": {n: round(r, 2) for n, r in middle.items()},
        "parameters": size // 4,
        "peak_bytes": peak,
        "small_bytes": size,
    }
