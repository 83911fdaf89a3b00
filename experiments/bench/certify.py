"""CPU seconds of a process's first certificate, and how many programs it compiles.

Three models, each in a process of its own without a cache of compiled programs: a stock GPT (2 layers,
embed 256, 4 heads, mlp 1024, float32) that grows by `msg` along `mlp`, the same along every axis, and
somebody else's network of plain `eqx.nn` layers, annotated, that grows by `copy`. `ratio` is of the first
one's seconds over `goal_seconds`; `again` is a second certificate of the same model in the same process.
The seconds are those of all cores, so they do not depend on what else the machine does.
"""

import json
import os
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from growjax.models import GPTConfig


GOAL = 2.0
COMPILED = "/jax/core/compile/backend_compile_duration"


def run() -> dict:
    """Certify every case in a process of its own, three times, and take the median."""
    rows = {}
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "experiments.bench.certify"]
    for name in CASES:
        results = []
        for _ in range(3):
            done = subprocess.run(
                [*command, name], env=environment, capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
        results.sort(key=lambda result: result["seconds"])
        rows[name] = results[1]
        print(f"{name}: {rows[name]}")
    return {
        "ratio": round(rows["msg"]["seconds"] / GOAL, 3),
        "goal": 1.0,
        "goal_seconds": GOAL,
        "cases": rows,
    }


def gpt():
    """A stock GPT and a batch of tokens."""
    config = GPTConfig(
        layers=2, embed=256, heads=4, head_dim=64, mlp=1024, vocab=1024, positions=128
    )
    return config.build(jax.random.key(0)), np.arange(128).reshape(2, 64)


class Network(eqx.Module):
    """Somebody else's model: residual blocks of plain layers in a list."""

    blocks: list[tuple[eqx.nn.LayerNorm, eqx.nn.Linear, eqx.nn.Linear]]
    head: eqx.nn.Linear

    def __init__(self, layers: int, embed: int, hidden: int):
        def linear(a: int, b: int) -> eqx.nn.Linear:
            return eqx.nn.Linear(a, b, key=jax.random.key(a + b))

        self.blocks = [
            (eqx.nn.LayerNorm(embed), linear(embed, hidden), linear(hidden, embed))
            for _ in range(layers)
        ]
        self.head = linear(embed, 10)

    def __call__(self, x):
        for norm, up, down in self.blocks:
            x = x + down(jnp.tanh(up(norm(x))))
        return self.head(x)


def network():
    """Its annotation and a batch of points."""
    specs = {
        "blocks.*.0": "~embed",
        "blocks.*.1": "embed -> mlp",
        "blocks.*.2": "mlp -> embed",
        "head": "embed -> classes",
    }
    model = gj.annotate(Network(6, 64, 128), specs, stacks={"blocks": "layers"})
    return model, np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)


CASES = {
    "msg": (gpt, lambda: gj.msg(mlp=2048)),
    "msg everywhere": (gpt, lambda: gj.msg(mlp=2048, embed=384, heads=6, layers=4)),
    "copy of an annotated network": (network, lambda: gj.copy(mlp=256)),
}


def measure(name: str) -> dict:
    """The first certificate of this process, and a second one."""
    make, operator = CASES[name]
    (model, batch), op = make(), operator()
    programs: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    result: dict = {}
    for attempt in ("seconds", "again"):
        programs.clear()
        start = time.process_time()
        certificate = gj.certify(op, model, batch, key=jax.random.key(1))
        result[attempt] = round(time.process_time() - start, 2)
        if not certificate.passed:
            raise SystemExit(f"certify: {certificate}")
        result["programs" if attempt == "seconds" else "programs_again"] = len(programs)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
