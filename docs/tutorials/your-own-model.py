# %% [markdown]
# # Your own model, with `gj.infer`
#
# A model that knows nothing of growjax: `gj.infer` traces it, finds its axes, and returns an annotation that every
# operator takes. What can and cannot be found is on the page about [such models](../infer.md).

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import growjax as gj


class Mixer(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width, hidden, key):
        one, two = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, hidden, key=one)
        self.down = eqx.nn.Linear(hidden, width, key=two)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Regressor(eqx.Module):
    embed: eqx.nn.Linear
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, width=8, hidden=12, layers=2):
        one, two, three = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(2, width, key=one)
        self.blocks = [Mixer(width, hidden, k) for k in jax.random.split(two, layers)]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, 1, key=three)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[0]


# %% [markdown]
# ## Find its axes
#
# Nothing of the model is computed for this. The result is called like the model; what is printed is the call of
# `gj.annotate` that makes the same annotation, to be pasted and changed.

# %%
points = jax.random.uniform(jax.random.key(1), (256, 2), minval=-2, maxval=2)
values = jnp.sin(3 * points[:, 0]) * jnp.cos(2 * points[:, 1])

model = gj.infer(Regressor(jax.random.key(0)), points)
print(model)

# %% [markdown]
# ## Train it
#
# `gj.State` holds the model and the optimizer's state, so that one call grows both.

# %%
tx = optax.adam(5e-3)


def mean_loss(model):
    return jnp.mean((jax.vmap(model)(points) - values) ** 2)


@eqx.filter_jit
def step(state):
    trained, rest = gj.partition(state.model)
    loss, gradient = jax.value_and_grad(lambda t: mean_loss(eqx.combine(t, rest)))(trained)
    updates, opt_state = tx.update(gradient, state.opt_state, trained)
    model = eqx.combine(optax.apply_updates(trained, updates), rest)
    return gj.State(model, opt_state, births=state.births), loss


def run(state, steps=200):
    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return state, losses


state, losses = run(gj.State(model, tx.init(gj.partition(model)[0])))

# %% [markdown]
# ## Grow it
#
# Three times the hidden units, and twice the blocks, whose copies are closed until training opens them. The certificate
# compares the outputs before and after, and the moments of Adam come along.

# %%
op = gj.chain(gj.copy(mlp=36, shares="random"), gj.stack(layers=4, branch="zero"))
print(gj.certify(op, state.model, points[:8], key=jax.random.key(2)))
grown = gj.grow(op, state, optimizer=tx, key=jax.random.key(2))
before, after = mean_loss(state.model), mean_loss(grown.model)
print(f"loss {before:.5f} before, {after:.5f} after")
assert jnp.allclose(before, after, rtol=1e-4)

# %%
stayed, more = run(state)[1], run(grown)[1]

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.semilogy(losses, color="C0", label="small")
axes.semilogy(range(200, 400), stayed, color="C0", linestyle=":", label="stays small")
axes.semilogy(range(200, 400), more, color="C1", label="grown at step 200")
axes.set(xlabel="step", ylabel="mean squared error")
axes.legend(frameon=False)
plt.show()
