"""What do open gates cost in a training step? And is nothing of them left after `settle`?"""

import equinox as eqx
import jax
import jax.numpy as jnp

import growjax as gj
from experiments.bench._race import gpt, loss, medians, race, ratio, tokens, trainer
from growjax.models import GPT, GPTConfig


def run() -> dict:
    """Race a step with every gate half open against the same model settled."""
    batch = tokens()
    config = GPTConfig(
        layers=4, embed=192, heads=3, head_dim=64, mlp=512, vocab=1024, positions=128
    )
    small = eqx.filter_jit(GPT)(config, key=jax.random.key(0))
    grown = gj.grow(gj.msg(layers=6, embed=256, heads=4, mlp=1024), small, key=jax.random.key(1))
    settled = gj.settle(gj.ramp(grown, 1.0))

    def gated(model, i):
        return loss(gj.ramp(model, jnp.minimum(i / 1000, 1.0)), batch)

    def plain(model, i):
        return loss(model, batch)

    times = race({"gated": trainer(grown, gated), "plain": trainer(settled, plain)})
    slower = ratio(times["gated"], times["plain"])

    def program(model):
        arrays, static = eqx.partition(model, eqx.is_array)
        return jax.jit(lambda a: loss(eqx.combine(a, static), batch)).lower(arrays).as_text()

    same = program(settled) == program(gpt(6))
    print(f"gated step over plain step: {slower}")
    print(f"program after settle is that of a model never grown: {same}")
    return {
        **slower,
        "goal": 1.03,
        "settled_program_is_the_plain_one": same,
        "milliseconds": medians(times),
    }
