"""Model FLOPs a second of a training step, over the peak of the device (MFU), and what bounds it.

On a GPU or TPU: a GPT of 350M parameters in bfloat16 at sequence 1024, over batches and what is kept
for the backward pass; the best of them counts. Elsewhere a GPT of 7M in float32, and the peak is the
speed of a large matrix product, since processors have none on paper. Steps are the trainer's own, timed
by `growjax.train.calibrate` on a batch that is there already: `trainer_overhead` is the rest of a run.

What bounds it: `product` is a large product's share of the peak, which no step can exceed; `layers` the
MFU of the layers alone, by the difference that half of them makes; `rest` the share of the time in which
no layer runs (the head and its loss, the embedding, the optimizer).
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._race import product_speed
from growjax.data import Causal
from growjax.models import GPTConfig
from growjax.runs.journal import peak_flops
from growjax.train import Plan, Schedule, Stage, calibrate


GOAL = 0.45
LARGE = GPTConfig(
    layers=24,
    embed=1024,
    heads=16,
    head_dim=64,
    mlp=4096,
    vocab=50_304,
    positions=1024,
    dtype="bfloat16",
)
SMALL = GPTConfig(layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=8192, positions=256)


def run() -> dict:
    """Time every setting, then the best one with half of its layers."""
    device = jax.devices()[0]
    known = peak_flops(device.device_kind)
    config, batches, size = (LARGE, (8, 16, 32), 8192) if known else (SMALL, (8,), 2048)
    square, product_of = jnp.ones((size, size), config.dtype or "float32"), jax.jit(jnp.matmul)
    product = product_speed(size, lambda: product_of(square, square))
    peak = known or product
    measured: dict[str, tuple[float, Plan]] = {}
    for plan in _settings(config, batches):
        try:
            flops, seconds = _timed(plan)
        except jax.errors.JaxRuntimeError as error:
            print(f"{plan.name}: {str(error).splitlines()[0][:100]}")
            continue
        measured[plan.name] = flops / seconds / peak, plan
        tokens = plan.batch * plan.objective.raw_length
        print(
            f"{plan.name}: MFU {measured[plan.name][0]:.3f}, {tokens / seconds:.0f} tokens a second"
        )
    if not measured:
        sys.exit("mfu: no setting ran, for the reasons above")
    best = max(measured, key=lambda name: measured[name][0])
    mfu, plan = measured[best]
    chosen: Any = plan.model
    smaller = dataclasses.replace(config, remat=chosen.remat, layers=config.layers // 2)
    half = dataclasses.replace(plan, model=smaller)
    (flops, seconds), (fewer, sooner) = _timed(plan), _timed(half)
    layers = 2 * (seconds - sooner)
    return {
        "ratio": round(mfu, 3),
        "goal": GOAL,
        "setting": best,
        "product": round(product / peak, 3),
        "layers": round(2 * (flops - fewer) / layers / peak, 3),
        "rest": round(1 - layers / seconds, 3),
        "peak_teraflops": round(peak / 1e12, 3),
        "device": device.device_kind,
    }


def _settings(config: GPTConfig, batches: tuple[int, ...]) -> Iterator[Plan]:
    """One step at each batch, with all kept for the backward pass and with products alone."""
    length = config.positions
    for batch, remat in itertools.product(batches, ("everything", "dots")):
        yield Plan(
            f"batch {batch}, {remat} kept",
            dataclasses.replace(config, remat=remat),
            (Stage(tokens=batch * length),),
            batch=batch,
            objective=Causal(length, packing="concat"),
            rate=Schedule(1e-3),
        )


def _timed(plan: Plan) -> tuple[float, float]:
    """Model FLOPs and seconds of a training step, on one device."""
    clock = calibrate(plan, name="mfu", warmup=3, steps=20, blocks=4, devices=jax.devices()[:1])
    ((op, nanoseconds),) = clock.entries
    return op.flops, nanoseconds / 1e9
