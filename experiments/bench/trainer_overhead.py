"""Tokens per second of the trainer over those of a bare loop around one jitted step.

The same model, optimizer and batches, in turns of ten steps in one process. The trainer makes its own
batches and keeps its clock; the bare loop calls its step and reads each loss while the next step runs.
Without that, steps are queued before their inputs are there: the buffers that a step gives away are then
not free yet when those of the next one are made, and the loop is slower by some percent.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import growjax as gj
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.models import GPTConfig
from growjax.train import CorpusFeed, Plan, Schedule, Stage, Step, cross_entropy, train


BATCH, LENGTH, TURN, TURNS = 8, 128, 10, 24


def run() -> dict:
    """Race them turn by turn."""
    config = GPTConfig(
        layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=384, positions=LENGTH
    )
    p = Plan(
        "overhead",
        config,
        (Stage(tokens=(TURNS + 2) * TURN * BATCH * LENGTH),),
        batch=BATCH,
        objective=Causal(LENGTH, packing="concat"),
        rate=Schedule(1e-3),
    )
    text = [" ".join(str(n * n % 9973) for n in range(k, k + 400)) for k in range(0, 80_000, 400)]
    feed = CorpusFeed(p, *(Corpus.of(part, ByteTokenizer()) for part in (text[10:], text[:10])))
    records = train(p, feed)

    def trainer() -> None:
        steps = 0
        while steps < TURN:
            steps += isinstance(next(records), Step)

    trained, rest = gj.partition(p.build())
    tx = p.optimizer.build()
    batches = [jax.device_put(feed.batches(p.spans[0]).batch_at(i)) for i in range(TURN)]

    def step(trained, state, rows):
        def loss(trained):
            model = eqx.combine(trained, rest)
            losses, weights = jax.vmap(lambda row: cross_entropy(model, row))(rows)
            return jnp.sum(losses * weights) / jnp.sum(weights)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradient, state, trained, rate=1e-3)
        return optax.apply_updates(trained, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1))
    carry = [jax.tree.map(jnp.copy, trained), tx.init(trained)]

    def bare() -> None:
        late = None
        for rows in batches:
            carry[0], carry[1], loss = jitted(carry[0], carry[1], rows)
            if late is not None:
                float(late)
            late = loss
        jax.block_until_ready(carry)

    seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
    for turn in range(TURNS + 2):
        for name, go in [("trainer", trainer), ("bare", bare)][:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            go()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds["bare"]) / np.array(seconds["trainer"])
    speed = {n: round(TURN * BATCH * LENGTH / float(np.median(s))) for n, s in seconds.items()}
    print(f"tokens per second: {speed}")
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "goal": 0.98,
        "quartiles": np.quantile(ratios, [0.25, 0.75]).round(4).tolist(),
        "tokens_per_second": speed,
    }
