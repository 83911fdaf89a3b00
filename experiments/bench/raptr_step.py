"""Does a training step at 6 of 12 layers cost what a 6-layer model's does? And where is the rest?

Both sides scan the same rematerialised block and run dense AdamW. What a path adds is gathering its
layers, scattering their gradients into zeros, and an optimizer that walks all 12 layers.
"""

import jax
import jax.numpy as jnp

import growjax as gj
from experiments.bench._race import gpt, loss, medians, race, ratio, tokens, trainer


def run() -> dict:
    """Race the path against the true 6-layer model and the full one, then time the parts."""
    batch = tokens()
    path = gj.random_path(6)
    full, short = gpt(12), gpt(6)

    def on_path(model, i):
        return loss(path(model, key=gj.step_key(0, i)), batch)

    def whole(model, i):
        return loss(model, batch)

    layers = gj.partition(full)[0].blocks

    @jax.jit
    def gather(blocks, i):
        rows = path.sample(12, key=gj.step_key(0, i))
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0, mode="clip"), blocks)

    @jax.jit
    def scatter(rows, i):
        index = path.sample(12, key=gj.step_key(0, i))
        return jax.tree.map(lambda r: jnp.zeros((12, *r.shape[1:])).at[index].set(r), rows)

    def norm(model, i):
        return sum(jnp.vdot(x, x) for x in jax.tree.leaves(gj.partition(model)[0]))

    rows = gather(layers, 0)
    times = race(
        {
            "path_6_of_12": trainer(full, on_path),
            "true_6": trainer(short, whole),
            "full_12": trainer(full, whole),
        }
    )
    parts = race(
        {
            "gather": lambda: gather(layers, 1),
            "scatter": lambda: scatter(rows, 1),
            "adamw_12": trainer(full, norm),
            "adamw_6": trainer(short, norm),
        }
    )
    ratios = ratio(times["path_6_of_12"], times["true_6"])
    whole_ratio = ratio(times["full_12"], times["true_6"])["ratio"]
    ms = medians(times) | medians(parts)
    rest = {
        "gather": ms["gather"],
        "scatter": ms["scatter"],
        "optimizer_of_the_other_layers": round(ms["adamw_12"] - ms["adamw_6"], 2),
    }
    print(f"6 of 12 layers over a true 6-layer model: {ratios}")
    print(f"12 layers over 6: {whole_ratio:.3f}")
    print(f"what a path adds, alone, in milliseconds: {rest}")
    return {
        **ratios,
        "goal": 1.03,
        "full_over_six": whole_ratio,
        "share_of_ideal_saving": round((whole_ratio - ratios["ratio"]) / (whole_ratio - 1), 3),
        "milliseconds": ms,
        "rest": rest,
        "ratio_that_the_rest_explains": round(1 + sum(rest.values()) / ms["true_6"], 4),
    }
