# %% [markdown]
# # RaPTr in your own loop
#
# [RaPTr](https://arxiv.org/abs/2402.05913) trains a random path through the layers of the full model, and lengthens the
# path in stages. In a loop of your own that is one more line: a sub-network is a function of a model and a key.
# Growth, averages and checkpoints in such a loop are on the page [in your own loop](../own-loop.md).

# %%
import pydoc_data.topics

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import growjax as gj

LENGTH, BATCH, LAYERS = 32, 16, 6
text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8)


def batch(step):
    """Rows of one byte more than the model reads: the same for the same step."""
    starts = np.random.default_rng(step).integers(0, len(text) - LENGTH - 1, BATCH)
    return jnp.asarray(text[starts[:, None] + np.arange(LENGTH + 1)], jnp.int32)


config = gj.models.GPTConfig(
    layers=LAYERS, embed=32, heads=2, head_dim=16, mlp=64, vocab=256, positions=LENGTH
)
trained, rest = gj.partition(gj.models.GPT(config, key=jax.random.key(0)))
tx = optax.adam(5e-3)
opt_state = tx.init(trained)

# %% [markdown]
# ## A step on a path
#
# The key follows from the step, so a run that starts again draws what it would have drawn. Layers that are not on
# the path have a gradient of 0; the step returns its norm for every layer, to look at later. Each length is one program.


# %%
def step_on(path):
    @jax.jit
    def step(trained, opt_state, rows, key):
        def loss(trained):
            model = path(eqx.combine(trained, rest), key=key)
            logits = jax.vmap(model)(rows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(trained)
        squares = [jnp.sum(g**2, axis=range(1, g.ndim)) for g in jax.tree.leaves(gradient.blocks)]
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value, sum(squares) ** 0.5

    return step


# %% [markdown]
# ## Three stages
#
# Paths of 3, then 4, then all 6 layers; the first and the last layer always run.

# %%
losses, norms, now = [], [], 0
for length, steps in ((3, 40), (4, 40), (6, 40)):
    step = step_on(gj.random_path(length))
    for _ in range(steps):
        key = jax.random.fold_in(jax.random.key(1), now)
        trained, opt_state, loss, norm = step(trained, opt_state, batch(now), key)
        losses.append(float(loss))
        norms.append(norm)
        now += 1
    print(f"paths of {length}: loss {np.mean(losses[-10:]):.2f}")

# %%
figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 4.2), layout="constrained")
above.plot(losses)
above.set(ylabel="loss of the path")
ran = np.array(norms).T > 0
below.imshow(ran, aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
below.set(xlabel="step", ylabel="layer", yticks=range(LAYERS))
plt.show()

# %% [markdown]
# Blue is a layer that ran. The counts are those that were asked for, at every step:

# %%
assert [set(ran[:, start : start + 40].sum(axis=0).tolist()) for start in (0, 40, 80)] == [
    {3},
    {4},
    {6},
]

# %% [markdown]
# ## A path for each example
#
# With a key for each row, every row takes a path of its own, in one program. The mean over paths has less noise, and a
# step costs more memory: the weights of each row's layers are gathered.

# %%
path = gj.random_path(3)


@jax.jit
def loss_by_example(trained, rows, key):
    model, keys = eqx.combine(trained, rest), jax.random.split(key, len(rows))
    logits = jax.vmap(lambda row, key: path(model, key=key)(row))(rows[:, :-1], keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


draws = [float(loss_by_example(trained, batch(0), jax.random.key(n))) for n in range(8)]
print(
    f"loss on paths of 3, a path for each row: {np.mean(draws):.3f}, between draws +-{np.std(draws):.3f}"
)

# %% [markdown]
# `gj.path_schedule` makes the lengths of a whole run as RaPTr's paper has them, and a
# [plan](../training.md) trains by it: `Stage(subnet=gj.path_schedule(...))`.
