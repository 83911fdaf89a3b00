"""Training a decoder on long sequences: tokens a second and memory, over PyTorch with fused attention.

One sequence a step, of 1,024, 4,096 and 16,384 tokens, forward, backward and AdamW: two layers of embed
256 in float32 with 1,024 words. growjax takes what it takes by itself (`growjax.nn.attend`, and the loss
that never holds all logits), PyTorch `scaled_dot_product_attention`; its MKL uses all instructions, as in
`torch_race`. Both are timed in one process, in turn, and the memory is that by which a process of its own
grows: scores of the longest sequence alone would take 4 GiB a layer. The ratio is that of the longest
sequence. Without PyTorch there is none; on an accelerator the model is one of 350M in bfloat16, and
growjax is alone.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._race import keep_memory, machine, medians, race
from experiments.bench.torch_race import Sizes, decoder, growjax_step, torch_step


LENGTHS = (1024, 4096, 16384)
SMALL = Sizes(layers=2, embed=256, heads=4, words=1024, length=1024, batch=1)
LARGE = Sizes(24, 1024, 16, 50_304, 1024, 1, "bfloat16")


def run() -> dict:
    """Race both at every length, and measure the memory of each in processes of their own."""
    # Memory that is kept is not seen to be given back, so the children have none of these settings
    keep_memory(full_mkl=True)
    libraries = ["growjax"]
    if importlib.util.find_spec("torch") and jax.default_backend() == "cpu":
        libraries.append("torch")
    result: dict[str, Any] = {"ratio": None, "goal": 1.0}
    for length in LENGTHS:
        times = race({name: _step(name, length) for name in libraries}, rounds=_rounds(length))
        speed = {name: round(length / (t / 1e3)) for name, t in medians(times).items()}
        memory = {name: _memory(name, length) for name in libraries}
        if "torch" in times:
            ratio = float(np.median(times["torch"].wall / times["growjax"].wall))
            result["ratio"] = round(ratio, 3)
        print(f"{length} tokens: {speed} a second, {memory} MiB")
        result[str(length)] = {
            "tokens_per_second": speed,
            "mebibytes": memory,
            "ratio": result["ratio"],
        }
    return {**result, "machine": machine()}


def _rounds(length: int) -> int:
    return max(4, 16 * LENGTHS[0] // length)


def _step(library: str, length: int) -> Callable[[], object]:
    sizes = (SMALL if jax.default_backend() == "cpu" else LARGE)._replace(length=length)
    if library == "growjax":
        return growjax_step(sizes)
    torch = importlib.import_module("torch")
    return torch_step(torch, decoder(torch, sizes), sizes)


def _memory(library: str, length: int) -> int:
    """MiB by which a process of its own grows with the model and two steps."""
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import grow; grow({library!r}, {length})"],
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def grow(library: str, length: int) -> None:
    """Print by how many MiB this process grows; on an accelerator, the most that is in use on it."""
    importlib.import_module(library)
    jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(8)))
    before = _most()
    step = _step(library, length)
    for _ in range(2):
        jax.block_until_ready(step())
    on_device = jax.devices()[0].memory_stats() if library == "growjax" else None
    used = on_device["peak_bytes_in_use"] if on_device else 1024 * (_most() - before)
    print(json.dumps(round(used / 2**20)))


def _most() -> int:
    """The most KiB that this process has held, and not, as `getrusage` has it, its parent before it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
