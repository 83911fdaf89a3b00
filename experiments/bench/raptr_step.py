"""Does a training step at 6 of 12 layers cost what a 6-layer model's does? And where is the rest?

Both sides scan the same rematerialised block and run dense AdamW. What a path adds is gathering its
layers, scattering their gradients into zeros, and an optimizer that walks all 12 layers.
"""

import jax
import jax.numpy as jnp

import growjax as gj
from experiments.bench._race import gpt, loss, race, ratio, tokens, trainer


def run() -> dict:
    """Race the path against the true 6-layer model and the full one, then time the parts."""
    batch = tokens()
    path = gj.random_path(6)
    full, short = gpt(12), gpt(6)

    def on_path(model, i):
        return loss(path(model, key=gj.step_key(0, i)), batch)

    def whole(model, i):
        return loss(model, batch)

    trained12, trained6 = gj.partition(full)[0], gj.partition(short)[0]
    layers = trained12.blocks

    @jax.jit
    def gather(blocks, i):
        rows = path.sample(12, gj.step_key(0, i))
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0, mode="clip"), blocks)

    @jax.jit
    def scatter(rows, i):
        index = path.sample(12, gj.step_key(0, i))
        return jax.tree.map(lambda r: jnp.zeros((12, *r.shape[1:])).at[index].set(r), rows)

    rows = gather(layers, 0)
    optimizer = {
        name: trainer(
            model, lambda m, i: sum(jnp.vdot(x, x) for x in jax.tree.leaves(gj.partition(m)[0]))
        )
        for name, model in (("adamw_12", full), ("adamw_6", short))
    }
    del trained6
    times = race(
        {
            "path_6_of_12": trainer(full, on_path),
            "true_6": trainer(short, whole),
            "full_12": trainer(full, whole),
        }
    )
    parts = race(
        {"gather": lambda: gather(layers, 1), "scatter": lambda: scatter(rows, 1), **optimizer}, 20
    )
    middle, low, high = ratio(times["path_6_of_12"], times["true_6"])
    whole_ratio = ratio(times["full_12"], times["true_6"])[0]
    milliseconds = {name: round(float(jnp.median(t)), 2) for name, t in {**times, **parts}.items()}
    print(f"6 of 12 layers over a true 6-layer model: {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"12 layers over 6: {whole_ratio:.3f}")
    print("milliseconds:", milliseconds)
    extra = milliseconds["adamw_12"] - milliseconds["adamw_6"]
    print(
        f"the rest: gather {milliseconds['gather']}, scatter {milliseconds['scatter']}, "
        f"optimizer of the other six layers {extra:.2f}"
    )
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "goal": 1.08,
        "full_over_six": whole_ratio,
        "share_of_ideal_saving": (whole_ratio - middle) / (whole_ratio - 1),
        "milliseconds": milliseconds,
    }
