"""Timing things against each other in one process, in turn, so that a slow minute slows them all."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import growjax as gj
from growjax.models import GPT, GPTConfig


KEPT = {"hugetlb": 1, "arena_max": 1, "mmap_threshold": 1 << 32, "trim_threshold": 1 << 36}
TUNABLES = ":".join(f"glibc.malloc.{name}={value}" for name, value in KEPT.items())


# MKL, which torch computes products with, uses AVX-512 on Intel's processors only, by this function
_INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }"


def keep_memory(*, full_mkl: bool = False) -> None:
    """Run the benchmark again in a process with huge pages and one arena that keeps what is freed.

    That must be asked for before Python starts, so this returns only in the second process. With
    `full_mkl`, MKL uses all instructions of the processor there, if a C compiler is installed.
    """
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = {"GLIBC_TUNABLES": TUNABLES}
        if full_mkl and (library := intel_library(Path(folder))):
            settings["LD_PRELOAD"] = str(library)
        again = [sys.executable, "-m", "experiments.bench", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env={**os.environ, **settings}, check=False).returncode)


def intel_library(folder: Path) -> Path | None:
    """A library that, loaded before MKL, lets it use all instructions; None without a C compiler."""
    source, library = folder / "intel.c", folder / "intel.so"
    source.write_text(_INTEL)
    for compiler in ("cc", "gcc", "clang"):
        if shutil.which(compiler):
            subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
            return library
    return None


def machine() -> str:
    """The processor and the number of cores that this process may use, or the accelerator."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in values.items()}
    model = fields.get("model name", model)
    number = "/".join(fields[key] for key in ("cpu family", "model", "stepping") if key in fields)
    wide = ", AVX-512" if "avx512f" in fields.get("flags", "").split() else ""
    return f"{model} ({number}{wide}), {len(os.sched_getaffinity(0))} cores"


class Times(NamedTuple):
    """Milliseconds `[rounds]` on the clock, and of all cores: a busy machine moves the first more."""

    wall: np.ndarray
    cpu: np.ndarray


def race(runners: dict[str, Callable[[], object]], rounds: int = 30) -> dict[str, Times]:
    """The times of each runner; every round runs all of them, in changing order."""
    for run in runners.values():
        for _ in range(3):
            jax.block_until_ready(run())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    names = list(runners)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(runners[name]())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name].append((1e3 * wall, 1e3 * cpu))
    return {name: Times(*np.array(t).T) for name, t in times.items()}


def product_speed(size: int, *products: Callable[[], object]) -> float:
    """FLOPs a second of the fastest of some products of two matrices of `size` rows and columns."""
    times = medians(race({str(i): product for i, product in enumerate(products)}))
    return 2 * size**3 / (min(times.values()) / 1e3)


def ratio(a: Times, b: Times) -> dict[str, Any]:
    """The median of the ratios round by round, with its quartiles, and that of the cores' time."""
    low, middle, high = np.quantile(a.wall / b.wall, [0.25, 0.5, 0.75]).round(4).tolist()
    cpu = round(float(np.median(a.cpu / b.cpu)), 4)
    return {"ratio": middle, "quartiles": [low, high], "cpu_ratio": cpu}


def medians(times: dict[str, Times]) -> dict[str, float]:
    """The median milliseconds of each runner on the clock."""
    return {name: round(float(np.median(t.wall)), 2) for name, t in times.items()}


def gpt(layers: int, **options) -> GPT:
    """The benchmarks' decoder: embed 256, 4 heads of 64, mlp 1024, 1024 words."""
    config = GPTConfig(
        layers=layers,
        embed=256,
        heads=4,
        head_dim=64,
        mlp=1024,
        vocab=1024,
        positions=128,
        **options,
    )
    return eqx.filter_jit(GPT)(config, key=jax.random.key(0))


def loss(model, tokens) -> jax.Array:
    """Mean next-token cross-entropy, in nats."""
    logits = jax.vmap(model)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def tokens(batch: int = 16, length: int = 128) -> jax.Array:
    """Random token ids `[batch, length + 1]`."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 1024, (batch, length + 1)))


def trainer(model, objective: Callable, *, donate: bool = True) -> Callable[[], object]:
    """One AdamW step of `objective(model, i) -> scalar` per call, state kept and donated."""
    trained, rest = gj.partition(model)
    trained = jax.tree.map(jnp.copy, trained)
    tx = optax.adamw(1e-3)
    state = tx.init(trained)

    def step(trained, state, i):
        grads = jax.grad(lambda t: objective(eqx.combine(t, rest), i))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    step = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    carry = [trained, state, 0]

    def run():
        carry[:2] = step(carry[0], carry[1], jnp.asarray(carry[2]))
        carry[2] += 1
        return carry[0]

    return run
