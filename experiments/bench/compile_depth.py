"""Seconds to compile a training step at 24 layers over those at 6: depth should cost next to nothing."""

import statistics
import time

import jax

from growjax.data import Causal
from growjax.models import GPTConfig
from growjax.programs.ahead import lower
from growjax.programs.step import Programs
from growjax.train import Layout, Plan, Schedule, Stage, cross_entropy


def run() -> dict:
    """Compile both three times, in turn."""
    seconds: dict[int, list[float]] = {6: [], 24: []}
    for attempt in range(3):
        for layers in seconds:
            config = GPTConfig(
                layers=layers, embed=256, heads=4, head_dim=64, mlp=1024, vocab=1024, positions=128
            )
            p = Plan(
                "compile",
                config,
                (Stage(tokens=8 * 128),),
                batch=8,
                objective=Causal(128, packing="concat"),
                rate=Schedule(1e-3),
                seed=attempt,
            )
            layout = Layout()
            mesh = layout.mesh(jax.devices()[:1])
            programs = Programs(p.optimizer.build(), cross_entropy, mesh, layout)
            start = time.perf_counter()
            lower(p, programs, ("step", 0, p.spans[0].works[0])).compile()
            seconds[layers].append(time.perf_counter() - start)
    middle = {layers: statistics.median(s) for layers, s in seconds.items()}
    print(f"seconds to trace and compile: { {n: round(s, 2) for n, s in middle.items()} }")
    return {
        "ratio": round(middle[24] / middle[6], 3),
        "goal": 1.1,
        "seconds": {str(n): [round(x, 2) for x in s] for n, s in seconds.items()},
    }
