"""Settings that must be made before JAX is imported, Hypothesis profiles, and bounded memory."""

import gc
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


DEEP = os.environ.get("GROWJAX_PROFILE") == "deep"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not DEEP:
    # Halves the time of thousands of tiny compilations; the deep profile runs what users run.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = os.environ.get("XLA_FLAGS", "").split()
    # Every core has a worker of its own, so nothing is won by splitting a small program into 32 parts
    wanted = ["--xla_cpu_parallel_codegen_split_count=1"]
    if version("jaxlib").startswith("0.10."):
        # Its older code generator takes a quarter of the time; later ones abort on an unknown flag
        wanted.append("--xla_cpu_use_fusion_emitters=false")
    # Once each: workers inherit them, and the cache finds no program under a flag that stands twice
    flags += [flag for flag in wanted if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join(flags)

# What one process compiled, the others load: workers, the processes that tests start, the next run.
# A program is found by all that decides it, so what changed is compiled anew.
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / f"jax-{version('jaxlib')}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Of processes with several devices: each device waits in a collective on a thread of a shared pool. With
# a thread a core, all threads may wait for a device that has none, until XLA ends the process.
SEVERAL_DEVICES = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "32"}
# A program for CPUs of several processes, once it is loaded from the cache, ends them all (JAX 0.10)
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jaxlib.mlir import ir  # noqa: E402


def share_contexts(make: Callable[[], Any], uses: int) -> Callable[[], Any]:
    """MLIR contexts that lower many programs each: a new one loads dialects, a fifth of a small program.

    A context keeps the constants of all that it lowered, so it gives way to another after some uses. What
    is lowered while another program is being lowered has one of its own: it must not land inside that.
    """
    latest: list[Any] = []

    def shared() -> Any:
        if ir.Context.current is not None:
            return make()
        if not latest or next(lowered) % uses == 0:
            latest[:] = [make()]
        return latest[0]

    lowered = itertools.count(1)
    return shared


if not DEEP and hasattr(mlir, "make_ir_context"):  # JAX's own, and no promise; tests pass without
    mlir.make_ir_context = share_contexts(mlir.make_ir_context, 500)


def profile(name: str, examples: int, derandomize: bool) -> None:
    # The first example of a test compiles, so no deadline; the rest are cheap.
    checks = list(hypothesis.HealthCheck)
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        suppress_health_check=checks,
    )


profile("dev", 8, True)
profile("ci", 8, True)
profile("deep", 200, False)
hypothesis.settings.load_profile(os.environ.get("GROWJAX_PROFILE", "dev"))


# Tracing makes more garbage than Python expects, and looking for it after every 700 objects is slow
gc.set_threshold(200_000, 20, 100)
_done = itertools.count(1)


@pytest.fixture(autouse=True)
def _free_compiled_programs():
    """Every program maps memory of its own, and a process that maps too much is killed."""
    yield
    if next(_done) % 16 == 0 and _maps() > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def only_young_garbage():
    """A search for garbage passes over what was there before this module, which takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _maps() -> float:
    """How much this process maps, of the 65,530 that Linux allows."""
    path = pathlib.Path("/proc/self/maps")
    return path.read_bytes().count(b"\n") if path.exists() else math.inf


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def programs():
    """Compiled programs, shared by all runs of the tests."""
    return {}


@pytest.fixture(scope="session")
def run(tmp_path_factory, programs):
    """The plan and records of a run through every kind of stage, with a checkpoint every two steps."""
    from growjax.train import Options, train
    from tests.runs import every_kind, feed

    whole, folder = every_kind(), tmp_path_factory.mktemp("runs") / "whole"
    options = Options(evaluate_every=whole.flops / 6, held_out=6, save_every=2, keep_last=99)
    # Nothing that other tests compiled before: how many programs it takes is itself tested
    own = {}
    records = list(train(whole, feed(whole), run=folder, options=options, cache=own))
    programs.update(own)
    return whole, records, folder


@pytest.fixture
def saved(tmp_path):
    """Writes a model of `tests.folders` as a Hugging Face folder; returns the model and the folder."""
    from growjax import hf
    from tests.folders import build

    def write(name: str):
        model = build(name)
        hf.save(model, tmp_path / name)
        return model, tmp_path / name

    return write
